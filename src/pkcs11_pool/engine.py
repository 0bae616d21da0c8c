"""The engine of a pool: threads and one lock, and no event loop.

Jobs go in, results come out through their waiters. What must be decided is
decided under the lock, at once; what blocks happens outside it. All state that
changes stands in :class:`TokenEngine` and is written under its lock.

The way of an operation: ``submit`` puts it in a line; a worker takes it, with a
session opened ahead or one that it opens now; the result is posted first, then
the used session is closed and the next one opened, behind the caller's back.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from contextlib import nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import exceptions as p11

from pkcs11_pool import events, recovery
from pkcs11_pool.actor import LoginActor
from pkcs11_pool.errors import (
    ForkedProcess,
    LoginRequired,
    PoolClosed,
    PoolTimeout,
    TokenUnavailable,
    TooManyWaiting,
    WouldDeadlock,
)
from pkcs11_pool.jobs import Job, Kind, Phase
from pkcs11_pool.keys import HandleCache
from pkcs11_pool.leases import Lease
from pkcs11_pool.limits import SessionLimit
from pkcs11_pool.session import Session
from pkcs11_pool.state import LoginState, PoolState, SessionState, may_follow
from pkcs11_pool.stats import Counters, PoolStats
from pkcs11_pool.timekeeper import TICK, timekeeper
from pkcs11_pool.workers import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable
    from contextlib import AbstractContextManager

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.jobs import Waiter
    from pkcs11_pool.keys import SessionObject
    from pkcs11_pool.module import Module
    from pkcs11_pool.pins import Pin, PinCallable

_ATTEMPTS: Final = 3
"""How often a job may start anew after a lost login."""
_IDLE: Final = 0.3
"""Seconds without work after which sessions opened ahead are closed."""
_LOGGED_OUT: Final = frozenset(
    {SessionState.RO_PUBLIC_SESSION, SessionState.RW_PUBLIC_SESSION}
)


class Pause(Enum):
    """What may start at present."""

    NOT = "not"
    """Everything."""
    NEW = "new"
    """Only jobs of open leases: the security officer waits for their end."""
    ALL = "all"
    """Nothing, but the jobs of a period of the security officer."""


class _Nobody:
    """Waits for nothing: the waiter of what the engine does for itself."""

    def wake(self) -> bool:
        return True


NOBODY: Final = _Nobody()


class TokenEngine:
    """Queue, workers, limits and sessions of one token."""

    def __init__(self, options: PoolOptions) -> None:
        self.options = options
        self.pid = os.getpid()
        self.state = PoolState.NEW
        self.cache = HandleCache(options.handle_max_age)
        self.actor = LoginActor(options, self, self.cache, options.name)
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._limit = SessionLimit(options.max_sessions)
        # The lines, by what a job needs to start. The number of a job says which
        # of two heads came first.
        self._lines: dict[Kind, deque[Job]] = {
            kind: deque() for kind in Kind if kind is not Kind.ACTOR
        }
        self._number = 0
        # Operations that wait for the login; not in any line meanwhile.
        self._parked: list[Job] = []
        self._idle: list[Worker] = []
        self._workers: set[Worker] = set()
        # Workers with a job, tidying included; and jobs whose result is not posted.
        self._busy = 0
        self._running = 0
        self._stuck = 0
        self._ahead: deque[Session] = deque()
        self._open_all = 0
        self._open_rw = 0
        self._leases: set[Lease] = set()
        self._leasing = 0
        self._pause = Pause.NOT
        self._so_lane: Lease | None = None
        self._buckets: dict[int, set[Job]] = {}
        self._source: PinCallable | None = None
        self._runner: Job | None = None
        self._counters = Counters()
        self._last_work = 0.0

    # -- Jobs: from the faces -----------------------------------------------------

    def submit(self, job: Job) -> None:
        """Put a job in line.

        Raises:
            PoolClosed, ForkedProcess, TooManyWaiting, WouldDeadlock, SessionClosed,
            TokenUnavailable: It was not taken; nothing happens.
            PoolTimeout: It would have to wait, and its deadline has passed already.
        """
        if os.getpid() != self.pid:
            raise self.forked()
        job.since = time.monotonic()
        with self._lock:
            self.check_open()
            if job.lane is not None:
                job.lane.check()
            self._number += 1
            job.number = self._number
            at_once = self._can_start_now(job)
            if not at_once:
                self._admit(job)
            self._watch(job)
            job.phase = Phase.WAITING
            self._enqueue(job)
            if at_once:
                self._wake_one()

    def _enqueue(self, job: Job) -> None:
        """Put a job in its line, or behind the running job of its lease."""
        lane = job.lane
        if lane is None:
            self._lines[job.kind].append(job)
        elif lane.busy:
            lane.waiting.append(job)
        else:
            lane.busy = True
            self._lines[Kind.LANE].append(job)

    def check_open(self) -> None:
        """Refuse a pool that is not open.

        Raises:
            PoolClosed, ForkedProcess, TokenUnavailable: See there.
        """
        if os.getpid() != self.pid:
            raise self.forked()
        if self.state not in (PoolState.READY, PoolState.RECOVERING):
            message = {
                PoolState.NEW: "the pool is not open: use `async with pool:`",
                PoolState.OPENING: "the pool is not open yet",
            }.get(self.state, "the pool is closed")
            raise PoolClosed(message)
        if self._stuck > self.options.max_sessions:
            message = (
                f"{self._stuck} calls hang in the module and none returns: only a new "
                "process can help"
            )
            raise TokenUnavailable(message)

    def _admit(self, job: Job) -> None:
        """Let a job wait, if it may."""
        most = self.options.max_waiting
        if most is not None and self._waiting() >= most:
            message = f"{most} callers wait already (max_waiting)"
            raise TooManyWaiting(message)
        if job.lane is None:
            self._check_deadlock(job)
        if job.nowait:
            self._counters.operations_timed_out += 1
            self._counters.operations_total += 1
            message = "no session is free, and timeout=0 does not wait"
            raise PoolTimeout(message, "waiting")
        job.waited = True
        self._counters.waits_total += 1

    def _check_deadlock(self, job: Job) -> None:
        if job.holder is None:
            return
        if self._so_lane is not None and self._so_lane.holder == job.holder:
            message = (
                "this task is the security officer: use so.session, or leave the "
                "period first"
            )
            raise WouldDeadlock(message)
        if not any(lease.holder == job.holder for lease in self._leases):
            return
        if job.kind is Kind.LEASE:
            full = len(self._leases) >= self._most_leases()
        else:
            full = len(self._leases) >= max(1, self._limit.total)
        if full:
            message = (
                f"all {len(self._leases)} sessions that can be lent are lent, one of "
                "them to this task: use key.on(session), or give the session back first"
            )
            raise WouldDeadlock(message)

    def forked(self) -> ForkedProcess:
        return ForkedProcess(
            f"this pool belongs to process {self.pid}: use the start method spawn or "
            "forkserver, or open a pool after the fork"
        )

    def cancel(self, job: Job) -> bool:
        """The caller wants to go; whether it may go now.

        A job that still waits is taken out: nothing happened. One that runs is
        dropped when it is done, unless it may change the token: then the caller
        has to wait for its outcome, and this gives False.
        """
        give_back: Any = None
        with self._lock:
            if job.errand is not None:
                job.errand = None
                self._next_runner(job)
            if job.phase is Phase.SETTLED:
                if not job.dropped:
                    job.dropped = True
                    give_back = job.result
            elif job.phase is Phase.RUNNING:
                if job.changes:
                    return False
                self._count_cancelled(job)
            elif job.phase is Phase.WAITING:
                self._take_out(job)
                self._count_cancelled(job)
                job.phase = Phase.SETTLED
        self._give_back(give_back)
        return True

    def _count_cancelled(self, job: Job) -> None:
        job.dropped = True
        self._counters.operations_cancelled += 1
        self._counters.operations_total += 1

    def _give_back(self, result: Any) -> None:
        """A result that nobody takes: a lease is a session, and must not leak."""
        if isinstance(result, Lease):
            self.end_lease(result, NOBODY)

    def _take_out(self, job: Job) -> None:
        """Remove a waiting job from wherever it waits."""
        self._unwatch(job)
        lane = job.lane
        if job in self._parked:
            self._parked.remove(job)
        elif lane is not None and job in lane.waiting:
            lane.waiting.remove(job)
            return
        elif job.kind is not Kind.ACTOR and job in self._lines[job.kind]:
            self._lines[job.kind].remove(job)
        if lane is not None:
            self._next_in_lane(lane)

    # -- Who may start ------------------------------------------------------------

    def _waiting(self) -> int:
        lanes = sum(len(lease.waiting) for lease in self._leases)
        return sum(map(len, self._lines.values())) + len(self._parked) + lanes

    def _most_leases(self) -> int:
        # One session always stays for operations, unless there is only one.
        return max(1, self._limit.total - 1)

    def _can_start(self, job: Job) -> bool:
        if self._pause is Pause.ALL:
            return job.lane is not None and job.lane is self._so_lane
        if self._pause is Pause.NEW and job.kind is not Kind.LANE:
            return False
        if job.kind is Kind.LANE:
            return True
        if job.kind is Kind.LEASE and (
            len(self._leases) + self._leasing >= self._most_leases()
        ):
            return False
        if self._ahead and not job.rw:
            return True
        # A session opened ahead makes room rather than let anybody wait for it.
        return self._limit.allows(
            rw=job.rw,
            open_all=self._open_all - (1 if self._ahead else 0),
            open_rw=self._open_rw,
        )

    def _can_start_now(self, job: Job) -> bool:
        """Whether a new job finds a session and a thread that nobody waits for."""
        if not self._can_start(job):
            return False
        if job.lane is not None and job.lane.busy:
            return False
        before = sum(
            len(line) for kind, line in self._lines.items() if kind is not Kind.LANE
        )
        free = self._limit.total - self._open_all + len(self._ahead)
        threads = len(self._idle) + self._most_workers() - len(self._workers)
        return threads > 0 and (job.kind is Kind.LANE or before < free)

    def _next(self) -> Job | None:
        """The first job in line that can start."""
        heads = [line[0] for line in self._lines.values() if line]
        for job in sorted(heads, key=_number) if len(heads) > 1 else heads:
            if self._can_start(job):
                return job
        return None

    def _most_workers(self) -> int:
        return self.options.max_sessions + 1

    def _wake_one(self) -> None:
        """Wake the worker that went idle last, or start one."""
        if self._idle:
            self._idle.pop().wake()
        elif len(self._workers) < self._most_workers():
            worker = Worker(self)
            self._workers.add(worker)
            worker.start()

    def _wake_many(self) -> None:
        """Many jobs may be able to start at once."""
        for _ in range(min(self._limit.total, self._waiting())):
            self._wake_for_next()

    def _wake_for_next(self) -> None:
        if self._next() is not None:
            self._wake_one()

    # -- Work: called by the workers ----------------------------------------------

    def claim(self, worker: Worker) -> tuple[Job, Session | None, Session | None] | None:
        """The next job, with a session opened ahead, or one to close first.

        None: nothing to do; the worker is on the list of the idle then.
        """
        with self._lock:
            job = self._next()
            if job is None:
                if worker in self._workers:
                    self._idle.append(worker)
                return None
            self._lines[job.kind].popleft()
            now = time.monotonic()
            if job.waited:
                self._counters.wait_seconds_total += now - job.since
            job.since = now
            if job.phase is Phase.WAITING:
                job.phase = Phase.RUNNING
            job.worker = worker
            worker.job = job
            self._busy += 1
            self._running += 1
            session, victim = self._reserve(job)
            # Another may be able to start as well: a claim wakes the next worker,
            # so a single wake-up is enough for a burst of jobs.
            if self._idle and self._next() is not None:
                self._idle.pop().wake()
            return job, session, victim

    def _reserve(self, job: Job) -> tuple[Session | None, Session | None]:
        if job.kind is Kind.LANE:
            return job.lane.session, None
        if job.kind is Kind.LEASE:
            self._leasing += 1
        if self._ahead and not job.rw:
            return self._ahead.popleft(), None
        victim = None
        if not self._limit.allows(
            rw=job.rw, open_all=self._open_all, open_rw=self._open_rw
        ):
            victim = self._ahead.popleft()
            self._open_all -= 1
        self._open_all += 1
        self._open_rw += job.rw
        return None, victim

    def turn(self) -> AbstractContextManager[Any]:
        """Held around each job where the module takes one call at a time."""
        module = self.actor.module
        return nullcontext() if module is None else module.turn

    def open_session(self, *, rw: bool) -> Session:
        """``C_OpenSession``, for a session that is counted already."""
        actor = self.actor
        assert actor.token is not None  # noqa: S101  # there are jobs: it is open
        session = Session(self._module, actor.token, rw=rw, epoch=actor.login.epoch)
        with self._lock:
            self._counters.sessions_opened_total += 1
            self._limit.opened(open_all=self._open_all)
        return session

    def no_session(self, job: Job, error: BaseException) -> bool:
        """Opening failed; whether the job waits for another try."""
        close: list[Session] = []
        with self._lock:
            self._open_all -= 1
            self._open_rw -= job.rw
            if job.kind is Kind.LEASE:
                self._leasing -= 1
            if recovery.classify(error) is not recovery.Fault.SESSION_COUNT:
                return False
            close = self._take_ahead()
            now = time.monotonic()
            self._limit.refused(
                rw=job.rw, open_all=self._open_all, open_rw=self._open_rw, now=now
            )
            events.info(
                events.SESSION_LIMIT,
                sessions=self._limit.total,
                rw_sessions=self._limit.rw,
            )
            requeued = self._requeue(job)
            if self._limit.retry_at is not None:
                timekeeper.call_at(self, self._limit.retry_at)
        self._close_all(close)
        return requeued

    def _requeue(self, job: Job) -> bool:
        """Put a job that could not start back where it stood; whether it waits."""
        if not self._let_go(job):
            return False
        if not job.waited:
            job.waited = True
            self._counters.waits_total += 1
        self._insert(job)
        return True

    def _let_go(self, job: Job) -> bool:
        """Take a job from its worker to start it again; False if nobody wants it."""
        if job.dropped or job.phase is not Phase.RUNNING:
            return False
        job.phase = Phase.WAITING
        if job.worker is not None:
            job.worker.job = None
            self._running -= 1
        job.worker = None
        return True

    def _insert(self, job: Job) -> None:
        line = self._lines[job.kind]
        # By number, not simply first: two may come back in either order.
        place = next((i for i, j in enumerate(line) if j.number > job.number), len(line))
        line.insert(place, job)

    def finished(self, job: Job, session: Session, error: Exception) -> bool:
        """Look at an error once; whether the job starts anew instead of raising it.

        A login that was lost shows as an error of the operation. It is restored in
        any case; the operation is made again only if it may be.
        """
        login = self.actor.login
        if not recovery.hints_at_lost_login(error) or login.state is LoginState.SO:
            return False
        if login.state is LoginState.USER and not self._is_logged_out(session):
            # It may have started under the login before this one.
            return session.epoch != login.epoch and self._again(job, wait=False)
        if login.state is LoginState.PUBLIC and login.wanted is LoginState.PUBLIC:
            return False
        again = self._again(job, wait=True)
        self.actor.need_login(login.epoch)
        return again

    def _is_logged_out(self, session: Session) -> bool:
        try:
            return session.info().state in _LOGGED_OUT
        except (p11.PKCS11Error, ValueError):
            return False

    def _again(self, job: Job, *, wait: bool) -> bool:
        """Start a job again, at once or when the login is there; whether it may be."""
        with self._lock:
            job.attempts += 1
            if not job.restart or job.attempts >= _ATTEMPTS or not self._let_go(job):
                return False
            if wait:
                self._parked.append(job)
                self._send_one()
            else:
                self._insert(job)
            return True

    def deliver(
        self, worker: Worker, job: Job, result: Any, error: BaseException | None
    ) -> None:
        """Settle a job that ran, and wake its caller."""
        with self._lock:
            if worker.lost:
                return
            worker.job = None
            self._running -= 1
            self._counters.run_seconds_total += time.monotonic() - job.since
            if isinstance(result, Lease):
                self._leasing -= 1
                self._leases.add(result)
            if error is not None:
                error = _login_required(error)
            settled = self._settle_locked(job, result, error)
        if not settled or not job.waiter.wake():
            self._give_back(result)

    def _settle_locked(
        self, job: Job, result: Any, error: BaseException | None
    ) -> bool:
        """Whether there is somebody to wake."""
        self._unwatch(job)
        if job.phase is Phase.SETTLED:
            return False
        job.phase = Phase.SETTLED
        job.result, job.error = result, error
        if job.dropped:
            return False
        counters = self._counters
        counters.operations_total += 1
        if error is not None:
            counters.operations_failed += 1
            counters.last_error = f"{type(error).__name__}: {error}"
        return True

    def tidied(self, job: Job, *, closed: bool, again: bool) -> bool:
        """A worker has closed what it used; whether to open a session ahead.

        Must come after ``deliver``: the caller waits for neither.
        """
        with self._lock:
            self._last_work = time.monotonic()
            if closed:
                self._open_all -= 1
                self._open_rw -= job.rw
            if job.lane is not None and not again:
                self._next_in_lane(job.lane)
            if closed and job.kind is Kind.READ and self._wants_ahead():
                self._open_all += 1
                return True
            self._no_longer_busy()
            return False

    def _wants_ahead(self) -> bool:
        """Whether to open one: a spare for each busy worker, if nobody waits."""
        return (
            self.state is PoolState.READY
            and self._pause is Pause.NOT
            and len(self._ahead) < self._busy
            and not any(self._lines.values())
            and self._limit.allows(
                rw=False, open_all=self._open_all, open_rw=self._open_rw
            )
        )

    def opened_ahead(self, session: Session | None) -> None:
        """The session asked for by ``tidied`` is there, or could not be opened."""
        close = None
        with self._lock:
            if session is None:
                self._open_all -= 1
            elif self._pause is not Pause.NOT or session.epoch != self.actor.login.epoch:
                self._open_all -= 1
                close = session
            else:
                self._ahead.append(session)
        if close is not None:
            close.close()
        with self._lock:
            self._no_longer_busy()

    def _no_longer_busy(self) -> None:
        self._busy -= 1
        self._quiet.notify_all()
        self._wake_for_next()

    def look_around(self) -> None:
        """Called by an idle worker now and then: spare sessions go when all is idle."""
        with self._lock:
            if self._busy or time.monotonic() - self._last_work < _IDLE:
                return
            close = self._take_ahead()
        self._close_all(close)

    def _close_all(self, sessions: Iterable[Session]) -> None:
        for session in sessions:
            session.close()

    def returned(self, session: Session | None) -> None:
        """A call that was given up on has returned after all."""
        if session is not None:
            # What it made in its session goes with it.
            with self.cache.changing():
                session.close()
        with self._lock:
            self._stuck -= 1
            self._module.lost_calls -= 1
            self._quiet.notify_all()
        events.info(events.CALL_RETURNED, stuck=self._stuck)

    # -- Leases -------------------------------------------------------------------

    def _next_in_lane(self, lane: Lease) -> None:
        """The next job of a lease takes its place in the line."""
        lane.busy = False
        if lane.waiting:
            job = lane.waiting.popleft()
            lane.busy = True
            self._lines[Kind.LANE].append(job)
            self._wake_for_next()
        self._quiet.notify_all()

    def end_lease(self, lease: Lease, waiter: Waiter) -> Job | None:
        """Close a lease, on a worker; None if it is closed or lost already.

        Its queued jobs are refused. A running one is let finish, and so are calls
        of others that are inside with its session objects, for at most
        ``close_timeout``; the waiter waits no longer than that.
        """
        timeout = self.options.close_timeout
        job = Job(
            lambda session: self._end(lease, session),
            Kind.LANE,
            waiter=waiter,
            deadline=time.monotonic() + 2 * timeout,
            restart=False,
            stays=True,
            lane=lease,
        )
        with self._lock:
            if lease.closing:
                return None
            lease.lose(None)
            wake = self._refuse_lane(lease)
            self._number += 1
            job.number = self._number
            job.phase = Phase.WAITING
            self._watch(job)
            self._enqueue(job)
            self._wake_for_next()
        self._wake_all(wake)
        return job

    def _end(self, lease: Lease, session: Session) -> None:
        lease.owner.wait_unused(self.options.close_timeout)
        # Its session objects die with it, so their numbers are free again.
        with self.cache.changing():
            session.close()
        with self._lock:
            self._uncount(lease)

    def _uncount(self, lease: Lease) -> None:
        self._leases.discard(lease)
        if lease.counted:
            lease.counted = False
            self._open_all -= 1
            self._open_rw -= lease.rw

    def _refuse_lane(self, lease: Lease) -> list[Job]:
        """Refuse the queued jobs of a lease that is over; who must be woken."""
        refused = []
        while lease.waiting:
            job = lease.waiting.popleft()
            if self._settle_locked(job, None, lease.error()):
                refused.append(job)
        return refused

    def _wake_all(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            job.waiter.wake()

    @property
    def _module(self) -> Module:
        module = self.actor.module
        assert module is not None  # noqa: S101  # there are jobs, so the pool is open
        return module

    def session_object(self, handle: int) -> SessionObject | None:
        """The session object with this number, whichever open session owns it."""
        with self._lock:
            owners = [lease.owner for lease in self._leases]
            if self._so_lane is not None:
                owners.append(self._so_lane.owner)
        found = (owner.objects.get(handle) for owner in owners if not owner.closed)
        return next((o for o in found if o is not None and not o.destroyed), None)

    def begin_so_lane(self, session: Session, holder: Hashable) -> Lease:
        """The session of a SO period, as a lease that only its jobs may use."""
        lease = Lease(session, holder)
        lease.counted = False
        with self._lock:
            self._so_lane = lease
        return lease

    def end_so_lane(self, lease: Lease) -> None:
        """The period ends: no more jobs on its session."""
        with self._lock:
            lease.lose(None)
            wake = self._refuse_lane(lease)
        self._wake_all(wake)

    # -- Gate: called by the actor ------------------------------------------------

    def begin(self, job: Job) -> bool:
        """The actor starts on a request; False if its caller has gone."""
        with self._lock:
            if job.phase is not Phase.WAITING:
                return False
            job.phase = Phase.RUNNING
            return True

    def settle(self, job: Job, result: Any, error: BaseException | None) -> None:
        """A request is done."""
        with self._lock:
            settled = self._settle_locked(job, result, error)
        if settled:
            job.waiter.wake()

    def pause(self, deadline: float | None, *, leases: bool) -> bool:
        """Let nothing start; wait until nothing is inside; whether it succeeded.

        With ``leases``, open sessions go on until they are closed: their holders
        must be able to come to their end.
        """
        with self._lock:
            before, self._pause = self._pause, Pause.NEW if leases else Pause.ALL

            def quiet() -> bool:
                held = leases and (self._leases or self._leasing)
                return not self._busy and not held

            left = None if deadline is None else max(0, deadline - time.monotonic())
            if not self._quiet.wait_for(quiet, left):
                self._pause = before
                self._wake_many()
                return False
            self._pause = Pause.ALL
            close = self._take_ahead()
        self._close_all(close)
        return True

    def resume(self) -> None:
        """Let jobs start again."""
        with self._lock:
            self._pause = Pause.NOT
            self._so_lane = None
            self._wake_many()

    def close_ahead(self) -> None:
        """Close the sessions that were opened ahead."""
        with self._lock:
            close = self._take_ahead()
        self._close_all(close)

    def _take_ahead(self) -> list[Session]:
        taken = list(self._ahead)
        self._ahead.clear()
        self._open_all -= len(taken)
        return taken

    def login_settled(self, error: BaseException | None) -> None:
        """The login that operations wait for succeeded, or failed."""
        wake = []
        with self._lock:
            self._source = self._runner = None
            parked, self._parked = self._parked, []
            for job in parked:
                job.errand = None
                if error is None:
                    self._insert(job)
                    continue
                if self._settle_locked(job, None, error):
                    wake.append(job)
                if job.lane is not None:
                    self._next_in_lane(job.lane)
            self._wake_many()
        self._wake_all(wake)

    def send_for_pin(self, source: PinCallable) -> None:
        """Have a caller who waits for the login await this PIN source."""
        with self._lock:
            self._source = source
            self._send_one()

    def _send_one(self) -> None:
        if self._source is None or self._runner is not None:
            return
        for job in (*self._requests(), *self._parked):
            if not job.dropped and job.phase is not Phase.SETTLED:
                job.errand = self._source
                self._runner = job
                job.waiter.wake()
                return

    def _requests(self) -> list[Job]:
        return [
            job
            for jobs in self._buckets.values()
            for job in jobs
            if job.kind is Kind.ACTOR and job.phase is Phase.RUNNING
        ]

    def _next_runner(self, job: Job) -> None:
        """The caller who was sent for the PIN goes away: another takes over."""
        if self._runner is job:
            self._runner = None
            self._send_one()

    def pin_came(self, job: Job, pin: Pin | None, error: BaseException | None) -> None:
        """The caller who was sent for the PIN is back with it, or without."""
        with self._lock:
            job.errand = None
            if self._runner is not job:
                return
            self._runner = self._source = None
        self.actor.pin_came(pin, error)

    def counted(self, **counts: int) -> None:
        """Add to the counters of the statistics."""
        with self._lock:
            for name, count in counts.items():
                setattr(self._counters, name, getattr(self._counters, name) + count)

    # -- Requests to the actor ----------------------------------------------------

    def request(self, job: Job, post: Callable[[Job], None]) -> None:
        """Hand a request to the actor."""
        if os.getpid() != self.pid:
            raise self.forked()
        with self._lock:
            job.phase = Phase.WAITING
            job.since = time.monotonic()
            self._watch(job)
        post(job)

    def holds_lease(self, holder: Any) -> bool:
        """Whether this task or thread has a session of the pool."""
        with self._lock:
            return any(lease.holder == holder for lease in self._leases)

    # -- Deadlines ----------------------------------------------------------------

    def _watch(self, job: Job) -> None:
        deadline = math.inf if job.deadline is None else job.deadline
        tick = -1 if deadline == math.inf else math.ceil(deadline / TICK)
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = set()
            if tick >= 0:
                timekeeper.call_at(self, tick * TICK)
        bucket.add(job)

    def _unwatch(self, job: Job) -> None:
        deadline = math.inf if job.deadline is None else job.deadline
        tick = -1 if deadline == math.inf else math.ceil(deadline / TICK)
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.discard(job)
            if not bucket:
                del self._buckets[tick]

    def sweep(self, now: float) -> float:
        """Give ``PoolTimeout`` to those that are due; when to come again."""
        wake = []
        with self._lock:
            ticks = sorted(tick for tick in self._buckets if tick >= 0)
            for tick in ticks:
                if tick * TICK > now:
                    break
                wake += [job for job in list(self._buckets[tick]) if self._expire(job)]
            again = min((t * TICK for t in self._buckets if t >= 0), default=math.inf)
            if self._limit.retry_at is not None:
                if self._limit.retry(now):
                    self._wake_many()
                else:
                    again = min(again, self._limit.retry_at)
        for job in wake:
            job.waiter.wake()
        return again

    def _expire(self, job: Job) -> bool:
        """A deadline has passed; whether somebody must be woken."""
        if job.phase is Phase.WAITING:
            if not job.stays:
                self._take_out(job)
            error = PoolTimeout("the deadline passed while waiting", "waiting")
        else:
            error = PoolTimeout(
                "the deadline passed while the call was inside the module: it may have "
                "happened",
                "running",
            )
            if job.kind is not Kind.ACTOR:
                self._write_off(job, error)
        if self._runner is job:
            self._next_runner(job)
        if not self._settle_locked(job, None, error):
            return False
        self._counters.operations_timed_out += 1
        return True

    def _write_off(self, job: Job, cause: BaseException) -> None:
        """Give up on a call that is inside the module: thread and session are lost."""
        worker = job.worker
        if worker is None or worker.job is not job:
            return
        worker.lost = True
        self._workers.discard(worker)
        self._busy -= 1
        self._running -= 1
        self._stuck += 1
        self._counters.calls_lost += 1
        self._module.lost_calls += 1
        if job.lane is not None:
            lane = job.lane
            lane.lose(cause)
            self._uncount(lane)
            self._wake_all(self._refuse_lane(lane))
        else:
            self._open_all -= 1
            self._open_rw -= job.rw
            self._leasing -= job.kind is Kind.LEASE
        events.warning(events.CALL_LOST, stuck=self._stuck)
        self._quiet.notify_all()
        self._wake_for_next()

    # -- The life of the pool -----------------------------------------------------

    def become(self, state: PoolState) -> bool:
        """Go to another state; False if it may not follow the present one."""
        with self._lock:
            if not may_follow(self.state, state):
                return False
            self.state = state
            return True

    def opened(self) -> None:
        """The token is there: heed its own limits, and take jobs."""
        info = self.actor.info
        assert info is not None  # noqa: S101  # open
        most, rw = self.options.max_sessions, None
        if info.max_sessions:
            # One of the token's sessions is the anchor's.
            most = max(1, min(most, info.max_sessions - 1))
        if info.max_rw_sessions:
            rw = info.max_rw_sessions
        with self._lock:
            self._limit = SessionLimit(most, rw)
        self.become(PoolState.READY)

    def refuse_waiting(self) -> None:
        """The pool closes: nobody waits any longer."""
        wake = []
        with self._lock:
            waiting = [job for line in self._lines.values() for job in line]
            waiting += self._parked
            waiting += [job for lease in self._leases for job in lease.waiting]
            for job in waiting:
                self._take_out(job)
                if self._settle_locked(job, None, PoolClosed("the pool is closing")):
                    wake.append(job)
        for job in wake:
            job.waiter.wake()

    def drain(self, deadline: float) -> None:
        """Wait for running calls; what runs longer is lost. Closes all sessions."""
        with self._lock:
            self._pause = Pause.ALL
            self._quiet.wait_for(
                lambda: not self._busy, max(0.0, deadline - time.monotonic())
            )
            wake = []
            error = PoolClosed("the pool was closed while the call was inside")
            for worker in list(self._workers):
                if (job := worker.job) is not None:
                    self._write_off(job, error)
                    if self._settle_locked(job, None, error):
                        wake.append(job)
            leases = [lease for lease in self._leases if lease.counted]
            for lease in leases:
                lease.lose(PoolClosed("the pool was closed"))
                wake += self._refuse_lane(lease)
                self._uncount(lease)
        self._wake_all(wake)
        with self.cache.changing():
            self._close_all(lease.session for lease in leases)
            self.close_ahead()

    def end_threads(self) -> None:
        """Let the workers go, and wait for those that are not lost."""
        with self._lock:
            workers, self._workers = list(self._workers), set()
            self._idle.clear()
        for worker in workers:
            worker.stop()
        timekeeper.forget(self)
        for worker in workers:
            worker.join(self.options.close_timeout)

    def stats(self) -> PoolStats:
        """A snapshot, taken under the lock."""
        with self._lock:
            counters = self._counters
            return PoolStats(
                sessions_max=self._limit.total,
                sessions_open=self._open_all,
                sessions_ahead=len(self._ahead),
                sessions_leased=len(self._leases),
                operations_running=self._running,
                operations_waiting=self._waiting(),
                calls_stuck=self._stuck,
                **{
                    name: getattr(counters, name) for name in Counters.__slots__
                },
            )


def _number(job: Job) -> int:
    return job.number


def _login_required(error: BaseException) -> BaseException:
    if isinstance(error, LoginRequired) or not isinstance(error, p11.UserNotLoggedIn):
        return error
    wrapped = LoginRequired("nobody is logged in: await pool.login(pin)")
    wrapped.__cause__ = error
    return wrapped
