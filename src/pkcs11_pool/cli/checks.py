"""What may be wrong with a set-up, looked at without loading any module.

Each check gives findings; one that is bad says how to mend it. What can be known from
files alone is looked at first: a module that is loaded can bring the process down.
"""

from __future__ import annotations

import getpass
import grp
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pkcs11_pool.cli.options import TYPICAL_MODULES

if TYPE_CHECKING:
    from collections.abc import Iterator

Level = Literal["good", "warning", "bad"]

OLDEST: Final = (3, 11)
NEWEST_TESTED: Final = (3, 13)

# ELF: e_ident[EI_CLASS] and e_machine, by the names of platform.machine().
_MACHINES: Final = {
    (2, 62): "x86_64",
    (1, 3): "i686",
    (2, 183): "aarch64",
    (1, 40): "armv7l",
    (2, 243): "riscv64",
    (2, 21): "ppc64le",
    (2, 22): "s390x",
}
_ELF_HEADER: Final = 20
_SOFTHSM_GROUP: Final = "softhsm"
_SOFTHSM_FILES: Final = (
    Path("~/.config/softhsm2/softhsm2.conf"),
    Path("/etc/softhsm/softhsm2.conf"),
    Path("/etc/softhsm2.conf"),
)


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        level: ``"good"``; ``"warning"``: it works, but; ``"bad"``: it cannot work.
        text: What is so.
        advice: What to do about it; empty where all is good.
    """

    level: Level
    text: str
    advice: str = ""


def good(text: str) -> Finding:
    """All is well."""
    return Finding("good", text)


def warning(text: str, advice: str) -> Finding:
    """It works, but."""
    return Finding("warning", text, advice)


def bad(text: str, advice: str) -> Finding:
    """It cannot work."""
    return Finding("bad", text, advice)


def of_python() -> Iterator[Finding]:
    """The interpreter, and the package that the pool leans on."""
    here = sys.version_info[:2]
    name = f"{platform.python_implementation()} {platform.python_version()}"
    if here < OLDEST or platform.python_implementation() != "CPython":
        yield bad(name, "use CPython 3.11 or later")
    elif here > NEWEST_TESTED:
        yield warning(name, "the newest Python that is tested is 3.13")
    else:
        yield good(name)
    try:
        found = version("python-pkcs11")
    except PackageNotFoundError:
        yield bad("python-pkcs11 is not installed", "pip install 'python-pkcs11<0.11'")
        return
    parts = tuple(int(part) for part in found.split(".")[:3] if part.isdecimal())
    if (0, 10, 1) <= parts < (0, 11):
        yield good(f"python-pkcs11 {found}")
    else:
        yield bad(
            f"python-pkcs11 {found}: the pool needs 0.10.1 or a later 0.10",
            "pip install 'python-pkcs11>=0.10.1,<0.11'",
        )


def of_file(path: Path) -> Iterator[Finding]:
    """The module as a file: there, readable, for this machine."""
    if path.is_dir():
        yield bad(f"{path} is a directory", "give the .so file of the module")
        return
    if not path.exists():
        yield bad(
            f"there is no {path}",
            "install the module's package, or give the right --module"
            f"{here() or ' (`pkcs11-pool softhsm` gets one to try)'}",
        )
        return
    try:
        with path.open("rb") as file:
            header = file.read(_ELF_HEADER)
    except OSError as error:
        yield bad(
            f"{path} cannot be read by {_user()}: {error.strerror}",
            f"chmod a+r {shlex.quote(str(path))}, and a+x the directories above it",
        )
        return
    if not header.startswith(b"\x7fELF"):
        if sys.platform == "linux":
            yield bad(f"{path} is no shared library", "give the .so file of the module")
        return
    order: Literal["little", "big"] = "little" if header[5] == 1 else "big"
    made_for = (header[4], int.from_bytes(header[18:20], order))
    bits = 64 if sys.maxsize > 1 << 32 else 32
    ours = (bits // 32, _ELF_OF.get(platform.machine(), (0, made_for[1]))[1])
    if made_for != ours:
        name = _MACHINES.get(made_for, f"another machine ({made_for[1]})")
        yield bad(
            f"{path} is for {name}, and this Python for {platform.machine()}",
            "install the module's package for this architecture",
        )
        return
    yield good(f"{path} is a library for {platform.machine()}")


def of_load(text: str) -> Finding:
    """A module that the loader or ``C_Initialize`` refused, by what they said."""
    if "C_GetFunctionList" in text:
        return bad(
            text,
            "it is some other library: give the .so file that the vendor calls the "
            f"PKCS#11 or Cryptoki module{here()}",
        )
    missing = re.search(r"(\S+): cannot open shared object file", text)
    if missing is not None:
        return bad(
            text,
            f"install the package with {missing[1]}, which the module needs, or name "
            "its directory in LD_LIBRARY_PATH",
        )
    if "undefined symbol" in text or "version `" in text:
        return bad(text, "install the module's package for this release of the system")
    return bad(
        text,
        "is a package missing that the module needs (ldd shows which), or its daemon "
        "not running?",
    )


def here() -> str:
    """The modules that are on this machine, as the end of an advice."""
    there = [path for path in TYPICAL_MODULES if _exists(Path(path))]
    return f"; on this machine: {', '.join(there)}" if there else ""


_ELF_OF: Final = {name: made_for for made_for, name in _MACHINES.items()}


def of_softhsm(path: Path) -> Iterator[Finding]:
    """SoftHSM2's configuration, and the directory with its tokens."""
    if "softhsm" not in path.name:
        return
    named = os.environ.get("SOFTHSM2_CONF")
    files = [Path(named)] if named else [p.expanduser() for p in _SOFTHSM_FILES]
    configuration = next((p for p in files if _exists(p)), None)
    if configuration is None:
        yield bad(
            f"SOFTHSM2_CONF names {named}, which is not there"
            if named
            else "SoftHSM2 has no configuration file",
            "write one that has directories.tokendir = /a/directory, and set "
            "SOFTHSM2_CONF to its path",
        )
        return
    if not configuration.is_file():
        yield bad(
            f"{configuration} is no file",
            "set SOFTHSM2_CONF to a file that has directories.tokendir = /a/directory",
        )
        return
    try:
        # Whatever else stands in it, the one line that counts is found.
        text = configuration.read_text(errors="replace")
    except OSError as error:
        yield bad(
            f"{configuration} cannot be read by {_user()}: {error.strerror}",
            _membership(configuration)
            or f"chmod a+r {shlex.quote(str(configuration))}",
        )
        return
    tokens = _token_directory(text)
    if tokens is None:
        yield bad(
            f"{configuration} has no directories.tokendir",
            "add a line: directories.tokendir = /a/directory",
        )
        return
    yield from _of_token_directory(configuration, tokens)


