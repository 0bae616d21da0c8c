"""What becomes of jobs when the token or its sessions are lost, and come back.

A layer of the engine, on :class:`~pkcs11_pool.engine.overdue.Overdue`. Workers come
here with the errors of their jobs. Where one tells of a lost token, nothing more is
started until the login actor has looked, or has brought the token back; callers
wait meanwhile, and no longer than ``recovery_timeout``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from pkcs11 import exceptions as p11

from pkcs11_pool import events
from pkcs11_pool.cryptoki import recovery, rv
from pkcs11_pool.cryptoki.recovery import Fault
from pkcs11_pool.engine.mode import Outage, Pause
from pkcs11_pool.engine.overdue import Overdue
from pkcs11_pool.engine.timekeeper import timekeeper
from pkcs11_pool.errors import (
    OutcomeUnknown,
    PoolError,
    StreamInterrupted,
    TokenUnavailable,
)
from pkcs11_pool.jobs import Change, Phase
from pkcs11_pool.login.recovering import blocked
from pkcs11_pool.state import LoginState, PoolState, SessionState

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.leases import Lease
    from pkcs11_pool.jobs import Job, Thread

_ATTEMPTS: Final = 3
"""How often a job may start anew: one that breaks the token must not do it for ever."""
_RESTS: Final = (0.05, 0.1, 0.2, 0.4)
"""Seconds that an operation waits at most, each time that the token was too busy."""
_LOGGED_OUT: Final = frozenset(
    {SessionState.RO_PUBLIC_SESSION, SessionState.RW_PUBLIC_SESSION}
)
_LOOK: Final = "Look at the token for what it makes or changes, by its label or id"


class _Clock:
    """One more matter of the engine that the timekeeper comes for."""

    def __init__(self, sweep: Callable[[float], float]) -> None:
        self.sweep = sweep


class Outages(Overdue):
    """Jobs that failed, and lost tokens."""

    def __init__(self, options: PoolOptions) -> None:
        super().__init__(options)
        self._clock = _Clock(self.outage_due)
        self._alarm = _Clock(self.rested)

    # -- Jobs that failed: called by the workers -----------------------------------

    def finished(
        self, job: Job, session: Session, error: Exception
    ) -> Exception | None:
        """Look at an error once; what to raise, or None: the job starts anew.

        What was lost is restored in any case; the operation is made again only if it
        may be.
        """
        fault = recovery.classify(error)
        if fault is Fault.UNSURE:
            # What the session says after an outage tells nothing of a call before it.
            over = session.epoch != self.actor.login.epoch
            fault = Fault.TOKEN if over else _asked(session)
            if fault is Fault.CALLER and self._was_busy(job, session, error):
                return None
        if fault.is_outage:
            return self._cut_off(job, session, error, fault)
        if fault not in (Fault.LOGIN, Fault.HANDLE):
            return error
        once = isinstance(error, OutcomeUnknown)
        return None if self._without_login(job, session, once=once) else error

    def _cut_off(
        self, job: Job, session: Session, error: Exception, fault: Fault
    ) -> Exception | None:
        """A job found its session, the token or the module gone."""
        lane: Lease | None = job.lane
        if lane is not None and fault is Fault.SESSION and not job.stays:
            with self._lock:
                wake = self._lose_lane_locked(lane, error)
            self._wake_all(wake)
        # Whoever closed it himself, or began before the last recovery, tells nothing.
        if session.handle and session.epoch == self.actor.login.epoch:
            self.doubt(error)
        once = isinstance(error, OutcomeUnknown)
        unsent = recovery.is_unsent(error)
        repeats = job.repeats or (job.restart and unsent)
        if not once and repeats and self._again(job, wait=False):
            return None
        # What a caller's function does with its session, he knows himself.
        known = unsent or (fault is Fault.SESSION and not job.restart)
        if job.changes and not known and not isinstance(error, PoolError):
            return self._unknown(job, error)
        if lane is not None and lane.cause is not None and not (job.stays or once):
            return lane.error()
        # What may have happened is worth more than why nothing more can.
        return error

    def _unknown(self, job: Job, error: Exception) -> OutcomeUnknown:
        """What to tell of a call that changes the token and was lost with it."""
        change = job.changes
        if not isinstance(change, Change):
            change = Change("the call", _LOOK)
        token = self.actor.info or self.options.wanted_token
        unknown = OutcomeUnknown(
            f"{change.call} on token {token} was cut off ({rv.text_of(error)}): it may "
            f"have happened. {change.look}"
        )
        unknown.__cause__ = error
        return unknown

    def _without_login(self, job: Job, session: Session, *, once: bool) -> bool:
        """Whether a job starts anew because it found no login; not one made ``once``.

        A login that was lost shows as an error of the operation. It is restored in any
        case: nobody knows when the next operation comes.
        """
        login = self.actor.login
        if login.state is LoginState.SO:
            return False
        # Where no login is asked for, what a session tells of it means nothing.
        ignored = self.options.login_ignored
        if login.state is LoginState.USER and (ignored or not _is_logged_out(session)):
            # Looked at anew: while the token was asked, a login that was lost may have
            # been restored. The job started under the one before, then.
            login = self.actor.login
            if login.state is LoginState.USER:
                before = session.epoch != login.epoch
                return before and not once and self._again(job, wait=False)
        if login.state is LoginState.PUBLIC and login.wanted is LoginState.PUBLIC:
            return False
        again = self._again(job, wait=True, once=once)
        self.actor.need_login(login.epoch)
        return again

    def _again(self, job: Job, *, wait: bool, once: bool = False) -> bool:
        """Start a job again, at once or when the login is there; whether it may be."""
        with self._lock:
            # Whatever becomes of this one: others would find the login lost, too.
            self._mode.login_awaited |= wait
            self._quiet.notify_all()
            job.attempts += 1
            if once or not (job.restart or job.repeats) or job.attempts >= _ATTEMPTS:
                return False
            if job.lane is not None and job.lane.closing:
                # Who was in its line has been told: nobody would look there again.
                return False
            if not self._let_go_locked(job):
                return False
            if wait:
                self._waiting.parked.append(job)
                self._errands.send_one()
            else:
                self._lines.insert(job)
            self._refuse_late_locked(job)
            return True

    def _was_busy(self, job: Job, session: Session, error: Exception) -> bool:
        """Whether the token was too busy, and the job starts again a moment later.

        Only what may happen twice. What a caller's function does is his own.
        """
        if session.lent or job.changes or not job.restart:
            return False
        if not recovery.says_busy(error):
            return False
        with self._lock:
            rest = self._rests_locked(job)
        self._tell_busy(job, error, rest)
        return rest is not None

    def _tell_busy(self, job: Job, error: Exception, rest: float | None) -> None:
        """Log that a job rests, without the lock."""
        if rest is not None:
            events.warning(
                events.OPERATION_THROTTLED,
                token=self.actor.label,
                error=rv.text_of(error),
                rests=job.rests,
                retry_in=round(rest, 3),
            )

    def _rests_locked(self, job: Job) -> float | None:
        """Let a job rest, each time for longer: so many seconds; None: it may not."""
        if job.nowait or job.rests >= len(_RESTS):
            return None
        import random  # noqa: PLC0415  # for a token that is busy

        # Cut at random: those that were refused together must not come back in step.
        rest = _RESTS[job.rests] * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        until = time.monotonic() + rest
        if job.deadline is not None and until >= job.deadline:
            return None
        if not self._let_go_locked(job):
            return None
        job.rests += 1
        self._waiting.resting[job] = until
        self._quiet.notify_all()
        timekeeper.call_at(self._alarm, until)
        return rest

    def rested(self, now: float) -> float:
        """Called by the timekeeper: start who has rested; when to come again."""
        with self._lock:
            again = self._waiting.end_rests(now)
            self._wake_many_locked()
            return again

    def _not_opened_locked(self, job: Job) -> bool:
        """No session for a job, as the token may be lost; whether it waits for one.

        Nothing was sent for it, so it may change the token all the same.
        """
        job.attempts += 1
        if job.attempts >= _ATTEMPTS or not self._let_go_locked(job):
            return False
        self._lines.insert(job)
        self._refuse_late_locked(job)
        return True

    # -- The token is lost, and back ----------------------------------------------

    def doubt(self, error: BaseException) -> None:
        """The token may be lost: nothing starts until the actor has looked."""
        if self.hold_off(error):
            self.actor.suspect(error)

    def _tell_lost(self) -> None:
        super()._tell_lost()
        if self._mode.stuck and self._module.is_blocked:
            # Nothing goes in any more, until that call is back: nobody waits too long.
            self.doubt(TokenUnavailable(blocked(self._module)))

    def hold_off(self, error: BaseException) -> bool:
        """Let nothing start, for the token may be lost; False if that is known."""
        with self._lock:
            mode, limit = self._mode, self.options.recovery_timeout
            if mode.state is not PoolState.READY:
                return False
            mode.state = PoolState.RECOVERING
            mode.outage = outage = Outage(error, limit, mode.pause)
            mode.pause = Pause.ALL
            wake = self._refuse_nowait_locked()
        timekeeper.call_at(self._clock, outage.until)
        self._wake_all(wake)
        return True

    def is_held_off(self) -> bool:
        """Whether nothing starts, because the token is or may be lost."""
        with self._lock:
            return self._mode.outage is not None

    def put_off(self, job: Job) -> bool:
        """A request waits again; False: its caller has gone, or it was tried enough."""
        with self._lock:
            job.attempts += 1
            if job.phase is not Phase.RUNNING or job.attempts >= _ATTEMPTS:
                return False
            job.phase = Phase.WAITING
            self._refuse_late_locked(job)
            return True

    def wait_quiet(self, deadline: float) -> bool:
        """Wait until nothing is inside the module; whether nothing is."""
        with self._lock:
            left = max(0.0, deadline - time.monotonic())
            return self._quiet.wait_for(
                lambda: not self._staff.busy and not self._staff.tidying, left
            )

    def token_lost(self, cause: BaseException) -> list[Session]:
        """What is open is no more; the sessions, to be closed by whoever calls."""
        with self._lock:
            mode, room = self._mode, self._room
            sessions, lanes = room.take_ahead(), list(room.leases)
            if mode.so_lane is not None:
                lanes.append(mode.so_lane)
            wake: list[Job] = []
            for lane in lanes:
                wake += self._lose_lane_locked(lane, cause)
                if not any(w.job and w.job.lane is lane for w in self._staff.workers):
                    sessions.append(lane.session)
                # Else its worker closes it, when the call inside is back.
            mode.so_lane = None
            if mode.outage is not None:
                # A period of the security officer, or the wait for one, is over.
                mode.outage.before = Pause.NOT
        self._wake_all(wake)
        return sessions

    def _lose_lane_locked(self, lane: Lease, cause: BaseException) -> list[Job]:
        """A session in somebody's hands is no more; who must be woken."""
        lone = lane.lone or isinstance(cause, StreamInterrupted)
        lane.lose(_cut(cause) if lone else cause)
        lane.owner.gone = True
        wake = self._refuse_lane_locked(lane) + self._refuse_users_locked(lane)
        for job in [*self._lines, *self._waiting.parked]:
            if job.lane is not lane:
                continue
            self._take_out_locked(job)
            if self._settle_lane_locked(job):
                wake.append(job)
        self._room.returned(lane)
        return wake

    def close_ahead(self) -> None:
        """Close the sessions that were opened ahead. Whoever calls has not the turn."""
        with self._lock:
            close = self._room.take_ahead(counted=True)
            self._staff.tidying += bool(close)
        if close:
            with self._module.turn:
                for session in close:
                    session.close()
                    with self._lock:
                        self._room.closed(rw=False)
                        self._wake_for_next_locked()
            with self._lock:
                self._staff.tidying -= 1
                self._quiet.notify_all()

    def close_spare(self, worker: Thread) -> bool:
        """Close them while the pool is idle and well; whether there was any.

        It is work like any other: the worker is busy and not among the idle, so that
        whoever wants quiet waits for it, and a call that hangs is given up on.
        """
        with self._lock:
            mode, staff = self._mode, self._staff
            well = mode.outage is None and mode.pause is Pause.NOT
            idle = not staff.busy and self._lull.lasts(time.monotonic())
            # Another thread may have woken it just now.
            asleep = worker in staff.idle
            if not (well and idle and asleep and self._room.ahead):
                return False
            staff.idle.remove(worker)
            worker.busy = True
            staff.busy += 1
            session = self._next_spare_locked(worker)
        while session is not None:
            with self._module.turn:
                session.close()
            with self._lock:
                session = self._next_spare_locked(worker)
        return True

    def _next_spare_locked(self, worker: Thread) -> Session | None:
        if worker.lost:
            return None
        if worker.counted is not None:
            self._room.closed(rw=worker.counted)
            worker.counted = None
            self._wake_for_next_locked()
        if self._room.ahead and not self._staff.running:
            worker.counted, worker.done = False, time.monotonic()
            return self._room.ahead.popleft()
        worker.busy = False
        self._staff.busy -= 1
        self._quiet.notify_all()
        return None

    def still_down(self, error: BaseException) -> None:
        """One more try was in vain: what to tell those who wait too long."""
        with self._lock:
            outage = self._mode.outage
            if outage is not None:
                outage.error = error

    def token_back(self, *, lost: bool) -> None:
        """All is well, and jobs start again; whether anything had been lost."""
        if not lost:
            # The anchor is well, but others may be among those that are not.
            self.close_ahead()
        with self._lock:
            mode = self._mode
            outage, mode.outage = mode.outage, None
            if mode.state is not PoolState.RECOVERING or outage is None:
                return
            mode.state = PoolState.READY
            mode.pause = outage.before
            if lost:
                # They look for the login themselves.
                for job in self._waiting.take_parked():
                    self._lines.insert(job)
                mode.login_awaited = False
            self._wake_many_locked()
        timekeeper.forget(self._clock)

    # -- Callers who wait too long ------------------------------------------------

    def outage_due(self, now: float) -> float:
        """Called by the timekeeper: refuse those who have waited long enough."""
        with self._lock:
            outage = self._mode.outage
            if outage is None or outage.over:
                return float("inf")
            if now < outage.until:
                return outage.until
            outage.over = True
            wake = self._refuse_locked(self._waiting.everybody(), outage.unavailable)
        self._wake_all(wake)
        events.warning(
            events.RECOVERY_TIMED_OUT,
            token=self.actor.label,
            error=rv.text_of(outage.error),
            seconds=round(now - outage.since, 1),
        )
        return float("inf")

    def _refuse_late_locked(self, job: Job) -> None:
        """A job waits again: refuse it, where all others have been refused already."""
        outage = self._mode.outage
        if outage is not None and outage.over:
            self._wake_all(self._refuse_locked([job], outage.unavailable))


def _asked(session: Session) -> Fault:
    """Whose trouble it is, by what the token says of the session."""
    try:
        session.info()
    except p11.PKCS11Error as error:
        fault = recovery.classify(error)
        # Not even this is answered: the token serves nobody.
        return Fault.TOKEN if fault is Fault.UNSURE else fault
    except ValueError:
        pass
    return Fault.CALLER


def _is_logged_out(session: Session) -> bool:
    try:
        return session.info().state in _LOGGED_OUT
    except (p11.PKCS11Error, ValueError):
        return False


def _cut(cause: BaseException) -> StreamInterrupted:
    error = StreamInterrupted(
        "the token was lost in the middle of the data: begin again"
    )
    error.__cause__ = cause
    return error
