"""Make each mistake in a private copy of the tree, and see who notices.

For people: ``python3 dev.py mutations [names]``. Needs the tests' environment.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from mutations.catalogue import CATALOGUE, Mutation  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT = 240.0
"""Seconds for the tests of one mistake."""
TIMED_OUT = "timed out"
"""Instead of a test's name. What hangs has been noticed, but by no test."""
_COPIED = ("src", "tests", "examples", "docs", "dev.py", "pyproject.toml", "README.md")
_FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(\S+)", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if a mistake was found by nobody.

    Raises:
        SystemExit: Without any mistake the tests are red, and so would tell nothing.
    """
    parser = argparse.ArgumentParser(prog="dev.py mutations", description=__doc__)
    parser.add_argument("names", nargs="*", help="which; all if none is named")
    parser.add_argument(
        "--model-steps", type=int, default=2_000, help="steps of the model machine"
    )
    parser.add_argument("--list", action="store_true", help="list them and end")
    given = parser.parse_args(arguments)
    if given.list:
        for mutation in CATALOGUE:
            print(f"{mutation.name:24} {mutation.breaks}")
        return 0
    unknown = set(given.names) - {mutation.name for mutation in CATALOGUE}
    if unknown:
        parser.error(f"no mutation {', '.join(sorted(unknown))}: see --list")
    chosen = [m for m in CATALOGUE if not given.names or m.name in given.names]
    rows = []
    with tempfile.TemporaryDirectory(prefix="pkcs11-pool-mutations-") as scratch:
        home = copied(Path(scratch))
        print("without a mistake ...", flush=True)
        control(home, chosen, given.model_steps)
        for number, mutation in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {mutation.name} ...", flush=True)
            began = time.monotonic()
            rows.append((mutation, *noticed(home, mutation, given.model_steps)))
            print(f"    {_line(*rows[-1])} ({time.monotonic() - began:.0f} s)")
    return report(rows)


def copied(home: Path) -> Path:
    """A copy of the tree, without what builds leave behind."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, home / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, home / name)
    return home


def control(home: Path, chosen: list[Mutation], steps: int) -> None:
    """Make sure that all is green without a mistake.

    Raises:
        SystemExit: It is not.
    """
    named = sorted({f"tests/{test}" for mutation in chosen for test in mutation.tests})
    for words in (named, _model(steps)):
        red, output = _tested(home, words) if words else ("", "")
        if red:
            raise SystemExit(
                f"{output}\nwithout a mistake, {red}: as long as the tests are not "
                "green, they tell nothing of mistakes"
            )


def _model(steps: int) -> list[str]:
    return ["tests/model", "--model-steps", str(steps)]


def noticed(home: Path, mutation: Mutation, steps: int) -> tuple[str, str]:
    """Which named test and which of the model machine noticed a mistake."""
    file = home / "src" / "pkcs11_pool" / mutation.file
    before = file.read_text()
    if before.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.name}: its text does not stand once in {file}")
    file.write_text(before.replace(mutation.old, mutation.new))
    try:
        named = ""
        if mutation.tests:
            named = _first_failure(home, [f"tests/{test}" for test in mutation.tests])
        return named, _first_failure(home, _model(steps))
    finally:
        file.write_text(before)


def _first_failure(home: Path, words: list[str]) -> str:
    """The first test that fails; empty if none does."""
    return _tested(home, words)[0]


def _tested(home: Path, words: list[str]) -> tuple[str, str]:
    """The first test that fails, empty if none does; and what pytest wrote."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", *words]
    # Only the plugins that are needed: others have died of what goes wrong here.
    command += ["-p", "anyio.pytest_plugin", "-p", "pytest_timeout"]
    environment = os.environ | {
        # The copy's source comes before the one that is installed.
        "PYTHONPATH": str(home / "src"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    with subprocess.Popen(
        [*command, "-p", "no:cacheprovider"],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return TIMED_OUT, output
    found = _FAILED.search(output)
    if found:
        return found[1].partition("[")[0], output
    if process.returncode == 0:
        return "", output
    if process.returncode in (4, 5):
        raise SystemExit(f"pytest could not run {' '.join(words)}:\n{output}")
    return f"the process ended with {process.returncode}", output


def _line(mutation: Mutation, named: str, model: str) -> str:
    if not named and not model:
        return f"SURVIVED: {mutation.breaks}"
    if TIMED_OUT in {named, model}:
        return f"the tests: {named or 'green'}; the machine: {model or 'green'}"
    return f"noticed by {' and '.join(filter(None, (named, model and 'the machine')))}"


def report(rows: list[tuple[Mutation, str, str]]) -> int:
    """Print the table; 1 if a mistake was found by nobody who should."""
    print(f"\n| {'mutation':22} | the model machine | test |")
    print(f"|{'-' * 24}|-------------------|------|")
    survived = 0
    for mutation, named, model in rows:
        # A test that is named must notice by itself, and say so in time.
        lost = (named if mutation.tests else model) in {"", TIMED_OUT}
        survived += lost
        shown = named or ("SURVIVED" if mutation.tests else "-")
        seen = TIMED_OUT if model == TIMED_OUT else "yes" if model else "no"
        print(f"| {mutation.name:22} | {seen:17} | {shown} |")
    machine = sum(model not in {"", TIMED_OUT} for _, _, model in rows)
    late = sum(TIMED_OUT in row for row in rows)
    print(f"\n{len(rows)} mutations, {survived} survived their tests, ", end="")
    print(f"{machine} noticed by the model machine, {late} timed out")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
