"""What happens when time is up: deadlines, and calls that do not return.

A layer of the engine, on :class:`~pkcs11_pool.engine.leasing.Leasing`. The timekeeper
comes here.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final

from pkcs11_pool import events
from pkcs11_pool.engine.leasing import Leasing
from pkcs11_pool.errors import PoolTimeout
from pkcs11_pool.jobs import Change, Job, Kind, Phase

if TYPE_CHECKING:
    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.jobs import Thread
    from pkcs11_pool.login.actor import LoginActor

BEHIND: Final = 2.0
"""Seconds that a worker has for closing and opening behind its caller, before those
who wait for it in vain have it given up on."""
_INSIDE: Final = "while the call was inside the module: it may have happened"
_ASKING: Final = (
    "while the PIN source was asked, or the call was inside the module: it may yet "
    "happen"
)


class Overdue(Leasing):
    """Jobs whose deadline has passed, and workers that were given up on."""

    actor: LoginActor

    def __init__(self, options: PoolOptions) -> None:
        super().__init__(options)
        # Calls given up on that the log has not been told of.
        self._lost_news: deque[int] = deque()

    # -- Deadlines ----------------------------------------------------------------

    def sweep(self, now: float) -> float:
        """Called by the timekeeper: do what is due, and say when to come again.

        Those whose deadline has passed get ``PoolTimeout``; results that are held back
        for too long are told; and whatever was put off is looked at.
        """
        staff = self._staff
        with self._lock:
            due = self._deadlines.due(now)
            wake = [job for job in due if self._expire_locked(job, now)]
            held = self._held.take()
            again = self._deadlines.next()
            if self._lull.is_due(now) and staff.idle:
                self._lull.wanted = True
                staff.idle.pop().wake()
            limit = self._room.limit
            if limit.retry(now) or staff.looked_after:
                staff.looked_after = False
                self._wake_many_locked()
            if limit.retry_at is not None:
                again = min(again, limit.retry_at)
            again = min(
                again,
                staff.next_look(now),
                self._lull.next(),
                self._give_up_overdue_locked(now),
            )
        self._wake_all(wake)
        for waiter in held:
            waiter.wake()
        self._tell_lost()
        return again

    def _expire_locked(self, job: Job, now: float) -> bool:
        """A deadline has passed; whether somebody must be woken."""
        if job.phase is Phase.WAITING:
            if not job.stays:
                self._take_out_locked(job)
                self._give_up_behind_locked(now)
                # A request to the actor waits for no session; nor does a chain, that
                # is watched between its parts and never was in line.
                if job.kind is not Kind.ACTOR and job.since:
                    job.wait_seconds = now - job.since
                    self._tally.waits.add(job.wait_seconds)
            why = self._rules.why_waiting(self._staff.running, len(self._waiting))
            error = PoolTimeout(why, "waiting")
        else:
            where = _ASKING if job.kind is Kind.ACTOR else _INSIDE
            text = f"the deadline passed {where}"
            if isinstance(job.changes, Change):
                text = f"{job.changes.call}: {text}. {job.changes.look}"
            error = PoolTimeout(text, "running")
            if job.kind is not Kind.ACTOR:
                self._write_off_locked(job, error)
                self._tally.ran(job, now - job.since)
        if not self._settle_locked(job, None, error):
            return False
        self._tally.counters.operations_timed_out += job.is_operation
        return True

    # -- Calls that do not return -------------------------------------------------

    def _write_off_locked(self, job: Job, cause: BaseException) -> None:
        """Give up on a call that is inside the module: thread and session are lost."""
        worker = job.worker
        if worker is None or worker.job is not job:
            return
        self._staff.running -= 1
        if job.lane is not None:
            job.lane.lose(cause)
            job.lane.owner.gone = True
            self._room.returned(job.lane)
            self._wake_all(self._refuse_lane_locked(job.lane))
        self._room.leasing -= job.kind is Kind.LEASE
        self._lose_worker_locked(worker)

    def _give_up_behind_locked(self, now: float) -> None:
        """A deadline passed in line: look for those who hang behind their callers.

        Nobody's deadline passes inside ``C_CloseSession`` or the ``C_OpenSession`` of
        a session ahead. Where a module takes turns nothing is won: who has the turn
        keeps it, and all others only wait for it.
        """
        behind = [
            worker
            for worker in self._staff.workers
            if worker.busy and worker.job is None and now - worker.done > BEHIND
        ]
        if behind and not self._module.turn.serialized:
            for worker in behind:
                self._lose_worker_locked(worker)

    def _give_up_overdue_locked(self, now: float) -> float:
        """The same for those that nobody waits for, which have as long as any call.

        The timekeeper is there no later than at the deadline of the job before.
        """
        most, again = self.options.timeout, math.inf
        if most is None:
            return again
        most = max(most, BEHIND)
        for worker in [w for w in self._staff.workers if w.busy and w.job is None]:
            if self._module.turn.serialized:
                break
            if worker.done + most > now:
                again = min(again, worker.done + most)
            else:
                self._lose_worker_locked(worker)
        return again

    def _lose_worker_locked(self, worker: Thread) -> None:
        worker.lost = True
        self._tally.counters.sessions_opened_total += worker.opened
        self._awake.ended(worker)
        self._staff.workers.discard(worker)
        if worker.counted is not None:
            self._room.closed(rw=worker.counted)
        self._staff.busy -= 1
        self._mode.stuck += 1
        self._tally.counters.calls_lost += 1
        self._module.lost_calls += 1
        self._lost_news.append(self._mode.stuck)
        self._quiet.notify_all()
        self._wake_for_next_locked()

    def _tell_lost(self) -> None:
        """Log it, without the lock: what writes the log may ask for statistics."""
        while self._lost_news:
            stuck = self._lost_news.popleft()
            events.warning(events.CALL_LOST, token=self.actor.label, stuck=stuck)

    def returned(self, session: Session | None) -> None:
        """A call that was given up on has returned after all."""
        if session is not None:
            # What it made in its session goes with it.
            with self.cache.changing():
                session.close()
        with self._lock:
            self._mode.stuck -= 1
            self._module.lost_calls -= 1
            self._quiet.notify_all()
        token, stuck = self.actor.label, self._mode.stuck
        events.info(events.CALL_RETURNED, token=token, stuck=stuck)
