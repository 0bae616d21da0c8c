"""A session that stays open for somebody, and the jobs that wait for it.

A lease holds one session and no thread. Its jobs run one at a time, in order,
on the engine's workers.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from pkcs11_pool.errors import SessionClosed
from pkcs11_pool.keys import ObjectOwner

if TYPE_CHECKING:
    from collections.abc import Hashable

    from pkcs11_pool.jobs import Job
    from pkcs11_pool.session import Session


class Loan:
    """A lease on its way to somebody, or in somebody's hands.

    When it is forgotten, with the event loop that it was for, or with a block that
    never ends, the lease is an orphan: the engine closes it when it looks around.
    """

    __slots__ = ("_orphans", "lease")

    def __init__(self, lease: Lease, orphans: deque[Lease]) -> None:
        self.lease = lease
        self._orphans = orphans

    def __del__(self) -> None:
        """Called by the garbage collector, anywhere: takes no lock."""
        if not self.lease.closing:
            self._orphans.append(self.lease)


class Lease:
    """One session of the pool in somebody's hands.

    Attributes:
        session: The session; the engine's until it is closed.
        holder: The task or thread that has it.
        owner: The life of the session objects that are made in it.
        cause: Why it was lost, or None.
        busy: Whether one of its jobs is queued at the engine or running.
        closing: Whether it takes no more jobs.
    """

    def __init__(self, session: Session, holder: Hashable) -> None:
        self.session = session
        self.handle = session.handle
        self.rw = session.rw
        self.holder = holder
        self.owner = ObjectOwner()
        self.waiting: deque[Job] = deque()
        self.busy = False
        self.closing = False
        #: Whether the engine counts its session as open.
        self.counted = True
        self.cause: BaseException | None = None

    def error(self) -> SessionClosed:
        """Why it takes no more jobs, with the cause if it was lost."""
        if self.cause is None:
            return SessionClosed("this session is closed")
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

    def lose(self, cause: BaseException | None) -> None:
        """It is over, and its objects with it."""
        self.closing = True
        self.cause = self.cause or cause
        self.owner.close()

    def __repr__(self) -> str:
        """The session, for messages."""
        kind: Any = "R/W" if self.rw else "R/O"
        return f"<Lease of {kind} session {self.handle}>"
