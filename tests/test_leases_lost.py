"""Leases that end otherwise than by the end of their block."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import TYPE_CHECKING, Literal

import anyio
import pkcs11
import pytest
from pkcs11 import KeyType, Mechanism

from pkcs11_pool import (
    PooledSession,
    PoolTimeout,
    SessionClosed,
)
from poolkit import (
    LAST_RESORT,
    Hold,
    blocking,
    digest,
    eventually,
    hangs,
    settled,
    time_is_up,
    wait_for,
)

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

_BLOCK = b"b" * 16


async def test_a_cancelled_call_leaves_the_session_usable(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It is busy until the call returns, and then goes on with its objects."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        secret = await session.generate_key(KeyType.AES, 128)
        fault.on("C_Digest", hang="before")
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as inner:
                    inner.start_soon(digest, session)
                    await hangs(fault, "C_Digest")
                    scope.cancel()
            after = anyio.Event()

            async def next_call() -> None:
                await secret.on(session).encrypt(_BLOCK, mechanism=Mechanism.AES_ECB)
                after.set()

            tasks.start_soon(next_call)
            await anyio.wait_all_tasks_blocked()
            assert not after.is_set()
            assert fault.count("C_EncryptInit") == 0
            fault.release()
        assert after.is_set()
        assert not session.closed


async def test_after_a_timeout_inside_the_session_is_gone(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its later calls, those in line too, say why; it is never reopened."""
    async with make_pool(module=fault.path) as pool:
        async with pool.session() as session:
            fault.on("C_Digest", hang="before")
            errors: list[BaseException] = []

            async def in_line() -> None:
                try:
                    await digest(session, timeout=None)
                except SessionClosed as error:
                    errors.append(error)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_times_out, session)
                await hangs(fault, "C_Digest")
                tasks.start_soon(in_line)
                await anyio.wait_all_tasks_blocked()
                time_is_up(pool)
            assert session.closed
            with pytest.raises(SessionClosed) as caught:
                await digest(session)
            assert isinstance(caught.value, pkcs11.SessionClosed)
            for error in (caught.value, *errors):
                assert isinstance(error.__cause__, PoolTimeout)
            assert len(errors) == 1
            assert pool.stats().sessions_leased == 0
        fault.release()
        await eventually(lambda: pool.stats().calls_stuck == 0)
        assert session.handle not in {s.number for s in fault.sessions()}


async def _times_out(session: PooledSession) -> None:
    with pytest.raises(PoolTimeout) as caught:
        await digest(session)
    assert caught.value.phase == "running"


async def test_a_timeout_while_waiting_leaves_the_session(make_pool: MakePool) -> None:
    """Nothing of that call was sent, so the session is as it was."""
    async with make_pool() as pool, pool.session() as session:
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(session.run, hold)
                await hold.entered()
                with pytest.raises(PoolTimeout) as caught:
                    await digest(session, timeout=0.1)
                assert caught.value.phase == "waiting"
                with pytest.raises(PoolTimeout):
                    await digest(session, timeout=0)
                hold.let_go()
        assert await digest(session)


