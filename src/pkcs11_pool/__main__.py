"""The command line: ``python -m pkcs11_pool``.

It reads words and calls functions. It may know every floor below, and imports each
command's module only when that command runs: what one needs, others may lack.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from pkcs11_pool.bench import options as bench_options

# What the extra of a command brings, over what the package itself needs.
DEMO_NEEDS = frozenset({"cryptography", "rich", "trio"})
BENCH_NEEDS = frozenset({"cryptography", "rich"})


def positive(text: str) -> int:
    """Read a number of things to do.

    Raises:
        argparse.ArgumentTypeError: It is not a whole number from 1 up.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def load(command: str, name: str, needs: frozenset[str]) -> ModuleType | None:
    """Import what a command is made of, or say what is missing for it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in needs:
            raise
        print(
            f"The {command} needs {error.name}: pip install 'pkcs11-pool[{command}]'",
            file=sys.stderr,
        )
        return None


def demo(options: argparse.Namespace) -> int:
    """Run the demo."""
    module = load("demo", "pkcs11_pool.demo", DEMO_NEEDS)
    if module is None:
        return 2
    status: int = module.run(
        operations=options.operations, tasks=options.tasks, as_json=options.json
    )
    return status


def bench(options: argparse.Namespace) -> int:
    """Run the benchmark."""
    try:
        wanted = bench_options.read(options)
    except bench_options.BadOptionError as error:
        print(error, file=sys.stderr)
        return 2
    module = load("bench", "pkcs11_pool.bench.command", BENCH_NEEDS)
    if module is None:
        return 2
    status: int = module.run(wanted)
    return status


def chaos(options: argparse.Namespace) -> int:
    """Mistreat a token while a pool on it is under load."""
    module = load("demo", "pkcs11_pool.chaos", DEMO_NEEDS)
    if module is None:
        return 2
    status: int = module.run(
        seconds=options.minutes * 60,
        seed=options.seed,
        tasks=options.tasks,
        loop=options.loop,
        as_json=options.json,
    )
    return status


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    whole = argparse.ArgumentParser(
        prog="python -m pkcs11_pool",
        description="An async session pool for PKCS#11.",
    )
    commands = whole.add_subparsers(required=True, metavar="command")
    one = commands.add_parser(
        "demo",
        help="make real signatures on a throwaway SoftHSM2 token and verify them",
        description=(
            "Make keys on a throwaway SoftHSM2 token, sign from many tasks on asyncio "
            "and on trio, and verify every result with an independent library."
        ),
    )
    one.set_defaults(run=demo)
    one.add_argument(
        "--operations",
        type=positive,
        default=2000,
        metavar="N",
        help="operations on each event loop (default: %(default)s)",
    )
    one.add_argument(
        "--tasks",
        type=positive,
        default=64,
        metavar="N",
        help="tasks that share them (default: %(default)s)",
    )
    one.add_argument(
        "--json", action="store_true", help="print the figures as JSON, nothing else"
    )
    two = commands.add_parser(
        "bench",
        # A word cut short must not come to mean another option: PINs are near.
        allow_abbrev=False,
        help="measure the pool on a token, next to the bare module",
        description=(
            "Measure operations through the pool: throughput, and what 50 and 99 of "
            "100 operations stay within. The bare module, called from C, takes turns "
            "with it; ratios to it are what can be compared."
        ),
    )
    two.set_defaults(run=bench)
    bench_options.add(two)
    three = commands.add_parser(
        "chaos",
        help="kill a token's server, again and again, while a pool is under load",
    )
    three.set_defaults(run=chaos)
    three.add_argument("--minutes", type=float, default=1.0, metavar="N")
    three.add_argument("--seed", type=int, metavar="N")
    three.add_argument("--tasks", type=positive, default=64, metavar="N")
    three.add_argument("--loop", choices=["asyncio", "trio"], default="asyncio")
    three.add_argument("--json", action="store_true")
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = parser().parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
