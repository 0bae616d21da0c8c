"""Cancellation: who may go at once, who waits for the outcome, and what remains."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from pkcs11 import KeyType

from pkcs11_pool import PoolTimeout
from poolkit import (
    ASYNCIO_ONLY,
    Hold,
    digest,
    eventually,
    hangs,
    settled,
    time_is_up,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool


class Caller:
    """A task that makes one call, and what it saw.

    Attributes:
        done: Set when the call is over, in whichever way.
        cancelled: Whether it ended by a cancellation.
    """

    def __init__(self, call: Callable[[], Awaitable[Any]]) -> None:
        self._call = call
        self.done = anyio.Event()
        self.cancelled = False
        self.result: Any = None
        self.scope = anyio.CancelScope()

    async def __call__(self) -> None:
        """Make the call."""
        try:
            with self.scope:
                self.result = await self._call()
        finally:
            self.cancelled = self.scope.cancelled_caught
            self.done.set()


async def _nothing_is_lost(pool: TokenPool) -> None:
    """All sessions are there again, and all of them can be used."""
    await settled(pool)
    async with anyio.create_task_group() as tasks:
        with Hold() as hold:
            for _ in range(pool.stats().sessions_max):
                tasks.start_soon(pool.run, hold)
            await hold.entered(pool.stats().sessions_max)
            hold.let_go()


@pytest.mark.parametrize("rw", [False, True])
async def test_cancelled_while_waiting_nothing_happened(
    make_pool: MakePool, fault: FaultModule, *, rw: bool
) -> None:
    """A call that stands in line is taken out, whether it changes the token or not."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                fault.reset_counts()
                waiting = Caller(lambda: pool.run(hold, 1, rw=rw))
                tasks.start_soon(waiting)
                await anyio.wait_all_tasks_blocked()
                waiting.scope.cancel()
                await waiting.done.wait()
                assert waiting.cancelled
                assert fault.counts() == {}
                stats = pool.stats()
                assert (stats.operations_waiting, stats.operations_cancelled) == (0, 1)
                hold.let_go()
        assert hold.calls == [()]
        await _nothing_is_lost(pool)


