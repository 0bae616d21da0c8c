"""Which job starts, when, and on which worker. Decides under one lock; never blocks.

The lowest layer of the engine: :class:`Dispatch` has the lock, and all parts that are
written under it. It knows no Cryptoki call. ``leasing``, ``overdue``, ``outage``,
``work`` and ``token_engine`` build on it, in this order.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.engine.awake import Awake
from pkcs11_pool.engine.deadlines import Deadlines
from pkcs11_pool.engine.errands import Errands
from pkcs11_pool.engine.held import Held
from pkcs11_pool.engine.home import Home, process
from pkcs11_pool.engine.limits import SessionLimit
from pkcs11_pool.engine.lines import Lines
from pkcs11_pool.engine.lull import Lull
from pkcs11_pool.engine.mode import Mode
from pkcs11_pool.engine.room import SessionRoom
from pkcs11_pool.engine.rules import NO_WAIT, Rules
from pkcs11_pool.engine.staff import Staff
from pkcs11_pool.engine.tally import Tally
from pkcs11_pool.engine.timekeeper import timekeeper
from pkcs11_pool.engine.waiting import Waiting
from pkcs11_pool.errors import PoolClosed, PoolError, PoolTimeout
from pkcs11_pool.jobs import Job, Kind, Phase
from pkcs11_pool.state import PoolState, may_follow

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.engine.leases import Chain, Lease
    from pkcs11_pool.jobs import Thread

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_READ: Final = Kind.READ
_ACTOR: Final = Kind.ACTOR
_READY: Final = PoolState.READY
_WAITING: Final = Phase.WAITING
_RUNNING: Final = Phase.RUNNING
_SETTLED: Final = Phase.SETTLED


class Dispatch(ABC):
    """Lines, room, deadlines and idle workers of one token.

    Every attribute is written under ``_lock``, those of the parts, too. A method whose
    name ends in ``_locked`` is called with the lock held, and so is every method of a
    part.
    """

    def __init__(self, options: PoolOptions) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._mode = Mode()
        self.home = Home(self._mode)
        self._room = SessionRoom(SessionLimit(options.max_sessions))
        self._rules = Rules(options, self._mode, self._room)
        self._lines = Lines()
        self._waiting = Waiting(self._lines, self._rules, self._room)
        self._deadlines = Deadlines()
        self._awake = Awake()
        # One more than sessions: closing a lease needs a thread and no session.
        most = options.max_sessions + 1
        self._staff = Staff(most, self._awake, self._new_worker, self._come_at)
        self._lull = Lull(self._come_at)
        self._held = Held(self._staff.look_later)
        self._errands = Errands(self._waiting)
        self._tally = Tally()
        #: Leases, or chains in one, that nobody holds any more: put here by the
        #: garbage collector.
        self.orphans: deque[tuple[Lease, Chain | None]] = deque()
        self._ending = threading.Lock()

    def _come_at(self, when: float) -> None:
        """Have the timekeeper come no later than then."""
        timekeeper.call_at(self, when)

    # -- In and out: called by the faces ------------------------------------------

    def submit(self, job: Job) -> None:
        """Put a job in line.

        Raises:
            PoolClosed, ForkedProcess, TooManyWaiting, WouldDeadlock, SessionClosed,
            TokenUnavailable: It was not taken; nothing happens.
            PoolTimeout: It would have to wait, and must not.
        """
        if process.pid != self.home.pid:
            self.home.check()
        if self.orphans or self._ending.locked():
            self.end_orphans()
        job.since = now = time.monotonic()
        lines, room = self._lines, self._room
        staff = self._staff
        with self._lock:
            if (
                self._mode.usual
                and job.kind is _READ
                and not lines.others
                and len(lines.reads)
                < room.limit.total - room.open_all + len(room.ahead)
                and (staff.idle or len(staff.workers) < staff.most)
            ):
                # The usual case: it finds a session and a thread. As `_submit_locked`
                # does for every job, in short.
                lines.number = job.number = lines.number + 1
                job.phase = _WAITING
                look = self._deadlines.watch(job)
                if look is not None:
                    timekeeper.call_at(self, look)
                lines.reads.append(job)
                if now >= staff.full_until or not staff.looked_after:
                    staff.wake_one(now)
            else:
                self._submit_locked(job, now)

    def _submit_locked(self, job: Job, now: float) -> None:
        mode = self._mode
        if mode.state is not _READY or mode.stuck:
            self._rules.check_open()
        if job.lane is not None:
            job.lane.check()
        at_once = self._can_start_at_once_locked(job)
        if not at_once:
            self._admit_locked(job)
        self._enqueue_locked(job)
        if at_once:
            self._staff.wake_one(now)
        elif mode.login_awaited:
            self._errands.send_one()

    def _can_start_at_once_locked(self, job: Job) -> bool:
        """Whether a new job finds a session and a thread that nobody waits for."""
        if not self._staff.has_hand or not self._rules.can_start(job):
            return False
        if job.lane is not None:
            return bool(job.lane.is_free_for(job))
        return self._lines.want_sessions(self._room) < self._room.free

    def _admit_locked(self, job: Job) -> None:
        """Let a job wait, if it may."""
        self._rules.check_wait(job, len(self._waiting))
        if job.nowait:
            self._tally.refused(job)
            raise PoolTimeout(NO_WAIT, "waiting")
        self._tally.waits_from_now(job)

    def _enqueue_locked(self, job: Job) -> None:
        self._watch_locked(job)
        self._waiting.enqueue(job)

    def _watch_locked(self, job: Job) -> None:
        look = self._deadlines.watch(job)
        if look is not None:
            timekeeper.call_at(self, look)

    def cancel(self, job: Job) -> bool:
        """The caller wants to go; whether it may go now.

        A job that still waits is taken out: nothing happened. One that runs is
        dropped when it is done, unless it may change the token: then the caller
        has to wait for its outcome, and this gives False. So it does for a job that
        is done in any case.
        """
        leftover: Any = None
        with self._lock:
            runs = job.phase is Phase.RUNNING
            if job.phase is not Phase.SETTLED and (job.stays or (job.changes and runs)):
                return False
            if job.dropped:
                return True
            job.dropped = True
            if job.errand is not None:
                self._errands.drop(job)
            if job.phase is Phase.SETTLED:
                # It arrived just before its caller went.
                leftover = job.result
            else:
                self._tally.cancelled(job)
            if job.phase is Phase.WAITING:
                job.phase = Phase.SETTLED
                self._take_out_locked(job)
            elif job.kind is Kind.ACTOR:
                # What it asked for goes on without it, or nobody is there to do it.
                self._waiting.requests.discard(job)
                self._deadlines.unwatch(job)
        self._give_back(leftover)
        return True

    def holds_lease(self, holder: Hashable) -> bool:
        """Whether this task or thread has a session of the pool."""
        with self._lock:
            return self._rules.holds_lease(holder)

    # -- The end of a job ---------------------------------------------------------

    def _take_out_locked(self, job: Job) -> None:
        """Remove a waiting job from wherever it waits."""
        self._deadlines.unwatch(job)
        # The actor may wait for quiet on its behalf.
        self._quiet.notify_all()
        if self._waiting.take_out(job):
            self._next_in_lane_locked(job.lane)

    def _settle_locked(
        self, job: Job, result: Any, error: BaseException | None
    ) -> bool:
        """Set what became of a job; whether there is somebody to wake."""
        if job.tick:
            self._deadlines.unwatch(job)
        if job.kind is _ACTOR:
            self._waiting.requests.discard(job)
        if job.phase is _SETTLED:
            return False
        job.phase = _SETTLED
        job.result, job.error = result, error
        if job.errand is not None:
            self._errands.drop(job)
        if job.dropped:
            return False
        self._tally.ended(job, error)
        return True

    def _refuse_locked(
        self, jobs: Iterable[Job], error: Callable[[], PoolError]
    ) -> list[Job]:
        """Refuse jobs that wait; who must be woken."""
        refused = []
        for job in jobs:
            self._take_out_locked(job)
            if self._settle_locked(job, None, error()):
                refused.append(job)
        return refused

    def _refuse_nowait_locked(self) -> list[Job]:
        """A pause came before the workers: who must not wait; who must be woken."""
        can_start = self._rules.can_start
        late = (j for j in self._lines if j.nowait and not can_start(j))
        return self._refuse_locked(late, lambda: PoolTimeout(NO_WAIT, "waiting"))

    def refuse_waiting(self) -> None:
        """The pool closes: nobody waits any longer."""
        with self._lock:
            wake = self._refuse_locked(
                self._waiting.everybody(), lambda: PoolClosed("the pool is closing")
            )
        self._wake_all(wake)

    def _wake_all(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            job.waiter.wake()

    # -- Who starts ---------------------------------------------------------------

    def _wake_for_next_locked(self) -> bool:
        if self._lines.first(self._rules.can_start) is None:
            return False
        return self._staff.wake_one(time.monotonic())

    def _wake_many_locked(self) -> None:
        """Many jobs may be able to start at once."""
        for _ in range(min(self._room.limit.total, len(self._lines))):
            if not self._wake_for_next_locked():
                break

    def _claim_locked(self, worker: Thread, now: float, *, came: bool) -> Job | None:
        """The next job, now running on this worker; None: the worker is idle.

        Args:
            worker: Whose.
            now: The time.
            came: Whether it was woken, so that there may be more jobs than this one.
        """
        lines = self._lines
        job = self._first_locked(worker, now)
        if job is None:
            self._staff.goes_idle(worker)
            if self._room.ahead or self._room.leases:
                self._lull.begins(now)
            return None
        lines.pop(job)
        self._awake.started(worker, now)
        if came and (lines.reads or lines.others):
            # There may be more for whom nobody was woken.
            self._wake_for_next_locked()
        self._start_locked(worker, job, now)
        return job

    def _first_locked(self, worker: Thread, now: float) -> Job | None:
        """The job that a worker should take, still in line."""
        lines, awake = self._lines, self._awake
        if not (lines.reads or lines.others):
            return None
        job = lines.first(self._rules.can_start)
        if job is None or worker in awake.at_work:
            return job
        if not awake.is_full(now):
            return job
        # It comes back from a long call, and the others do without it.
        self._staff.look_later(now)
        return None

    def _start_locked(self, worker: Thread, job: Job, now: float) -> None:
        job.wait_seconds = waited = now - job.since
        self._tally.waits.add(waited, not job.stays)
        if job.waited:
            self._tally.counters.wait_seconds_total += waited
        job.since = now
        if job.phase is _WAITING:
            job.phase = _RUNNING
        job.worker = worker
        worker.job = job
        worker.busy = True
        self._staff.busy += 1
        self._staff.running += 1

    def _let_go_locked(self, job: Job) -> bool:
        """Take a job from its worker to start it again; False if nobody wants it."""
        if job.dropped or job.phase is not Phase.RUNNING:
            return False
        job.phase = Phase.WAITING
        if job.worker is not None:
            job.worker.job = None
            job.worker.done = time.monotonic()
            self._staff.running -= 1
        job.worker = None
        self._tally.waits_from_now(job)
        return True

    def _next_in_lane_locked(self, lane: Lease) -> None:
        """The next job of a lease takes its place in the line."""
        job = lane.next()
        lane.busy = job is not None
        if job is not None:
            self._lines.add(job)
            self._wake_for_next_locked()
        self._quiet.notify_all()

    # -- The life of the pool -----------------------------------------------------

    @property
    def state(self) -> PoolState:
        """Where the pool is in its life."""
        return self._mode.state

    def become(self, state: PoolState) -> bool:
        """Go to another state; False if it may not follow the present one."""
        with self._lock:
            if not may_follow(self._mode.state, state):
                return False
            self._mode.state = state
            return True

    def start_here(self) -> bool:
        """Begin to open, in this process; False if it was opened before.

        Raises:
            ForkedProcess: It was opened in the parent process.
        """
        self.home.move_in()
        return self.become(PoolState.OPENING)

    def check_open(self) -> None:
        """Refuse a pool that is not open.

        Raises:
            PoolClosed, ForkedProcess, TokenUnavailable: See there.
        """
        self.home.check()
        with self._lock:
            self._rules.check_open()

    # -- Done by the layers above -------------------------------------------------

    @abstractmethod
    def _new_worker(self) -> Thread:
        """Start a thread."""

    @abstractmethod
    def end_orphans(self) -> None:
        """End what nobody holds any more."""

    @abstractmethod
    def _give_back(self, result: Any) -> None:
        """A result that nobody takes."""

    @abstractmethod
    def sweep(self, now: float) -> float:
        """Called by the timekeeper: do what is due, and say when to come again."""