async def test_a_cancelled_block_gives_its_session_back(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Whether the worker is quick or not, the session is closed."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        for _ in range(20):
            with anyio.CancelScope() as scope:
                async with pool.session():
                    scope.cancel()
        assert await digest(pool, timeout=LAST_RESORT)
        await eventually(lambda: pool.stats().sessions_leased == 0)
        await eventually(lambda: len(fault.sessions()) == 1)


async def test_a_cancelled_block_gives_its_session_back_when_its_call_is_back(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The block's end is not given up because a call is inside."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        fault.on("C_Digest", hang="before")
        scope = anyio.CancelScope()

        async def block() -> None:
            with scope:
                async with pool.session() as session:
                    await digest(session)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(block)
            await hangs(fault, "C_Digest")
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            fault.release()
        assert scope.cancelled_caught
        assert pool.stats().sessions_leased == 0
        assert await digest(pool, timeout=LAST_RESORT)


def _arrives(pool: TokenPool, fault: FaultModule) -> None:
    """Let a lease arrive, on the loop's own thread: its caller cannot be resumed."""
    fault.release("C_OpenSession")
    wait_for(lambda: pool.stats().sessions_leased == 1)


async def test_a_block_whose_call_never_returns_ends_with_that_calls_deadline(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The session is lost with the call; of that the block's end has nothing to say."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", hang="before")
        scope = anyio.CancelScope()
        sessions = []

        async def block() -> None:
            async with pool.session() as session:
                sessions.append(session)
                with scope:
                    await digest(session)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(block)
            await hangs(fault, "C_Digest")
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            time_is_up(pool)
        assert sessions[0].closed
        assert pool.stats().calls_lost == 1
        assert pool.stats().sessions_leased == 0
        fault.release()
        await eventually(lambda: pool.stats().calls_stuck == 0)


async def test_a_lease_for_a_caller_just_cancelled_is_given_back(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It was there, but its caller never heard of it."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        fault.on("C_OpenSession", hang="before")
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.session().__aenter__)
                await hangs(fault, "C_OpenSession")
                _arrives(pool, fault)
                scope.cancel()
        await eventually(lambda: pool.stats().sessions_leased == 0)
        assert await digest(pool, timeout=LAST_RESORT)


async def test_who_lost_a_lease_by_cancellation_may_ask_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A task is no holder of a session that it never got."""
    async with make_pool(module=fault.path, max_sessions=2) as pool:
        fault.on("C_OpenSession", hang="before")
        fault.on("C_CloseSession", hang="before")
        scope = anyio.CancelScope()

        async def ask_twice() -> None:
            with scope:
                await pool.session().__aenter__()
            async with pool.session(timeout=LAST_RESORT) as session:
                assert await digest(session)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_twice)
            await hangs(fault, "C_OpenSession")
            _arrives(pool, fault)
            scope.cancel()
            await hangs(fault, "C_CloseSession")
            await anyio.wait_all_tasks_blocked()
            fault.clear()
        assert scope.cancelled_caught


async def test_a_lease_cancelled_while_it_is_opened_is_closed(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The session that comes too late goes back to the token."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        fault.on("C_OpenSession", hang="after")
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.session().__aenter__)
                await hangs(fault, "C_OpenSession")
                scope.cancel()
        assert len(fault.sessions()) == 2
        fault.release()
        await eventually(lambda: len(fault.sessions()) == 1)
        assert await digest(pool, timeout=LAST_RESORT)


def _leave_in_a_dead_loop(
    pool: TokenPool, fault: FaultModule, where: Literal["on its way", "there", "held"]
) -> None:
    """Run a loop that ends while a session is lent to one of its tasks."""
    loop = asyncio.new_event_loop()
    held = asyncio.Event()

    async def hold() -> None:
        async with pool.session():
            held.set()
            await asyncio.Event().wait()

    async def main() -> asyncio.Task[None]:
        task = loop.create_task(hold())
        await (held.wait() if where == "held" else asyncio.sleep(0))
        return task

    task = loop.run_until_complete(main())
    if where == "there":
        wait_for(lambda: pool.stats().sessions_leased == 1)
    elif where == "on its way":
        fault.wait_until_hanging("C_OpenSession")
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001


@pytest.mark.parametrize("where", ["on its way", "there", "held"])
async def test_the_lease_of_a_loop_that_has_ended_is_given_back(
    make_pool: MakePool,
    fault: FaultModule,
    where: Literal["on its way", "there", "held"],
) -> None:
    """Nobody will ever take it, or leave its block."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        if where == "on its way":
            fault.on("C_OpenSession", hang="before")
        thread = threading.Thread(
            target=_leave_in_a_dead_loop, args=(pool, fault, where)
        )
        thread.start()
        await blocking(thread.join, LAST_RESORT)
        if where != "on its way":
            # Until then the worker that brought it may have it in its hands.
            await settled(pool)
        gc.collect()
        fault.clear()
        # With a limit of one, this is served only when the lease is given back.
        assert await digest(pool, timeout=LAST_RESORT)
        await eventually(lambda: pool.stats().sessions_leased == 0)
        await eventually(lambda: len(fault.sessions()) == 1)
