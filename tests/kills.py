"""Programs on ``p11-kit server``, a token whose server is killed and stopped for real.

Run by ``test_kills`` in processes of their own, because a Cryptoki module is one per
process. Each prints what came of it as JSON: ``kills.py PROGRAM BACKEND [PLAN]``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from pkcs11_pool import PoolTimeout, TokenPool, TokenUnavailable, softhsm
from pkcs11_pool.chaos import faults, load
from pkcs11_pool.chaos.server import TokenServer, client_module

TASKS = 64
REST = 1.0


def _pool(token: Any, **options: Any) -> TokenPool:
    return TokenPool(
        client_module(), token_label=token.label, pin=token.user_pin, **options
    )


async def under_load(token: Any, server: TokenServer, plan: str) -> dict[str, Any]:
    """64 tasks while the server goes and comes; the plan is ``kill:3,stop:5``."""
    steps = [step.split(":") for step in plan.split(",")]
    wanted = [faults.Fault(kind, REST, float(length)) for kind, length in steps]
    async with _pool(token) as pool:
        public = await load.prepare(pool)
        rng = random.Random(1)  # noqa: S311  # no secret
        work = load.Load(pool, public, rng, unruly=False)
        mischief = faults.Mischief(server, pool, work.book)
        async with anyio.create_task_group() as tasks:
            for _ in range(TASKS):
                tasks.start_soon(work.task)
            await mischief.run(wanted)
            with anyio.fail_after(20):
                await work.book.one_more()
            work.stopping = True
        lost, strange = await load.compare(pool, work.book)
        stats = pool.stats()
    book = work.book
    return {
        "acknowledged": book.total,
        "refused": book.refused,
        "wrong": book.wrong,
        "lost": lost,
        "strange": strange,
        "returns": book.returns,
        "recoveries": stats.recoveries_total,
        "calls_lost": stats.calls_lost,
    }


async def opening(token: Any, server: TokenServer, _plan: str) -> dict[str, Any]:
    """The server is down when the pool opens: it is waited for, or not for ever."""
    server.kill()
    began = time.monotonic()
    refused = ""
    try:
        await _pool(token, open_timeout=2.0).open()
    except TokenUnavailable as error:
        refused = str(error)
    gave_up = time.monotonic() - began
    async with anyio.create_task_group() as tasks:

        async def later() -> None:
            await anyio.sleep(1)
            await anyio.to_thread.run_sync(server.start)

        tasks.start_soon(later)
        async with _pool(token) as pool:
            random_bytes = await pool.generate_random(64)
    return {"refused": refused, "gave_up": gave_up, "random": random_bytes.hex()}


async def hanging(token: Any, server: TokenServer, _plan: str) -> dict[str, Any]:
    """The server is stopped for good: nothing that ends may wait for the call."""
    pool = _pool(token, close_timeout=0.5, recovery_timeout=5.0)
    await pool.open()
    server.stop()
    phases: list[str] = []
    # Time to get into the module; less than the recovery has; more than that.
    for timeout in (2.0, 0.4, 30.0):
        try:
            await pool.generate_random(64, timeout=timeout)
        except PoolTimeout as error:
            phases.append(error.phase)
        except TokenUnavailable as error:
            phases.append(str(error))
    stats = pool.stats()
    began = time.monotonic()
    await pool.close()
    return {
        "phases": phases,
        "calls_lost": stats.calls_lost,
        "calls_stuck": stats.calls_stuck,
        "closing": time.monotonic() - began,
        "state": pool.state.value,
    }


def main(program: str, backend: str, plan: str = "") -> None:
    """Do it in a directory that is gone afterwards."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hsm = softhsm.ensure()
        token = stack.enter_context(softhsm.throwaway_token("kills", softhsm=hsm))
        server = stack.enter_context(TokenServer(token, directory))
        os.environ.update(server.environment)
        found = anyio.run(globals()[program], token, server, plan, backend=backend)
        if program == "hanging":
            # The end of the process comes while the server is still stopped.
            stack.pop_all()
        found["server"] = server.pid
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
