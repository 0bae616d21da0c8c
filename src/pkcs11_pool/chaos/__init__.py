"""A token mistreated on purpose, while a pool on it is under load.

It makes a throwaway SoftHSM2 token, puts it behind ``p11-kit server``, opens a pool
and lets many tasks use it. Meanwhile the server is killed and started again, stopped
and let go on, and the login taken away, at random by a seed. At the end nothing that
was acknowledged may be lost, no result wrong and nothing left over; else the exit
status is 1.

It needs the ``demo`` extra, p11-kit and its modules, and nothing of the user's.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from pkcs11_pool import softhsm
from pkcs11_pool.chaos import faults, load
from pkcs11_pool.chaos.report import Report, Screen
from pkcs11_pool.chaos.server import ServerUnavailable, TokenServer, client_module
from pkcs11_pool.faces.pool import TokenPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.softhsm import ThrowawayToken

__all__ = ["run"]

CANNOT_RUN: Final = 2
INTERRUPTED: Final = 130
_LOOK: Final = 0.2
_LAST_RESULT: Final = 40.0
"""Seconds after the last fault within which a result must come."""
_PATIENCE: Final = 5.0
"""Seconds in which what is left over may still go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What was asked for."""

    seconds: float
    seed: int
    tasks: int
    loop: str


def run(
    *, seconds: float, seed: int | None, tasks: int, loop: str, as_json: bool
) -> int:
    """Run it and return its exit status.

    Args:
        seconds: How long the load lasts.
        seed: For the faults and the load; None: a new one, which is told.
        tasks: How many use the pool at once.
        loop: ``asyncio`` or ``trio``.
        as_json: Print one JSON object; what is told meanwhile goes to standard error.

    Returns:
        0: nothing is lost, wrong or left over. 1: something is. 2: it cannot run here,
        and the text says why.
    """
    chosen = seed if seed is not None else random.SystemRandom().randrange(1_000_000)
    order = _Order(seconds=seconds, seed=chosen, tasks=tasks, loop=loop)
    screen = Screen(to_stderr=as_json)
    try:
        report = _on_a_server(order, screen)
    except (softhsm.SoftHSMUnavailable, ServerUnavailable) as error:
        sys.stderr.write(f"{error}\n")
        return CANNOT_RUN
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return INTERRUPTED
    screen.show(report)
    if as_json:
        sys.stdout.write(json.dumps(report.as_data(), indent=2) + "\n")
    return 0 if report.is_well else 1


def _on_a_server(order: _Order, screen: Screen) -> Report:
    module = client_module()
    hsm = softhsm.ensure(screen.say)
    with (
        tempfile.TemporaryDirectory() as directory,
        softhsm.throwaway_token("chaos", softhsm=hsm) as token,
        TokenServer(token, Path(directory)) as server,
    ):
        # Read at each C_Initialize.
        os.environ.update(server.environment)
        report: Report = anyio.run(
            _mistreat, order, screen, (module, token, server), backend=order.loop
        )
    report.leaked += [
        f"thread {thread.name}"
        for thread in threading.enumerate()
        if thread.name.startswith("pkcs11-pool")
    ]
    return report


async def _mistreat(
    order: _Order, screen: Screen, place: tuple[Path, ThrowawayToken, TokenServer]
) -> Report:
    module, token, server = place
    # The load draws more or less often, as it is fast or slow: the faults must not.
    plan = faults.plan(random.Random(order.seed), order.seconds)  # noqa: S311
    options: dict[str, Any] = {"token_label": token.label, "pin": token.user_pin}
    began = time.monotonic()
    async with TokenPool(module, **options) as pool:
        work = load.Load(
            pool,
            await load.prepare(pool),
            random.Random(order.seed + 1),  # noqa: S311
        )
        mischief = faults.Mischief(server, pool, work.book, screen.fault)
        with screen.live(order.seconds) as show:
            async with anyio.create_task_group() as group:
                group.start_soon(_watch, work, pool, show)
                await _until_over(order, work, mischief, plan)
        stats = pool.stats()
        lost, strange = await load.compare(pool, work.book)
        leaked = await _left_over(pool)
    return Report(
        seed=order.seed,
        loop=order.loop,
        tasks=order.tasks,
        seconds=time.monotonic() - began,
        book=work.book,
        faults=dict(mischief.done),
        stats=stats,
        lost=lost,
        strange=strange,
        leaked=leaked,
    )


async def _watch(work: load.Load, pool: TokenPool, show: Callable[[str], None]) -> None:
    book = work.book
    while not work.stopping:
        wrong = f"{len(book.wrong)} wrong"
        show(f"{book.total:,} results, {wrong}, the pool is {pool.state.value}")
        await anyio.sleep(_LOOK)


async def _until_over(
    order: _Order,
    work: load.Load,
    mischief: faults.Mischief,
    plan: list[faults.Fault],
) -> None:
    ends = time.monotonic() + order.seconds
    async with anyio.create_task_group() as group:
        for _ in range(order.tasks):
            group.start_soon(work.task)
        await mischief.run(plan)
        await anyio.sleep(max(0.0, ends - time.monotonic()))
        with anyio.move_on_after(_LAST_RESULT) as scope:
            await work.book.one_more()
        if scope.cancelled_caught:
            work.book.blame(f"no result within {_LAST_RESULT:.0f} s of the last fault")
        work.stopping = True


async def _left_over(pool: TokenPool) -> list[str]:
    """What is still held when all callers are gone."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        stats = pool.stats()
        left = {
            "sessions": stats.sessions_open - stats.sessions_ahead,
            "leases": stats.sessions_leased,
            "waiting": stats.operations_waiting,
            "running": stats.operations_running,
        }
        found = [f"{count} {name}" for name, count in left.items() if count]
        if not found or time.monotonic() > deadline:
            return found
        await anyio.sleep(0.05)
