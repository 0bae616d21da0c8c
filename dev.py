#!/usr/bin/env python3
"""Everything this repository can do, from one command, on a fresh machine.

    python3 dev.py demo [options]   real signatures through the pool, on a real token
    python3 dev.py test [options]   the tests (options go to pytest; none: on all cores)
    python3 dev.py check            lint, formatting, types, floors, spelling, docs
    python3 dev.py docs [--open]    the pages, into docs/_build/html; --open shows them
    python3 dev.py mutations [...]  break the source on purpose and see who notices
    python3 dev.py pins [options]   write the pin files anew (options go to uv)

It needs Python 3.11 or later and pip, nothing else: no root, no compiler, no venv
package. Each interpreter gets an environment of its own below ``.venv``, installed
from the pin files with their hashes checked. While those do not change, a command
starts at once and asks no package index.

Only the standard library may be imported here: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent
MINIMUM = (3, 11)

# Every pin. The demo's are a subset of them, in a file of their own: pip checks the
# hashes of what it reads from a requirements file, not those of a mere constraint.
ALL_PINS = "constraints.txt"
DEMO_PINS = "constraints-demo.txt"

PAGES = "docs/_build/html"
# All pages each time: one that has not changed would keep its warnings to itself.
BUILD_PAGES = ("sphinx-build", "-E", "-n", "-W", "--keep-going", "-q", "docs", PAGES)

NO_PIP = """\
pip is missing for {python}.
  Debian, Ubuntu: apt-get install python3-pip
  elsewhere:      {python} -m ensurepip --user"""

NO_INDEX = """\
The package index cannot be reached. Check the network, or tell pip about a mirror
(PIP_INDEX_URL) or a proxy (HTTPS_PROXY), then run the same command again."""

NO_WHEEL = """\
The package index offers no ready-made build of a pinned package for Python {version}
on {machine}. The pins are made for CPython 3.11 to 3.13 on Linux (x86_64, aarch64)
and macOS. Another interpreter may do (python3.11 dev.py ...); a mirror may lag."""

WRONG_HASH = """\
A package is not the one that was pinned. Nothing of it was installed. A mirror that
builds its own packages does this; if yours does not, do not go on, and report it."""

OLD_PIP = """\
pip is too old: it cannot install into an environment from outside (pip 22.3 can).
  {python} -m pip install --user --upgrade pip"""

# What pip says, and what to do about it. The first that matches is told.
HINTS = (
    (r"no such option: --python", OLD_PIP),
    (r"DO NOT MATCH THE HASHES", WRONG_HASH),
    (r"connection broken|NewConnection|ProxyError|SSLError|timed? ?out", NO_INDEX),
    (r"No matching distribution", NO_WHEEL),
)


class SetupError(Exception):
    """The environment cannot be made. The text says what to do."""


def fingerprint() -> str:
    """Return a digest of all that an environment is made from.

    Two equal ones need no installation. The interpreter counts, because an upgrade
    leaves links to one that is gone; the place counts, because an editable
    installation points at it.
    """
    digest = hashlib.sha256()
    for text in (sys.version, sys.base_prefix, str(ROOT)):
        digest.update(hashlib.sha256(text.encode()).digest())
    for name in (ALL_PINS, DEMO_PINS, "pyproject.toml"):
        digest.update(hashlib.sha256((ROOT / name).read_bytes()).digest())
    return digest.hexdigest()


def installed_pins(stamp: Path, wanted: str) -> set[str]:
    """Return the pin files that an environment holds whole.

    Args:
        stamp: Where the environment says so. It is written last, so that an
            interrupted installation counts as none.
        wanted: The fingerprint that the environment must have.
    """
    try:
        found = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return set()
    return set(found["pins"]) if found["fingerprint"] == wanted else set()


def environment(pins: str) -> Path:
    """Return the Python of an environment that holds all of a pin file.

    Args:
        pins: Name of the pin file.

    Raises:
        SetupError: It could not be made.
    """
    name = "{}.{}".format(*sys.version_info)
    home = ROOT / ".venv" / name
    python = home / "bin" / "python"
    stamp = home / "installed.json"
    wanted = fingerprint()
    with exclusive(ROOT / ".venv" / f"{name}.lock"):
        done = installed_pins(stamp, wanted)
        if pins in done or ALL_PINS in done:
            return python
        if not done:
            create(home)
        install(python, pins, project=not done)
        stamp.write_text(json.dumps({"fingerprint": wanted, "pins": [*done, pins]}))
    return python


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Keep a second run out while this one installs: it would find half of it."""
    try:
        lock.parent.mkdir(exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        text = (
            f"Cannot write below {lock.parent}: use a checkout of your own. ({error})"
        )
        raise SetupError(text) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def create(home: Path) -> None:
    """Make an empty environment without pip, which Debian's Python cannot put there."""
    if importlib.util.find_spec("pip") is None:
        raise SetupError(NO_PIP.format(python=sys.executable))
    say(f"Setting up {home.relative_to(ROOT)} with Python {platform.python_version()}")
    command = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SetupError(f"Cannot make {home}:\n{made.stdout}{made.stderr}")


def install(python: Path, pins: str, *, project: bool) -> None:
    """Install a pin file, and the project itself so that edits count at once.

    Ready-made packages only: there may be no compiler. No dependencies: the file
    names them all, and what it does not name must not come in.
    """
    count = len(re.findall(r"(?m)^[a-z0-9]", (ROOT / pins).read_text()))
    say(f"Installing up to {count} packages from {pins}")
    strict = ["--require-hashes", "--only-binary", ":all:"]
    pip(python, *strict, "--no-deps", "--requirement", str(ROOT / pins))
    if project:
        here = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
        pip(python, *here)
    say("Ready")


def pip(python: Path, *arguments: str) -> None:
    """Let this interpreter's pip install into an environment that has none.

    Raises:
        SetupError: pip failed. The text has pip's last words and, where they are
            known, what to do.
    """
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    lines: list[str] = []
    with subprocess.Popen(
        [*command, *quiet, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None  # noqa: S101 - it is a pipe, see above
        for line in process.stdout:
            lines.append(line.rstrip())
            show_progress(lines[-1])
    show_progress("")
    if process.returncode:
        raise SetupError(explain(lines))


def explain(lines: Sequence[str]) -> str:
    """Turn pip's output into its last words and what to do about them."""
    whole = "\n".join(lines)
    last = "\n".join(["pip failed:", *(f"  {line}" for line in lines[-8:])])
    for pattern, hint in HINTS:
        if re.search(pattern, whole, re.IGNORECASE):
            facts = {
                "python": sys.executable,
                "version": platform.python_version(),
                "machine": f"{platform.system()} {platform.machine()}",
            }
            return f"{last}\n\n{hint.format(**facts)}"
    return last


def say(text: str) -> None:
    """Tell a step on standard error: standard output belongs to the command."""
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def show_progress(text: str) -> None:
    """Show what pip does on one line that the next one overwrites."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{text.strip()[:width]}", end="", file=sys.stderr, flush=True)


def replace_process(command: list[str]) -> NoReturn:
    """Become the command, so that its exit status and Ctrl-C are its own."""
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 - no shell is what we want


def demo(arguments: Sequence[str]) -> NoReturn:
    """Run the main job: keys, signatures and their verification, on a real token."""
    python = environment(DEMO_PINS)
    replace_process([str(python), "-m", "pkcs11_pool", "demo", *arguments])


def test(arguments: Sequence[str]) -> NoReturn:
    """Run the tests: all of them on every core, or as the options say."""
    python = environment(ALL_PINS)
    os.chdir(ROOT)
    everything = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    replace_process([str(python), "-m", "pytest", *(arguments or everything)])


def mutations(arguments: Sequence[str]) -> NoReturn:
    """Break the source in one place after the other; all must be noticed."""
    python = environment(ALL_PINS)
    replace_process([str(python), str(ROOT / "tests/mutations/run.py"), *arguments])


def check(arguments: Sequence[str]) -> int:
    """Run every static check, all of them even if one fails."""
    if arguments:
        raise SetupError("'check' takes no options.")
    tools = environment(ALL_PINS).parent
    typed = [
        name
        for name in ("src", "tests", "examples", "docs/tables.py", "dev.py")
        if (ROOT / name).exists()
    ]
    # codespell reads what git keeps, not what builds leave behind.
    spelled = [
        path.name for path in sorted(ROOT.iterdir()) if not path.name.startswith(".")
    ]
    commands = (
        ("mypy", *typed),
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("lint-imports", "--no-logo"),
        ("codespell", *spelled),
        BUILD_PAGES,
    )

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        name, *rest = command
        words = [str(tools / name), *rest]
        return subprocess.run(
            words,
            cwd=ROOT,
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    failed = []
    # The two long ones, types and pages, beside each other; told in order all the same.
    with ThreadPoolExecutor(2) as threads:
        for (name, *rest), result in zip(
            commands, threads.map(run, commands), strict=True
        ):
            say(" ".join([name, *rest]))
            print(result.stdout, end="", flush=True)
            if result.returncode:
                failed.append(" ".join([name, *rest[:1]]))
    say(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def docs(arguments: Sequence[str]) -> int:
    """Build the pages, and say where to look. A reference to nothing is an error."""
    if arguments not in ([], ["--open"]):
        raise SetupError("'docs' takes --open, or nothing.")
    name, *rest = BUILD_PAGES
    tools = environment(ALL_PINS).parent
    built = subprocess.run([tools / name, *rest], cwd=ROOT, check=False)
    if built.returncode:
        say(f"the pages have errors, see above; what could be made is in {PAGES}")
        return built.returncode
    first = ROOT / PAGES / "index.html"
    say(f"open {first.relative_to(ROOT)}")
    if arguments:
        webbrowser.open(first.as_uri())
    return 0


def pins(arguments: Sequence[str]) -> int:
    """Write both pin files anew. What they hold already stays unless told otherwise.

    ``--upgrade`` or ``--upgrade-package NAME`` bring in newer releases.
    """
    uv = shutil.which("uv")
    if uv is None:
        raise SetupError("'pins' needs uv on the PATH: pipx install uv")
    compile_pins = [uv, "pip", "compile", "--quiet", "--universal", "pyproject.toml"]
    compile_pins += ["--python-version", "{}.{}".format(*MINIMUM), "--generate-hashes"]
    compile_pins += ["--no-emit-index-url", "--no-emit-find-links"]
    compile_pins += ["--custom-compile-command", "python3 dev.py pins"]
    everything = ["--all-extras", "--group", "dev", "--output-file", ALL_PINS]
    # The same versions in both, whatever was released between the two runs.
    subset = ["--extra", "demo", "--group", "build", "--constraints", ALL_PINS]
    subset += ["--no-annotate", "--output-file", DEMO_PINS]
    for command in ([*everything, *arguments], subset):
        done = subprocess.run([*compile_pins, *command], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    return 0


COMMANDS = {
    "demo": demo,
    "test": test,
    "check": check,
    "mutations": mutations,
    "docs": docs,
    "pins": pins,
}


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    if sys.version_info < MINIMUM:
        found = platform.python_version()
        say(f"Python 3.11 or later is needed, {sys.executable} is {found}.")
        return 2
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__)
        return 0 if arguments and arguments[0] in {"-h", "--help", "help"} else 2
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except SetupError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
