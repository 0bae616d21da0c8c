"""``pool.session()``: one session in somebody's hands, and when it is over."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.lowlevel
import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from pkcs11_pool import (
    PooledSession,
    PoolTimeout,
    SessionClosed,
    SessionState,
    WouldDeadlock,
)
from poolkit import (
    Hold,
    blocking,
    by_session,
    digest,
    eventually,
    hangs,
    make_ec_key,
    settled,
    wait_for,
)

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

_BLOCK = b"b" * 16


@pytest.mark.parametrize("rw", [False, True])
async def test_a_block_has_one_session(
    make_pool: MakePool, fault: FaultModule, *, rw: bool
) -> None:
    """All operations of the block run in its session, which ends with it."""
    async with make_pool(module=fault.path) as pool:
        async with pool.session(rw=rw) as session:
            assert isinstance(session, PooledSession)
            assert session.rw is rw
            assert not session.closed
            fault.clear_log()
            await digest(session)
            await session.generate_random(64)
            handle = await session.run(lambda bare: bare.handle)
            assert handle == session.handle
            assert set(by_session(fault.calls())) == {handle}
            assert handle in {s.number for s in fault.sessions() if s.rw is rw}
            assert pool.stats().sessions_leased == 1
        assert session.closed
        assert pool.stats().sessions_leased == 0
        assert handle not in {s.number for s in fault.sessions()}
        with pytest.raises(SessionClosed):
            await digest(session)


@pytest.mark.parametrize(
    ("rw", "state"),
    [
        (False, SessionState.RO_USER_FUNCTIONS),
        (True, SessionState.RW_USER_FUNCTIONS),
    ],
)
async def test_a_session_tells_what_the_token_says_of_it(
    pool: TokenPool, *, rw: bool, state: SessionState
) -> None:
    """``info()`` has state, kind, device error and slot."""
    async with pool.session(rw=rw) as session:
        info = await session.info()
        assert info.state is state
        assert info.rw is rw
        assert info.device_error == 0
        assert info.slot_id == pool.token.slot_id


async def test_a_session_has_the_names_of_the_pool(pool: TokenPool) -> None:
    """What is done on a pool is done on a session in the same words."""
    async with pool.session(rw=True) as session:
        public, private = await session.generate_keypair(
            KeyType.EC, curve="secp256r1", label="pair", store=True
        )
        secret = await session.generate_key(KeyType.AES, 128, label="secret")
        data = await session.create_object(
            {
                Attribute.CLASS: ObjectClass.DATA,
                Attribute.LABEL: "data",
                Attribute.VALUE: b"value",
            }
        )
        assert await session.run(lambda bare: bare.rw)
        assert len(await session.generate_random(256)) == 32
        assert len(await digest(session)) == 32
        found = await session.find({Attribute.LABEL: "pair"})
        classes = [await ref.attributes([Attribute.CLASS]) for ref in found]
        assert sorted(c[Attribute.CLASS] for c in classes) == [
            ObjectClass.PUBLIC_KEY,
            ObjectClass.PRIVATE_KEY,
        ]
        signature = await session.key(label="pair").sign(
            b"d" * 32, mechanism=Mechanism.ECDSA
        )
        assert await public.verify(b"d" * 32, signature, mechanism=Mechanism.ECDSA)
        assert await private.public_key_der() == await public.public_key_der()
        assert await secret.encrypt(_BLOCK, mechanism=Mechanism.AES_ECB)
        value = await data.attributes([Attribute.VALUE])
        assert value == {Attribute.VALUE: b"value"}


async def test_a_key_bound_to_a_session_is_used_there(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``key.on(session)`` opens no session of its own."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        async with pool.session() as session:
            await settled(pool)
            fault.clear_log()
            await key.on(session).sign(b"d" * 32, mechanism=Mechanism.ECDSA)
            assert set(by_session(fault.calls())) == {session.handle}


async def test_calls_of_a_session_run_one_at_a_time_in_order(
    make_pool: MakePool,
) -> None:
    """Whoever calls: the second waits for the first, and nobody overtakes."""
    order: list[int] = []
    async with (
        make_pool() as pool,
        pool.session() as session,
        anyio.create_task_group() as tasks,
    ):
        with Hold() as hold:
            tasks.start_soon(session.run, hold)
            await hold.entered()

            async def call(number: int) -> None:
                await session.run(lambda _: order.append(number))

            for number in range(8):
                tasks.start_soon(call, number)
                await anyio.wait_all_tasks_blocked()
            assert pool.stats().operations_running == 1
            assert pool.stats().operations_waiting == 8
            hold.let_go()
    assert order == list(range(8))


async def test_an_open_session_holds_no_thread(make_pool: MakePool) -> None:
    """Between two calls a lease costs a session and nothing else."""
    async with (
        make_pool(max_sessions=4) as pool,
        pool.session(),
        pool.session(),
        pool.session(),
    ):
        assert pool.stats().operations_running == 0
        assert await digest(pool, timeout=5)


async def test_leases_leave_one_session_for_operations(make_pool: MakePool) -> None:
    """However many want a session for themselves, operations go on."""
    async with make_pool(max_sessions=3) as pool:
        inside = anyio.Semaphore(0)
        leave = anyio.Event()

        async def lease() -> None:
            async with pool.session():
                inside.release()
                await leave.wait()

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(lease)
            await inside.acquire()
            await inside.acquire()
            await anyio.wait_all_tasks_blocked()
            stats = pool.stats()
            assert (stats.sessions_leased, stats.operations_waiting) == (2, 3)
            assert await digest(pool, timeout=5)
            leave.set()
        assert pool.stats().sessions_leased == 0


@pytest.mark.parametrize("rw", [False, True])
async def test_the_only_session_would_deadlock(
    make_pool: MakePool, fault: FaultModule, *, rw: bool
) -> None:
    """A task that holds it is told at once to use it."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        key = await make_ec_key(pool)
        async with pool.session() as session:
            await settled(pool)
            fault.reset_counts()
            with pytest.raises(WouldDeadlock, match=r"key\.on\(session\)"):
                await key.sign(b"d" * 32, mechanism=Mechanism.ECDSA)
            with pytest.raises(WouldDeadlock):
                await pool.run(lambda _: None, rw=rw)
            with pytest.raises(WouldDeadlock):
                await pool.session(rw=rw).__aenter__()
            assert fault.counts() == {}
            bound = key.on(session)
            assert await bound.sign(b"d" * 32, mechanism=Mechanism.ECDSA)


