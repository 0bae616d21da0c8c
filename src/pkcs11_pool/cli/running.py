"""Commands that put a pool under load: the demo and the benchmark.

What they are made of stands elsewhere; here are their words.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Final, Literal

from cyclopts import Group, Parameter

from pkcs11_pool import pins
from pkcs11_pool.bench import options
from pkcs11_pool.bench.turns import BACKENDS, OPERATIONS
from pkcs11_pool.cli.exits import CommandError
from pkcs11_pool.cli.options import ModuleOptions, agree
from pkcs11_pool.cli.pin_options import PinOptions

# What the extra of a command brings, over what the package itself needs.
DEMO_NEEDS: Final = frozenset({"cryptography", "rich", "trio"})
BENCH_NEEDS: Final = frozenset({"cryptography", "rich"})

_WHAT: Final = Group("What is measured", sort_key=1)
_HOW_LONG: Final = Group("How long", sort_key=2)
_WHERE: Final = Group("Where it goes, besides the terminal", sort_key=3)
_TOKEN: Final = Group(
    "The token",
    help=(
        "A throwaway SoftHSM2 token, if none is named here; PKCS11_MODULE and "
        "PKCS11_TOKEN are not read. The PIN: by one of these words, else by the URI's "
        "pin-source, else PKCS11_PIN, else it is asked for."
    ),
    sort_key=4,
)


def _by(read: Any) -> Any:
    """Make a reader of text a converter; what is given twice is a list of both."""

    def convert(_type: Any, words: Any) -> Any:
        return read(",".join(word.value for word in words))

    return convert


_Count = Parameter(converter=_by(options.count))


def load(command: str, name: str, needs: frozenset[str]) -> ModuleType:
    """Import what a command is made of, or say what is missing for it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in needs:
            raise
        raise CommandError(
            f"The {command} needs {error.name}: pip install 'pkcs11-pool[{command}]'"
        ) from error


def demo(
    *,
    operations: Annotated[int, _Count] = 2000,
    tasks: Annotated[int, _Count] = 64,
    json: bool = False,
) -> int:
    """Make real signatures on a throwaway SoftHSM2 token, and verify them.

    Keys are made there, many tasks sign on asyncio and on trio, and an independent
    library verifies every result.

    Args:
        operations: Operations on each event loop.
        tasks: Tasks that share them.
        json: Print the figures as JSON, nothing else.
    """
    module = load("demo", "pkcs11_pool.demo", DEMO_NEEDS)
    status: int = module.run(operations=operations, tasks=tasks, as_json=json)
    return status


def chaos(
    *,
    minutes: Annotated[float, Parameter(converter=_by(options.duration))] = 1.0,
    seed: int | None = None,
    tasks: Annotated[int, _Count] = 64,
    loop: Literal["asyncio", "trio"] = "asyncio",
    json: bool = False,
) -> int:
    """Kill a token's server, again and again, while a pool on it is under load.

    A throwaway SoftHSM2 token stands behind `p11-kit server`. At the end nothing that
    was acknowledged may be lost, no result wrong and nothing left over.

    Args:
        minutes: How long.
        seed: For the faults and the load; else a new one.
        tasks: How many use the pool at once.
        loop: The event loop.
        json: Print the figures as JSON, nothing else.
    """
    module = load("demo", "pkcs11_pool.chaos", DEMO_NEEDS)
    status: int = module.run(
        seconds=60 * minutes, seed=seed, tasks=tasks, loop=loop, as_json=json
    )
    return status


def bench(  # the words that it had before there was this command line
    *,
    operations: Annotated[
        list[str] | None,
        Parameter(converter=_by(options.names(tuple(OPERATIONS))), group=_WHAT),
    ] = None,
    callers: Annotated[
        list[int] | None, Parameter(converter=_by(options.numbers), group=_WHAT)
    ] = None,
    backends: Annotated[
        list[str] | None,
        Parameter(converter=_by(options.names(tuple(BACKENDS))), group=_WHAT),
    ] = None,
    max_sessions: Annotated[int | None, _Count, Parameter(group=_WHAT)] = None,
    soak: Annotated[int | None, _Count, Parameter(group=_WHAT)] = None,
    import_time: Annotated[bool, Parameter(group=_WHAT)] = False,
    quick: Annotated[bool, Parameter(group=_HOW_LONG)] = False,
    rounds: Annotated[int | None, _Count, Parameter(group=_HOW_LONG)] = None,
    seconds: Annotated[
        float | None, Parameter(converter=_by(options.duration), group=_HOW_LONG)
    ] = None,
    json: Annotated[bool, Parameter(group=_WHERE)] = False,
    output: Annotated[Path | None, Parameter(group=_WHERE)] = None,
    plots: Annotated[Path | None, Parameter(group=_WHERE)] = None,
    module: Annotated[Path | None, Parameter(group=_TOKEN)] = None,
    token_label: Annotated[
        str | None, Parameter(name=["--token-label", "--token"], group=_TOKEN)
    ] = None,
    uri: Annotated[str | None, Parameter(group=_TOKEN)] = None,
    allow_pin_command: Annotated[bool, Parameter(group=_TOKEN)] = False,
    user: Annotated[PinOptions, Parameter(name="*", group=_TOKEN)] = PinOptions(),
) -> int:
    """Measure the pool on a token, next to the bare module.

    Throughput, and what 50 and 99 of 100 operations stay within. The bare module,
    called from C, takes turns with it; ratios to it are what can be compared.

    Args:
        operations: Names with commas between them: p256, rsa2048, ... (default: all).
        callers: How many call at once, with commas (1,8,64; the soak: 16).
        backends: Event loops: asyncio, uvloop, trio (those installed).
        max_sessions: Of the pool (twice the callers).
        soak: Instead: so many operations on each loop, 1,000,000 if no number stands
            there, watching memory, threads, files and sessions; status 1 if any grew.
        import_time: Instead: what importing the package costs; status 1 if too much.
        quick: Fewer and shorter turns.
        rounds: Turns of each figure.
        seconds: Seconds that count, of each turn.
        json: Print all figures as JSON; the tables go to standard error.
        output: File for all figures, as JSON.
        plots: Directory for pictures, as SVG.
        module: Cryptoki module.
        token_label: Label of the token.
        uri: PKCS#11 URI (RFC 7512) that names the module, the token, the PIN's source.
        allow_pin_command: Run the program that the URI's pin-source names.
        user: Where the user's PIN comes from.
    """
    # Without a token of the user's, the variable PKCS11_PIN is for other commands.
    wants_pin = module is not None or uri is not None or user != PinOptions()
    named = ModuleOptions(module=module, uri=uri)
    told = named.parsed()
    if module is not None:
        agree("module", told.module_path, "--module", str(module))
    if token_label is not None:
        agree("token", told.token, "--token-label", token_label)
    source = told.pin_source and pins.from_pin_source(
        told.pin_source, allow_command=allow_pin_command
    )
    given = SimpleNamespace(
        **locals() | {"uri": None if uri is None else told},
        unquoted=named.unquoted(),
        pin=user.later(source) if wants_pin else None,
    )
    try:
        wanted = options.read(given)
    except options.BadOptionError as error:
        raise CommandError(str(error)) from error
    command = load("bench", "pkcs11_pool.bench.command", BENCH_NEEDS)
    status: int = command.run(wanted)
    return status
