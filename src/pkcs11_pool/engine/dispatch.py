"""Which job starts, when, and on which worker. Decides under one lock; never blocks.

The lowest of the three layers of the engine: :class:`Dispatch` knows jobs,
lines, room and deadlines, and no Cryptoki call. ``leasing`` and ``engine`` build
on it, in this order.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.engine.awake import Awake
from pkcs11_pool.engine.deadlines import Deadlines
from pkcs11_pool.engine.limits import SessionLimit
from pkcs11_pool.engine.lines import Lines
from pkcs11_pool.engine.room import SessionRoom
from pkcs11_pool.engine.timekeeper import timekeeper
from pkcs11_pool.errors import (
    ForkedProcess,
    PoolClosed,
    PoolError,
    PoolTimeout,
    TokenUnavailable,
    TooManyWaiting,
    WouldDeadlock,
)
from pkcs11_pool.jobs import Change, Job, Kind, Phase
from pkcs11_pool.state import PoolState, may_follow
from pkcs11_pool.stats import Counters, RecentError, Times

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.engine.leases import Chain, Lease
    from pkcs11_pool.jobs import Thread, Waiter

T = TypeVar("T")

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_READ: Final = Kind.READ
_LANE: Final = Kind.LANE
_ACTOR: Final = Kind.ACTOR
_READY: Final = PoolState.READY
_WAITING: Final = Phase.WAITING
_RUNNING: Final = Phase.RUNNING
_SETTLED: Final = Phase.SETTLED
_WHY_CLOSED = {
    PoolState.NEW: "the pool is not open: use `async with pool:`",
    PoolState.OPENING: "the pool is not open yet",
}


IDLE = 0.3
"""Seconds without work after which sessions opened ahead are closed."""
_FULL: Final = 0.0005
"""Seconds for which enough workers stay enough, while none goes idle."""
_LOOK = 0.005
"""Seconds after which it is looked at jobs for which nobody was woken."""
RECENT = 20
"""How many errors are remembered for the statistics."""
_FIRST = 1 << 62
"""Taken from a job's number, it puts it before all that were given one."""
_INSIDE: Final = "while the call was inside the module: it may have happened"
_ASKING: Final = (
    "while the PIN source was asked, or the call was inside the module: it may yet "
    "happen"
)
NO_WAIT = "timeout=0, and it would have to wait"


class _Process:
    """The number of this process, without a system call for each operation."""

    def __init__(self) -> None:
        self.look()
        os.register_at_fork(after_in_child=self.look)

    def look(self) -> None:
        self.pid = os.getpid()


_process = _Process()


class Pause(Enum):
    """What may start at present."""

    NOT = "not"
    """Everything."""
    NEW = "new"
    """Only jobs of open leases: the security officer waits for their end.

    When no others are open, he stops chains that have a session to themselves.
    """
    ALL = "all"
    """Nothing, but the jobs of a period of the security officer.

    And those neither while the token may be lost.
    """


_NOT: Final = Pause.NOT


