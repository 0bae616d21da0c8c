"""The engine of a pool: threads and one lock, and no event loop.

Jobs go in, results come out through their waiters. What must be decided is
decided under the lock, at once; what blocks happens outside it.

The way of an operation: ``submit`` puts it in a line; a worker takes it, with a
session opened ahead or one that it opens now; the result is posted first, then
the used session is closed and the next one opened, behind the caller's back.

The top layer: on :class:`~pkcs11_pool.engine.work.Work`, which is on
:class:`~pkcs11_pool.engine.outage.Outages`, which is on
:class:`~pkcs11_pool.engine.leasing.Leasing`, which is on
:class:`~pkcs11_pool.engine.dispatch.Dispatch`. It runs workers and serves the actor.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from pkcs11_pool.engine.dispatch import NO_WAIT, Pause
from pkcs11_pool.engine.leasing import NOBODY
from pkcs11_pool.engine.limits import SessionLimit
from pkcs11_pool.engine.timekeeper import timekeeper
from pkcs11_pool.engine.work import Work
from pkcs11_pool.engine.workers import Worker
from pkcs11_pool.errors import (
    InvalidType,
    PoolClosed,
    PoolTimeout,
    StreamInterrupted,
)
from pkcs11_pool.jobs import Job, Kind, Phase
from pkcs11_pool.login.actor import LoginActor
from pkcs11_pool.state import PoolState
from pkcs11_pool.stats import Counters, PoolStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.module import Module, Turn
    from pkcs11_pool.engine.leases import Lease
    from pkcs11_pool.jobs import Thread
    from pkcs11_pool.pins import Pin, Source


class TokenEngine(Work):
    """Queue, workers, limits and sessions of one token."""

    def __init__(self, options: PoolOptions) -> None:
        super().__init__(options)
        self.actor = LoginActor(options, self, self.cache, options.name)
        # A PIN source that must be awaited, and the caller who was sent for it.
        self._source: Source | None = None
        self._runner: Job | None = None

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled or copied, with all that leads here.

        Raises:
            InvalidType: It is this process's own.
        """
        message = (
            "a pool, its sessions and its keys are neither pickled nor copied: they "
            "are this process's own; make a pool in the other one"
        )
        raise InvalidType(message)

    @property
    def _module(self) -> Module:
        return self.actor.attached

    @property
    def name(self) -> str:
        """What the pool is called in metrics."""
        options, info = self.options, self.actor.info
        label = options.token_label if info is None else info.label
        return options.name or label or "pkcs11"

    def turn(self) -> Turn | None:
        """Held around each job where the module takes one call at a time."""
        module = self.actor.module
        if module is None or not module.turn.serialized:
            return None
        return module.turn

    # -- Work: called by the workers ----------------------------------------------

    def _start_worker_locked(self) -> Worker:
        worker = Worker(self)
        self._workers.add(worker)
        worker.start()
        return worker

    def look_around(self, worker: Thread) -> bool:
        """Called by a worker that goes idle; to the point when the timekeeper asks.

        Sessions whose holders are forgotten are closed; spare ones, when all is idle.
        Whether the worker did that, and is not on the list of the idle any more.
        """
        if not self._look_wanted:
            return False
        self._look_wanted = False
        self.end_orphans()
        return self.close_spare(worker)

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

    def begin(self, job: Job, *, pauses: bool) -> bool:
        """The actor starts on a request; False if its caller has gone.

        One that pauses goes on waiting: nothing has happened for it, so its caller may
        go, and its deadline says so.
        """
        with self._lock:
            if job.phase is Phase.WAITING:
                if not pauses:
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
                self._let_holders_pass_locked()
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

    def send_for_pin(self, source: Source) -> None:
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
            if self.options.rw_sessions_only:
                # The anchor is one of these as well.
                rw = most = max(1, min(most, rw - 1))
        with self._lock:
            self._room.limit = SessionLimit(most, rw)
            self._last_work = time.monotonic()
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
        timekeeper.forget(self._alarm)
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
            self._count_locked()
            counted = {name: getattr(counters, name) for name in Counters.__slots__}
            counted["sessions_opened_total"] += sum(w.opened for w in self._workers)
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
                **counted,
            )


def _cut_off() -> StreamInterrupted:
    return StreamInterrupted(
        "the security officer came in the middle of the data: begin again"
    )
