"""What the workers ask for: the next job, and what becomes of its result.

A layer of the engine, on :class:`~pkcs11_pool.engine.outage.Outages`. Nearly all jobs
are R/O operations of a pool in its usual state. Their way is written out here at full
length, because every step of it counts in each operation; for all other jobs the
layers below decide.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import exceptions as p11

from pkcs11_pool import events
from pkcs11_pool.cryptoki import recovery, rv
from pkcs11_pool.cryptoki.session import Session
from pkcs11_pool.engine.leases import Loan
from pkcs11_pool.engine.outage import Outages
from pkcs11_pool.engine.rules import NO_WAIT
from pkcs11_pool.engine.timekeeper import timekeeper
from pkcs11_pool.errors import LoginRequired, PoolClosed, PoolError, PoolTimeout
from pkcs11_pool.jobs import Job, Kind, Phase
from pkcs11_pool.login.each_session import log_in
from pkcs11_pool.state import LoginState
from pkcs11_pool.stats import Times

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.engine.workers import Worker

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_READ: Final = Kind.READ
_LANE: Final = Kind.LANE
_LEASE: Final = Kind.LEASE
_RUNNING: Final = Phase.RUNNING
_SETTLED: Final = Phase.SETTLED
REST: Final = 2.0
"""Seconds without work in which nobody swaps a token."""
_MANY: Final = 64
"""Sessions that a worker opens before it is looked at them."""


class Work(Outages):
    """Jobs go out to the workers, and results come back."""

    def __init__(self, options: PoolOptions) -> None:
        super().__init__(options)
        # What an odd token needs.
        self._rw_only = options.rw_sessions_only
        self._login_each = options.login_per_session
        #: Seconds after which the token drops an idle session, or None.
        self.max_idle = options.session_max_idle

    # -- The next job -------------------------------------------------------------

    def claim(
        self, worker: Worker, ahead: Session | None
    ) -> tuple[Job, Session | None, Session | None] | None:
        """The next job, with a session opened ahead, or one to close first.

        None: nothing to do; the worker is on the list of the idle then. ``ahead`` is
        the session that it opened behind its last job.
        """
        unwanted: Session | None = None
        with self._lock:
            now = time.monotonic()
            if ahead is not None and not (
                self._mode.usual
                and ahead.epoch == self.actor.login.epoch
                and not worker.lost
            ):
                unwanted = ahead
            else:
                claimed = self._claim_read_locked(
                    worker, ahead, now
                ) or self._claim_any_locked(worker, ahead, now)
                held = self._held
                if not held.waiters or (claimed and not held.is_late(now)):
                    # They go on waiting: this worker goes on working.
                    return claimed
                waiters = held.take()
        if unwanted is not None:
            # The worker counts as busy still: a pause waits for this, too.
            unwanted.close()
            return self.claim(worker, None)
        for waiter in waiters:
            waiter.wake()
        return claimed

    def _claim_read_locked(  # noqa: C901, PLR0912  # written out: a call costs more
        self, worker: Worker, ahead: Session | None, now: float
    ) -> tuple[Job, Session | None, None] | None:
        """The usual case: a worker that is at work takes the next R/O operation.

        As `_claim_any_locked` does for every job, in short. Where it counts for a
        session that it has closed, the next one takes that one's place in the count.
        """
        room, lines = self._room, self._lines
        reads, counted = lines.reads, worker.counted
        if (
            not reads
            or not self._mode.usual
            or lines.others
            or counted
            or worker not in self._awake.at_work
        ):
            return None
        session = ahead
        if room.ahead:
            session = room.ahead.popleft()
            if ahead is not None:
                room.ahead.append(ahead)
            else:
                room.open_all -= counted is not None
        elif ahead is None:
            if room.open_all - (counted is not None) >= room.limit.total:
                return None
            room.open_all += counted is None
        worker.counted = False
        if not worker.busy:
            worker.busy = True
            self._staff.busy += 1
        else:
            if worker.spent is not None:
                self._awake.took(now - worker.since, worker.spent)
            if worker.opened >= _MANY:
                self._opened_locked(worker)
        job = reads.popleft()
        job.wait_seconds = waited = now - job.since
        self._tally.waits.fresh.append(waited)
        if job.waited:
            self._tally.counters.wait_seconds_total += waited
        job.since = worker.since = now
        job.phase = _RUNNING
        job.worker = worker
        worker.job = job
        self._staff.running += 1
        if worker.coming:
            self._awake.came(worker)
            if reads and (room.ahead or room.open_all < room.limit.total):
                # There may be more for whom nobody was woken.
                self._staff.wake_one(now)
        return job, session, None

    def _claim_any_locked(
        self, worker: Worker, ahead: Session | None, now: float
    ) -> tuple[Job, Session | None, Session | None] | None:
        room = self._room
        if ahead is not None:
            room.ahead.append(ahead)
            worker.counted = None
        if worker.lost:
            return None
        if worker.busy:
            self._tidied_locked(worker, now)
        came = worker.coming and self._awake.came(worker)
        found = self._claim_locked(worker, now, came=came)
        if found is None:
            return None
        if found.kind is _LANE:
            return found, found.lane.session, None
        session, victim = room.reserve(found)
        worker.counted = found.rw
        return found, session, victim

    def _tidied_locked(self, worker: Worker, now: float) -> None:
        """A worker has closed what it used."""
        self._lull.last_work = now
        if worker.spent is not None:
            self._awake.took(now - worker.since, worker.spent)
        worker.busy = False
        self._staff.busy -= 1
        if worker.opened:
            self._opened_locked(worker)
        if worker.counted is not None:
            self._room.open_all -= 1
            self._room.open_rw -= worker.counted
            worker.counted = None
        if not self._mode.usual:
            self._quiet.notify_all()

    # -- Sessions -----------------------------------------------------------------

    def _opened_locked(self, worker: Worker) -> None:
        self._tally.counters.sessions_opened_total += worker.opened
        worker.opened = 0

    def open_session(self, worker: Worker, *, rw: bool) -> Session:
        """``C_OpenSession``, for a session that is counted already."""
        actor = self.actor
        module, token = actor.module, actor.token
        if module is None or token is None:
            raise PoolClosed("the pool is not open")
        session = Session(
            module, token, rw=rw or self._rw_only, epoch=actor.login.epoch
        )
        worker.opened += 1
        if self._room.limit.was_refused:
            with self._lock:
                self._room.limit.opened(self._room.open_all)
        if self._login_each and (error := self.not_logged_in(session)):
            session.close()
            raise error
        return session

    def not_logged_in(self, session: Session) -> Exception | None:
        """Why a session has no part in the present login, if it has none.

        Most tokens have one login for all sessions: then there is nothing to do.
        """
        if self._login_each:
            try:
                log_in(self.actor, session)
            except (p11.PKCS11Error, PoolError) as error:
                return error
        return None

    def is_stale(self, job: Job, session: Session) -> bool:
        """Whether a session opened ahead is too old to be used; it is closed then."""
        most = self.max_idle
        if job.lane is not None or most is None:
            return False
        if time.monotonic() - session.opened_at < most / 2:
            return False
        session.close()
        return True

    def session_for(self, worker: Worker, job: Job) -> Session:
        """The same for a job that waits for it; after a rest, on the pool's own token.

        Sessions die with their token, so one that stays open tells of no other. But
        while nothing was done it may have been swapped, and the next session be a
        stranger's: so the token is asked, after that session was opened.

        Raises:
            TokenUnavailable: Another token is in the slot. Nothing was sent to it.
        """
        session = self.open_session(worker, rw=job.rw)
        # As of when it was taken by its worker: that was just now.
        now = job.since
        if now - self._lull.last_work > REST:
            try:
                self.actor.same_token()
            except BaseException:
                session.close()
                raise
            self._lull.last_work = now
        return session

    def no_session(self, worker: Worker, job: Job, error: Exception) -> None:
        """Opening failed: it is the caller's error, or the job waits for another try.

        ``CKR_SESSION_COUNT`` is no error of the caller.
        """
        room, again = self._room, False
        rest: float | None = None
        fault = recovery.classify(error)
        epoch = self.actor.login.epoch
        if fault.tells_of_outage:
            # First of all: the job must not start again at once.
            self.doubt(error)
        close: list[Session] = []
        with self._lock:
            if worker.lost:
                return
            room.closed(rw=job.rw)
            worker.counted = None
            room.leasing -= job.kind is Kind.LEASE
            if fault is recovery.Fault.SESSION_COUNT:
                close = room.take_ahead()
                room.limit.refused(
                    rw=job.rw,
                    open_all=room.open_all,
                    open_rw=room.open_rw,
                    now=time.monotonic(),
                )
                if room.limit.retry_at is not None:
                    timekeeper.call_at(self, room.limit.retry_at)
                again = not job.nowait and self._let_go_locked(job)
                if again:
                    self._lines.insert(job)
            elif recovery.says_busy(error):
                # Nothing was sent for it yet, so it may be anything.
                rest = self._rests_locked(job)
                again = rest is not None
            elif fault.tells_of_outage:
                again = self._not_opened_locked(job)
        self._close_all(close)
        if fault is recovery.Fault.LOGIN and self.options.login_per_session:
            # It was opened, and its own login refused. Without one it tells nothing.
            again = self._again(job, wait=True)
            self.actor.need_login(epoch)
        else:
            self._tell_refused(job, error, rest)
        if not again:
            full = fault is recovery.Fault.SESSION_COUNT
            failure = PoolTimeout(NO_WAIT, "waiting") if full and job.nowait else error
            self.deliver(worker, job, None, failure)

    def _tell_refused(self, job: Job, error: Exception, rest: float | None) -> None:
        """Log that no session was opened, without the lock."""
        if rest is not None:
            self._tell_busy(job, error, rest)
            return
        events.warning(
            events.SESSION_REFUSED,
            token=self.actor.label,
            error=str(error),
            sessions=self._room.limit.total,
            rw_sessions=self._room.limit.rw,
        )

    def _close_all(self, sessions: Iterable[Session]) -> None:
        for session in sessions:
            session.close()

    # -- Results ------------------------------------------------------------------

    def deliver(  # noqa: C901  # written out, too
        self, worker: Worker, job: Job, result: Any, error: BaseException | None
    ) -> bool:
        """Settle a job that ran, and wake its caller; whether to open the next session.

        Before the session is closed: the caller waits for neither.
        """
        if error is not None:
            error = self._explained(error)
        with self._lock:
            if worker.lost:
                return False
            worker.done = now = time.monotonic()
            worker.job = None
            self._staff.running -= 1
            if (
                error is None
                and job.kind is _READ
                and job.phase is _RUNNING
                and not job.dropped
                and job.errand is None
            ):
                # As below, in short.
                settled = True
                done = self._tally.done
                done.append(now - job.since)
                if len(done) >= Times.MANY:
                    self._tally.count()
                if job.tick:
                    self._deadlines.unwatch(job)
                job.phase = _SETTLED
                job.result = result
            else:
                settled = self._ended_locked(worker, job, result, error, now)
            lines, opens = self._lines, False
            # But for those that a worker comes for, who was woken.
            waiting = len(lines.reads) + lines.others - self._awake.coming
            if waiting <= 0:
                # A spare for each busy worker, and one for this one's caller, who may
                # be back sooner than the next is open.
                opens = (
                    self._mode.usual
                    and job.kind is _READ
                    and len(self._room.ahead) <= self._staff.busy
                )
            elif (
                # Each worker has its next one, while the loop makes new ones.
                waiting > len(self._awake.at_work)
                and settled
                and self._held.hold(job, now)
            ):
                return False
            waiters = self._held.waiters
            if waiters:
                self._held.waiters = []
        for waiter in waiters:
            waiter.wake()
        if not settled or not job.waiter.wake():
            self._give_back(result)
        return opens

    def _ended_locked(
        self,
        worker: Worker,
        job: Job,
        result: Any,
        error: BaseException | None,
        now: float,
    ) -> bool:
        """Any job is done, in whichever way; whether there is somebody to wake."""
        duration = now - job.since
        self._tally.counters.run_seconds_total += duration
        self._tally.ran(job, duration)
        if job.kind is _LEASE:
            self._lent_locked(worker, result, error)
        settled = self._settle_locked(job, result, error)
        if job.lane is not None:
            self._next_in_lane_locked(job.lane)
        return settled

    def _explained(self, error: BaseException) -> BaseException:
        """An error with a text that says what to do."""
        error = _login_required(error, self.actor.login.state, self.options)
        if isinstance(error, p11.PKCS11Error):
            rv.explain(error)
        return error

    def _lent_locked(
        self, worker: Worker, result: Any, error: BaseException | None
    ) -> None:
        """The job that opens a lease is done."""
        if isinstance(result, Loan):
            self._room.lent(result.lease)
            worker.counted = None
        elif error is None:
            self._room.leasing -= 1


def _login_required(
    error: BaseException, state: LoginState, options: PoolOptions
) -> BaseException:
    """The pool's own error for a login that is missing, whoever noticed."""
    if isinstance(error, LoginRequired) or not isinstance(error, p11.UserNotLoggedIn):
        return error
    message = "nobody is logged in: await pool.login(pin)"
    if state is LoginState.SO:
        message = "private objects are not for the security officer: end the period"
    elif state is LoginState.USER and options.login_ignored:
        message = "the token asks for a login: take login_ignored=True out, give pin="
    elif state is LoginState.USER and not options.login_per_session:
        message = (
            "the user is logged in, and this session is not: if the token has a login "
            "for each session, set login_per_session=True"
        )
    wrapped = LoginRequired(message)
    wrapped.__cause__ = error
    return wrapped
