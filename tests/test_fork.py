"""What a forked child has of its parent's process, and what it must not use.

Each test is a process of its own that forks: nothing else is forked here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from poolkit import LAST_RESORT

if TYPE_CHECKING:
    from collections.abc import Callable

    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import ThrowawayToken

_TESTS = Path(__file__).parent

# A child that hangs must end before the test is over, and be seen to have hung.
_COMMON = f"""
import os, signal, sys, threading, traceback
import anyio
from pkcs11_pool import ForkedProcess, PoolTimeout, TokenPool

MODULE, OTHER, LABEL, PIN, BACKEND = sys.argv[1:]


def pool_on(module, **options):
    return TokenPool(module, token_label=LABEL, pin=PIN, **options)


def forked(child):
    # What the child said, or by which signal it ended.
    reading, writing = os.pipe()
    number = os.fork()
    if not number:
        signal.alarm({int(LAST_RESORT)})
        try:
            said = child()
        except BaseException as error:
            traceback.print_exc()
            said = type(error).__name__
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        said = answer.read()
    return said or str(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))


def refused(call, *arguments):
    # The thread that forks runs no loop, so that it may run one in the child.
    try:
        anyio.run(call, *arguments, backend=BACKEND)
    except ForkedProcess as error:
        return "refused: " + str(error)
    return "not refused"


async def use(pool, *calls):
    async with pool:
        for call in calls:
            await call(pool)


async def random(pool):
    await pool.generate_random(64)
