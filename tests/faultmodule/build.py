"""Compile the fault module, with whatever C compiler there is.

A compiler on the path is used first. Without one, the ``ziglang`` package from the
package index brings one along, so that the tests need no root and no system package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

FLAGS = (
    "-std=c11",
    "-D_GNU_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-O2",
    "-fPIC",
    "-pthread",
    # Without this the functions of the real module and ours could find each other.
    "-fvisibility=hidden",
    "-shared",
)


class NoCompilerError(RuntimeError):
    """No C compiler: install one, or the ``ziglang`` package."""


def compiler() -> list[str]:
    """Return the command that compiles C.

    Raises:
        NoCompilerError: There is none, neither on the path nor as a package.
    """
    for name in ("cc", "gcc"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise NoCompilerError(
        "The fault module needs a C compiler: install cc or gcc,"
        f" or run: {sys.executable} -m pip install ziglang"
    )


def build(directory: Path) -> Path:
    """Return the compiled module in *directory*, compiling it if it is not there.

    The file's name holds a digest of the sources, so a change of them is a new file
    and an old one is never overwritten while some process has it loaded. Processes
    that build at the same time do not disturb each other.

    Raises:
        NoCompilerError: There is no compiler.
        RuntimeError: The compiler refused; its words are in the text.
    """
    sources = sorted(HERE.glob("*.[ch]"))
    digest = hashlib.sha256(repr(FLAGS).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    library = directory / f"faultmodule-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library

    directory.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{secrets.token_hex(4)}.tmp")
    units = [str(source) for source in sources if source.suffix == ".c"]
    command = [*compiler(), *FLAGS, "-o", str(unfinished), *units, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    unfinished.replace(library)
    return library
