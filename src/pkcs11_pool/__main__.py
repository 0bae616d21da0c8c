"""The command line: ``python -m pkcs11_pool``.

It reads words and calls functions. It may know every floor below, and imports each
command's module only when that command runs: what one needs, others may lack.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

# What the `demo` extra brings, over what the package itself needs.
DEMO_NEEDS = frozenset({"cryptography", "rich", "trio"})


def positive(text: str) -> int:
    """Read a number of things to do.

    Raises:
        argparse.ArgumentTypeError: It is not a whole number from 1 up.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def demo(options: argparse.Namespace) -> int:
    """Run the demo, or say what is missing for it."""
    try:
        module = importlib.import_module("pkcs11_pool.demo")
    except ModuleNotFoundError as error:
        if error.name not in DEMO_NEEDS:
            raise
        print(
            f"The demo needs {error.name}: pip install 'pkcs11-pool[demo]'",
            file=sys.stderr,
        )
        return 2
    status: int = module.run(
        operations=options.operations, tasks=options.tasks, as_json=options.json
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
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = parser().parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
