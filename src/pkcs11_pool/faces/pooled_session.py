"""A session of the pool in the caller's hands, for the length of a block."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

from pkcs11_pool.engine.leases import Hold
from pkcs11_pool.faces import arguments
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.faces.calls import Calls
from pkcs11_pool.faces.waiting import checkpoint, current_waiter, ended
from pkcs11_pool.jobs import Job, Kind

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from pkcs11_pool.cryptoki.keys import ObjectOwner, SessionObject
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.leases import Lease, Loan
    from pkcs11_pool.engine.multipart import MultiPart
    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.faces.waiting import FaceWaiter
    from pkcs11_pool.jobs import Change
    from pkcs11_pool.state import SessionInfo

T = TypeVar("T")


class PooledSession(Calls):
    """One session, open for a block; it owns the session objects made through it.

    It has the pool's own operations, all in this one session, one at a time and in
    order. It holds no thread. When the block ends, the session is closed, and its
    session objects are gone with it (PKCS#11 v3.1, "Session objects").

    Example:
        .. code-block:: python

            async with pool.session() as session:
                secret = await session.generate_key(KeyType.AES, 256)
                sealed = await secret.encrypt(b"data", mechanism_param=bytes(16))
            # `secret` is gone
    """

    def __init__(self, engine: TokenEngine, pool: Calls, lease: Lease) -> None:
        self._engine = engine
        self._of = pool
        self._lease = lease

    @property
    def handle(self) -> int:
        """The session's number."""
        return self._lease.handle

    @property
    def rw(self) -> bool:
        """Whether it is read-write."""
        return self._lease.rw

    @property
    def closed(self) -> bool:
        """Whether it is over, by its block's end or by a loss."""
        return self._lease.closing

    async def info(self, *, timeout: Timeout = DEFAULT) -> SessionInfo:
        """What the token says of this session: state, kind, device error, slot.

        Args:
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            What the token says; nothing of it is guessed.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_GetSessionInfo``.

        Source:
            PKCS#11 v3.1, "Session management functions".
        """
        return await self._perform(lambda session: session.info(), timeout)

    @property
    def _owner(self) -> ObjectOwner:
        return self._lease.owner

    def _pool(self) -> Calls:
        return self._of

    async def _seat(
        self,
        chain: MultiPart,
        deadline: float | None,
        *,
        nowait: bool,
        home: Calls | None,
    ) -> tuple[Lease, Hold | Loan]:
        del deadline, nowait, home  # the session is there
        return self._lease, Hold(self._lease, chain, self._engine.orphans)

    def _job(
        self,
        work: Callable[[Session], Any],
        timeout: Timeout,
        *,
        waiter: FaceWaiter,
        rw: bool = False,
        changes: Change | bool = False,
        restart: bool = True,
        repeat: bool = False,
        target: SessionObject | None = None,
    ) -> Job:
        del rw  # the session is what it is
        limit = arguments.timeout(timeout, self._engine.options.timeout)
        return Job(
            work,
            Kind.LANE,
            waiter=waiter,
            deadline=time.monotonic() + limit if limit else None,
            changes=changes,
            restart=restart,
            repeat=repeat,
            nowait=limit == 0,
            lane=self._lease,
            target=target,
            holder=waiter.holder,
        )

    async def _perform(
        self,
        work: Callable[[Session], T],
        timeout: Timeout,
        *,
        rw: bool = False,
        changes: Change | bool = False,
        restart: bool = True,
        repeat: bool = False,
        home: Calls | None = None,
        target: SessionObject | None = None,
    ) -> T:
        del rw, home  # the session is what it is
        arguments.timeout(timeout, None)
        self._engine.home.check()
        if changes:
            await checkpoint()
        waiter = current_waiter()
        job = self._job(
            work,
            timeout,
            waiter=waiter,
            changes=changes,
            restart=restart,
            repeat=repeat,
            target=target,
        )
        self._engine.submit(job)
        result: T = await waiter.result(self._engine, job)
        return result

    def __repr__(self) -> str:
        """Number, kind, and whether it is open."""
        kind = "R/W" if self.rw else "R/O"
        state = "closed" if self.closed else "open"
        return f"<PooledSession {self.handle} {kind} {state}>"


class SessionBlock:
    """``async with pool.session() as session:``."""

    def __init__(
        self, engine: TokenEngine, pool: Calls, *, rw: bool, timeout: float | None
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._rw = rw
        self._timeout = timeout
        self._loan: Loan | None = None

    async def __aenter__(self) -> PooledSession:
        """Wait for a session.

        Raises:
            WouldDeadlock: All are lent, one of them to this task.
            PoolTimeout: None came free in time.
        """
        limit = self._timeout
        self._engine.home.check()
        waiter = current_waiter()
        job = Job(
            None,
            Kind.LEASE,
            rw=self._rw,
            waiter=waiter,
            deadline=time.monotonic() + limit if limit else None,
            nowait=limit == 0,
            holder=waiter.holder,
        )
        self._engine.submit(job)
        loan: Loan = await waiter.result(self._engine, job)
        # From here on the block holds it: forgotten, it is given back.
        self._loan = loan
        return PooledSession(self._engine, self._pool, loan.lease)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the session, on a worker; its running call is let finish."""
        loan, self._loan = self._loan, None
        if loan is None or kind is GeneratorExit:
            # The block was forgotten with its loop: nothing can be awaited any more,
            # and the session is an orphan.
            return
        if self._engine.home.is_forked:
            # In a child the session is its parent's.
            return
        waiter = current_waiter()
        job = self._engine.end_lease(loan.lease, waiter)
        if job is not None:
            await ended(self._engine, job, waiter)
