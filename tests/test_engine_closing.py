"""The end of a pool: nobody waits for ever, and nothing is left over."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from faultmodule import CKR
from pkcs11_pool import (
    PoolClosed,
    PoolState,
    PoolTimeout,
)
from poolkit import (
    LAST_RESORT,
    Hold,
    Refused,
    digest,
    eventually,
    hangs,
    pool_threads,
    settled,
    time_is_up,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

_SHORT = 0.3


async def test_who_waits_is_told_that_the_pool_closes(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Callers in line get ``PoolClosed`` at once; who runs gets the result."""
    pool = make_pool(module=fault.path, max_sessions=1)
    await pool.open()
    results = []
    with Hold() as hold:

        async def run() -> None:
            results.append(await pool.run(hold, "result"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await hold.entered()
            waiting = [Refused() for _ in range(3)]
            for caller in waiting:
                tasks.start_soon(caller, pool)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(pool.close)
            with anyio.fail_after(LAST_RESORT):
                for caller in waiting:
                    await caller.done.wait()
            assert pool.state is PoolState.CLOSING
            assert not hold.ended
            hold.let_go()
    assert results == [("result",)]
    assert fault.sessions() == []


async def test_closing_refuses_what_comes_later(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """While it closes and afterwards a pool sends nothing more for callers."""
    pool = make_pool(module=fault.path)
    await pool.open()
    async with anyio.create_task_group() as tasks:
        with Hold() as hold:
            tasks.start_soon(pool.run, hold)
            await hold.entered()
            tasks.start_soon(pool.close)
            await anyio.wait_all_tasks_blocked()
            fault.reset_counts()
            with pytest.raises(PoolClosed):
                await digest(pool)
            with pytest.raises(PoolClosed):
                await pool.session().__aenter__()
            with pytest.raises(PoolClosed):
                await pool.login()
            assert fault.counts() == {}
            hold.let_go()
    fault.reset_counts()
    with pytest.raises(PoolClosed):
        await digest(pool)
    assert fault.counts() == {}


async def test_closed_wins_over_a_deadline_that_is_due(make_pool: MakePool) -> None:
    """A caller in line learns that the pool is closed, not that time is up."""
    pool = make_pool(max_sessions=1)
    await pool.open()
    async with anyio.create_task_group() as tasks:
        with Hold() as hold:
            tasks.start_soon(lambda: pool.run(hold, timeout=None))
            await hold.entered()
            caller = Refused()
            tasks.start_soon(caller, pool)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(pool.close)
            await anyio.wait_all_tasks_blocked()
            # Just then the deadline passes as well.
            time_is_up(pool)
            await caller.done.wait()
            hold.let_go()


async def test_a_cancelled_block_closes_all_the_same(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Cancellation does not leave a pool half open."""
    with anyio.CancelScope() as scope:
        async with make_pool(module=fault.path) as pool:
            await digest(pool)
            scope.cancel()
    assert scope.cancelled_caught
    assert pool.state is PoolState.CLOSED
    assert fault.sessions() == []
    assert fault.count("C_Finalize") == 1
    await eventually(lambda: not pool_threads())


async def test_an_opening_that_is_cancelled_leaves_nothing_open(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The pool is closed then, and so is what it had opened."""
    pool = make_pool(module=fault.path)
    fault.on("C_Login", hang="before")
    async with anyio.create_task_group() as tasks:

        async def enter() -> None:
            with anyio.CancelScope() as scope:
                cancel.append(scope.cancel)
                await pool.open()

        cancel: list[Any] = []
        tasks.start_soon(enter)
        await hangs(fault, "C_Login")
        cancel[0]()
        await anyio.wait_all_tasks_blocked()
        fault.release()
    assert pool.state is PoolState.CLOSED
    assert fault.sessions() == []
    await eventually(lambda: not pool_threads())


@pytest.mark.parametrize("error", [KeyError("mine"), PoolTimeout("mine", "waiting")])
async def test_the_error_that_leaves_the_block_is_the_one_raised_in_it(
    make_pool: MakePool, error: Exception
) -> None:
    """Neither wrapped in a group nor hidden behind the end of the pool."""
    pool = make_pool()

    async def block() -> None:
        async with pool:
            await digest(pool)
            raise error

    with pytest.raises(type(error)) as caught:
        await block()
    assert caught.value is error
    assert pool.state is PoolState.CLOSED


async def test_a_pool_that_is_closed_while_it_opens_leaves_no_thread(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Whoever opens it hears of that when all is over: no deadline is kept for him."""
    pool = make_pool(module=fault.path, open_timeout=10_000, close_timeout=1_000)
    fault.on("C_GetSlotList", every=True, answer=CKR.DEVICE_ERROR)
    async with anyio.create_task_group() as tasks:

        async def opens() -> None:
            with pytest.raises(PoolClosed):
                await pool.open()

        tasks.start_soon(opens)
        await eventually(lambda: fault.count("C_GetSlotList"))
        closer = threading.Thread(target=anyio.run, args=(pool.close,))
        closer.start()
        # On the loop's own thread, so that the other one cannot hear of it before.
        closer.join(LAST_RESORT)
    assert pool.state is PoolState.CLOSED
    await eventually(lambda: not pool_threads())


async def test_open_and_close_in_different_tasks(make_pool: MakePool) -> None:
    """As frameworks do whose start-up and shutdown run apart."""
    pool = make_pool()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.open)
    assert await digest(pool)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.close)
    assert pool.state is PoolState.CLOSED


async def test_an_async_generator_may_hold_the_block(make_pool: MakePool) -> None:
    """A fixture-like generator that is closed elsewhere ends the pool properly."""

    async def provide() -> AsyncIterator[TokenPool]:
        async with make_pool() as pool:
            yield pool

    generator = provide()
    pool = await anext(generator)
    assert await digest(pool)
    with pytest.raises(StopAsyncIteration):
        await anext(generator)
    assert pool.state is PoolState.CLOSED


async def test_closing_twice_is_harmless(make_pool: MakePool) -> None:
    """Also a pool that was never open can be closed."""
    pool = make_pool()
    async with pool:
        await pool.close()
        await pool.close()
    never = make_pool()
    await never.close()
    assert never.state is PoolState.CLOSED
    with pytest.raises(PoolClosed):
        await never.open()


async def test_a_pool_is_opened_once(make_pool: MakePool) -> None:
    """A closed pool stays closed, and an open one is not opened again."""
    async with make_pool() as pool:
        with pytest.raises(PoolClosed, match="once"):
            await pool.open()
        assert await digest(pool)
    with pytest.raises(PoolClosed, match="once"):
        await pool.open()


async def test_a_pool_that_was_not_opened_says_how(make_pool: MakePool) -> None:
    """The message names the block to write."""
    with pytest.raises(PoolClosed, match="async with"):
        await digest(make_pool())


async def test_an_open_session_ends_with_the_pool(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its later calls say so, and leaving its block is no error."""
    pool = make_pool(module=fault.path)
    await pool.open()
    async with pool.session() as session:
        await digest(session)
        await pool.close()
        assert fault.sessions() == []
        with pytest.raises(PoolClosed):
            await digest(session)


async def test_nothing_is_left_of_a_pool(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """After a load no thread and no session remains, and the module is finalised."""
    async with make_pool(module=fault.path) as pool:
        async with anyio.create_task_group() as tasks:
            for _ in range(30):
                tasks.start_soon(digest, pool)
        await settled(pool)
    await eventually(lambda: not pool_threads())
    assert fault.sessions() == []
    assert fault.count("C_Logout") == fault.count("C_Finalize") == 1
    last = [call.function for call in fault.calls()][-3:]
    assert last == ["C_Logout", "C_CloseSession", "C_Finalize"]


@pytest.mark.parametrize("returns", [True, False])
async def test_the_module_is_not_finalised_while_an_idle_pool_closes_a_session(
    make_pool: MakePool, fault: FaultModule, *, returns: bool
) -> None:
    """What is given back because nobody needs it is a call like any other."""
    grace = LAST_RESORT if returns else _SHORT
    pool = make_pool(module=fault.path, close_timeout=grace)
    await pool.open()
    # The second one: the session opened ahead, after the operation's own. Said before
    # there is one: a machine that stands still for a moment may find it closed.
    fault.on("C_CloseSession", nth=2, hang="before")
    await digest(pool)
    await hangs(fault, "C_CloseSession")  # nobody had anything to do
    own, _ahead = (call.session for call in fault.calls("C_OpenSession")[-2:])
    assert [c.session for c in fault.calls("C_CloseSession") if c.rv == 0] == [own]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.close)
        if returns:
            await anyio.wait_all_tasks_blocked()
            assert fault.count("C_Finalize") == 0
            fault.release()
    assert fault.count("C_Finalize") == returns
    last = fault.calls()[-1]
    assert (last.function == "C_Finalize") == returns
    fault.clear()
    await eventually(lambda: pool.stats().calls_stuck == 0)
    assert pool.stats().calls_lost == (not returns)
