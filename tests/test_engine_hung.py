"""The end of a pool with a call inside the module that does not come back."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from faultmodule import CKR
from pkcs11_pool import (
    PoolError,
    PoolState,
)
from poolkit import (
    LAST_RESORT,
    Hold,
    Refused,
    blocking,
    closes_in_time,
    digest,
    eventually,
    hangs,
    lost,
    pool_threads,
    workers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import SoftHSM

_SHORT = 0.3


@pytest.fixture(autouse=True)
def finalised(soft_hsm: SoftHSM) -> Iterator[None]:
    """Finalise a module that was kept for a lost call: else the next pool would."""
    yield
    ctypes.CDLL(str(soft_hsm.module)).C_Finalize(None)


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
        await closes_in_time(pool)
        await caller.done.wait()
    stats = pool.stats()
    assert (stats.calls_lost, stats.calls_stuck) == (1, 1)
    assert fault.count("C_Finalize") == 0
    # An idle one, if there was any, ends when it is its turn.
    await eventually(lambda: len(workers()) == 1)
    await eventually(lambda: "pkcs11-pool login actor" not in pool_threads())
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
    await closes_in_time(pool)
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
        await closes_in_time(pool)
        await caller.done.wait()
    assert fault.count("C_Finalize") == 0
    fault.release()
    await eventually(lambda: not pool_threads())


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


async def test_the_error_of_the_block_survives_a_hung_call(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Trouble at the end does not take the place of the error."""
    fault.on("C_Digest", hang="before")

    async def block() -> None:
        async with make_pool(module=fault.path, close_timeout=0.1) as pool:
            await lost(pool, fault)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await block()
    fault.release()
    await eventually(lambda: not workers())


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
    hold = Hold()

    def actor_ends() -> None:
        # On the loop's own thread, so the first closer cannot hear of it.
        hold.let_go()
        for thread in threading.enumerate():
            if thread.name == "pkcs11-pool login actor":
                thread.join(LAST_RESORT)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.run, hold)
        await hold.entered()
        tasks.start_soon(pool.close)
        await anyio.wait_all_tasks_blocked()
        actor_ends()
        await closes_in_time(pool, 0.5)


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
        with anyio.fail_after(LAST_RESORT):
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
        with anyio.fail_after(LAST_RESORT):
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
        with anyio.fail_after(LAST_RESORT):
            await caller.done.wait()