async def test_cancelled_before_it_begins_nothing_happened(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """In a scope that is cancelled already, a call that changes sends nothing."""
    async with make_pool(module=fault.path) as pool:
        fault.reset_counts()
        with Hold() as hold, anyio.CancelScope() as scope:
            scope.cancel()
            await pool.run(hold, rw=True)
        assert scope.cancelled_caught
        assert hold.calls == []
        assert fault.counts() == {}


async def test_cancelled_while_its_session_is_opened_the_function_is_not_called(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Nobody waits for the result any more, so nothing is done for it."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_OpenSession", hang="before")
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                caller = Caller(lambda: pool.run(hold))
                tasks.start_soon(caller)
                await hangs(fault, "C_OpenSession")
                caller.scope.cancel()
                await caller.done.wait()
                fault.release()
            await _nothing_is_lost(pool)
        assert hold.calls == []


async def test_a_running_call_is_left_at_once(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The caller goes; the call counts as running until it returns."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", hang="before")
        async with anyio.create_task_group() as tasks:
            caller = Caller(lambda: digest(pool))
            tasks.start_soon(caller)
            await hangs(fault, "C_Digest")
            caller.scope.cancel()
            await caller.done.wait()
            assert caller.cancelled
            stats = pool.stats()
            assert (stats.operations_running, stats.operations_cancelled) == (1, 1)
            fault.release()
        await _nothing_is_lost(pool)
        assert pool.stats().calls_lost == 0


async def test_a_call_that_changes_waits_for_its_outcome(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Cancelled inside the module it goes on, and is cancelled afterwards."""
    async with make_pool(module=fault.path) as pool:
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                caller = Caller(lambda: pool.run(hold, rw=True))
                tasks.start_soon(caller)
                await hold.entered()
                caller.scope.cancel()
                await anyio.wait_all_tasks_blocked()
                assert not caller.done.is_set()
                hold.let_go()
                await caller.done.wait()
        assert hold.ended == 1
        assert caller.cancelled
        assert caller.result is None
        await _nothing_is_lost(pool)


async def test_a_key_is_there_when_its_making_was_cancelled(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Who cancels a generation knows afterwards that it is over."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_GenerateKey", hang="before")
        async with anyio.create_task_group() as tasks:
            caller = Caller(
                lambda: pool.generate_key(KeyType.AES, 128, label="made", store=True)
            )
            tasks.start_soon(caller)
            await hangs(fault, "C_GenerateKey")
            caller.scope.cancel()
            await anyio.wait_all_tasks_blocked()
            assert not caller.done.is_set()
            fault.release()
        assert caller.cancelled
        assert len(await pool.find()) == 1


async def test_a_deadline_ends_the_wait_for_an_outcome(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A cancelled call that changes waits no longer than its own deadline."""
    async with make_pool(module=fault.path) as pool:
        with Hold() as hold:
            caller = Caller(lambda: pool.run(hold, rw=True))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(caller)
                await hold.entered()
                caller.scope.cancel()
                await anyio.wait_all_tasks_blocked()
                time_is_up(pool)
            assert caller.cancelled
            assert hold.ended == 0
            assert pool.stats().calls_lost == 1
        await eventually(lambda: pool.stats().calls_stuck == 0)


async def test_the_callers_own_limit_is_no_pool_timeout(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``fail_after`` raises what AnyIO raises."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", hang="before")
        with pytest.raises(TimeoutError) as caught, anyio.fail_after(0.1):
            await digest(pool)
        assert not isinstance(caught.value, PoolTimeout)
        assert pool.stats().operations_cancelled == 1
        fault.clear()
        await _nothing_is_lost(pool)


@ASYNCIO_ONLY
async def test_asyncios_own_limit_is_no_pool_timeout(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``asyncio.timeout`` raises what asyncio raises."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", hang="before")
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.1):
                await digest(pool)
        assert not isinstance(caught.value, PoolTimeout)
        fault.clear()
        await _nothing_is_lost(pool)


@ASYNCIO_ONLY
async def test_asyncios_own_cancel_leaves_a_running_call_at_once(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``Task.cancel()`` ends the wait for a call that changes nothing."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", hang="before")
        task = asyncio.create_task(digest(pool))
        await hangs(fault, "C_Digest")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.stats().operations_running == 1
        fault.release()
        await _nothing_is_lost(pool)


@ASYNCIO_ONLY
@pytest.mark.parametrize("times", [1, 3])
async def test_asyncios_own_cancel_waits_for_an_outcome(
    make_pool: MakePool, times: int
) -> None:
    """However often a task is cancelled, it learns the outcome first."""
    async with make_pool() as pool:
        with Hold() as hold:
            task = asyncio.create_task(pool.run(hold, rw=True))
            await hold.entered()
            for _ in range(times):
                task.cancel()
                await anyio.wait_all_tasks_blocked()
                assert not task.done()
            hold.let_go()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert hold.ended == 1
        await _nothing_is_lost(pool)


@ASYNCIO_ONLY
async def test_asyncios_own_limit_waits_for_an_outcome(make_pool: MakePool) -> None:
    """``asyncio.timeout`` over a call that changes is late rather than wrong."""
    async with make_pool() as pool:
        with Hold() as hold:
            limit = asyncio.timeout(None)

            async def limited() -> None:
                async with limit:
                    await pool.run(hold, rw=True)

            task = asyncio.create_task(limited())
            await hold.entered()
            # Not before: a call that is in line yet may go at once.
            limit.reschedule(asyncio.get_running_loop().time())
            await eventually(limit.expired)
            await anyio.wait_all_tasks_blocked()
            assert not task.done()
            hold.let_go()
            with pytest.raises(TimeoutError):
                await task
            assert hold.ended == 1


async def test_many_cancelled_calls_leave_nothing_behind(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Cancelled at any point of their way, calls neither leak nor block."""
    async with make_pool(module=fault.path, max_sessions=3) as pool:

        async def work(number: int) -> None:
            for turn in range(20):
                with anyio.CancelScope() as scope:
                    if turn % 2:
                        scope.cancel()
                    else:
                        scope.deadline = anyio.current_time() + 0.0003 * (
                            (number + turn) % 7
                        )
                    await pool.run(lambda _: None, rw=turn % 3 == 0)
                with anyio.CancelScope() as scope:
                    scope.deadline = anyio.current_time() + 0.0003 * (turn % 5)
                    async with pool.session() as session:
                        await digest(session)

        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(work, number)
        await eventually(lambda: pool.stats().sessions_leased == 0)
        await _nothing_is_lost(pool)
        await eventually(lambda: pool.stats().sessions_open == 0)
        await eventually(lambda: len(fault.sessions()) == 1)
