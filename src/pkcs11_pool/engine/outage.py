"""What becomes of jobs when the token or its sessions are lost, and come back.

A layer of the engine, on :class:`~pkcs11_pool.engine.leasing.Leasing`. Workers come
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
from pkcs11_pool.engine.dispatch import IDLE, Pause
from pkcs11_pool.engine.leasing import Leasing
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
    from pkcs11_pool.login.actor import LoginActor

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


class _Outage:
    """One time that nothing may start.

    Attributes:
        since: When it began.
        until: How long callers wait.
        error: How the token is down.
        over: Whether they have waited too long.
        before: What might start before it began.
    """

    def __init__(self, error: BaseException, limit: float, before: Pause) -> None:
        self.since = time.monotonic()
        self.until = self.since + limit
        self.error = error
        self.over = False
        self.before = before


class Outages(Leasing):
    """Jobs that failed, and lost tokens."""

    actor: LoginActor

    def __init__(self, options: PoolOptions) -> None:
        super().__init__(options)
        self._outage: _Outage | None = None
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
        made = isinstance(error, OutcomeUnknown)
        if (
            fault in (Fault.LOGIN, Fault.HANDLE)
            and not made
            and self._without_login(job, session)
        ):
            return None
        return error

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

    def _without_login(self, job: Job, session: Session) -> bool:
        """Whether a job starts anew because it found no login.

        A login that was lost shows as an error of the operation.
        """
        login = self.actor.login
        if login.state is LoginState.SO:
            return False
        # Where no login is asked for, what a session tells of it means nothing.
        told = not self.options.login_ignored and _is_logged_out(session)
        if login.state is LoginState.USER and not told:
            # Looked at anew: while the token was asked, a login that was lost may have
            # been restored. The job started under the one before, then.
            login = self.actor.login
            if login.state is LoginState.USER:
                return session.epoch != login.epoch and self._again(job, wait=False)
        if login.state is LoginState.PUBLIC and login.wanted is LoginState.PUBLIC:
            return False
        again = self._again(job, wait=True)
        self.actor.need_login(login.epoch)
        return again

    def _again(self, job: Job, *, wait: bool) -> bool:
        """Start a job again, at once or when the login is there; whether it may be."""
        with self._lock:
            # Whatever becomes of this one: others would find the login lost, too.
            self._login_awaited |= wait
            self._quiet.notify_all()
            job.attempts += 1
            if not (job.restart or job.repeats) or job.attempts >= _ATTEMPTS:
                return False
            if job.lane is not None and job.lane.closing:
                # Who was in its line has been told: nobody would look there again.
                return False
            if not self._let_go_locked(job):
                return False
            if wait:
                self._parked.append(job)
                self._send_one_locked()
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
                token=self.actor.known.label,
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
        self._resting[job] = until
        self._quiet.notify_all()
        timekeeper.call_at(self._alarm, until)
        return rest

    def rested(self, now: float) -> float:
        """Called by the timekeeper: start who has rested; when to come again."""
        with self._lock:
            for job in [job for job, until in self._resting.items() if until <= now]:
                del self._resting[job]
                self._lines.insert(job)
            self._wake_many_locked()
            return min(self._resting.values(), default=float("inf"))

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
        if self._stuck and self._module.is_blocked:
            # Nothing goes in any more, until that call is back: nobody waits too long.
            self.doubt(TokenUnavailable(blocked(self._module)))

    def hold_off(self, error: BaseException) -> bool:
        """Let nothing start, for the token may be lost; False if that is known."""
        with self._lock:
            if self.state is not PoolState.READY:
                return False
            self.state = PoolState.RECOVERING
            limit = self.options.recovery_timeout
            self._outage = outage = _Outage(error, limit, self._pause)
            self._pause = Pause.ALL
            wake = self._refuse_nowait_locked()
        timekeeper.call_at(self._clock, outage.until)
        self._wake_all(wake)
        return True

    def is_held_off(self) -> bool:
        """Whether nothing starts, because the token is or may be lost."""
        with self._lock:
            return self._outage is not None

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
                lambda: not self._busy and not self._tidying, left
            )

    def token_lost(self, cause: BaseException) -> list[Session]:
        """What is open is no more; the sessions, to be closed by whoever calls."""
        with self._lock:
            sessions = self._room.take_ahead()
            lanes = list(self._room.leases)
            if self._so_lane is not None:
                lanes.append(self._so_lane)
            wake: list[Job] = []
            for lane in lanes:
                wake += self._lose_lane_locked(lane, cause)
                if not any(w.job and w.job.lane is lane for w in self._workers):
                    sessions.append(lane.session)
                # Else its worker closes it, when the call inside is back.
            self._so_lane = None
            if self._outage is not None:
                # A period of the security officer, or the wait for one, is over.
                self._outage.before = Pause.NOT
        self._wake_all(wake)
        return sessions

    def _lose_lane_locked(self, lane: Lease, cause: BaseException) -> list[Job]:
        """A session in somebody's hands is no more; who must be woken."""
        lone = lane.lone or isinstance(cause, StreamInterrupted)
        lane.lose(_cut(cause) if lone else cause)
        lane.owner.gone = True
        wake = self._refuse_lane_locked(lane) + self._refuse_users_locked(lane)
        for job in [*self._lines, *self._parked]:
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
            self._tidying += bool(close)
        if close:
            with self._module.turn:
                for session in close:
                    session.close()
                    with self._lock:
                        self._room.closed(rw=False)
                        self._wake_for_next_locked()
            with self._lock:
                self._tidying -= 1
                self._quiet.notify_all()

    def close_spare(self, worker: Thread) -> bool:
        """Close them while the pool is idle and well; whether there was any.

        It is work like any other: the worker is busy and not among the idle, so that
        whoever wants quiet waits for it, and a call that hangs is given up on.
        """
        with self._lock:
            well = self._outage is None and self._pause is Pause.NOT
            spare = well and self._room.ahead and self._is_idle_locked()
            # Another thread may have woken it just now.
            if not spare or worker not in self._idle:
                return False
            self._idle.remove(worker)
            worker.busy = True
            self._busy += 1
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
        if self._room.ahead and not self._running:
            worker.counted, worker.done = False, time.monotonic()
            return self._room.ahead.popleft()
        worker.busy = False
        self._busy -= 1
        self._quiet.notify_all()
        return None

    def _is_idle_locked(self) -> bool:
        return not self._busy and time.monotonic() - self._last_work >= IDLE

    def still_down(self, error: BaseException) -> None:
        """One more try was in vain: what to tell those who wait too long."""
        with self._lock:
            if self._outage is not None:
                self._outage.error = error

    def token_back(self, *, lost: bool) -> None:
        """All is well, and jobs start again; whether anything had been lost."""
        if not lost:
            # The anchor is well, but others may be among those that are not.
            self.close_ahead()
        with self._lock:
            outage, self._outage = self._outage, None
            if self.state is not PoolState.RECOVERING or outage is None:
                return
            self.state = PoolState.READY
            self._pause = outage.before
            if lost:
                # They look for the login themselves.
                parked, self._parked = self._parked, []
                for job in parked:
                    self._lines.insert(job)
                self._login_awaited = False
            self._wake_many_locked()
        timekeeper.forget(self._clock)

    # -- Callers who wait too long ------------------------------------------------

    def outage_due(self, now: float) -> float:
        """Called by the timekeeper: refuse those who have waited long enough."""
        with self._lock:
            outage = self._outage
            if outage is None or outage.over:
                return float("inf")
            if now < outage.until:
                return outage.until
            outage.over = True
            wake = self._refuse_all_locked(self._unavailable)
        self._wake_all(wake)
        events.warning(
            events.RECOVERY_TIMED_OUT,
            error=rv.text_of(outage.error),
            seconds=round(now - outage.since, 1),
        )
        return float("inf")

    def _refuse_late_locked(self, job: Job) -> None:
        """A job waits again: refuse it, where all others have been refused already."""
        if self._outage is None or not self._outage.over:
            return
        self._take_out_locked(job)
        if self._settle_locked(job, None, self._unavailable()):
            job.waiter.wake()

    def _unavailable(self) -> TokenUnavailable:
        outage = self._outage
        assert outage is not None  # noqa: S101  # whoever calls has looked
        down = time.monotonic() - outage.since
        error = TokenUnavailable(
            f"the token is down since {down:.1f} s: {rv.text_of(outage.error)}. The "
            "pool goes on trying, and refuses all calls until it is back"
        )
        error.__cause__ = outage.error
        return error

    def _check_open_locked(self) -> None:
        super()._check_open_locked()
        if self._outage is not None and self._outage.over:
            raise self._unavailable()

    def _why_waiting_locked(self) -> str:
        if self._outage is None:
            return super()._why_waiting_locked()
        return (
            "the deadline passed while the token was down "
            f"({rv.text_of(self._outage.error)}): nothing was sent"
        )


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
