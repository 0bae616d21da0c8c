"""The end of a pool: nobody waits for ever, and nothing is left over."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from faultmodule import CKR
from pkcs11_pool import (
    PoolClosed,
    PoolError,
    PoolState,
    PoolTimeout,
)
from poolkit import (
    LAST_RESORT,
    Hold,
    blocking,
    digest,
    eventually,
    hangs,
    settled,
    wait_for,
    workers,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import SoftHSM

_SHORT = 0.3


@pytest.fixture(autouse=True)
def finalised(soft_hsm: SoftHSM) -> Iterator[None]:
    """Finalise a module that was kept for a lost call: else the next pool would."""
    yield
    ctypes.CDLL(str(soft_hsm.module)).C_Finalize(None)


def _threads() -> list[str]:
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith("pkcs11-pool")]


class Refused:
    """A caller who is told that the pool is closed."""

    def __init__(self, error: type[PoolError] = PoolClosed) -> None:
        self.error = error
        self.done = anyio.Event()

    async def __call__(self, pool: TokenPool, **options: Any) -> None:
        """Make a call that does not end well."""
        with pytest.raises(self.error):
            await digest(pool, **options)
        self.done.set()


async def _closes_in_time(pool: TokenPool, promised: float = _SHORT) -> None:
    began = time.monotonic()
    await pool.close()
    assert time.monotonic() - began < 3 * promised
    assert pool.state is PoolState.CLOSED


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
            with anyio.fail_after(5):
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
    pool = make_pool(max_sessions=1, timeout=0.2)
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
            # The loop stands still until the deadline has passed as well.
            until = time.monotonic() + 0.4
            wait_for(lambda: time.monotonic() > until)
            await caller.done.wait()
            hold.let_go()


async def test_a_hung_call_does_not_hold_up_the_end(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The call is lost, nothing is finalised under it, and its thread ends later."""
    pool = make_pool(module=fault.path, close_timeout=_SHORT)
    await pool.open()
    fault.on("C_Digest", hang="before")
    async with anyio.create_task_group() as tasks:
        caller = Refused()
        tasks.start_soon(caller, pool)
        await hangs(fault, "C_Digest")
        await _closes_in_time(pool)
        await caller.done.wait()
    stats = pool.stats()
    assert (stats.calls_lost, stats.calls_stuck) == (1, 1)
    assert fault.count("C_Finalize") == 0
    assert len(workers()) == 1
    assert _threads().count("pkcs11-pool login actor") == 0
    fault.release()
    await eventually(lambda: not workers())
    assert pool.stats().calls_stuck == 0
    assert fault.sessions() == []


@pytest.mark.parametrize("function", ["C_OpenSession", "C_CloseSession"])
async def test_a_hang_behind_the_caller_is_no_reason_to_finalise(
    make_pool: MakePool, fault: FaultModule, function: str
) -> None:
    """Opening ahead and closing behind are calls inside the module as well."""
    pool = make_pool(module=fault.path, close_timeout=_SHORT)
    await pool.open()
    # The second one: the session after the operation's own.
    fault.on(function, nth=2 if function == "C_OpenSession" else 1, hang="before")
    await digest(pool)
    await hangs(fault, function)
    await _closes_in_time(pool)
    assert fault.count("C_Finalize") == 0
    stats = pool.stats()
    assert (stats.calls_lost, stats.calls_stuck) == (1, 1)
    fault.release()
    await eventually(lambda: not workers())
    assert pool.stats().calls_stuck == 0


async def test_a_hung_call_in_a_module_that_takes_turns(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Where nothing can enter any more, closing still ends in time."""
    pool = make_pool(module=fault.path, close_timeout=_SHORT, serialize=True)
    await pool.open()
    fault.on("C_Digest", hang="before")
    async with anyio.create_task_group() as tasks:
        caller = Refused()
        tasks.start_soon(caller, pool)
        await hangs(fault, "C_Digest")
        await _closes_in_time(pool)
        await caller.done.wait()
    assert fault.count("C_Finalize") == 0
    fault.release()
    await eventually(lambda: not _threads())


async def test_the_module_is_usable_again_when_the_lost_call_is_back(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It was never finalised: the next pool must not take it for a stranger's."""
    pool = make_pool(module=fault.path, close_timeout=_SHORT)
    await pool.open()
    fault.on("C_Digest", hang="before")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Refused(), pool)
        await hangs(fault, "C_Digest")
        await pool.close()
    fault.release()
    await eventually(lambda: not workers())
    async with make_pool(module=fault.path) as another:
        assert await digest(another)
    assert fault.sessions() == []
    assert fault.count("C_Finalize") == 1


