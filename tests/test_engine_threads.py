"""One pool for every event loop, every thread, and one process."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import Mechanism

from pkcs11_pool import WouldBlockLoop
from poolkit import ASYNCIO_ONLY, blocking, digest, make_ec_key

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


@ASYNCIO_ONLY
async def test_a_loop_goes_on_while_another_thread_imports_trio(
    pool: TokenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python shows a package that is half imported, without its names yet."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trio", ModuleType("trio"))
        assert await digest(pool)
        assert await blocking(pool.run_sync, lambda _session: True)


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
from pkcs11 import Mechanism
from pkcs11_pool import ForkedProcess, TokenPool, WouldBlockLoop
import anyio

MODULE, BACKEND, LABEL, PIN = sys.argv[1:]


async def refused(call):
    try:
        await call()
    except ForkedProcess:
        return True
    return False


async def child(pool, session, officer):
    key = pool.key(label="any")
    calls = {
        "random": lambda: pool.generate_random(64),
        "sign": lambda: key.sign(b"x", mechanism=Mechanism.ECDSA_SHA256),
        "destroy": key.destroy,
        "session": pool.session().__aenter__,
        "in a session": lambda: session.generate_random(64),
        "officer": officer.__aenter__,
        "login": pool.login,
        "logout": pool.logout,
        "open": pool.open,
        "close": pool.close,
    }
    wrong = [name for name, call in calls.items() if not await refused(call)]

    def from_a_thread():
        try:
            pool.run_sync(lambda session: session)
        except ForkedProcess:
            return
        wrong.append("thread")

    thread = threading.Thread(target=from_a_thread, daemon=True)
    thread.start()
    thread.join(10)
    return wrong + ["thread hangs"] * thread.is_alive()


async def main():
    async with TokenPool(MODULE, token_label=LABEL, pin=PIN) as pool:
        stop = threading.Event()

        def load():
            while not stop.is_set():
                pool.run_sync(lambda session: session.generate_random(64))

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        await pool.generate_random(64)
        officer = pool.security_officer("12345678")
        async with pool.session() as session:
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    wrong = await child(pool, session, officer)
                    print("not refused:", wrong, file=sys.stderr)
                    status = len(wrong)
                finally:
                    os._exit(status)
            _, status = os.waitpid(pid, 0)
            await session.generate_random(64)
        for _ in range(50):
            await pool.generate_random(64)
        stop.set()
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)
        print("child", status, "failed", pool.stats().operations_failed)


anyio.run(main, backend=BACKEND)
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_forked_child_is_refused_and_the_parent_goes_on(
    token: ThrowawayToken, backend: str
) -> None:
    """In the middle of load; the child touches nothing, and every call says so."""
    arguments = [str(token.module), backend, token.label, token.user_pin]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1:] == ["child 0 failed 0"], done.stderr


_PRELOAD = """
import os, sys, traceback
from pkcs11_pool import TokenPool
import anyio

MODULE, BACKEND, LABEL, PIN = sys.argv[1:]
pool = TokenPool(MODULE, token_label=LABEL, pin=PIN)


async def main():
    async with pool:
        print(len(await pool.generate_random(64)), flush=True)


children = []
# One after the other: SoftHSM2 2.6.1 may miss a token that another process writes to
# while it is initialised.
for _ in range(2):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            anyio.run(main, backend=BACKEND)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    children.append(os.waitpid(pid, 0)[1])
print("children", children)
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_pool_made_before_a_fork_may_be_opened_in_each_child(
    token: ThrowawayToken, backend: str
) -> None:
    """As servers do that load the application first and fork their workers then."""
    arguments = [str(token.module), backend, token.label, token.user_pin]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PRELOAD, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["8", "8", "children [0, 0]"], done.stderr
