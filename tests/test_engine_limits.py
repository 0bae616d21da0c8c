"""How many sessions: what the token tells, and what ``CKR_SESSION_COUNT`` teaches."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

from poolkit import (
    LAST_RESORT,
    Hold,
    digest,
    eventually,
    settled,
)

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

_REFUSED = 0x0B1
_UNAVAILABLE, _INFINITE = -1, 0


def _refused(fault: FaultModule) -> int:
    return sum(call.rv == _REFUSED for call in fault.calls("C_OpenSession"))


async def _load(pool: TokenPool, tasks: int, *, rw: bool = False) -> None:
    async def work() -> None:
        for _ in range(5):
            await pool.run(lambda session: session.rw, rw=rw)

    async with anyio.create_task_group() as group:
        for _ in range(tasks):
            group.start_soon(work)


@pytest.mark.parametrize("rw", [False, True])
async def test_no_caller_sees_that_the_token_has_too_few_sessions(
    make_pool: MakePool, fault: FaultModule, *, rw: bool
) -> None:
    """``CKR_SESSION_COUNT`` is waited out, however many callers there are."""
    fault.session_limit(total=3)
    fault.latency_us = 1000  # so that calls overlap
    async with make_pool(module=fault.path) as pool:
        await _load(pool, 20, rw=rw)
        assert _refused(fault) > 0
        assert pool.stats().operations_failed == 0
    assert fault.sessions() == []


async def test_the_limit_is_learnt(make_pool: MakePool, fault: FaultModule) -> None:
    """What was refused once is not asked for by every caller after it."""
    fault.session_limit(total=3)
    async with make_pool(module=fault.path) as pool:
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                for _ in range(20):
                    tasks.start_soon(pool.run, hold)
                await hold.entered(2)
                await eventually(lambda: _refused(fault))
                await eventually(lambda: pool.stats().operations_running == 2)
                assert len(hold.calls) == 2
                # The higher limit is tried again, less and less often.
                assert _refused(fault) <= 12
                hold.let_go()
        assert len(hold.calls) == 20


async def test_the_higher_limit_comes_back(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """When others give sessions back to the token, they are used without a restart."""
    async with make_pool(module=fault.path) as pool:
        fault.session_limit(total=2)
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                for _ in range(8):
                    tasks.start_soon(pool.run, hold)
                await hold.entered(1)
                await eventually(lambda: _refused(fault))
                fault.session_limit(None)
                await hold.entered(8)
                hold.let_go()
        await settled(pool)
        assert pool.stats().sessions_max == 8


async def test_a_token_whose_sessions_are_all_others(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """With not one session left the caller waits, and starts when there is one."""
    async with make_pool(module=fault.path) as pool:
        fault.session_limit(total=1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: digest(pool, timeout=20))
            await eventually(lambda: _refused(fault) >= 2)
            # Between two attempts: during one of them it does not wait.
            await eventually(lambda: pool.stats().operations_waiting == 1)
            fault.session_limit(None)


async def test_a_lease_waits_for_the_token_too(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``CKR_SESSION_COUNT`` for a lease is waited out as well."""
    async with make_pool(module=fault.path) as pool:
        fault.session_limit(total=1)

        async def lease() -> None:
            async with pool.session(timeout=20) as session:
                assert await digest(session)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lease)
            await eventually(lambda: _refused(fault) >= 2)
            fault.session_limit(None)
        await settled(pool)
        assert pool.stats().sessions_leased == 0


async def test_too_few_rw_sessions_do_not_lower_the_ro_ones(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The limit of R/W sessions is learnt apart."""
    async with make_pool(module=fault.path) as pool:
        fault.session_limit(rw=1)
        async with anyio.create_task_group() as tasks:
            with Hold() as hold, Hold() as reads:
                for _ in range(3):
                    tasks.start_soon(lambda: pool.run(hold, rw=True))
                await hold.entered(1)
                await eventually(lambda: _refused(fault))
                await eventually(lambda: pool.stats().operations_waiting == 2)
                assert pool.stats().sessions_max == 8
                for _ in range(7):
                    tasks.start_soon(pool.run, reads)
                await reads.entered(7)
                assert len(hold.calls) == 1
                reads.let_go()
                hold.let_go()
        assert len(hold.calls) == 3


async def test_the_limit_that_the_token_tells_is_heeded(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``ulMaxSessionCount`` counts the anchor, so one less is for operations."""
    fault.token_info(max_sessions=4)
    fault.session_limit(total=4)
    async with make_pool(module=fault.path) as pool:
        assert pool.stats().sessions_max == 3
        assert pool.token.max_sessions == 4
        await _load(pool, 10)
        assert _refused(fault) == 0


async def test_the_rw_limit_that_the_token_tells_is_heeded(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``ulMaxRwSessionCount`` bounds R/W sessions and no others."""
    fault.token_info(max_rw=2)
    fault.session_limit(rw=2)
    async with make_pool(module=fault.path) as pool:
        assert pool.stats().sessions_max == 8
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                for _ in range(5):
                    tasks.start_soon(lambda: pool.run(hold, rw=True))
                await hold.entered(2)
                for _ in range(5):
                    assert await digest(pool, timeout=LAST_RESORT)
                assert len(hold.calls) == 2
        assert len(hold.calls) == 5
        assert _refused(fault) == 0


@pytest.mark.parametrize("told", [_INFINITE, _UNAVAILABLE, -2, 1024])
async def test_a_token_that_tells_no_limit(
    make_pool: MakePool, fault: FaultModule, told: int
) -> None:
    """Neither 0, nor unknown, nor more than the user's number lowers it."""
    fault.token_info(max_sessions=told, max_rw=told)
    async with make_pool(module=fault.path) as pool:
        assert pool.stats().sessions_max == 8
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                # Two of the eight are kept from those that change the token.
                for rw in [True] * 6 + [False] * 2:
                    tasks.start_soon(partial(pool.run, hold, rw=rw))
                await hold.entered(8)
                hold.let_go()