async def test_the_next_pool_takes_a_module_over_with_a_call_inside(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A lost call keeps the module as it is, and the next pool works beside it."""
    pool = make_pool(module=fault.path, close_timeout=_SHORT)
    await pool.open()
    fault.on("C_Digest", hang="before")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Refused(), pool)
        await hangs(fault, "C_Digest")
        await pool.close()
    async with make_pool(module=fault.path) as another:
        assert await digest(another)
        assert fault.count("C_Initialize") == 1
        fault.release()
        await eventually(lambda: pool.stats().calls_stuck == 0)
        assert await digest(another)
    assert fault.count("C_Finalize") == 1


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
    await eventually(lambda: not _threads())


async def test_a_cancelled_block_waits_for_a_busy_actor(
    make_pool: MakePool, fault: FaultModule, token: Any
) -> None:
    """Closing is not given up because the actor is not ready for it at once."""
    pool = make_pool(module=fault.path, pin=None)
    await pool.open()
    fault.on("C_Login", hang="before")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.login, token.user_pin)
        await hangs(fault, "C_Login")

        async def close() -> None:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await pool.close()

        tasks.start_soon(close)
        await anyio.wait_all_tasks_blocked()
        assert pool.state is PoolState.CLOSING
        fault.release()
    assert fault.sessions() == []
    assert fault.count("C_Finalize") == 1


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
    await eventually(lambda: not _threads())


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


async def test_the_error_of_the_block_survives_a_hung_call(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Trouble at the end does not take the place of the error."""
    fault.on("C_Digest", hang="before")

    async def block() -> None:
        async with make_pool(module=fault.path, close_timeout=0.1) as pool:
            with pytest.raises(PoolTimeout):
                await digest(pool, timeout=0.1)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await block()
    fault.release()
    await eventually(lambda: not workers())


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


async def test_two_tasks_close_at_once(make_pool: MakePool) -> None:
    """Both come back when it is closed."""
    pool = make_pool()
    await pool.open()
    with Hold() as hold, anyio.fail_after(LAST_RESORT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.run, hold)
            await hold.entered()
            tasks.start_soon(pool.close)
            tasks.start_soon(pool.close)
            await anyio.wait_all_tasks_blocked()
            hold.let_go()
    assert pool.state is PoolState.CLOSED


async def test_closing_just_when_another_has_closed(make_pool: MakePool) -> None:
    """A second closer that comes between the end and its news is not left alone."""
    pool = make_pool(close_timeout=1)
    await pool.open()

    def actor_ends() -> None:
        for thread in threading.enumerate():
            if thread.name == "pkcs11-pool login actor":
                thread.join(LAST_RESORT)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.close)
        await anyio.lowlevel.checkpoint()
        # On the loop's own thread, so the first closer cannot have heard of it yet.
        actor_ends()
        await _closes_in_time(pool, 0.5)


async def test_a_session_block_that_ends_while_the_pool_closes(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its end is part of the pool's: nobody waits for the other."""
    pool = make_pool(module=fault.path, close_timeout=_SHORT)
    await pool.open()
    fault.on("C_Digest", hang="before")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Refused(), pool)
        await hangs(fault, "C_Digest")
        with anyio.fail_after(5):
            async with pool.session():
                tasks.start_soon(pool.close)
                await anyio.wait_all_tasks_blocked()
                assert pool.state is PoolState.CLOSING
        await eventually(lambda: pool.state is PoolState.CLOSED)
        fault.release()
    await eventually(lambda: fault.sessions() == [])


async def test_who_is_sent_back_into_the_line_while_the_pool_closes(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No line is served any more, so nobody may be put in one."""
    pool = make_pool(module=fault.path, close_timeout=1)
    await pool.open()
    fault.on("C_OpenSession", hang="before", answer=CKR.SESSION_COUNT)
    async with anyio.create_task_group() as tasks:
        caller = Refused()
        tasks.start_soon(caller, pool)
        await hangs(fault, "C_OpenSession")
        tasks.start_soon(pool.close)
        await anyio.wait_all_tasks_blocked()
        fault.release()
        with anyio.fail_after(5):
            await caller.done.wait()


async def test_who_needs_a_login_while_the_pool_closes(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No login comes any more, so nobody may wait for it."""
    pool = make_pool(module=fault.path, close_timeout=1)
    await pool.open()
    fault.on("C_Digest", hang="before", answer=CKR.USER_NOT_LOGGED_IN)
    async with anyio.create_task_group() as tasks:
        caller = Refused(PoolError)
        tasks.start_soon(caller, pool)
        await hangs(fault, "C_Digest")
        tasks.start_soon(pool.close)
        await anyio.wait_all_tasks_blocked()
        await blocking(fault.lose_login)
        fault.release()
        with anyio.fail_after(5):
            await caller.done.wait()


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
    await eventually(lambda: not _threads())
    assert fault.sessions() == []
    assert fault.count("C_Logout") == fault.count("C_Finalize") == 1
    last = [call.function for call in fault.calls()][-3:]
    assert last == ["C_Logout", "C_CloseSession", "C_Finalize"]
