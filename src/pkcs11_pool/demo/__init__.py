"""The main job, to be seen and believed: real keys, many tasks, every result checked.

It makes a throwaway SoftHSM2 token, shows what sessions and logins do on it, then puts
a pool under load from asyncio and from trio. Every result is checked by somebody other
than the token; one that is wrong or missing makes the exit status 1.

It needs the ``demo`` extra, and nothing of the user's.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import anyio
import trio

from pkcs11_pool import softhsm
from pkcs11_pool.demo import load, report, story
from pkcs11_pool.demo.calls import counting
from pkcs11_pool.demo.work import Bench, Material, make_keys
from pkcs11_pool.faces.pool import TokenPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pkcs11_pool.cryptoki.interface import Library
    from pkcs11_pool.demo.load import Orders, Outcome
    from pkcs11_pool.demo.report import Terminal
    from pkcs11_pool.softhsm import ThrowawayToken

__all__ = ["run"]

BACKENDS: Final = ("asyncio", "trio")
CANNOT_RUN: Final = 2
INTERRUPTED: Final = 130


def run(*, operations: int, tasks: int, as_json: bool) -> int:
    """Run the demo and return its exit status.

    Args:
        operations: How many on each event loop.
        tasks: How many tasks share them.
        as_json: Print one JSON object; what is told meanwhile goes to standard error.

    Returns:
        0: all is right. 1: a result is wrong or missing. 2: there is no token to run
        it on, and the text says why.
    """
    terminal = report.Terminal(to_stderr=as_json)
    try:
        with terminal.log():
            outcomes = _show(terminal, operations, tasks)
    except softhsm.SoftHSMUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return CANNOT_RUN
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return INTERRUPTED
    return _conclude(terminal, outcomes, as_json=as_json)


def _show(terminal: Terminal, operations: int, tasks: int) -> Sequence[Outcome]:
    """Do all of it on one token; return what the loads came to."""
    hsm = softhsm.ensure(terminal.say)
    with softhsm.throwaway_token("demo", softhsm=hsm) as token:
        terminal.say(f"A throwaway token in {token.directory}")
        material, library = anyio.run(_prepare, token, terminal)
        outcomes = []
        for backend in BACKENDS:
            with counting(library) as functions:
                orders = load.Orders(backend, operations, tasks, functions)
                outcomes.append(
                    anyio.run(_load, token, material, orders, terminal, backend=backend)
                )
        return outcomes


def _pool(token: ThrowawayToken) -> TokenPool:
    return TokenPool(token.module, token_label=token.label, pin=token.user_pin)


async def _prepare(
    token: ThrowawayToken, terminal: Terminal
) -> tuple[Material, Library]:
    """Make the keys, and show sessions and logins."""
    terminal.title("Login")
    async with _pool(token) as pool:
        terminal.title("Keys")
        material = await make_keys(pool)
        for key in await pool.find():
            terminal.say(f"  {key}")
        bench = Bench(pool, material)
        terminal.title("The life of a session object")
        await story.session_objects(bench, terminal.tell)
        terminal.title("Logout and login, as an open session sees them")
        await story.login(bench, terminal.tell)
        return material, pool.lib


async def _load(
    token: ThrowawayToken, material: Material, orders: Orders, terminal: Terminal
) -> Outcome:
    """Put a pool under load on one event loop."""
    what = f"{orders.operations:,} operations from {orders.tasks:,} tasks"
    terminal.title(f"{orders.backend}: {what}")
    async with _pool(token) as pool:
        with terminal.bars(["operations", "verified"], orders.operations) as bars:
            outcome = await load.run(pool, material, orders, (bars[0], bars[1]))
    terminal.outcome(outcome)
    return outcome


def _conclude(terminal: Terminal, outcomes: Sequence[Outcome], *, as_json: bool) -> int:
    """Show the figures, last of all how many results were right."""
    verified = sum(outcome.total_verified for outcome in outcomes)
    expected = sum(outcome.operations for outcome in outcomes)
    terminal.title("All together")
    terminal.summary(outcomes)
    for text in terminal.wrong:
        terminal.say(f"not as it should be: {text}", "red")
    right = verified == expected and not terminal.wrong
    terminal.say(f"verified {verified} of {expected}", "green" if right else "red")
    if as_json:
        data = {
            "versions": _versions(),
            "event_loops": [report.as_data(outcome) for outcome in outcomes],
            "wrong": terminal.wrong,
            "verified": verified,
            "expected": expected,
        }
        report.write(json.dumps(data, indent=2))
    return 0 if right else 1


def _versions() -> dict[str, str]:
    names = ("python-pkcs11", "anyio", "cryptography")
    found = {name: version(name) for name in names}
    return {"python": platform.python_version(), "trio": trio.__version__, **found}