class _State(Generic[T]):
    """A part of the engine's state on which it depends whether all is as usual."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, _owner: object, name: str) -> None:
        self._name = f"{name} "  # no attribute of the engine has this name

    def __get__(self, engine: Dispatch, _owner: object = None) -> T:
        value: T = engine.__dict__.get(self._name, self._default)
        return value

    def __set__(self, engine: Dispatch, value: T) -> None:
        engine.__dict__[self._name] = value
        engine.look_at_state()


class Dispatch(ABC):
    """Lines, room, deadlines and idle workers of one token.

    Every attribute is written under ``_lock``. A method whose name ends in
    ``_locked`` is called with the lock held.
    """

    def __init__(self, options: PoolOptions) -> None:
        self.options = options
        self.pid = _process.pid
        # Whether the pool is in the state that it is nearly always in, where jobs take
        # a short way: one look for each of them in place of four.
        self._usual = False
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._lines = Lines()
        self._room = SessionRoom(SessionLimit(options.max_sessions))
        self._deadlines = Deadlines()
        self._counters = Counters()
        self._wait_times = Times()
        self._run_times = Times()
        # How long operations took that ended well and are not counted yet.
        self._done: list[float] = []
        self._recent_errors: deque[RecentError] = deque(maxlen=RECENT)
        self._number = 0
        # Operations that wait for the login; in no line meanwhile.
        self._parked: list[Job] = []
        # Operations that the token was too busy for, and until when they rest.
        self._resting: dict[Job, float] = {}
        # Requests that the actor has.
        self._requests: set[Job] = set()
        self._so_lane: Lease | None = None
        self._awake = Awake()
        # Whether the timekeeper comes to look at jobs for which nobody was woken.
        self._looked_after = False
        # Until when it is not asked again whether enough workers are awake: they were,
        # and none of them has gone idle since.
        self._full_until = 0.0
        # One more than sessions: closing a lease needs a thread and no session.
        self._most_workers = options.max_sessions + 1
        # When an idle worker is sent to look for sessions that should go, and whether
        # one was sent.
        self._look_at: float | None = None
        self._look_wanted = False
        # Callers whose results are there and who are woken together, in a moment.
        self._held: list[Waiter] = []
        self._held_since = 0.0
        # When the last result was there, and when the last worker was done tidying.
        self._last_result = 0.0
        self._last_work = 0.0
        # The one that went idle last is the last.
        self._idle: list[Thread] = []
        self._workers: set[Thread] = set()
        # Workers with a job, tidying included; and jobs whose result is not posted.
        self._busy = 0
        self._running = 0
        # Threads that close sessions opened ahead, and count as nothing else.
        self._tidying = 0
        #: Leases, or chains in one, that nobody holds any more: put here by the
        #: garbage collector.
        self.orphans: deque[tuple[Lease, Chain | None]] = deque()
        self._ending = threading.Lock()

    #: Where the pool is in its life.
    state = _State(PoolState.NEW)
    # What may start.
    _pause = _State(Pause.NOT)
    #: What is known of a token that may be lost, while it may be.
    _outage: object | None = None
    # A lost login is being restored: what may not start twice waits for it.
    _login_awaited = _State(False)  # noqa: FBT003  # its default
    # Calls that were given up on and have not returned.
    _stuck = _State(0)

    # -- In and out: called by the faces ------------------------------------------

    def submit(self, job: Job) -> None:
        """Put a job in line.

        Raises:
            PoolClosed, ForkedProcess, TooManyWaiting, WouldDeadlock, SessionClosed,
            TokenUnavailable: It was not taken; nothing happens.
            PoolTimeout: It would have to wait, and must not.
        """
        if _process.pid != self.pid:
            self.check_process()
        if self.orphans or self._ending.locked():
            self.end_orphans()
        job.since = now = time.monotonic()
        lines, room = self._lines, self._room
        with self._lock:
            if (
                self._usual
                and job.kind is _READ
                and not lines.others
                and len(lines.reads)
                < room.limit.total - room.open_all + len(room.ahead)
                and (self._idle or len(self._workers) < self._most_workers)
            ):
                # The usual case: it finds a session and a thread. As `_submit_locked`
                # does for every job, in short.
                self._number = job.number = self._number + 1
                job.phase = _WAITING
                look = self._deadlines.watch(job)
                if look is not None:
                    timekeeper.call_at(self, look)
                lines.reads.append(job)
                if now >= self._full_until or not self._looked_after:
                    self._wake_one_locked(now)
            else:
                self._submit_locked(job, now)

    def _submit_locked(self, job: Job, now: float) -> None:
        if self.state is not _READY or self._stuck:
            self._check_open_locked()
        if job.lane is not None:
            job.lane.check()
        at_once = self._can_start_at_once_locked(job)
        if not at_once:
            self._admit_locked(job)
        self._enqueue_locked(job)
        if at_once:
            self._wake_one_locked(now)
        elif self._login_awaited:
            self._send_one_locked()

    def look_at_state(self) -> None:
        """Called at each change of the state. Whoever changes it has the lock."""
        self._usual = self.state is _READY and not (
            self._pause is not _NOT or self._login_awaited or self._stuck
        )

    def check_open(self) -> None:
        """Refuse a pool that is not open.

        Raises:
            PoolClosed, ForkedProcess, TokenUnavailable: See there.
        """
        self.check_process()
        with self._lock:
            self._check_open_locked()

    @property
    def is_forked(self) -> bool:
        """Whether the pool was opened in the process that this one was forked from."""
        return _process.pid != self.pid and self.state is not PoolState.NEW

    def start_here(self) -> bool:
        """Begin to open, in this process; False if it was opened before.

        A pool that was made before a fork and not opened may be opened in the child.

        Raises:
            ForkedProcess: It was opened in the parent process.
        """
        self.check_process()
        self.pid = _process.pid
        return self.become(PoolState.OPENING)

    def check_process(self) -> None:
        """Refuse a child process that uses its parent's pool, and touch nothing.

        First of all in each call: in a child even the lock may be held for ever, and
        asyncio says that no loop is running.

        Raises:
            ForkedProcess: This is such a child.
        """
        if _process.pid != self.pid and self.is_forked:
            message = (
                f"this pool belongs to process {self.pid}: use the start method spawn "
                "or forkserver, or open a pool after the fork"
            )
            raise ForkedProcess(message)

    def _check_open_locked(self) -> None:
        if self.state not in (PoolState.READY, PoolState.RECOVERING):
            raise PoolClosed(_WHY_CLOSED.get(self.state, "the pool is closed"))
        if self._stuck > self.options.max_sessions:
            raise TokenUnavailable(
                f"{self._stuck} calls hang in the module and none returns: only a new "
                "process can help"
            )

    def _admit_locked(self, job: Job) -> None:
        """Let a job wait, if it may."""
        most = self.options.max_waiting
        goes_on = job.chain is not None and job.chain.begun
        if most is not None and not goes_on and self._waiting_locked() >= most:
            raise TooManyWaiting(f"{most} callers wait already (max_waiting)")
        if job.lane is None and job.holder is not None:
            self._check_deadlock_locked(job)
        elif job.lane is not None and job.lane.would_deadlock(job):
            raise WouldDeadlock(
                "this task is in the middle of an operation on data in parts in this "
                "session: finish that first, or await its aclose()"
            )
        if job.nowait:
            counters = self._counters
            counters.operations_timed_out += job.is_operation
            counters.operations_failed += job.is_operation
            counters.operations_total += job.is_operation
            raise PoolTimeout(NO_WAIT, "waiting")
        job.waited = True
        self._counters.waits_total += 1

    def _refuse_nowait_locked(self) -> list[Job]:
        """A pause came before the workers: who must not wait; who must be woken."""
        refused = []
        for job in self._lines:
            if job.nowait and not self._can_start_locked(job):
                self._take_out_locked(job)
                if self._settle_locked(job, None, PoolTimeout(NO_WAIT, "waiting")):
                    refused.append(job)
        return refused

    def _check_officer_locked(self, job: Job) -> None:
        """Refuse what waits for the end of the period to him whose period it is."""
        so = self._so_lane
        if so is not None and job.holder is not None and so.holder == job.holder:
            raise WouldDeadlock(
                "this task is the security officer: use so.session, or leave the "
                "period first"
            )

    def _check_deadlock_locked(self, job: Job) -> None:
        room = self._room
        self._check_officer_locked(job)
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

    def _enqueue_locked(self, job: Job) -> None:
        """Put a job in its line, or behind the running job of its lease."""
        self._number += 1
        job.number = self._number
        job.phase = _WAITING
        self._watch_locked(job)
        lane = job.lane
        if lane is None and self._is_awaited_locked(job):
            self._put_first_locked(job)
        elif lane is None:
            self._lines.add(job)
        elif lane.busy or not lane.admit(job):
            lane.waiting.append(job)
        else:
            lane.busy = True
            self._lines.add(job)

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
                self._errand_dropped_locked(job)
            if job.phase is Phase.SETTLED:
                # It arrived just before its caller went.
                leftover = job.result
            else:
                self._counters.operations_cancelled += job.is_operation
                self._counters.operations_total += job.is_operation
            if job.phase is Phase.WAITING:
                job.phase = Phase.SETTLED
                self._take_out_locked(job)
            elif job.kind is Kind.ACTOR:
                # What it asked for goes on without it, or nobody is there to do it.
                self._requests.discard(job)
                self._deadlines.unwatch(job)
        self._give_back(leftover)
        return True

    def _take_out_locked(self, job: Job) -> None:
        """Remove a waiting job from wherever it waits."""
        self._deadlines.unwatch(job)
        self._requests.discard(job)
        # The actor may wait for quiet on its behalf.
        self._quiet.notify_all()
        lane = job.lane
        if lane is not None and job in lane.waiting:
            lane.waiting.remove(job)
            return
        if job in self._parked:
            self._parked.remove(job)
        elif self._resting.pop(job, None) is None:
            self._lines.remove(job)
        if lane is not None:
            self._next_in_lane_locked(lane)

    def _settle_locked(
        self, job: Job, result: Any, error: BaseException | None
    ) -> bool:
        """Set what became of a job; whether there is somebody to wake."""
        if job.tick:
            self._deadlines.unwatch(job)
        if job.kind is _ACTOR:
            self._requests.discard(job)
        if job.phase is _SETTLED:
            return False
        job.phase = _SETTLED
        job.result, job.error = result, error
        if job.errand is not None:
            self._errand_dropped_locked(job)
        if job.dropped:
            return False
        counters = self._counters
        counters.operations_total += job.is_operation
        if error is not None:
            counters.operations_failed += job.is_operation
            counters.last_error = f"{type(error).__name__}: {error}"
            self._remember_locked(error)
        return True

    def _remember_locked(self, error: BaseException) -> None:
        code = rv.code_of(error)
        name = None if code is None else rv.name_of(code)
        seen = RecentError(time.time(), type(error).__name__, name)
        self._recent_errors.append(seen)

    def _count_locked(self) -> None:
        """Count the operations that ended well: many at once cost each of them less."""
        done, self._done = self._done, []
        self._counters.operations_total += len(done)
        self._counters.run_seconds_total += sum(done)
        self._run_times.fresh += done
        self._run_times.count()
        self._wait_times.count()

    def _wake_all(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            job.waiter.wake()

    # -- Who may start ------------------------------------------------------------

    def _waiting_locked(self) -> int:
        waiting = len(self._lines) + len(self._parked) + len(self._resting)
        for lease in self._room.leases:
            waiting += len(lease.waiting)
        return waiting

    def _can_start_locked(self, job: Job) -> bool:
        if self._pause is Pause.ALL:
            if self._outage is not None:
                # His session is the login's own, and the actor looks at it.
                return False
            return job.lane is not None and job.lane is self._so_lane
        if self._login_awaited and not job.restart and not job.stays:
            return False
        if job.kind is _LANE:
            return self._pause is _NOT or not self._is_stopped_locked(job)
        goes = self._pause is _NOT or self._is_awaited_locked(job)
        return goes and self._room.allows(job)

    def _is_awaited_locked(self, job: Job) -> bool:
        """Whether the officer waits for its caller, who holds a session.

        If the caller waited for the officer, too, neither would come to his end.
        """
        return (
            self._pause is Pause.NEW
            and job.holder is not None
            and any(
                lease.holder == job.holder and not lease.lone and not lease.closing
                for lease in self._room.leases
            )
        )

    def _put_first_locked(self, job: Job) -> None:
        """Put it before all who must wait for the officer."""
        job.number -= _FIRST
        self._lines.insert(job)

    def _let_holders_pass_locked(self) -> None:
        """The officer begins to wait: whom he waits for must not stand in line."""
        for job in [*self._lines]:
            if job.lane is None and self._is_awaited_locked(job):
                self._lines.remove(job)
                self._put_first_locked(job)

    def _is_stopped_locked(self, job: Job) -> bool:
        """Whether a part of a chain must not start: it would keep the officer out.

        Not while he waits for a session in somebody's hands, who may need the chain to
        come to his end.
        """
        if not job.lane.lone or job.stays:
            return False
        return not (self._room.lent_out or self._room.leasing)

    def _can_start_at_once_locked(self, job: Job) -> bool:
        """Whether a new job finds a session and a thread that nobody waits for."""
        if not self._idle and len(self._workers) >= self._most_workers:
            return False
        if not self._can_start_locked(job):
            return False
        if job.lane is not None:
            return bool(job.lane.is_free_for(job))
        return self._lines.want_sessions(self._room) < self._room.free

    def _wake_one_locked(self, now: float) -> bool:
        """Wake the worker that went idle last, or start one; False if enough are.

        The next of those takes the job then. Should all be inside long calls, the
        timekeeper comes and wakes more.
        """
        if self._awake.is_full(now):
            if not self._awake.coming:
                self._full_until = now + _FULL
            self._look_later_locked(now)
            return False
        if self._idle:
            worker = self._idle.pop()
            worker.wake()
        elif len(self._workers) < self._most_workers:
            worker = self._start_worker_locked()
        else:
            return False
        self._awake.woken(worker, now)
        return True

    def _look_later_locked(self, now: float) -> None:
        """Have the timekeeper come soon: what was put off may not be done else."""
        if not self._looked_after:
            self._looked_after = True
            timekeeper.call_at(self, now + _LOOK)

    def _held_locked(self) -> list[Waiter]:
        """Those whose results were held back, to be woken now."""
        held, self._held = self._held, []
        return held

    def _wake_for_next_locked(self) -> bool:
        if self._lines.first(self._can_start_locked) is None:
            return False
        return self._wake_one_locked(time.monotonic())

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
        awake, lines = self._awake, self._lines
        job = self._first_locked(worker, now)
        if job is None:
            self._goes_idle_locked(worker, now)
            return None
        lines.pop(job)
        awake.started(worker, now)
        if came and (lines.reads or lines.others):
            # There may be more for whom nobody was woken.
            self._wake_for_next_locked()
        self._start_locked(worker, job, now)
        return job

    def _start_locked(self, worker: Thread, job: Job, now: float) -> None:
        job.wait_seconds = waited = now - job.since
        self._wait_times.add(waited, not job.stays)
        if job.waited:
            self._counters.wait_seconds_total += waited
        job.since = now
        if job.phase is _WAITING:
            job.phase = _RUNNING
        job.worker = worker
        worker.job = job
        worker.busy = True
        self._busy += 1
        self._running += 1

    def _first_locked(self, worker: Thread, now: float) -> Job | None:
        """The job that a worker should take, still in line."""
        lines, awake = self._lines, self._awake
        if not (lines.reads or lines.others):
            return None
        job = lines.first(self._can_start_locked)
        if job is None or worker in awake.at_work:
            return job
        if not awake.is_full(now):
            return job
        # It comes back from a long call, and the others do without it.
        self._look_later_locked(now)
        return None

    def _goes_idle_locked(self, worker: Thread, now: float) -> None:
        self._awake.ended(worker)
        self._full_until = 0.0
        if worker in self._workers:
            self._idle.append(worker)
        if self._look_at is None and (self._room.ahead or self._room.leases):
            self._look_at = now + IDLE
            timekeeper.call_at(self, self._look_at)

    def _let_go_locked(self, job: Job) -> bool:
        """Take a job from its worker to start it again; False if nobody wants it."""
        if job.dropped or job.phase is not Phase.RUNNING:
            return False
        job.phase = Phase.WAITING
        if job.worker is not None:
            job.worker.job = None
            job.worker.done = time.monotonic()
            self._running -= 1
        job.worker = None
        if not job.waited:
            job.waited = True
            self._counters.waits_total += 1
        return True

    def _next_in_lane_locked(self, lane: Lease) -> None:
        """The next job of a lease takes its place in the line."""
        job = lane.next()
        lane.busy = job is not None
        if job is not None:
            self._lines.add(job)
            self._wake_for_next_locked()
        self._quiet.notify_all()

    # -- Deadlines: called by the timekeeper --------------------------------------

    def _watch_locked(self, job: Job) -> None:
        look = self._deadlines.watch(job)
        if look is not None:
            timekeeper.call_at(self, look)

    def sweep(self, now: float) -> float:
        """Give ``PoolTimeout`` to those that are due; when to come again."""
        with self._lock:
            due = self._deadlines.due(now)
            wake = [job for job in due if self._expire_locked(job, now)]
            held = self._held_locked()
            again = self._deadlines.next()
            if self._look_at is not None and now >= self._look_at:
                self._look_at = None
                if self._idle:
                    self._look_wanted = True
                    self._idle.pop().wake()
            limit = self._room.limit
            if limit.retry(now) or self._looked_after:
                self._looked_after = False
                self._wake_many_locked()
            if limit.retry_at is not None:
                again = min(again, limit.retry_at)
            if self._looked_after:
                again = min(again, now + _LOOK)
            if self._look_at is not None:
                again = min(again, self._look_at)
            again = min(again, self._give_up_overdue_locked(now))
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
                    self._wait_times.add(job.wait_seconds)
            error = PoolTimeout(self._why_waiting_locked(), "waiting")
        else:
            where = _ASKING if job.kind is Kind.ACTOR else _INSIDE
            text = f"the deadline passed {where}"
            if isinstance(job.changes, Change):
                text = f"{job.changes.call}: {text}. {job.changes.look}"
            error = PoolTimeout(text, "running")
            if job.kind is not Kind.ACTOR:
                self._write_off_locked(job, error)
                self._run_times.add(now - job.since, job.is_operation)
        if not self._settle_locked(job, None, error):
            return False
        self._counters.operations_timed_out += job.is_operation
        return True

    def _why_waiting_locked(self) -> str:
        room = self._room
        return (
            f"the deadline passed while waiting (max_sessions={room.limit.total}, "
            f"{len(room.leases)} lent, {self._running} calls under way, "
            f"{self._waiting_locked()} more wait): give it more time, or the pool more "
            "sessions"
        )

    # -- The life of the pool -----------------------------------------------------

    def become(self, state: PoolState) -> bool:
        """Go to another state; False if it may not follow the present one."""
        with self._lock:
            if not may_follow(self.state, state):
                return False
            self.state = state
            return True

    def refuse_waiting(self) -> None:
        """The pool closes: nobody waits any longer."""
        with self._lock:
            wake = self._refuse_all_locked(lambda: PoolClosed("the pool is closing"))
        self._wake_all(wake)

    def _refuse_all_locked(self, error: Callable[[], PoolError]) -> list[Job]:
        """Refuse all that wait for anything; who must be woken."""
        waiting = [*self._lines, *self._parked, *self._resting]
        # A request that waits for quiet must not keep the pool from closing.
        waiting += [
            job
            for job in self._requests
            if job.phase is Phase.WAITING and not job.stays
        ]
        waiting += [job for lease in self._room.leases for job in lease.waiting]
        wake = []
        for job in waiting:
            self._take_out_locked(job)
            if self._settle_locked(job, None, error()):
                wake.append(job)
        return wake

    def holds_lease(self, holder: Hashable) -> bool:
        """Whether this task or thread has a session of the pool."""
        with self._lock:
            so = self._so_lane
            return (so is not None and so.holder == holder) or any(
                lease.holder == holder and not lease.closing and not lease.lone
                for lease in self._room.leases
            )

    # -- Done by the layers above -------------------------------------------------

    @abstractmethod
    def end_orphans(self) -> None:
        """End what nobody holds any more."""

    @abstractmethod
    def _start_worker_locked(self) -> Thread: ...

    @abstractmethod
    def _give_back(self, result: Any) -> None:
        """A result that nobody takes."""

    @abstractmethod
    def _write_off_locked(self, job: Job, cause: BaseException) -> None:
        """Give up on a call that is inside the module."""

    @abstractmethod
    def _give_up_behind_locked(self, now: float) -> None:
        """Give up on calls behind callers, which hold up who waits."""

    @abstractmethod
    def _give_up_overdue_locked(self, now: float) -> float:
        """Give up on those that are late whoever waits; when to come again."""

    @abstractmethod
    def _tell_lost(self) -> None:
        """Log the calls that were given up on."""

    @abstractmethod
    def _send_one_locked(self) -> None:
        """Send a caller who waits for the PIN, if one is needed."""

    @abstractmethod
    def _errand_dropped_locked(self, job: Job) -> None:
        """The caller who was sent for the PIN goes away."""