"""


@pytest.fixture
def run(token: ThrowawayToken, tmp_path: Path) -> Callable[..., list[str]]:
    """Run a program that forks, on the test's token; the lines that it wrote.

    ``OTHER`` is a copy of the module, with a state of its own.
    """

    def run(
        program: str, backend: str = "asyncio", module: Any = None, call: str = ""
    ) -> list[str]:
        other = tmp_path / "other.so"
        shutil.copyfile(token.module, other)
        arguments = [module or token.module, other, token.label, token.user_pin]
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", "-c"),
                _COMMON + textwrap.dedent(program),
                *map(str, arguments),
                backend,
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=_TESTS,
            env={**os.environ, "TEST_TARGET": str(token.module), "TEST_CALL": call},
            timeout=3 * LAST_RESORT,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@BACKENDS
def test_a_child_opens_no_module_that_was_open_at_the_fork(
    run: Callable[..., list[str]], backend: str
) -> None:
    """Not for a pool, and not for a look at its tokens; another module serves it."""
    said = run(
        """
        from pkcs11_pool import list_tokens

        def child():
            async def look():
                await list_tokens(MODULE)

            anyio.run(use, pool_on(OTHER), random, backend=BACKEND)
            return "; ".join([refused(look), refused(use, pool_on(MODULE)), "served"])

        with anyio.from_thread.start_blocking_portal(BACKEND) as portal:
            pool = pool_on(MODULE)
            portal.call(pool.open)
            print(forked(child))
            portal.call(pool.close)
        """,
        backend,
    )
    (told,) = said
    look, opened, other = told.split("; ")
    for refused in (look, opened):
        assert refused.startswith("refused: ")
        assert "after the fork" in refused
    assert other == "served"


@BACKENDS
def test_a_module_that_was_not_finalised_is_not_used_by_a_child(
    run: Callable[..., list[str]], backend: str, fault: FaultModule
) -> None:
    """No pool is open, but the module is initialised: by the parent, for itself."""
    said = run(
        """
        from faultmodule import CKR, FaultModule

        fault = FaultModule(MODULE, os.environ["TEST_TARGET"])
        fault.on("C_Finalize", answer=CKR.GENERAL_ERROR)
        anyio.run(use, pool_on(MODULE), random, backend=BACKEND)
        print(forked(lambda: refused(use, pool_on(MODULE))))
        anyio.run(use, pool_on(MODULE), random, backend=BACKEND)
        print("served")
        """,
        backend,
        fault.path,
    )
    child, parent = said
    assert child.startswith("refused: ")
    assert parent == "served"


def test_deadlines_hold_in_a_child_that_has_a_pool_of_its_own(
    run: Callable[..., list[str]],
) -> None:
    """The thread that kept them stayed in the parent, in the middle of its work."""
    said = run(
        """
        go_on, inside = threading.Event(), threading.Event()

        def stays(_session):
            inside.set()
            go_on.wait(60)

        async def late(pool):
            try:
                await pool.run(stays, timeout=0.2)
            finally:
                go_on.set()

        def child():
            go_on.clear()
            anyio.run(use, pool_on(OTHER), late, backend=BACKEND)
            return "no PoolTimeout"

        with anyio.from_thread.start_blocking_portal(BACKEND) as portal:
            pool = pool_on(MODULE)
            portal.call(pool.open)
            thread = threading.Thread(target=pool.run_sync, args=(stays,))
            thread.start()
            inside.wait()
            names = [thread.name for thread in threading.enumerate()]
            assert "pkcs11-pool timekeeper" in names
            print(forked(child))
            go_on.set()
            thread.join()
            portal.call(pool.close)
        """
    )
    assert said == ["PoolTimeout"]


@BACKENDS
def test_a_child_opens_a_pool_though_a_thread_was_opening_another(
    run: Callable[..., list[str]], backend: str, fault: FaultModule
) -> None:
    """It held the lock of all modules at the fork, and is not there to release it."""
    said = run(
        """
        from faultmodule import FaultModule

        fault = FaultModule(MODULE, os.environ["TEST_TARGET"])
        fault.on("C_Initialize", hang="before")

        def child():
            anyio.run(use, pool_on(OTHER), random, backend=BACKEND)
            return "served"

        opening = (use, pool_on(MODULE), random)
        thread = threading.Thread(
            target=anyio.run, args=opening, kwargs={"backend": BACKEND}
        )
        thread.start()
        fault.wait_until_hanging("C_Initialize")
        print(forked(child))
        fault.release()
        thread.join()
        """,
        backend,
        fault.path,
    )
    assert said == ["served"]


@BACKENDS
@pytest.mark.parametrize("call", ["map", "digest", "digest at once", "stream"])
def test_a_fork_among_the_items_or_the_data_is_noticed(
    run: Callable[..., list[str]], backend: str, call: str
) -> None:
    """A pool looks at its process again after whatever a caller's code has done.

    What has the lock in the child waits for ever.
    """
    said = run(
        """
        from pkcs11 import KeyType, Mechanism

        children = []

        def items():
            if "at once" not in os.environ["TEST_CALL"]:
                yield bytes(100_000)
            with pool._engine._lock:
                children.append(os.fork())
            if not children[-1]:
                signal.alarm(20)
                pool._engine._lock.acquire()
            yield bytes(100_000)

        def digest(session, item):
            return session.digest(item, mechanism=Mechanism.SHA256)

        async def work(pool):
            cbc = {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": bytes(16)}
            await pool.generate_key(KeyType.AES, 256, label="aes", store=True)
            try:
                if os.environ["TEST_CALL"].startswith("digest"):
                    await pool.digest(items(), mechanism=Mechanism.SHA256)
                elif os.environ["TEST_CALL"] == "map":
                    async for _ in pool.map(digest, items()):
                        pass
                else:
                    key = pool.key(label="aes")
                    async for _ in key.encrypt_stream(items(), **cbc):
                        pass
            except ForkedProcess:
                os._exit(7)
            finally:
                if not children[-1]:
                    os._exit(1)
            print(os.waitstatus_to_exitcode(os.waitpid(children[-1], 0)[1]))

        pool = pool_on(MODULE)
        anyio.run(use, pool, work, backend=BACKEND)
        """,
        backend,
        call=call,
    )
    assert said == ["7"]