async def test_all_lent_would_deadlock_for_one_more(make_pool: MakePool) -> None:
    """A task that holds one and asks for the one that operations need is told so."""
    async with make_pool(max_sessions=3) as pool:
        async with pool.session(), pool.session():
            with pytest.raises(WouldDeadlock):
                await pool.session().__aenter__()
            assert await digest(pool, timeout=5)
        async with pool.session(timeout=5):
            pass


async def test_who_holds_nothing_waits(make_pool: MakePool) -> None:
    """Another task than the holder's is served when the session comes back."""
    async with (
        make_pool(max_sessions=1) as pool,
        anyio.create_task_group() as tasks,
        pool.session(),
    ):
        tasks.start_soon(digest, pool)
        await anyio.wait_all_tasks_blocked()
        assert pool.stats().operations_waiting == 1


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
                    await digest(session)
                except SessionClosed as error:
                    errors.append(error)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_times_out, session)
                await hangs(fault, "C_Digest")
                tasks.start_soon(in_line)
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
        await digest(session, timeout=0.2)
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


async def test_closing_refuses_the_queued_and_waits_for_the_running(
    make_pool: MakePool,
) -> None:
    """A block ends when its running call has ended, and the rest never starts."""
    async with make_pool() as pool:
        with Hold() as hold, Hold() as queued:
            refused = []

            async def in_line(session: PooledSession) -> None:
                try:
                    await session.run(queued)
                except SessionClosed as error:
                    refused.append(error)

            async with anyio.create_task_group() as tasks:
                ended = anyio.Event()

                async def block() -> None:
                    async with pool.session() as session:
                        tasks.start_soon(session.run, hold)
                        await hold.entered()
                        tasks.start_soon(in_line, session)
                        await anyio.wait_all_tasks_blocked()
                    ended.set()

                tasks.start_soon(block)
                await hold.entered()
                await eventually(lambda: refused)
                assert not ended.is_set()
                hold.let_go()
        assert queued.calls == []


async def test_a_cancelled_block_gives_its_session_back(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Whether the worker is quick or not, the session is closed."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        for _ in range(20):
            with anyio.CancelScope() as scope:
                async with pool.session():
                    scope.cancel()
        assert await digest(pool, timeout=5)
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
        assert await digest(pool, timeout=5)


async def test_a_lease_for_a_caller_just_cancelled_is_given_back(
    make_pool: MakePool,
) -> None:
    """It was there, but its caller never heard of it."""
    async with make_pool(max_sessions=1) as pool:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.session().__aenter__)
                await anyio.lowlevel.checkpoint()
                # On the loop's own thread: the caller cannot be resumed meanwhile.
                wait_for(lambda: pool.stats().sessions_leased == 1)
                scope.cancel()
        await eventually(lambda: pool.stats().sessions_leased == 0)
        assert await digest(pool, timeout=5)


async def test_who_lost_a_lease_by_cancellation_may_ask_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A task is no holder of a session that it never got."""
    async with make_pool(module=fault.path, max_sessions=2) as pool:
        fault.on("C_CloseSession", hang="before")
        scope = anyio.CancelScope()

        async def ask_twice() -> None:
            with scope:
                await pool.session().__aenter__()
            async with pool.session(timeout=5) as session:
                assert await digest(session)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_twice)
            await anyio.lowlevel.checkpoint()
            wait_for(lambda: pool.stats().sessions_leased == 1)
            scope.cancel()
            await hangs(fault, "C_CloseSession")
            await anyio.wait_all_tasks_blocked()
            fault.release()
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
        assert await digest(pool, timeout=5)


async def test_the_error_of_the_block_leaves_as_itself(make_pool: MakePool) -> None:
    """A session block wraps nothing and hides nothing."""
    error = KeyError("mine")
    async with make_pool() as pool:
        with pytest.raises(KeyError) as caught:
            async with pool.session():
                raise error
        assert caught.value is error
        assert pool.stats().sessions_leased == 0


async def test_leases_may_be_given_from_task_to_task(make_pool: MakePool) -> None:
    """A session is usable by any task while its block is open."""
    async with make_pool() as pool, pool.session() as session:
        results: list[bytes] = []

        async def use() -> None:
            results.append(await digest(session))

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(use)
        assert len(set(results)) == 1


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
        await blocking(thread.join, 10)
        gc.collect()
        fault.clear()
        await eventually(lambda: len(fault.sessions()) == 1)
        assert pool.stats().sessions_leased == 0
        assert await digest(pool, timeout=5)
