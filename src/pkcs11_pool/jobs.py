"""One thing to do, from the caller's hands to the worker's and back.

A job is settled once, under the engine's lock: by its result, its deadline, its
cancellation or the end of the pool, whichever comes first. Whoever settled it
wakes the waiter; what comes later is dropped.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from pkcs11_pool.pins import Source


class Phase(Enum):
    """Where a job is."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    SETTLED = "settled"


class Kind(Enum):
    """What a job needs to start."""

    # By identity, as Enum compares: its own hash is a call into Python.
    __hash__ = object.__hash__

    READ = "read"
    """A fresh session of its own; a R/O one will do."""
    WRITE = "write"
    """A fresh R/W session of its own."""
    LEASE = "lease"
    """A fresh session that stays open when the job is done."""
    LANE = "lane"
    """A session that is leased already: only a thread."""
    ACTOR = "actor"
    """The login actor's thread: no session, no worker."""


# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_READ: Final = Kind.READ
_LEASE: Final = Kind.LEASE
_ACTOR: Final = Kind.ACTOR
_NEVER: Final = math.inf


class Bell(Protocol):
    """What wakes an event loop."""

    def ring(self) -> None:
        """Wake it, unless all who are lined up for it have been told already."""


class Waiter(Protocol):
    """The caller, as the threads below the faces see it."""

    def wake(self) -> bool:
        """Tell the caller to look at its job; False if its loop has ended."""

    def line_up(self) -> Bell | None:
        """The same when the bell is rung, together with others; None: no need to."""


class Caller(Waiter, Protocol):
    """A caller who may hold sessions."""

    holder: Hashable


class Thread(Protocol):
    """A worker, as far as jobs and lines know it."""

    #: What it works on.
    job: Job | None
    #: It is inside the module, or may be; tidying included.
    busy: bool
    #: A session is counted for it: whether that is R/W. None: no session is.
    counted: bool | None
    #: Its call was given up on.
    lost: bool
    #: When it took its last job, or was woken.
    since: float
    #: When it was done with it, but for what it does behind its caller.
    done: float
    #: It was woken, and is not there yet.
    coming: bool
    #: How many sessions it opened, not yet counted.
    opened: int
    #: Seconds on a processor for its last job, where that was measured.
    spent: float | None

    def wake(self) -> None:
        """End its sleep."""

    def stop(self) -> None:
        """End it when it is idle."""

    def join(self, timeout: float) -> None:
        """Wait for its end."""


@dataclass(frozen=True, slots=True)
class Change:
    """How a call changes the token: true wherever it is asked whether it does.

    Attributes:
        call: What was called, and with which names.
        look: What to look for, when nobody knows whether it happened.
    """

    call: str
    look: str


class Job:
    """One operation, lease or request, and what became of it.

    Attributes:
        work: Called on a worker with the session.
        kind: What it needs to start.
        rw: Whether its session must be R/W.
        changes: Whether it may change the token, or how: the outcome is waited for.
        restart: Whether it may start again after a lost login.
        repeats: Whether it may start again after a lost token, that may have done it.
        stays: Whether it is done in any case, also when nobody waits any more.
        nowait: Whether it is refused rather than let wait (``timeout=0``).
        deadline: On the monotonic clock, or None.
        lane: The lease whose session it runs on.
        target: The session object that it uses, or None.
        holder: The task or thread that asked.
        errand: A PIN source that the caller, when woken, should await.
        chain: The multi-part operation that it is a part of, or None.
        away: Its caller is elsewhere just now and cannot be sent for a PIN.
    """

    # What every job begins with. Attributes of the class, because a job is made for
    # each operation, and most of these stay as they are.
    away = False
    phase = Phase.NEW
    errand: Source | None = None
    #: The caller has gone; the result is dropped when it comes.
    dropped = False
    result: Any = None
    error: BaseException | None = None
    attempts = 0
    #: How often it rested, because the token was too busy for it.
    rests = 0
    number = 0
    since = 0.0
    #: When its deadline is looked at; see ``deadlines``.
    tick = 0
    deadline: float | None = None
    waited = False
    rw = stays = nowait = False
    changes: Change | bool = False
    restart = repeats = True
    lane: Any = None
    target: Any = None
    chain: Any = None
    holder: Hashable = None
    #: Whether it counts in the statistics: a lease or a request does not.
    is_operation = True
    #: How long it was in line: until it started, or was given up.
    wait_seconds = 0.0
    worker: Thread | None = None

    def __init__(  # the fields of a job, given once by the faces
        self,
        work: Callable[[Any], Any] | None,
        kind: Kind,
        *,
        waiter: Waiter,
        deadline: float | None,
        changes: Change | bool = False,
        restart: bool = True,
        repeat: bool = False,
        rw: bool = False,
        stays: bool = False,
        nowait: bool = False,
        lane: Any = None,
        target: Any = None,
        holder: Hashable = None,
        chain: Any = None,
    ) -> None:
        self.work = work
        self.kind = kind
        self.rw = rw
        self.changes = changes
        self.restart = restart
        self.repeats = repeat or (restart and not changes)
        self.stays = stays
        self.nowait = nowait
        self.deadline = None if deadline == _NEVER else deadline
        self.lane = lane
        self.target = target
        self.holder = holder
        self.chain = chain
        self.waiter = waiter
        self.is_operation = not (stays or kind is _LEASE or kind is _ACTOR)


class Reading(Job):
    """An operation that may run in any session and be made again: nearly all jobs.

    As ``Job`` makes them, with a quarter of the steps.
    """

    kind = _READ

    def __init__(
        self, work: Callable[[Any], Any], waiter: Caller, limit: float | None
    ) -> None:
        self.work = work
        self.waiter = waiter
        self.holder = waiter.holder
        # Seconds from now; 0 is no deadline, and no waiting either.
        if limit:
            if limit != _NEVER:
                self.deadline = time.monotonic() + limit
        elif limit is not None:
            self.nowait = True
