"""The end of a process: it waits for no call that hangs, and leaves little behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken

_PROGRAM = """
import sys
import anyio
from faultmodule import FaultModule
from pkcs11_pool import TokenPool
from poolkit import lost

LIBRARY, COPY, TARGET, LABEL, PIN, BACKEND, HOW = sys.argv[1:]
fault = FaultModule(LIBRARY, TARGET, copy_to=COPY)


async def main():
    pool = TokenPool(fault.path, token_label=LABEL, pin=PIN, close_timeout=0.2)
    await pool.open()
    fault.on("C_Digest", every=True, hang="before")
    for calls in (1, 2):
        print((await lost(pool, fault, calls)).phase)
    if HOW == "closed":
        await pool.close()
    if HOW == "in the middle":
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.generate_random, 8)
            sys.exit(3)
    print(fault.inside("C_Digest"), pool.stats().calls_stuck, flush=True)


anyio.run(main, backend=BACKEND)
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("how", ["closed", "left open", "in the middle"])
def test_the_process_ends_with_calls_that_never_return(
    fault_library: Path,
    soft_hsm: SoftHSM,
    token: ThrowawayToken,
    tmp_path: Path,
    *,
    backend: str,
    how: str,
) -> None:
    """Whether its pool was closed or not, and with nothing written at the end."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", _PROGRAM, str(fault_library)),
            *(str(tmp_path / "libfault.so"), str(soft_hsm.module)),
            *(token.label, token.user_pin, backend, how),
        ],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.stdout.split()[:2] == ["running", "running"], done.stderr
    if how == "in the middle":
        # trio has a SystemExit in a group of errors.
        assert done.returncode in (1, 3)
        return
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[2:] == ["2", "2"]


# What the module was asked is looked at after the library's own last word.
_LEFT_OPEN = """
import atexit, os, sys, threading

@atexit.register
def report():
    counts = [fault.count(f) for f in ("C_Logout", "C_Finalize")]
    print(*counts, len(fault.sessions()), flush=True)

import anyio
from faultmodule import FaultModule
from pkcs11_pool import PoolClosed, TokenPool
from poolkit import digest, lost, settled

LIBRARY, COPY, TARGET, LABEL, PIN, BACKEND, HOW = sys.argv[1:]
fault = FaultModule(LIBRARY, TARGET, copy_to=COPY)


def told_in_time(pool):
    try:
        pool.run_sync(lambda session: session.generate_random(64))
    except PoolClosed:
        pass


async def main():
    pool = TokenPool(fault.path, token_label=LABEL, pin=PIN)
    await pool.open()
    if HOW == "idle":
        await digest(pool)
    elif HOW == "with a lease":
        await pool.session().__aenter__()
    elif HOW == "with a call given up on":
        fault.on("C_Digest", hang="before")
        await lost(pool, fault)
    elif HOW == "with a call inside":
        fault.on("C_GenerateRandom", hang="before")
        threading.Thread(target=told_in_time, args=(pool,), daemon=True).start()
        await anyio.to_thread.run_sync(fault.wait_until_hanging, "C_GenerateRandom")
    elif HOW == "and hanging":
        fault.on("C_Finalize", hang="before")
    else:
        await settled(pool)


anyio.run(main, backend=BACKEND)
if HOW == "by the parent" and os.fork():
    os.wait()
"""


@pytest.mark.parametrize(
    ("how", "backend", "told"),
    [
        # C_Logout, C_Finalize, and sessions that are open then.
        ("idle", "asyncio", ["1 1 0"]),
        ("idle", "trio", ["1 1 0"]),
        ("with a lease", "asyncio", ["1 1 0"]),
        ("with a call given up on", "asyncio", ["1 0 1"]),
        ("with a call inside", "trio", ["1 0 1"]),
        ("and hanging", "trio", ["1 1 0"]),
        ("by the parent", "asyncio", ["0 0 1", "1 1 0"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pool_left_open_is_closed_at_the_end_if_nobody_is_inside(  # noqa: PLR0917
    fault_library: Path,
    soft_hsm: SoftHSM,
    token: ThrowawayToken,
    tmp_path: Path,
    how: str,
    backend: str,
    told: list[str],
) -> None:
    """Logged out and finalised; with a call inside not finalised, and in no case late.

    What a forked child has of its parent's is left alone.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", _LEFT_OPEN, str(fault_library)),
            *(str(tmp_path / "libfault.so"), str(soft_hsm.module)),
            *(token.label, token.user_pin, backend, how),
        ],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == told
