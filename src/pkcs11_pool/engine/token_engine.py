"""The engine of a pool: threads and one lock, and no event loop.

Jobs go in, results come out through their waiters. What must be decided is
decided under the lock, at once; what blocks happens outside it.

The way of an operation: ``submit`` puts it in a line; a worker takes it, with a
session opened ahead or one that it opens now; the result is posted first, then
the used session is closed and the next one opened, behind the caller's back.

The top layer: on :class:`~pkcs11_pool.engine.work.Work`, which is on
:class:`~pkcs11_pool.engine.outage.Outages`, which is on
:class:`~pkcs11_pool.engine.overdue.Overdue`, which is on
:class:`~pkcs11_pool.engine.leasing.Leasing`, which is on
:class:`~pkcs11_pool.engine.dispatch.Dispatch`. It runs workers and serves the actor.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from pkcs11_pool.engine.leasing import NOBODY
from pkcs11_pool.engine.limits import SessionLimit
from pkcs11_pool.engine.mode import Pause
from pkcs11_pool.engine.rules import NO_WAIT
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
from pkcs11_pool.stats import PoolStats

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

    def _new_worker(self) -> Worker:
        worker = Worker(self)
        worker.start()
        return worker

    def look_around(self, worker: Thread) -> bool:
        """Called by a worker that goes idle; to the point when the timekeeper asks.

        Sessions whose holders are forgotten are closed; spare ones, when all is idle.
        Whether the worker did that, and is not on the list of the idle any more.
        """
        if not self._lull.wanted:
            return False
        self._lull.wanted = False
        self.end_orphans()
        return self.close_spare(worker)

    # -- The gate: called by the actor --------------------------------------------

    def request(self, job: Job, post: Callable[[Job], None]) -> None:
        """Hand a request to the actor.

        Raises:
            WouldDeadlock: It waits for the end of a period of the security officer,
                who is the one that asks.
        """
        self.home.check()
        with self._lock:
            if not job.stays:
                self._rules.check_officer(job)
            job.phase = Phase.WAITING
            job.since = time.monotonic()
            self._waiting.requests.add(job)
            self._watch_locked(job)
        post(job)
        if self.actor.has_ended:
            # It is refused, and the timekeeper was told of its deadline.
            timekeeper.forget(self)

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
        mode, room, staff = self._mode, self._room, self._staff

        def quiet() -> bool:
            return not staff.busy and not (leases and (room.lent_out or room.leasing))

        def news() -> bool:
            lost = leases and mode.login_awaited
            return quiet() or job.phase is Phase.SETTLED or lost

        with self._lock:
            if job.nowait and (staff.running or room.lent_out or room.leasing):
                # What is only tidied behind its caller's back is no reason.
                self._settle_locked(job, None, PoolTimeout(NO_WAIT, "waiting"))
                job.waiter.wake()
                return False
            if mode.pause is Pause.NOT and leases:
                mode.pause = Pause.NEW
                self._waiting.let_holders_pass()
            before = mode.pause if mode.outage is None else mode.outage.before
            if not leases:
                mode.pause = Pause.ALL
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
            mode.pause = Pause.ALL
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
        if not self.home.is_forked:
            self.actor.later(partial(self._end_forgotten, lane))

    def _end_forgotten(self, lane: Lease) -> None:
        self.end_so_lane(lane)
        job = Job(None, Kind.ACTOR, waiter=NOBODY, deadline=None, stays=True)
        self.request(job, self.actor.so_end)

    def login_awaited(self) -> bool:
        """Whether operations wait for a lost login to be restored."""
        with self._lock:
            return self._mode.login_awaited

    def resume(self) -> None:
        """Let jobs start again."""
        with self._lock:
            self._mode.so_lane = None
            self._go_on_locked(Pause.NOT)

    def _go_on_locked(self, pause: Pause) -> None:
        """A pause is over; but while the token is down, nothing starts."""
        if self._mode.outage is not None:
            self._mode.outage.before = pause
            return
        self._mode.pause = pause
        self._wake_many_locked()

    def login_settled(self, error: BaseException | None) -> None:
        """The login that operations wait for succeeded, or failed."""
        wake = []
        with self._lock:
            self._mode.login_awaited = False
            runner = self._errands.end()
            if runner is not None:
                wake.append(runner)
            for job in self._waiting.take_parked():
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
            self._tally.add(counts)

    # -- Callers who are sent for the PIN -----------------------------------------

    def send_for_pin(self, source: Source) -> None:
        """Have a caller who waits for the login await this PIN source."""
        with self._lock:
            self._errands.begin(source)

    def send_another(self) -> None:
        """Have another one await it, if the one who was sent has gone."""
        with self._lock:
            self._errands.send_one()

    def is_back(self, job: Job) -> None:
        """The caller of a job waits for it from now on, and can be sent."""
        with self._lock:
            job.away = False
            self._errands.send_one()

    def pin_came(self, job: Job, pin: Pin | None, error: BaseException | None) -> None:
        """The caller who was sent for the PIN is back with it, or without."""
        with self._lock:
            expected = self._errands.is_done(job)
        if expected:
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
            self._lull.last_work = time.monotonic()
        self.become(PoolState.READY)

    def drain(self, deadline: float) -> None:
        """Wait for running calls; what runs longer is lost. Closes all sessions."""
        error = PoolClosed("the pool was closed while the call was inside")
        with self._lock:
            room, self._mode.pause = self._room, Pause.ALL
            left = max(0.0, deadline - time.monotonic())
            self._quiet.wait_for(lambda: not self._staff.busy, left)
            wake = []
            for worker in list(self._staff.workers):
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
            workers, self._staff.workers = list(self._staff.workers), set()
            self._staff.idle.clear()
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
        self.home.check()
        with self._lock:
            room, staff, counted = self._room, self._staff, self._tally.snapshot()
            counted["sessions_opened_total"] += sum(w.opened for w in staff.workers)
            return PoolStats(
                sessions_max=room.limit.total,
                sessions_open=room.open_all,
                sessions_ahead=len(room.ahead),
                sessions_leased=len(room.leases),
                operations_running=staff.running,
                operations_waiting=len(self._waiting),
                calls_stuck=self._mode.stuck,
                **counted,
            )


def _cut_off() -> StreamInterrupted:
    return StreamInterrupted(
        "the security officer came in the middle of the data: begin again"
    )
