"""Everybody who waits, wherever: in line, behind a lease, for the login, at rest.

Called under the engine's lock. Knows who stands where; whom that lets start is
decided by others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pkcs11_pool.jobs import Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11_pool.engine.lines import Lines
    from pkcs11_pool.engine.room import SessionRoom
    from pkcs11_pool.engine.rules import Rules
    from pkcs11_pool.jobs import Job

_FIRST: Final = 1 << 62
"""Taken from a job's number, it puts it before all that were given one."""


class Waiting:
    """The jobs of one engine that wait for anything.

    Attributes:
        lines: Those that wait for a session or a thread.
        parked: Operations that wait for the login; in no line meanwhile.
        resting: Operations that the token was too busy for, and until when they rest.
        requests: Requests that the actor has.
    """

    def __init__(self, lines: Lines, rules: Rules, room: SessionRoom) -> None:
        self.lines = lines
        self.parked: list[Job] = []
        self.resting: dict[Job, float] = {}
        self.requests: set[Job] = set()
        self._rules = rules
        self._room = room

    def __len__(self) -> int:
        """How many callers wait for a session, a thread or the login."""
        waiting = len(self.lines) + len(self.parked) + len(self.resting)
        for lease in self._room.leases:
            waiting += len(lease.waiting)
        return waiting

    def __iter__(self) -> Iterator[Job]:
        """Those that do not stand behind another job of their lease."""
        return iter([*self.lines, *self.parked, *self.resting])

    def everybody(self) -> list[Job]:
        """All that may be refused, requests to the actor among them."""
        waiting = list(self)
        # A request that waits for quiet must not keep the pool from closing.
        waiting += [
            job for job in self.requests if job.phase is Phase.WAITING and not job.stays
        ]
        waiting += [job for lease in self._room.leases for job in lease.waiting]
        return waiting

    def enqueue(self, job: Job) -> None:
        """Put a new job in its line, or behind the running job of its lease."""
        lines, lane = self.lines, job.lane
        lines.number = job.number = lines.number + 1
        job.phase = Phase.WAITING
        if lane is None and self._rules.is_awaited(job):
            self._put_first(job)
        elif lane is None:
            lines.add(job)
        elif lane.busy or not lane.admit(job):
            lane.waiting.append(job)
        else:
            lane.busy = True
            lines.add(job)

    def take_out(self, job: Job) -> bool:
        """Remove a job from wherever it waits; whether its lease's next one may come.

        That is so where it had the turn among the jobs of its lease.
        """
        self.requests.discard(job)
        lane = job.lane
        if lane is not None and job in lane.waiting:
            lane.waiting.remove(job)
            return False
        if job in self.parked:
            self.parked.remove(job)
        elif self.resting.pop(job, None) is None:
            self.lines.remove(job)
        return lane is not None

    def take_parked(self) -> list[Job]:
        """The login is settled: those that waited for it stand nowhere now."""
        parked, self.parked = self.parked, []
        return parked

    def end_rests(self, now: float) -> float:
        """Put those that have rested back in line; when the next ones have."""
        for job in [job for job, until in self.resting.items() if until <= now]:
            del self.resting[job]
            self.lines.insert(job)
        return min(self.resting.values(), default=float("inf"))

    def let_holders_pass(self) -> None:
        """The officer begins to wait: whom he waits for must not stand in line."""
        for job in [*self.lines]:
            if job.lane is None and self._rules.is_awaited(job):
                self.lines.remove(job)
                self._put_first(job)

    def _put_first(self, job: Job) -> None:
        """Put it before all who must wait for the officer."""
        job.number -= _FIRST
        self.lines.insert(job)
