"""The Cryptoki module: initialised right, shared, and called as it can bear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from poolkit import digest, eventually, settled

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import ThrowawayToken, TokenDirectory

_OS_LOCKING_OK = 0x2


@pytest.fixture
def tokens(token_directory: TokenDirectory, token: ThrowawayToken) -> tuple[str, str]:
    """The labels of two tokens."""
    return token.label, token_directory.add_token("second").label


async def test_the_module_is_told_of_threads(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``C_Initialize`` gets ``CKF_OS_LOCKING_OK``, at each opening."""
    for _ in range(2):
        async with make_pool(module=fault.path):
            assert fault.init_args
            assert fault.init_flags == _OS_LOCKING_OK
            assert fault.init_reserved is None
    assert fault.count("C_Initialize") == fault.count("C_Finalize") == 2


async def test_module_parameters_are_passed_on(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``init_reserved`` of the pool that initialises reaches the module."""
    fault.hide_reserved = True
    for words in ("configdir='sql:/a' flags=", "configdir='sql:/b'", None):
        async with make_pool(module=fault.path, init_reserved=words) as pool:
            assert fault.init_reserved == words
            assert fault.init_flags == _OS_LOCKING_OK
            assert await digest(pool)


async def test_a_module_that_cannot_lock_is_called_by_one_at_a_time(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """No two calls are ever inside: not of operations, not of the actor."""
    fault.cant_lock = True
    fault.latency_us = 200
    async with make_pool(module=fault.path, pin=None) as pool:
        assert fault.init_flags == 0
        fault.reset_counts()
        stop = anyio.Event()

        async def load() -> None:
            while not stop.is_set():
                await digest(pool)

        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(load)
            for _ in range(10):
                await pool.login(token.user_pin)
                await pool.logout()
            for _ in range(5):
                async with pool.session(rw=True) as session:
                    await digest(session)
            stop.set()
        await eventually(lambda: pool.stats().sessions_open == 0)
        assert fault.overlaps == 0


async def test_two_pools_take_turns_on_a_module_that_cannot_lock(
    make_pool: MakePool, tokens: tuple[str, str], fault: FaultModule
) -> None:
    """The turn is the module's, not the pool's: also when one of them falls idle."""
    fault.cant_lock = True
    fault.latency_us = 200
    first, second = tokens
    async with (
        make_pool(module=fault.path, token_label=first) as one,
        make_pool(module=fault.path, token_label=second) as two,
    ):
        fault.reset_counts()
        stop = anyio.Event()

        async def load() -> None:
            while not stop.is_set():
                await digest(one)

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(load)
            for _ in range(3):
                async with anyio.create_task_group() as some:
                    for _ in range(8):
                        some.start_soon(digest, two)
                await settled(two)
                await eventually(lambda: two.stats().sessions_open == 0)
                await two.logout()
                await two.login("1234")
            stop.set()
        assert fault.overlaps == 0
