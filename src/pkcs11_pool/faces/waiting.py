"""How a caller waits for a job: on asyncio, on trio, or on a plain thread.

Waiting is native to each backend, because it is on the way of every operation.

A caller that is cancelled goes at once where the job allows it. Where the job
may change the token, the caller waits for its outcome first: asyncio's own
``Task.cancel()`` goes through AnyIO's shields, so it is caught here each time
and raised at the end.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import weakref
from asyncio import current_task, get_running_loop
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from weakref import ref

import anyio
import anyio.lowlevel

from pkcs11_pool.errors import PoolClosed, PoolTimeout, WouldBlockLoop
from pkcs11_pool.faces.errands import fetch_pin
from pkcs11_pool.faces.ports import NOWHERE, into_asyncio, into_trio
from pkcs11_pool.jobs import Job, Phase

if TYPE_CHECKING:
    from collections.abc import Coroutine, Hashable

    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.faces.ports import Way
    from pkcs11_pool.jobs import Bell

T = TypeVar("T")

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_SETTLED: Final = Phase.SETTLED
_modules: Final = sys.modules
LATE = 0.05
"""Seconds that a blocking caller allows the engine to give out a deadline."""


class FaceWaiter(Protocol):
    """A waiter that its own caller can wait with."""

    holder: Hashable

    def wake(self) -> bool:
        """See :class:`pkcs11_pool.jobs.Waiter`."""

    def line_up(self) -> Bell | None:
        """See there, too."""

    async def result(self, engine: TokenEngine, job: Job) -> Any:
        """The result of a job, or its error."""

    async def outlast(self, *jobs: Job) -> None:
        """Wait for the end of jobs, through every cancellation; raise that then."""


class _LoopWaiter:
    """One caller on an event loop."""

    # Around a PIN source that this caller awaits, and the job that it is for.
    _errand: tuple[Job, anyio.CancelScope] | None = None

    def __init__(self, port: Way, holder: Hashable) -> None:
        # A call away, because it goes with its loop, and the waiter may stay: the
        # traceback of an error keeps it.
        self._port = port
        self.holder = holder

    def wake(self) -> bool:
        """Called by any thread."""
        port = self._port()
        if port is None or port.ended():
            return False
        port.ready.append(self)
        # Most find that somebody else is waking the loop already.
        return port.scheduled or port.schedule()

    def line_up(self) -> Bell | None:
        """Called by any thread."""
        port = self._port()
        if port is None or port.ended():
            return None
        port.ready.append(self)
        return port

    def resume(self) -> None:
        """Called on the loop."""
        if self._errand is not None:
            job, scope = self._errand
            if job.errand is None:
                # The deadline came, or a login by others: the PIN is not wanted.
                scope.cancel()

    async def _run_errand(self, engine: TokenEngine, job: Job) -> None:
        with anyio.CancelScope() as scope:
            self._errand = (job, scope)
            try:
                await fetch_pin(engine, job)
            finally:
                self._errand = None


class _AsyncioWaiter(_LoopWaiter):
    _future: asyncio.Future[None] | None = None

    def __init__(
        self,
        port: Way,
        holder: Hashable,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        # As its base class: a call less for each operation.
        self._port = port
        self.holder = holder
        self._loop = loop

    def resume(self) -> None:
        if self._errand is not None:
            super().resume()
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)

    def _wait(self) -> asyncio.Future[None]:
        # A new one for each wait, after a look at the job: what came before is seen
        # there, and nothing can come between, because it comes on this thread.
        self._future = future = self._loop.create_future()
        return future

    async def result(self, engine: TokenEngine, job: Job) -> Any:
        try:
            while job.phase is not _SETTLED:
                if job.errand is not None:
                    await self._run_errand(engine, job)
                else:
                    await self._wait()
        except GeneratorExit:
            engine.forget(job)
            raise
        except BaseException:
            if not engine.cancel(job):
                await self.outlast(job)
            raise
        return job.result if job.error is None else outcome(job)

    async def outlast(self, *jobs: Job) -> None:
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            for job in jobs:
                while job.phase is not _SETTLED:
                    try:
                        await self._wait()
                    except asyncio.CancelledError as error:
                        # asyncio says it once only: it must not be lost.
                        cancelled = error
        if cancelled is not None:
            try:
                raise cancelled
            finally:
                del cancelled


class _TrioWaiter(_LoopWaiter):
    def __init__(self, port: Way, holder: Hashable, trio: Any) -> None:
        super().__init__(port, holder)
        self._trio = trio
        self._task: Any = None

    def resume(self) -> None:
        super().resume()
        task, self._task = self._task, None
        if task is not None:
            self._trio.lowlevel.reschedule(task)

    async def _wait(self, engine: TokenEngine | None, job: Job) -> None:
        lowlevel = self._trio.lowlevel

        def abort(_raise_cancel: object) -> Any:
            if engine is not None and engine.cancel(job):
                self._task = None
                return lowlevel.Abort.SUCCEEDED
            return lowlevel.Abort.FAILED

        self._task = lowlevel.current_task()
        await lowlevel.wait_task_rescheduled(abort)

    async def result(self, engine: TokenEngine, job: Job) -> Any:
        try:
            while job.phase is not _SETTLED:
                if job.errand is not None:
                    await self._run_errand(engine, job)
                else:
                    await self._wait(engine, job)
            if job.changes or job.stays:
                await self._trio.lowlevel.checkpoint_if_cancelled()
        except GeneratorExit:
            engine.forget(job)
            raise
        except BaseException:
            if not engine.cancel(job):
                await self.outlast(job)
            raise
        return outcome(job)

    async def outlast(self, *jobs: Job) -> None:
        for job in jobs:
            while job.phase is not _SETTLED:
                await self._wait(None, job)


class _ThreadWaiter:
    """A caller on a thread without an event loop."""

    def __init__(self) -> None:
        self.holder: Hashable = threading.get_ident()
        self._woken = threading.Semaphore(0)

    def wake(self) -> bool:
        self._woken.release()
        return True

    def line_up(self) -> None:
        self.wake()

    async def result(self, engine: TokenEngine, job: Job) -> Any:
        try:
            while job.phase is not _SETTLED:
                if job.errand is not None:
                    # No loop runs on this thread, so one may be run for the PIN.
                    _run_errand_here(engine, job)
                else:
                    self._woken.acquire()
        except BaseException:
            engine.cancel(job)
            raise
        return outcome(job)

    async def outlast(self, *jobs: Job) -> None:
        for job in jobs:
            while job.phase is not _SETTLED:
                self._woken.acquire()


class _Local(threading.local):
    """What the current thread waits with.

    Attributes:
        blocking: Whether its own waiting blocks it.
        asyncio, trio: Give the way into the loop that ran here last, or None. Trio may
            be the guest of asyncio, on one thread by turns.
    """

    def __init__(self) -> None:
        self.blocking = False
        self.asyncio: Way = NOWHERE
        self.trio: Way = NOWHERE


_local = _Local()


def outcome(job: Job) -> Any:
    """The result of a settled job, or its error, raised."""
    if job.error is None:
        return job.result
    try:
        raise job.error
    finally:
        # The traceback holds this frame: without this, it would hold itself.
        del job


def _run_errand_here(engine: TokenEngine, job: Job) -> None:
    """Await a PIN source on a thread without a loop, in a loop for it alone.

    It ends soon after the deadline, which the engine has given out by then.
    """

    async def main() -> None:
        left = None if job.deadline is None else job.deadline - time.monotonic()
        with anyio.move_on_after(None if left is None else left + LATE):
            await fetch_pin(engine, job)

    _local.blocking = False
    try:
        anyio.run(main)
    finally:
        _local.blocking = True


def _trio() -> Any:
    """Trio, or None. While another thread still imports it, no loop of it runs."""
    trio = sys.modules.get("trio")
    return trio if hasattr(trio, "lowlevel") else None


def current_waiter() -> FaceWaiter:
    """The waiter for whoever calls: a task of asyncio or trio, or a thread.

    Raises:
        RuntimeError: Neither runs here, and the call is not a blocking one.
    """
    local = _local
    if local.blocking:
        return _ThreadWaiter()
    trio: Any = _modules.get("trio")
    if (
        trio is not None
        # While another thread still imports it, no loop of it runs.
        and hasattr(trio, "lowlevel")
        and trio.lowlevel.in_trio_task()
    ):
        token = trio.lowlevel.current_trio_token()
        port = local.trio()
        if port is None or port.loop is not token:
            local.trio = into_trio(token)
        me = weakref.ref(trio.lowlevel.current_task())
        return _TrioWaiter(local.trio, me, trio)
    loop = get_running_loop()
    way = local.asyncio
    port = way()
    if port is None or port.loop is not loop:
        way = local.asyncio = into_asyncio(loop)
    task = current_task(loop)
    # Weak, or a session held by a task would keep the task, which keeps the session.
    return _AsyncioWaiter(way, None if task is None else ref(task), loop)


async def checkpoint() -> None:
    """Raise the cancellation of the caller, before anything is sent."""
    if not _local.blocking:
        await anyio.lowlevel.checkpoint_if_cancelled()


async def ended(engine: TokenEngine, job: Job, waiter: FaceWaiter) -> None:
    """Wait for the end of a session, which comes in any case, but not for ever.

    The error that leaves a block is the one raised in it.
    """
    with suppress(PoolTimeout, PoolClosed):
        await waiter.result(engine, job)


def blocks() -> bool:
    """Whether this is a blocking call, that can await nothing but the engine."""
    return _local.blocking


def loop_runs_here() -> bool:
    """Whether the current thread runs an event loop."""
    trio = _trio()
    if trio is not None and trio.lowlevel.in_trio_run():
        return True
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run one of the faces' coroutines on this thread, without an event loop.

    Raises:
        WouldBlockLoop: The thread runs an event loop, which would stand still.
    """
    if loop_runs_here():
        coroutine.close()
        message = (
            "this thread runs an event loop, which would stand still: await the async "
            "form, or call from a worker thread (anyio.to_thread.run_sync)"
        )
        raise WouldBlockLoop(message)
    _local.blocking = True
    try:
        return await_nothing(coroutine)
    finally:
        _local.blocking = False


def await_nothing(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends: its waiting blocks the thread."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    message = "a blocking call tried to wait for an event loop"
    raise RuntimeError(message)
