"""The end of a process does not wait for a call that never returns."""

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
