"""Deadlines: what ``PoolTimeout`` promises, and calls that never return."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from pkcs11_pool import PoolTimeout, TokenUnavailable, TooManyWaiting
from poolkit import (
    LAST_RESORT,
    SLACK,
    Hold,
    blocking,
    digest,
    eventually,
    given_up,
    hangs,
    lost,
    settled,
    time_is_up,
    time_limits,
    wait_for,
    workers,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakePool
    from faultmodule import FaultModule

_SHORT = 0.2


async def _times_out(call: Callable[[], Any], phase: str, promised: float) -> None:
    began = time.monotonic()
    with pytest.raises(PoolTimeout) as caught:
        await call()
    took = time.monotonic() - began
    assert caught.value.phase == phase
    assert isinstance(caught.value, TimeoutError)
    assert promised <= took < 3 * promised + SLACK


async def _runs_out(
    call: Callable[[float], Any], is_inside: Callable[[], object]
) -> None:
    for limit in time_limits(_SHORT):
        began = time.monotonic()
        with pytest.raises(PoolTimeout) as caught:
            await call(limit)
        assert limit <= time.monotonic() - began < 3 * limit + SLACK
        if is_inside():
            assert caught.value.phase == "running"
            return


async def test_a_deadline_while_waiting_sends_nothing(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """In the phase ``waiting`` the call has not reached the module."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                fault.reset_counts()
                await _times_out(
                    lambda: digest(pool, timeout=_SHORT), "waiting", _SHORT
                )
                await _times_out(
                    lambda: pool.run(hold, rw=True, timeout=_SHORT), "waiting", _SHORT
                )
                assert fault.counts() == {}
                hold.let_go()
        assert len(hold.calls) == 1
        assert pool.stats().operations_timed_out == 2


