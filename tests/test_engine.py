"""The way of an operation: its session, its turn, its worker."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import Mechanism

from poolkit import (
    LAST_RESORT,
    Hold,
    by_session,
    digest,
    eventually,
    hangs,
    make_ec_key,
    most_open,
    settled,
    workers,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakePool
    from faultmodule import FaultModule

_TIDY = {"C_OpenSession", "C_CloseSession"}


async def test_no_session_serves_two_operations(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Every operation runs in a session that none used before or uses after."""
    async with make_pool(module=fault.path) as pool:
        fault.clear_log()

        async def work() -> None:
            for _ in range(20):
                await digest(pool)

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(work)
    sessions = by_session(fault.calls())
    used = [calls for calls in sessions.values() if "C_Digest" in calls]
    assert used == [
        ["C_OpenSession", "C_DigestInit", "C_Digest", "C_CloseSession"]
    ] * len(used)
    assert len(used) == 160


async def test_each_session_that_is_opened_is_closed_once(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """After closing, as many sessions were closed as opened, by number."""
    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        for _ in range(5):
            await digest(pool)
        async with pool.session(rw=True):
            await digest(pool)
    calls = fault.calls()
    opened = [c.session for c in calls if c.function == "C_OpenSession"]
    closed = [c.session for c in calls if c.function == "C_CloseSession"]
    assert sorted(map(str, closed)) == sorted(map(str, opened))
    assert fault.sessions() == []


@pytest.mark.usefixtures("never_idle")
async def test_a_signature_costs_four_calls(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """In the steady state nothing is looked up, asked or logged in."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await key.sign(b"d" * 32, mechanism=Mechanism.ECDSA)
        await settled(pool)
        fault.reset_counts()
        for _ in range(50):
            await key.sign(b"d" * 32, mechanism=Mechanism.ECDSA)
        counts = fault.counts()
    assert set(counts) <= {"C_SignInit", "C_Sign"} | _TIDY
    assert counts["C_SignInit"] == counts["C_Sign"] == 50
    # One may have been opened ahead for the operation after the last.
    assert 49 <= counts["C_OpenSession"] <= 55


async def test_the_caller_waits_for_no_tidying(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The result comes first; the used session is closed behind the caller."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_CloseSession", hang="before")
        with anyio.fail_after(LAST_RESORT):
            await digest(pool)
        await hangs(fault, "C_CloseSession")
        fault.release()


@pytest.mark.usefixtures("never_idle")
async def test_the_next_session_is_opened_ahead(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """In a pool in use an operation finds its session open."""
    async with make_pool(module=fault.path) as pool:
        await digest(pool)
        await settled(pool)
        assert pool.stats().sessions_ahead == 1
        fault.on("C_OpenSession", every=True, hang="before")
        with anyio.fail_after(LAST_RESORT):
            await digest(pool)
        fault.clear()


@pytest.mark.usefixtures("never_idle")
async def test_a_session_opened_ahead_makes_room(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Nobody waits for a spare session: it is closed for a R/W operation."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        await digest(pool)
        await settled(pool)
        assert pool.stats().sessions_ahead == 1
        fault.clear_log()
        rw = await pool.run(lambda session: session.rw, rw=True, timeout=LAST_RESORT)
        assert rw
        calls = [call.function for call in fault.calls()]
        assert calls[:2] == ["C_CloseSession", "C_OpenSession"]


async def test_an_idle_pool_holds_no_session(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """When nothing is to be done, spare sessions go back to the token."""
    async with make_pool(module=fault.path) as pool:
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(digest, pool)
        await eventually(lambda: pool.stats().sessions_open == 0)
        await eventually(lambda: len(fault.sessions()) == 1)  # the anchor
        assert await digest(pool)


async def test_no_more_sessions_than_allowed(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """What finds no session waits, and the anchor is the only one beside."""
    async with make_pool(module=fault.path, max_sessions=3) as pool:
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                for _ in range(12):
                    tasks.start_soon(pool.run, hold)
                await hold.entered(3)
                await anyio.wait_all_tasks_blocked()
                stats = pool.stats()
                assert (stats.operations_running, stats.operations_waiting) == (3, 9)
                assert len(fault.sessions()) == 4
                hold.let_go()
        assert len(hold.calls) == 12


async def test_no_more_sessions_than_allowed_under_load(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """At no moment of a mixed load is one session too many open."""
    async with make_pool(module=fault.path, max_sessions=3) as pool:

        async def work(rw: bool) -> None:  # noqa: FBT001  # start_soon has no names
            for _ in range(15):
                await pool.run(lambda _session: None, rw=rw)

        async def lease() -> None:
            for _ in range(15):
                async with pool.session() as session:
                    await digest(session)

        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(work, number % 2 == 0)
            tasks.start_soon(lease)
            tasks.start_soon(lease)
        assert most_open(fault.calls()) <= 4


async def test_no_more_threads_than_needed(make_pool: MakePool) -> None:
    """Workers start when there is work for them, and never without a session."""
    async with make_pool() as pool:
        assert workers() == []
        await digest(pool)
        # A second one, where the end of the login at opening meets the operation.
        assert 1 <= len(workers()) <= 2
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                for _ in range(20):
                    tasks.start_soon(pool.run, hold)
                await hold.entered(8)
                assert 8 <= len(workers()) <= 9
                hold.let_go()
    assert workers() == []


async def test_workers_are_daemons(make_pool: MakePool) -> None:
    """The end of the process waits for no call inside the module."""
    async with make_pool() as pool:
        await digest(pool)
        names = [t for t in threading.enumerate() if t.name.startswith("pkcs11-pool")]
        assert names
        assert all(thread.daemon for thread in names)


async def _line_up(tasks: anyio.abc.TaskGroup, *starts: Callable[[], Any]) -> None:
    """Start callers one after the other, each when the one before stands in line."""
    for start in starts:
        tasks.start_soon(start)
        await anyio.wait_all_tasks_blocked()


async def test_first_come_first_served(make_pool: MakePool) -> None:
    """Callers that wait are served in the order in which they came."""
    order: list[int] = []
    async with make_pool(max_sessions=1) as pool, anyio.create_task_group() as tasks:
        with Hold() as hold:
            tasks.start_soon(pool.run, hold)
            await hold.entered()

            def caller(number: int, *, rw: bool) -> Callable[[], Any]:
                async def call() -> None:
                    await pool.run(lambda _: order.append(number), rw=rw)

                return call

            await _line_up(tasks, *(caller(n, rw=n % 3 == 0) for n in range(10)))
            assert pool.stats().operations_waiting == 10
            hold.let_go()
    assert order == list(range(10))


async def test_one_that_cannot_start_holds_up_no_other_kind(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Callers that wait for a R/W session let R/O operations pass."""
    fault.token_info(max_rw=1)
    async with make_pool(module=fault.path) as pool, anyio.create_task_group() as tasks:
        with Hold() as hold:
            for _ in range(2):
                tasks.start_soon(lambda: pool.run(hold, rw=True))
            await hold.entered()
            await anyio.wait_all_tasks_blocked()
            assert pool.stats().operations_waiting == 1
            assert await digest(pool, timeout=LAST_RESORT)
            assert len(hold.calls) == 1
            hold.let_go()


@pytest.mark.parametrize("timeout", [0, 5])
async def test_who_waits_for_a_lease_holds_up_no_operation(
    make_pool: MakePool, timeout: float
) -> None:
    """The session that leases leave is for operations, also if leases wait."""
    async with make_pool(max_sessions=2) as pool, pool.session() as mine:

        async def lease() -> None:
            async with pool.session():
                pass

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lease)
            await anyio.wait_all_tasks_blocked()
            assert pool.stats().operations_waiting == 1
            assert await digest(pool, timeout=timeout)
            assert not mine.closed
            tasks.cancel_scope.cancel()
