"""One pool for every event loop, every thread, and one process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import Mechanism

from pkcs11_pool import WouldBlockLoop
from poolkit import blocking, digest, make_ec_key

if TYPE_CHECKING:
    from conftest import MakePool
    from pkcs11_pool import KeyRef, TokenPool

_DIGEST = b"d" * 32


async def test_several_loops_and_threads_use_one_pool_at_once(pool: TokenPool) -> None:
    """Loops of both backends and plain threads, each with right answers."""
    key = await make_ec_key(pool)
    right: list[bool] = []

    async def main() -> None:
        for _ in range(20):
            signature = await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
            valid = await key.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)
            right.append(valid)

    def plain() -> None:
        for _ in range(20):
            signature = key.sync.sign(_DIGEST, mechanism=Mechanism.ECDSA)
            right.append(key.sync.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA))

    loops: list[Any] = ["asyncio", "asyncio", "trio"]
    threads = [threading.Thread(target=anyio.run, args=(main,)) for _ in loops[:2]]
    threads += [
        threading.Thread(target=anyio.run, args=(main,), kwargs={"backend": b})
        for b in loops[2:]
    ]
    threads += [threading.Thread(target=plain) for _ in range(2)]
    for thread in threads:
        thread.start()
    await main()
    for thread in threads:
        await blocking(thread.join, 30)
    assert right == [True] * 20 * (len(threads) + 1)


async def test_a_blocking_call_on_a_loops_thread_is_refused(pool: TokenPool) -> None:
    """The loop would stand still."""
    key: KeyRef = pool.key(label="k")
    with pytest.raises(WouldBlockLoop):
        key.sync.sign(_DIGEST)
    with pytest.raises(WouldBlockLoop):
        pool.run_sync(print)


async def test_a_pool_is_opened_and_closed_by_different_tasks(
    make_pool: MakePool,
) -> None:
    """As frameworks do it at start-up and shutdown."""
    pool = make_pool()
    for step in (pool.open, lambda: digest(pool), pool.close):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(step)


async def test_the_error_of_the_block_leaves_as_itself(make_pool: MakePool) -> None:
    """No group around it."""
    with pytest.raises(KeyError):
        async with make_pool():
            raise KeyError("mine")