async def test_a_deadline_of_a_running_call_holds(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """In the phase ``running`` the call was sent; its caller goes on time."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", hang="before", every=True)
        await _runs_out(
            lambda limit: digest(pool, timeout=limit), lambda: fault.inside("C_Digest")
        )
        with Hold() as hold:
            await _runs_out(
                lambda limit: pool.run(hold, rw=True, timeout=limit), lambda: hold.calls
            )
        fault.clear()
        await eventually(lambda: pool.stats().calls_stuck == 0)


async def test_the_pools_own_timeout_is_the_default(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Without ``timeout=`` a call has the pool's; with ``None`` it has none."""
    async with make_pool(module=fault.path, max_sessions=1, timeout=_SHORT) as pool:
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(lambda: pool.run(hold, timeout=None))
                await hold.entered()
                tasks.start_soon(lambda: pool.run(hold, 1, timeout=None))
                await anyio.wait_all_tasks_blocked()
                await _times_out(lambda: digest(pool), "waiting", _SHORT)
                assert pool.stats().operations_waiting == 1
                hold.let_go()
        assert hold.calls == [(), (1,)]


async def test_an_infinite_timeout_is_none(make_pool: MakePool) -> None:
    """``math.inf`` is a number of seconds that never pass."""
    async with make_pool(timeout=math.inf) as pool:
        assert await digest(pool)
        async with pool.session(timeout=math.inf) as session:
            assert await digest(session)


@pytest.mark.usefixtures("never_idle")
async def test_timeout_zero_does_not_wait(make_pool: MakePool) -> None:
    """With ``timeout=0`` a free session is used, and no other waited for."""
    async with make_pool(max_sessions=1) as pool:
        assert await digest(pool, timeout=0)
        await settled(pool)
        async with pool.session(timeout=0) as session:
            assert await digest(session, timeout=0)
        await settled(pool)
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                await _times_out(lambda: digest(pool, timeout=0), "waiting", 0)
                await _times_out(pool.session(timeout=0).__aenter__, "waiting", 0)
                hold.let_go()


async def test_a_lease_has_a_deadline_too(make_pool: MakePool) -> None:
    """``pool.session(timeout=)`` bounds the wait for the session."""
    async with make_pool(max_sessions=1) as pool:
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                block = pool.session(timeout=_SHORT)
                await _times_out(block.__aenter__, "waiting", _SHORT)
                hold.let_go()
        await settled(pool)
        assert pool.stats().sessions_leased == 0


async def test_only_so_many_may_wait(make_pool: MakePool, fault: FaultModule) -> None:
    """``max_waiting`` bounds the line; who is refused has sent nothing."""
    async with make_pool(module=fault.path, max_sessions=1, max_waiting=2) as pool:
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                for _ in range(2):
                    tasks.start_soon(pool.run, hold)
                await anyio.wait_all_tasks_blocked()
                fault.reset_counts()
                with pytest.raises(TooManyWaiting, match="2 callers"):
                    await digest(pool)
                assert fault.counts() == {}
                hold.let_go()
        assert len(hold.calls) == 3
        assert await digest(pool)


async def test_nobody_may_wait(make_pool: MakePool) -> None:
    """With ``max_waiting=0`` a call starts at once or is refused."""
    async with (
        make_pool(max_sessions=1, max_waiting=0) as pool,
        anyio.create_task_group() as tasks,
    ):
        with Hold() as hold:
            tasks.start_soon(pool.run, hold)
            await hold.entered()
            with pytest.raises(TooManyWaiting):
                await digest(pool)
            hold.let_go()


async def test_a_lost_call_is_replaced(make_pool: MakePool, fault: FaultModule) -> None:
    """A call that hangs keeps its thread; the pool goes on without both."""
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        fault.on("C_Digest", hang="before")
        await lost(pool, fault)
        stats = pool.stats()
        assert (stats.calls_lost, stats.calls_stuck) == (1, 1)
        assert stats.operations_running == 0
        assert await digest(pool, timeout=LAST_RESORT)
        stuck = next(c for c in fault.calls("C_Digest") if c.rv is None)
        fault.release()
        await eventually(lambda: pool.stats().calls_stuck == 0)
        assert pool.stats().calls_lost == 1
        # Its session is closed, and its thread ends.
        assert stuck.session not in {s.number for s in fault.sessions()}
        await eventually(lambda: len(workers()) <= 2)
        assert await digest(pool, timeout=LAST_RESORT)


@pytest.mark.parametrize("function", ["C_OpenSession", "C_CloseSession"])
async def test_a_hang_behind_a_caller_is_given_up_on_by_who_waits_for_it(
    make_pool: MakePool,
    fault: FaultModule,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
) -> None:
    """Nobody's deadline passes inside such a call; in a full pool, in front of it."""
    monkeypatch.setattr("pkcs11_pool.engine.overdue.BEHIND", 0)
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        fault.on("C_Digest", hang="before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(digest, pool)
            await hangs(fault, "C_Digest")
            fault.on(function, hang="before")
            fault.release("C_Digest")
            await hangs(fault, function)
        await _times_out(lambda: digest(pool, timeout=_SHORT), "waiting", _SHORT)
        stats = pool.stats()
        assert (stats.calls_lost, stats.calls_stuck) == (1, 1)
        assert await digest(pool, timeout=LAST_RESORT)
        fault.release()
        await eventually(lambda: pool.stats().calls_stuck == 0)
        await settled(pool)
        await eventually(lambda: len(fault.sessions()) == 1)


@pytest.mark.parametrize("function", ["C_OpenSession", "C_CloseSession"])
async def test_a_hang_behind_a_caller_is_given_up_on_where_nobody_waits(
    make_pool: MakePool,
    fault: FaultModule,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
) -> None:
    """After the pool's timeout, as any other call: it is seen in the statistics."""
    monkeypatch.setattr("pkcs11_pool.engine.overdue.BEHIND", 0)
    async with make_pool(module=fault.path, timeout=0.5) as pool:
        # The first one is opened for the operation itself.
        fault.on(function, nth=2 if function == "C_OpenSession" else 1, hang="before")
        await digest(pool)
        await hangs(fault, function)
        await eventually(lambda: pool.stats().calls_stuck == 1)
        assert pool.stats().calls_lost == 1
        fault.release()
        await eventually(lambda: pool.stats().calls_stuck == 0)
        await settled(pool)
        await eventually(lambda: len(fault.sessions()) == 1)


async def test_a_call_behind_a_caller_has_its_time(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has no time to wait takes nothing from it."""
    monkeypatch.setattr("pkcs11_pool.engine.overdue.BEHIND", LAST_RESORT)
    async with make_pool(module=fault.path, max_sessions=1) as pool:
        fault.on("C_CloseSession", hang="before")
        await digest(pool, timeout=LAST_RESORT)
        await hangs(fault, "C_CloseSession")
        with pytest.raises(PoolTimeout):
            await digest(pool, timeout=0.01)
        assert pool.stats().calls_lost == 0
        fault.release()
        assert await digest(pool, timeout=LAST_RESORT)


@pytest.mark.parametrize("function", ["C_OpenSession", "C_CloseSession"])
async def test_a_session_that_cannot_be_opened_or_closed_in_time(
    make_pool: MakePool, fault: FaultModule, function: str
) -> None:
    """A pool with sessions left goes on while one hangs in its opening or closing."""
    async with make_pool(module=fault.path, max_sessions=2) as pool:
        fault.on(function, hang="before")
        if function == "C_OpenSession":
            await given_up(pool, lambda: digest(pool), hangs(fault, function))
        else:
            await digest(pool, timeout=LAST_RESORT)
        await hangs(fault, function)
        for _ in range(3):
            assert await digest(pool, timeout=LAST_RESORT)
        fault.release()
        # A pool that closes while the call is still inside keeps the module.
        await eventually(lambda: pool.stats().calls_stuck == 0)
        await settled(pool)
        await eventually(lambda: len(fault.sessions()) == 1)


async def test_deadlines_hold_while_every_worker_hangs(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The timekeeper needs no worker, and says when nothing can help any more."""
    async with make_pool(module=fault.path, max_sessions=2, close_timeout=0.1) as pool:
        fault.on("C_Digest", every=True, hang="before")
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(_times_out, lambda: digest(pool), "running", 0)
            await hangs(fault, "C_Digest", 2)
            await _times_out(lambda: digest(pool, timeout=_SHORT), "waiting", _SHORT)
            time_is_up(pool)
        await lost(pool, fault, 3)
        assert pool.stats().calls_stuck == 3
        with pytest.raises(TokenUnavailable, match="new process"):
            await digest(pool)
        fault.clear()
        await eventually(lambda: pool.stats().calls_stuck == 0)
        assert await digest(pool, timeout=LAST_RESORT)


async def test_a_result_that_arrived_first_wins(make_pool: MakePool) -> None:
    """A deadline that passes while the loop is busy takes nothing away."""
    async with make_pool() as pool:
        hold = Hold()
        results = []

        def stand_still() -> None:
            # On the loop's own thread: nobody is resumed meanwhile.
            hold.let_go()
            wait_for(lambda: pool.stats().operations_running == 0)
            time_is_up(pool)

        async def call() -> None:
            results.append(await pool.run(hold, "result"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await hold.entered()
            stand_still()
        assert results == [("result",)]
        assert pool.stats().operations_timed_out == 0


async def test_a_cancelled_call_is_lost_at_its_own_deadline(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Until then it counts as running, although its caller has gone."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", hang="before")
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(digest, pool)
                await hangs(fault, "C_Digest")
                scope.cancel()
        stats = pool.stats()
        assert (stats.operations_running, stats.calls_lost) == (1, 0)
        time_is_up(pool)
        stats = pool.stats()
        assert (stats.operations_running, stats.calls_lost) == (0, 1)
        assert stats.calls_stuck == 1
        assert (stats.operations_cancelled, stats.operations_timed_out) == (1, 0)
        fault.clear()
        await eventually(lambda: pool.stats().calls_stuck == 0)


async def test_deadlines_hold_on_plain_threads(make_pool: MakePool) -> None:
    """The blocking twins keep the same promises."""
    async with make_pool(max_sessions=1) as pool, anyio.create_task_group() as tasks:
        with Hold() as hold:
            tasks.start_soon(pool.run, hold)
            await hold.entered()

            def call() -> None:
                began = time.monotonic()
                with pytest.raises(PoolTimeout) as caught:
                    pool.run_sync(_nothing, timeout=_SHORT)
                assert caught.value.phase == "waiting"
                assert _SHORT <= time.monotonic() - began < 3 * _SHORT + SLACK

            await blocking(call)
            hold.let_go()


def _nothing(_session: object) -> None:
    pass
