"""One pool for every event loop, every thread, and one process."""

from __future__ import annotations

import subprocess
import sys
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
    from pkcs11_pool.softhsm import ThrowawayToken

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


_FORK = """
import os, sys, threading
from pkcs11_pool import ForkedProcess, TokenPool
import anyio

async def main():
    async with TokenPool(sys.argv[1], token_label="demo", pin="1234") as pool:
        stop = threading.Event()
        def load():
            while not stop.is_set():
                pool.run_sync(lambda session: session.generate_random(64))
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        await pool.generate_random(64)
        child = os.fork()
        if not child:
            refused = 0
            for call in (pool.generate_random, pool.session().__aenter__, pool.close):
                try:
                    await (call(64) if call == pool.generate_random else call())
                except ForkedProcess:
                    refused += 1
            os._exit(0 if refused == 3 else 1)
        _, status = os.waitpid(child, 0)
        for _ in range(50):
            await pool.generate_random(64)
        stop.set()
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)
        print("child", status, "failed", pool.stats().operations_failed)

anyio.run(main)
"""


def test_a_forked_child_is_refused_and_the_parent_goes_on(
    token: ThrowawayToken,
) -> None:
    """In the middle of load; the child touches nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK, str(token.module)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1:] == ["child 0 failed 0"], done.stderr
