"""A session that stays open for somebody, and the jobs that wait for it.

A lease holds one session and no thread. Its jobs run one at a time, in order,
on the engine's workers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any

from pkcs11_pool.cryptoki.keys import ObjectOwner
from pkcs11_pool.errors import SessionClosed, StreamInterrupted

if TYPE_CHECKING:
    from collections.abc import Hashable

    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.jobs import Job

    Orphans = deque[tuple["Lease", "Chain | None"]]


class Loan:
    """A lease on its way to somebody, or in somebody's hands.

    When it is forgotten, with the event loop that it was for, or with a block that
    never ends, the lease is an orphan: the engine closes it when it looks around.
    """

    __slots__ = ("_orphans", "lease")

    def __init__(self, lease: Lease, orphans: Orphans) -> None:
        self.lease = lease
        self._orphans = orphans

    def __del__(self) -> None:
        """Called by the garbage collector, anywhere: takes no lock."""
        if not self.lease.closing:
            self._orphans.append((self.lease, None))


class Hold:
    """A chain in somebody's hands. Forgotten, it is an orphan, as a loan is."""

    __slots__ = ("_chain", "_lease", "_orphans")

    def __init__(self, lease: Lease, chain: Chain, orphans: Orphans) -> None:
        self._lease = lease
        self._chain = chain
        self._orphans = orphans

    def __del__(self) -> None:
        """Called by the garbage collector, anywhere: takes no lock."""
        if not self._chain.over:
            self._orphans.append((self._lease, self._chain))


class Chain(ABC):
    """A multi-part operation: a chain of calls that has a session to itself.

    Between two calls nothing is inside the module, and no thread is held.

    Attributes:
        holder: The task or thread that feeds it.
        begun: Its first call was made.
        given_up: It will be fed no more, and is being ended.
        over: It has ended, and the session is free for others.
        private: It needs the login that it began in.
        cause: Why it must not go on, or None.
    """

    def __init__(self, holder: Hashable) -> None:
        self.holder = holder
        self.begun = False
        self.given_up = False
        self.over = False
        self.private = False
        self.cause: Exception | None = None

    @abstractmethod
    def stop(self, session: Session) -> None:
        """End it in the module, so that the session can be used for others."""


class Lease:
    """One session of the pool in somebody's hands.

    Attributes:
        session: The session; the engine's until it is closed.
        holder: The task or thread that has it.
        owner: The life of the session objects that are made in it.
        cause: Why it was lost, or None.
        busy: Whether one of its jobs is queued at the engine or running.
        closing: Whether it takes no more jobs.
        chain: The multi-part operation that has the session to itself, or None.
        lone: It is there for one chain only: nobody else waits for its end.
        anchor: The session is the login's own: the actor alone closes it.
    """

    def __init__(
        self, session: Session, holder: Hashable, *, counts_rw: bool = False
    ) -> None:
        self.session = session
        self.handle = session.handle
        self.rw = session.rw
        #: Whether the engine counts it as R/W: not one that need not be.
        self.counts_rw = counts_rw
        self.holder = holder
        self.owner = ObjectOwner()
        self.waiting: deque[Job] = deque()
        self.busy = False
        self.closing = False
        self.chain: Chain | None = None
        self.lone = False
        self.anchor = False
        #: Whether the engine counts its session as open.
        self.counted = True
        self.cause: BaseException | None = None

    def error(self) -> SessionClosed:
        """Why it takes no more jobs, with the cause if it was lost."""
        if self.cause is None:
            return SessionClosed(
                "this session is closed: it is open inside its `async with` block only"
            )
        if isinstance(self.cause, StreamInterrupted):
            cut = copy.copy(self.cause)
            cut.__cause__ = self.cause.__cause__  # a copy has none
            return cut
        error = SessionClosed(f"this session was lost: {self.cause}")
        error.__cause__ = self.cause
        return error

    def check(self) -> None:
        """Refuse jobs when it is over.

        Raises:
            SessionClosed: With the cause, if it was lost.
        """
        if self.closing:
            raise self.error()

    def admit(self, job: Job) -> bool:
        """Let a job run, unless it must wait until a chain is over."""
        chain = self.chain
        if chain is None or chain.over:
            # The job may begin a chain: from here on the session is that one's.
            self.chain = job.chain
            return True
        return job.chain is chain or job.stays

    def is_free_for(self, job: Job) -> bool:
        """Whether a job would be admitted at once."""
        chain = self.chain
        free = chain is None or chain.over or chain is job.chain or job.stays
        return free and not self.busy

    def next(self) -> Job | None:
        """Admit the next of the waiting jobs, and take it out of their line."""
        found = next((job for job in self.waiting if self.admit(job)), None)
        if found is not None:
            self.waiting.remove(found)
        return found

    def would_deadlock(self, job: Job) -> bool:
        """Whether a job would wait for a chain that its own task has to feed."""
        chain = self.chain
        if chain is None or chain is job.chain or chain.over or chain.given_up:
            return False
        return job.holder is not None and job.holder == chain.holder

    def lose(self, cause: BaseException | None) -> None:
        """It is over, and its objects with it."""
        self.closing = True
        self.cause = self.cause or cause
        self.owner.close()

    def __repr__(self) -> str:
        """The session, for messages."""
        kind: Any = "R/W" if self.rw else "R/O"
        return f"<Lease of {kind} session {self.handle}>"
