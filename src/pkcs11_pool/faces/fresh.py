"""Operations each in a fresh session of its own: how they are handed to the engine.

A caller who holds all sessions there are would wait for himself: an operation that
has a session for a home runs there then.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pkcs11_pool.errors import WouldDeadlock
from pkcs11_pool.faces import arguments
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.faces.calls import Calls
from pkcs11_pool.faces.waiting import checkpoint, current_waiter
from pkcs11_pool.jobs import Job, Kind, Reading

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pkcs11_pool.cryptoki.keys import SessionObject
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.leases import Hold, Lease, Loan
    from pkcs11_pool.engine.multipart import MultiPart
    from pkcs11_pool.faces.waiting import FaceWaiter
    from pkcs11_pool.jobs import Change

T = TypeVar("T")

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_READ: Final = Kind.READ
_WRITE: Final = Kind.WRITE


class FreshCalls(Calls):
    """What can be done on a token, each call in a session that nobody else uses."""

    @property
    def _owner(self) -> None:
        return None

    def _pool(self) -> Calls:
        return self

    async def _seat(
        self,
        chain: MultiPart,
        deadline: float | None,
        *,
        nowait: bool,
        home: Calls | None,
    ) -> tuple[Lease, Hold | Loan]:
        engine, waiter = self._engine, current_waiter()
        job = Job(
            None,
            Kind.LEASE,
            waiter=waiter,
            deadline=deadline,
            nowait=nowait,
            holder=waiter.holder,
            chain=chain,
        )
        try:
            engine.submit(job)
        except WouldDeadlock:
            if home is None or getattr(home, "closed", True):
                raise
            return await home._seat(chain, deadline, nowait=nowait, home=None)  # noqa: SLF001
        loan: Loan = await waiter.result(engine, job)
        return loan.lease, loan

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
        limit = self._engine.options.timeout
        if timeout is not DEFAULT:
            limit = arguments.timeout(timeout, limit)
        return Job(
            work,
            _WRITE if rw else _READ,
            waiter=waiter,
            deadline=time.monotonic() + limit if limit else None,
            changes=changes,
            restart=restart,
            repeat=repeat,
            rw=rw,
            nowait=limit == 0,
            target=target,
            holder=waiter.holder,
        )

    def _read(
        self, work: Callable[[Session], T], timeout: Timeout, home: Calls | None = None
    ) -> Awaitable[T]:
        # As `_perform`, for the operations that are nearly all: no coroutine is on the
        # way but the one that waits.
        engine = self._engine
        limit = engine.options.timeout
        if timeout is not DEFAULT:
            limit = arguments.timeout(timeout, limit)
        engine.home.check()
        waiter = current_waiter()
        job = Reading(work, waiter, limit)
        try:
            engine.submit(job)
        except WouldDeadlock:
            if home is None or getattr(home, "closed", True):
                raise
            return home._read(work, timeout)  # noqa: SLF001  # one package
        return waiter.result(engine, job)

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
        engine = self._engine
        if timeout is not DEFAULT:
            arguments.timeout(timeout, None)
        engine.home.check()
        if changes:
            await checkpoint()
        waiter = current_waiter()
        job = self._job(
            work,
            timeout,
            waiter=waiter,
            rw=rw,
            changes=changes,
            restart=restart,
            repeat=repeat,
            target=target,
        )
        try:
            engine.submit(job)
        except WouldDeadlock:
            if home is None or getattr(home, "closed", True):
                raise
            return await home._perform(  # noqa: SLF001  # one package
                work,
                timeout,
                changes=changes,
                restart=restart,
                repeat=repeat,
                target=target,
            )
        result: T = await waiter.result(engine, job)
        return result
