"""The engine of a pool: threads and one lock, and no event loop.

Jobs go in, results come out through their waiters. What must be decided is
decided under the lock, at once; what blocks happens outside it.

The way of an operation: ``submit`` puts it in a line; a worker takes it, with a
session opened ahead or one that it opens now; the result is posted first, then
the used session is closed and the next one opened, behind the caller's back.

The top layer: on :class:`~pkcs11_pool.engine.outage.Outages`, which is on
:class:`~pkcs11_pool.engine.leasing.Leasing`, which is on
:class:`~pkcs11_pool.engine.dispatch.Dispatch`. It runs workers and serves the actor.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import exceptions as p11

from pkcs11_pool import events
from pkcs11_pool.cryptoki import recovery, rv
from pkcs11_pool.engine.dispatch import IDLE, NO_WAIT, Pause
from pkcs11_pool.engine.leases import Loan
from pkcs11_pool.engine.leasing import NOBODY
from pkcs11_pool.engine.limits import SessionLimit
from pkcs11_pool.engine.outage import Outages
from pkcs11_pool.engine.timekeeper import timekeeper
from pkcs11_pool.engine.workers import Worker
from pkcs11_pool.errors import (
    LoginRequired,
    PoolClosed,
    PoolTimeout,
    StreamInterrupted,
)
from pkcs11_pool.jobs import Job, Kind, Phase
from pkcs11_pool.login.actor import LoginActor
from pkcs11_pool.state import LoginState, PoolState
from pkcs11_pool.stats import Counters, PoolStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.module import Module, Turn
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.leases import Lease
    from pkcs11_pool.pins import Pin, PinCallable

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_READ: Final = Kind.READ
_LANE: Final = Kind.LANE
_LEASE: Final = Kind.LEASE
_NOT: Final = Pause.NOT
_READY: Final = PoolState.READY
_LATE: Final = 0.0005
"""Seconds that a result may wait for others, so that one wake-up serves all."""
_ENOUGH: Final = 4
"""Jobs in line that keep the workers busy while the loop makes new ones."""


class TokenEngine(Outages):
    """Queue, workers, limits and sessions of one token."""

    def __init__(self, options: PoolOptions) -> None:
        super().__init__(options)
        self.actor = LoginActor(options, self, self.cache, options.name)
        # A PIN source that must be awaited, and the caller who was sent for it.
        self._source: PinCallable | None = None
        self._runner: Job | None = None

    @property
    def _module(self) -> Module:
        return self.actor.attached

    @property
    def name(self) -> str:
        """What the pool is called in metrics."""
        options, info = self.options, self.actor.info
        label = options.token_label if info is None else info.label
        return options.name or label or "pkcs11"

    def turn(self) -> Turn:
        """Held around each job where the module takes one call at a time."""
        module = self.actor.module
        assert module is not None  # noqa: S101  # workers come after it
        return module.turn

    # -- Work: called by the workers ----------------------------------------------

    def _start_worker_locked(self) -> Worker:
        worker = Worker(self)
        self._workers.add(worker)
        worker.start()
        return worker

    def claim(
        self, worker: Worker, ahead: Session | None
    ) -> tuple[Job, Session | None, Session | None] | None:
        """The next job, with a session opened ahead, or one to close first.

        None: nothing to do; the worker is on the list of the idle then. ``ahead`` is
        the session that it opened behind its last job.
        """
        with self._lock:
            unwanted = ahead is not None and not self._keep_ahead_locked(worker, ahead)
            claimed = None if unwanted else self._next_locked(worker)
            held = self._held
            if held and claimed is not None and worker.since - self._held_since < _LATE:
                # They go on waiting: this one goes back to work.
                held = []
            elif held:
                self._held = []
        for waiter in held:
            waiter.wake()
        if unwanted and ahead is not None:
            # While the worker still counts as busy: a pause waits for this, too.
            ahead.close()
            return self.claim(worker, None)
        return claimed

    def _keep_ahead_locked(self, worker: Worker, session: Session) -> bool:
        """Whether a session opened behind a job may wait for the next one."""
        wanted = (
            self._pause is _NOT
            and self.state is _READY
            and session.epoch == self.actor.login.epoch
            and not worker.lost
        )
        if wanted:
            self._room.ahead.append(session)
            worker.counted = None
        return wanted

    def _next_locked(
        self, worker: Worker
    ) -> tuple[Job, Session | None, Session | None] | None:
        """A worker is done with its last job, tidying included; its next one."""
        if worker.lost:
            return None
        now = time.monotonic()
        room = self._room
        if worker.busy:
            # It has closed what it used.
            self._last_work = now
            self._awake.took(now - worker.since, worker.spent)
            worker.busy = False
            self._busy -= 1
            if worker.opened:
                self._opened_locked(worker)
            if worker.counted is not None:
                room.closed(rw=worker.counted)
                worker.counted = None
            if self._pause is not _NOT:
                self._quiet.notify_all()
        job = self._claim_locked(worker, now)
        if job is None:
            return None
        if job.kind is _LANE:
            return job, job.lane.session, None
        session, victim = room.reserve(job)
        worker.counted = job.rw
        return job, session, victim

    def _opened_locked(self, worker: Worker) -> None:
        self._counters.sessions_opened_total += worker.opened
        worker.opened = 0
        self._room.limit.opened(self._room.open_all)

    def open_session(self, worker: Worker, *, rw: bool) -> Session:
        """``C_OpenSession``, for a session that is counted already."""
        session = self.actor.new_session(rw=rw)
        worker.opened += 1
        return session

    def no_session(self, worker: Worker, job: Job, error: Exception) -> None:
        """Opening failed: it is the caller's error, or the job waits for another try.

        ``CKR_SESSION_COUNT`` is no error of the caller.
        """
        room, again = self._room, False
        fault = recovery.classify(error)
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
            elif fault.tells_of_outage:
                again = self._not_opened_locked(job)
        self._close_all(close)
        events.warning(
            events.SESSION_REFUSED,
            error=str(error),
            sessions=room.limit.total,
            rw_sessions=room.limit.rw,
        )
        if not again:
            full = fault is recovery.Fault.SESSION_COUNT
            failure = PoolTimeout(NO_WAIT, "waiting") if full and job.nowait else error
            self.deliver(worker, job, None, failure)

    def deliver(
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
            worker.job = None
            self._running -= 1
            now = time.monotonic()
            duration = now - job.since
            self._counters.run_seconds_total += duration
            self._run_times.add(duration, job.is_operation)
            kind = job.kind
            if kind is _LEASE:
                self._lent_locked(worker, result, error)
            if worker.opened:
                self._opened_locked(worker)
            settled = self._settle_locked(job, result, error)
            if job.lane is not None:
                self._next_in_lane_locked(job.lane)
            waiting = len(self._lines.reads) + self._lines.others
            opens = (
                kind is _READ
                and not waiting
                and self._pause is _NOT
                and self.state is _READY
                # A spare for each busy worker.
                and len(self._room.ahead) < self._busy
            )
            if settled and waiting > _ENOUGH and self._hold_locked(job, now):
                return opens
            held = self._held
            if held:
                self._held = []
        for waiter in held:
            waiter.wake()
        if not settled or not job.waiter.wake():
            self._give_back(result)
        return opens

    def _explained(self, error: BaseException) -> BaseException:
        """An error with a text that says what to do."""
        error = _login_required(error, self.actor.login.state)
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

    def _hold_locked(self, job: Job, now: float) -> bool:
        """Whether a result is held back for the next one, which will be there soon.

        While workers have enough to do without its caller, and results come faster
        than one in half a millisecond: then one wake-up of the loop serves several,
        and none is late. Where all workers are inside all the same, the timekeeper
        comes.
        """
        if job.kind is _LEASE or now - self._last_result > _LATE:
            self._last_result = now
            return False
        self._last_result = now
        held = self._held
        if not held:
            self._held_since = now
            self._look_later_locked(now)
        elif now - self._held_since > _LATE:
            return False
        held.append(job.waiter)
        return True

    def look_around(self) -> None:
        """Called by a worker that goes idle; to the point when the timekeeper asks.

        Sessions whose holders are forgotten are closed; spare ones, when all is idle.
        """
        if not self._look_wanted:
            return
        self._look_wanted = False
        self.end_orphans()
        with self._lock:
            if self._busy or time.monotonic() - self._last_work < IDLE:
                return
        self.close_ahead()

    def _close_all(self, sessions: Iterable[Session]) -> None:
        for session in sessions:
            session.close()

    # -- The gate: called by the actor --------------------------------------------

    def request(self, job: Job, post: Callable[[Job], None]) -> None:
        """Hand a request to the actor.

        Raises:
            WouldDeadlock: It waits for the end of a period of the security officer,
                who is the one that asks.
        """
        self.check_process()
        with self._lock:
            if not job.stays:
                self._check_officer_locked(job)
            job.phase = Phase.WAITING
            job.since = time.monotonic()
            self._requests.add(job)
            self._watch_locked(job)
        post(job)

    def begin(self, job: Job) -> bool:
        """The actor starts on a request; False if its caller has gone."""
        with self._lock:
            if job.phase is Phase.WAITING:
                job.phase = Phase.RUNNING
                return True
            return job.stays

    def settle(self, job: Job, result: Any, error: BaseException | None) -> bool:
        """A request is done; whether its caller is still there to hear of it."""
        with self._lock:
            settled = self._settle_locked(job, result, error)
        if settled:
            job.waiter.wake()
        return settled

    def pause(self, job: Job, *, leases: bool) -> bool | None:
        """Let nothing start; wait until nothing is inside; whether it succeeded.

        The request waits meanwhile: its deadline and its cancellation end the pause,
        and nothing has changed. With ``leases``, open sessions go on until they are
        closed: their holders must be able to come to their end. When one of them
        needs the login, the answer is None: restore it and call again.
        """
        room = self._room

        def quiet() -> bool:
            return not self._busy and not (leases and (room.lent_out or room.leasing))

        def news() -> bool:
            lost = leases and self._login_awaited
            return quiet() or job.phase is Phase.SETTLED or lost

        with self._lock:
            if job.nowait and (self._running or room.lent_out or room.leasing):
                # What is only tidied behind its caller's back is no reason.
                self._settle_locked(job, None, PoolTimeout(NO_WAIT, "waiting"))
                job.waiter.wake()
                return False
            if self._pause is Pause.NOT and leases:
                self._pause = Pause.NEW
            before = self._pause if self._outage is None else self._outage.before
            if not leases:
                self._pause = Pause.ALL
            if job.phase is not Phase.SETTLED:
                job.phase = Phase.WAITING
            self._wake_all(self._refuse_nowait_locked())
            self._quiet.wait_for(news)
            if job.phase is Phase.SETTLED:
                self._go_on_locked(Pause.NOT if leases else before)
                return False
            if not quiet():
                return None
            job.phase = Phase.RUNNING
            self._pause = Pause.ALL
            lone = self._take_lone_locked(_cut_off()) if leases else []
        if lone:
            with self._module.turn:
                self._close_all(lone)
        self.close_ahead()
        return True

    def forget(self, job: Job) -> None:
        """The caller is gone without a word, with its loop.

        Called by the garbage collector, on any thread: takes no lock.
        """
        if job.phase is not Phase.SETTLED:
            self.actor.later(partial(self.cancel, job))

    def forget_so_lane(self, lane: Lease) -> None:
        """The security officer is gone without a word, with his loop.

        Called by the garbage collector, on any thread: takes no lock.
        """
        if not self.is_forked:
            self.actor.later(partial(self._end_forgotten, lane))

    def _end_forgotten(self, lane: Lease) -> None:
        self.end_so_lane(lane)
        job = Job(None, Kind.ACTOR, waiter=NOBODY, deadline=None, stays=True)
        self.request(job, self.actor.so_end)

    def login_awaited(self) -> bool:
        """Whether operations wait for a lost login to be restored."""
        with self._lock:
            return self._login_awaited

    def resume(self) -> None:
        """Let jobs start again."""
        with self._lock:
            self._so_lane = None
            self._go_on_locked(Pause.NOT)

    def _go_on_locked(self, pause: Pause) -> None:
        """A pause is over; but while the token is down, nothing starts."""
        if self._outage is not None:
            self._outage.before = pause
            return
        self._pause = pause
        self._wake_many_locked()

    def login_settled(self, error: BaseException | None) -> None:
        """The login that operations wait for succeeded, or failed."""
        wake = []
        with self._lock:
            self._login_awaited = False
            if self._runner is not None:
                # Back from the errand, if still on it.
                self._runner.errand = None
                wake.append(self._runner)
            self._source = self._runner = None
            parked, self._parked = self._parked, []
            for job in parked:
                if error is None:
                    self._lines.insert(job)
                    continue
                if self._settle_locked(job, None, error):
                    wake.append(job)
                if job.lane is not None:
                    self._next_in_lane_locked(job.lane)
            self._wake_many_locked()
        self._wake_all(wake)

    def counted(self, **counts: int) -> None:
        """Add to the counters of the statistics."""
        with self._lock:
            for name, count in counts.items():
                setattr(self._counters, name, getattr(self._counters, name) + count)

    # -- Callers who are sent for the PIN -----------------------------------------

    def send_for_pin(self, source: PinCallable) -> None:
        """Have a caller who waits for the login await this PIN source."""
        with self._lock:
            self._source = source
            self._send_one_locked()

    def send_another(self) -> None:
        """Have another one await it, if the one who was sent has gone."""
        with self._lock:
            self._send_one_locked()

    def _send_one_locked(self) -> None:
        if self._source is None or self._runner is not None:
            return
        requests = (job for job in self._requests if job.phase is Phase.RUNNING)
        for job in (*requests, *self._parked, *self._lines):
            gone = job.dropped or job.away
            wants = not gone and job.phase is not Phase.SETTLED
            if wants and not (job.stays and job.kind is Kind.LANE):
                job.errand = self._source
                self._runner = job
                job.waiter.wake()
                return

    def is_back(self, job: Job) -> None:
        """The caller of a job waits for it from now on, and can be sent."""
        with self._lock:
            job.away = False
            self._send_one_locked()

    def _errand_dropped_locked(self, job: Job) -> None:
        """The caller who was sent for the PIN goes away: another takes over."""
        job.errand = None
        if self._runner is job:
            self._runner = None
            self._send_one_locked()

    def pin_came(self, job: Job, pin: Pin | None, error: BaseException | None) -> None:
        """The caller who was sent for the PIN is back with it, or without."""
        with self._lock:
            job.errand = None
            if self._runner is not job:
                return
            self._runner = self._source = None
        self.actor.pin_came(pin, error)

    # -- The life of the pool -----------------------------------------------------

    def opened(self) -> None:
        """The token is there: heed its own limits, and take jobs."""
        info = self.actor.known
        most, rw = self.options.max_sessions, None
        if info.max_sessions:
            # One of the token's sessions is the anchor's.
            most = max(1, min(most, info.max_sessions - 1))
        if info.max_rw_sessions:
            rw = info.max_rw_sessions
        with self._lock:
            self._room.limit = SessionLimit(most, rw)
        self.become(PoolState.READY)

    def drain(self, deadline: float) -> None:
        """Wait for running calls; what runs longer is lost. Closes all sessions."""
        error = PoolClosed("the pool was closed while the call was inside")
        with self._lock:
            room, self._pause = self._room, Pause.ALL
            left = max(0.0, deadline - time.monotonic())
            self._quiet.wait_for(lambda: not self._busy, left)
            wake = []
            for worker in list(self._workers):
                if (job := worker.job) is not None:
                    self._write_off_locked(job, error)
                    if self._settle_locked(job, None, error):
                        wake.append(job)
                elif worker.busy:
                    # It hangs behind its caller's back: closing, or opening ahead.
                    self._lose_worker_locked(worker)
            leases = list(room.leases)
            for lease in leases:
                lease.lose(PoolClosed("the pool was closed"))
                lease.owner.gone = True
                wake += self._refuse_lane_locked(lease)
                room.returned(lease)
            ahead = room.take_ahead()
        self._wake_all(wake)
        self._tell_lost()
        # Sessions that were just closing are closed here, and their jobs not needed.
        self.refuse_waiting()
        # A module that takes one call at a time, with a lost one inside, takes none.
        if self._module.wait_turn(self.options.close_timeout):
            with self.cache.changing():
                self._close_all([lease.session for lease in leases] + ahead)
            self._module.turn.__exit__()

    def end_threads(self) -> None:
        """Let the workers go, and wait for those that are not lost."""
        with self._lock:
            workers, self._workers = list(self._workers), set()
            self._idle.clear()
        for worker in workers:
            worker.stop()
        timekeeper.forget(self)
        timekeeper.forget(self._clock)
        # Behind a lost call of a module that takes turns, they wait for theirs.
        module = self.actor.module
        blocked = module is not None and module.is_blocked
        wait = 0.0 if blocked else self.options.close_timeout
        deadline = time.monotonic() + wait
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def stats(self) -> PoolStats:
        """A snapshot, taken under the lock."""
        self.check_process()
        with self._lock:
            room, counters = self._room, self._counters
            return PoolStats(
                sessions_max=room.limit.total,
                sessions_open=room.open_all,
                sessions_ahead=len(room.ahead),
                sessions_leased=len(room.leases),
                operations_running=self._running,
                operations_waiting=self._waiting_locked(),
                calls_stuck=self._stuck,
                wait_times=self._wait_times.snapshot(),
                run_times=self._run_times.snapshot(),
                recent_errors=tuple(self._recent_errors),
                **{name: getattr(counters, name) for name in Counters.__slots__},
            )


def _cut_off() -> StreamInterrupted:
    return StreamInterrupted(
        "the security officer came in the middle of the data: begin again"
    )


def _login_required(error: BaseException, state: LoginState) -> BaseException:
    """The pool's own error for a login that is missing, whoever noticed."""
    if isinstance(error, LoginRequired) or not isinstance(error, p11.UserNotLoggedIn):
        return error
    message = "nobody is logged in: await pool.login(pin)"
    if state is LoginState.SO:
        message = "private objects are not for the security officer: end the period"
    wrapped = LoginRequired(message)
    wrapped.__cause__ = error
    return wrapped