def _of_token_directory(configuration: Path, tokens: Path) -> Iterator[Finding]:
    quoted = shlex.quote(str(tokens))
    if not _exists(tokens):
        yield bad(
            f"{tokens}, of {configuration}, is not there",
            _membership(tokens) or f"mkdir -m 700 -p {quoted}",
        )
    elif not os.access(tokens, os.R_OK | os.W_OK | os.X_OK):
        yield bad(
            f"{_user()} cannot use {tokens}, where SoftHSM2 keeps its tokens",
            _membership(tokens)
            or f"give it to this user (chown -R {_user()} {quoted}), or set "
            "SOFTHSM2_CONF to a configuration of your own",
        )
    else:
        yield good(f"SoftHSM2 keeps its tokens in {tokens}")


def _membership(path: Path) -> str | None:
    """Where the group would do: how to become one of it."""
    try:
        group = grp.getgrnam(_SOFTHSM_GROUP)
    except KeyError:
        return None
    nearest = next((p for p in (path, *path.parents) if _exists(p)), None)
    of_group = nearest is not None and nearest.stat().st_gid == group.gr_gid
    if not of_group or group.gr_gid in (os.getgid(), *os.getgroups()):
        return None
    return (
        f"make {_user()} one of the group {_SOFTHSM_GROUP} and log in anew: "
        f"usermod -aG {_SOFTHSM_GROUP} {_user()}"
    )


def _token_directory(text: str) -> Path | None:
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and name.strip() == "directories.tokendir":
            return Path(value.strip())
    return None


def _exists(path: Path) -> bool:
    """Whether it is there; if that cannot be seen, it is not for us."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
