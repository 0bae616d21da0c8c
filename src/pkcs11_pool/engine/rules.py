"""Who may start, who may wait for it, and who is refused at once.

Pure: decides by what keeps jobs back and by what sessions there are, and changes
nothing. Called under the engine's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.engine.mode import Pause
from pkcs11_pool.errors import (
    PoolClosed,
    TokenUnavailable,
    TooManyWaiting,
    WouldDeadlock,
)
from pkcs11_pool.jobs import Job, Kind
from pkcs11_pool.state import PoolState

if TYPE_CHECKING:
    from collections.abc import Hashable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.engine.mode import Mode
    from pkcs11_pool.engine.room import SessionRoom

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_LANE: Final = Kind.LANE
_NOT: Final = Pause.NOT
_ALL: Final = Pause.ALL
_WHY_CLOSED: Final = {
    PoolState.NEW: "the pool is not open: use `async with pool:`",
    PoolState.OPENING: "the pool is not open yet",
}
NO_WAIT: Final = "timeout=0, and it would have to wait"


class Rules:
    """The rules of one engine."""

    def __init__(self, options: PoolOptions, mode: Mode, room: SessionRoom) -> None:
        self._options = options
        self._mode = mode
        self._room = room

    # -- Who may start ------------------------------------------------------------

    def can_start(self, job: Job) -> bool:
        """Whether a job at the head of its line may start now."""
        mode = self._mode
        if mode.usual:
            return job.kind is _LANE or self._room.allows(job)
        pause = mode.pause
        if pause is _ALL:
            if mode.outage is not None:
                # His session is the login's own, and the actor looks at it.
                return False
            return job.lane is not None and job.lane is mode.so_lane
        if mode.login_awaited and not job.restart and not job.stays:
            return False
        if job.kind is _LANE:
            return pause is _NOT or not self._is_stopped(job)
        goes = pause is _NOT or self.is_awaited(job)
        return goes and self._room.allows(job)

    def is_awaited(self, job: Job) -> bool:
        """Whether the officer waits for its caller, who holds a session.

        If the caller waited for the officer, too, neither would come to his end.
        """
        return (
            self._mode.pause is Pause.NEW
            and job.holder is not None
            and self._room.is_held_by(job.holder)
        )

    def _is_stopped(self, job: Job) -> bool:
        """Whether a part of a chain must not start: it would keep the officer out.

        Not while he waits for a session in somebody's hands, who may need the chain to
        come to his end.
        """
        if not job.lane.lone or job.stays:
            return False
        return not (self._room.lent_out or self._room.leasing)

    # -- Who may wait -------------------------------------------------------------

    def check_open(self) -> None:
        """Refuse a pool that takes no jobs.

        Raises:
            PoolClosed: It is not open.
            TokenUnavailable: No call returns any more, or the token is down for longer
                than callers wait.
        """
        mode = self._mode
        if mode.state not in (PoolState.READY, PoolState.RECOVERING):
            raise PoolClosed(_WHY_CLOSED.get(mode.state, "the pool is closed"))
        if mode.stuck > self._options.max_sessions:
            raise TokenUnavailable(
                f"{mode.stuck} calls hang in the module and none returns: only a new "
                "process can help"
            )
        if mode.outage is not None and mode.outage.over:
            raise mode.outage.unavailable()

    def check_wait(self, job: Job, waiting: int) -> None:
        """Refuse a job that must not wait, while so many others do.

        Raises:
            TooManyWaiting, WouldDeadlock: See there.
        """
        most = self._options.max_waiting
        goes_on = job.chain is not None and job.chain.begun
        if most is not None and not goes_on and waiting >= most:
            raise TooManyWaiting(f"{most} callers wait already (max_waiting)")
        if job.lane is None and job.holder is not None:
            self._check_deadlock(job)
        elif job.lane is not None and job.lane.would_deadlock(job):
            raise WouldDeadlock(
                "this task is in the middle of an operation on data in parts in this "
                "session: finish that first, or await its aclose()"
            )

    def check_officer(self, job: Job) -> None:
        """Refuse what waits for the end of the period to him whose period it is.

        Raises:
            WouldDeadlock: He would wait for himself.
        """
        so = self._mode.so_lane
        if so is not None and job.holder is not None and so.holder == job.holder:
            raise WouldDeadlock(
                "this task is the security officer: use so.session, or leave the "
                "period first"
            )

    def _check_deadlock(self, job: Job) -> None:
        room = self._room
        self.check_officer(job)
        mine = (
            lease.holder == job.holder for lease in room.leases if not lease.closing
        )
        if not any(mine):
            return
        lendable = room.most_leases if job.kind is Kind.LEASE else room.limit.total
        if len(room.leases) >= max(1, lendable):
            raise WouldDeadlock(
                f"of {room.limit.total} sessions all that can be lent are lent "
                f"({len(room.leases)}), one of them to this task: use key.on(session), "
                "or give the session back first"
            )

    def holds_lease(self, holder: Hashable) -> bool:
        """Whether this task or thread has a session of the pool."""
        so = self._mode.so_lane
        officer = so is not None and so.holder == holder
        return officer or self._room.is_held_by(holder)

    def why_waiting(self, running: int, waiting: int) -> str:
        """Why a job still waited when its deadline passed."""
        room, outage = self._room, self._mode.outage
        if outage is not None:
            return (
                "the deadline passed while the token was down "
                f"({rv.text_of(outage.error)}): nothing was sent"
            )
        return (
            f"the deadline passed while waiting (max_sessions={room.limit.total}, "
            f"{len(room.leases)} lent, {running} calls under way, {waiting} more "
            "wait): give it more time, or the pool more sessions"
        )
