"""More callers than the token can serve: who waits, who is refused; nobody starves."""

from __future__ import annotations

import time
import tracemalloc
from itertools import count
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from pkcs11 import KeyType, Mechanism

from pkcs11_pool import PoolTimeout, TooManyWaiting
from poolkit import (
    LAST_RESORT,
    SLACK,
    Hold,
    digest,
    hangs,
    make_ec_key,
    settled,
)

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

_CALLERS = 10_000
_SESSIONS = 4
_LIMIT = 0.5
_MOST_BYTES = 8_000
"""Bytes for one caller who waits, all included."""


_FAST = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {}), ("trio", {})], ids=["asyncio", "trio"]
)
"""Without uvloop and debug, for the time."""


@_FAST
@pytest.mark.timeout(120)
async def test_ten_thousand_callers_are_served_in_order(make_pool: MakePool) -> None:
    """Each waits in a few kilobytes, the first who came is served first."""
    order: list[int] = []

    def serve(_session: object, number: int) -> None:
        order.append(number)

    async with make_pool(max_sessions=_SESSIONS, timeout=100) as pool:
        numbers = count()

        async def call() -> None:
            # Taken when it is submitted: trio starts tasks in any order.
            await pool.run(serve, next(numbers))

        with Hold() as hold:
            async with anyio.create_task_group() as tasks:
                for _ in range(_SESSIONS):
                    tasks.start_soon(pool.run, hold)
                await hold.entered(_SESSIONS)
                tracemalloc.start()
                for _ in range(_CALLERS):
                    tasks.start_soon(call)
                await _all_wait(pool)
                used, _ = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                with pytest.raises(TooManyWaiting):
                    await digest(pool)
                hold.let_go()
        assert sorted(order) == list(range(_CALLERS))
        # Who has started and not noted it yet holds a session: those before him and
        # not noted are fewer than there are sessions, however a thread stands still.
        assert _most_missing(order) < _SESSIONS
        assert used / _CALLERS < _MOST_BYTES
        await settled(pool)
        assert pool.stats().operations_waiting == 0


def _most_missing(order: list[int]) -> int:
    """How many smaller numbers were not there yet, when one came, at most."""
    seen: set[int] = set()
    most = first = 0
    for number in order:
        seen.add(number)
        while first in seen:
            first += 1
        missing = sum(one not in seen for one in range(first, number))
        most = max(most, missing)
    return most


async def _all_wait(pool: TokenPool) -> None:
    # The test's own limit counts: under tracemalloc it takes what it takes.
    while pool.stats().operations_waiting < _CALLERS:
        await anyio.lowlevel.checkpoint()


@_FAST
@pytest.mark.timeout(120)
async def test_deadlines_hold_for_thousands_who_wait(make_pool: MakePool) -> None:
    """All are told in time, and none of their calls is made."""
    async with make_pool(max_sessions=_SESSIONS) as pool:
        late: list[float] = []

        async def wait() -> None:
            began = time.monotonic()
            with pytest.raises(PoolTimeout) as caught:
                await digest(pool, timeout=_LIMIT)
            assert caught.value.phase == "waiting"
            late.append(time.monotonic() - began - _LIMIT)

        with Hold() as hold:
            async with anyio.create_task_group() as tasks:
                for _ in range(_SESSIONS):
                    tasks.start_soon(pool.run, hold)
                await hold.entered(_SESSIONS)
                async with anyio.create_task_group() as waiting:
                    for number in range(_CALLERS):
                        waiting.start_soon(wait)
                        if number % 100 == 0:
                            # The loop looks at those whose time is over, too.
                            await anyio.lowlevel.checkpoint()
                assert len(late) == _CALLERS
                assert min(late) >= 0
                assert max(late) < 2 * _LIMIT + SLACK
                assert pool.stats().operations_waiting == 0
                hold.let_go()
        assert await digest(pool)


async def _flood(pool: TokenPool, fault: FaultModule, tasks: Any, calls: int) -> None:
    """Key generations that do not end, more than there are sessions."""
    fault.on("C_GenerateKey", every=True, hang="before")
    for number in range(calls):
        tasks.start_soon(_generate, pool, number)
    await hangs(fault, "C_GenerateKey", _SESSIONS - 1)


async def _generate(pool: TokenPool, number: int) -> None:
    await pool.generate_key(KeyType.AES, 128, label=f"key {number}", store=True)


async def test_slow_key_generations_do_not_starve_signatures(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """They never take the last session, however many wait and whoever came first."""
    async with make_pool(module=fault.path, max_sessions=_SESSIONS) as pool:
        key = await make_ec_key(pool)
        async with anyio.create_task_group() as tasks:
            await _flood(pool, fault, tasks, 50)
            for _ in range(20):
                assert await key.sign(b"d" * 32, mechanism=Mechanism.ECDSA)
            assert fault.count("C_GenerateKey") == _SESSIONS - 1
            fault.clear()
        assert fault.count("C_GenerateKey") == 50


async def test_signatures_do_not_starve_key_generations(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Nor the other way round: whoever came first is first, while there is room."""
    async with make_pool(module=fault.path, max_sessions=_SESSIONS) as pool:
        key = await make_ec_key(pool)
        stop = False

        async def sign() -> None:
            while not stop:
                await key.sign(b"d" * 32, mechanism=Mechanism.ECDSA)

        async with anyio.create_task_group() as tasks:
            for _ in range(16):
                tasks.start_soon(sign)
            for number in range(10):
                with anyio.fail_after(LAST_RESORT):
                    await _generate(pool, number)
            stop = True


async def test_a_pool_of_one_session_makes_keys_too(make_pool: MakePool) -> None:
    """There is no session to be kept for others then."""
    async with make_pool(max_sessions=1) as pool:
        await _generate(pool, 1)
        assert await digest(pool)
