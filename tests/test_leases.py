"""``pool.session()``: one session in somebody's hands, and when it is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from pkcs11_pool import (
    PooledSession,
    SessionClosed,
    SessionState,
    WouldDeadlock,
)
from poolkit import (
    LAST_RESORT,
    Hold,
    by_session,
    digest,
    eventually,
    make_ec_key,
    settled,
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
            # Workers that look for work find none of this session's.
            for _ in range(3):
                await digest(pool)
            assert order == []
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
        assert await digest(pool, timeout=LAST_RESORT)


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
            assert await digest(pool, timeout=LAST_RESORT)
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
            assert await digest(pool, timeout=LAST_RESORT)
        async with pool.session(timeout=LAST_RESORT):
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
