"""``pool.stats()``: gauges of what is, and counters of what was."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import anyio
import pkcs11
import pytest
import structlog

from pkcs11_pool import PoolStats, PoolTimeout
from poolkit import Hold, digest, eventually, lost, settled

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

_NAMES = """
sessions_max sessions_open sessions_ahead sessions_leased operations_running
operations_waiting calls_stuck operations_total operations_failed
operations_cancelled operations_timed_out waits_total wait_seconds_total
run_seconds_total sessions_opened_total logins_total logins_failed_total
recoveries_total calls_lost last_error
"""


def test_the_names_of_the_contract() -> None:
    """Dashboards are built on these."""
    names = {field.name for field in dataclasses.fields(PoolStats)}
    assert set(_NAMES.split()) <= names


async def test_a_snapshot_is_frozen(pool: TokenPool) -> None:
    """What was read stays as it was read."""
    stats = pool.stats()
    await digest(pool)
    assert stats.operations_total == pool.stats().operations_total - 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.operations_total = 0  # type: ignore[misc]


async def test_a_fresh_pool_has_done_nothing(pool: TokenPool) -> None:
    """Opening is a login, but no operation."""
    stats = pool.stats()
    assert stats == dataclasses.replace(
        stats,
        sessions_max=8,
        sessions_open=0,
        sessions_ahead=0,
        sessions_leased=0,
        operations_running=0,
        operations_waiting=0,
        operations_total=0,
        operations_failed=0,
        sessions_opened_total=0,
        logins_total=1,
        logins_failed_total=0,
        last_error=None,
    )


async def test_the_gauges(make_pool: MakePool) -> None:
    """They tell what is so at this moment."""
    async with make_pool(max_sessions=4) as pool, pool.session():
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                for _ in range(5):
                    tasks.start_soon(pool.run, hold)
                await hold.entered(3)
                await anyio.wait_all_tasks_blocked()
                stats = pool.stats()
                assert stats.sessions_max == stats.sessions_open == 4
                assert stats.sessions_leased == 1
                assert stats.sessions_ahead == 0
                assert (stats.operations_running, stats.operations_waiting) == (3, 2)
                assert stats.waits_total == 2
        await settled(pool)
        stats = pool.stats()
        assert (stats.operations_running, stats.operations_waiting) == (0, 0)
        assert stats.wait_seconds_total > 0
        assert stats.run_seconds_total > 0


def _fails(_session: object) -> None:
    raise pkcs11.DataInvalid("mine")


async def test_each_operation_is_counted_once(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """By how it ended; one that timed out has failed as well."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        before = pool.stats()
        for _ in range(3):
            await digest(pool)
        with pytest.raises(pkcs11.DataInvalid):
            await pool.run(_fails)
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                with pytest.raises(PoolTimeout):
                    await digest(pool, timeout=0.05)
                with pytest.raises(PoolTimeout):
                    await digest(pool, timeout=0)
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await digest(pool)
        # The next session is opened ahead when the last result is there already.
        await settled(pool)
        after = pool.stats()

        def grew(name: str) -> int:
            difference: int = getattr(after, name) - getattr(before, name)
            return difference

        assert grew("operations_total") == 8
        assert grew("operations_failed") == 3
        assert grew("operations_timed_out") == 2
        assert grew("operations_cancelled") == 1
        assert grew("sessions_opened_total") == fault.count("C_OpenSession") - 1
        assert after.last_error is not None
        assert after.last_error.startswith("PoolTimeout: ")


@pytest.mark.parametrize("ends_well", [True, False])
async def test_a_call_whose_caller_has_gone_counts_once(
    pool: TokenPool,
    ends_well: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """As cancelled, whatever comes of it; its error is nobody's."""
    with Hold() as hold:

        def work(session: object) -> None:
            hold(session)
            if not ends_well:
                _fails(session)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.run, work)
            await hold.entered()
            tasks.cancel_scope.cancel()
    await settled(pool)
    stats = pool.stats()
    assert (stats.operations_total, stats.operations_cancelled) == (1, 1)
    assert (stats.operations_failed, stats.last_error) == (0, None)


async def test_a_session_is_counted_when_it_is_opened(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Not when the call that it was opened for is over."""
    async with make_pool(module=fault.path) as pool:
        before = fault.count("C_OpenSession")
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                opened = fault.count("C_OpenSession") - before
                assert pool.stats().sessions_opened_total == opened == 1


async def test_a_session_block_is_no_operation(pool: TokenPool) -> None:
    """What is done in it is."""
    before = pool.stats().operations_total
    async with pool.session() as session:
        await digest(session)
    assert pool.stats().operations_total == before + 1


async def test_what_writes_the_log_may_ask_for_them(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A processor of structlog that adds the gauges holds up nothing."""
    seen: list[PoolStats] = []
    pool = make_pool(module=fault.path, close_timeout=0.3)

    def add_gauges(_logger: object, _name: str, _event: object) -> Any:
        seen.append(pool.stats())
        raise structlog.DropEvent

    structlog.configure(processors=[add_gauges])
    async with pool:
        fault.on("C_Digest", hang="before")
        await lost(pool, fault)
        await eventually(lambda: seen[-1].calls_stuck == 1)
        fault.release()
        await eventually(lambda: seen[-1].calls_stuck == 0)
