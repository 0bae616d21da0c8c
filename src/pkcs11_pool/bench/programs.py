"""Client programs: how they are compiled, started, asked for turns and ended.

A client is a process that takes turns (see `turns`). It may hang or crash without
taking the benchmark along.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pkcs11_pool.bench.turns import Request

#: The source of the client that is the bare module.
BARE: Final = Path(__file__).with_name("bare.c")

_FLAGS: Final = ("-O2", "-std=c11", "-Wall", "-Wextra", "-pthread")
# What a turn may take beyond its own time: starting, finding keys, slow last calls.
_PATIENCE: Final = 60.0
# What it may take to end by itself once standard input is closed.
_FAREWELL: Final = 5.0
_SAID: Final = 2000


class NoCompilerError(RuntimeError):
    """There is no C compiler: install cc or gcc, or the ``ziglang`` package."""


class ClientError(RuntimeError):
    """A client crashed, hung, or said that it cannot go on."""


@dataclass(frozen=True)
class Turn:
    """What a client answered.

    Attributes:
        operations: How many ended inside the window.
        seconds: Its length.
        total: How many were made in all.
        p50_us: Median time of one, as its caller saw it, in microseconds.
        p99_us: What 99 of 100 stayed within.
        samples: Some of the results.
    """

    operations: int
    seconds: float
    total: int
    p50_us: float
    p99_us: float
    samples: tuple[bytes, ...]

    @property
    def rate(self) -> float:
        """Operations in a second."""
        return self.operations / self.seconds


def compiler() -> list[str]:
    """Return the command that compiles C.

    Raises:
        NoCompilerError: There is none, neither on the path nor as a package.
    """
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise NoCompilerError("no C compiler: install cc, or pip install ziglang")


def compile_c(source: Path, directory: Path, *flags: str) -> Path:
    """Compile one C source into a directory; return the program or library.

    Raises:
        NoCompilerError: There is no compiler.
        RuntimeError: The compiler refused; its words are in the text.
    """
    target = directory / source.stem
    command = [*compiler(), *_FLAGS, *flags, "-o", str(target), str(source), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return target


class Client:
    """A client program that runs."""

    def __init__(
        self, command: Sequence[str], pin: str | None, environment: Mapping[str, str]
    ) -> None:
        # A file, not a pipe: nobody reads it unless the program fails.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **environment},
        )
        self._pending = b""
        self.name = " ".join(Path(word).name for word in command[:3])
        try:
            self._write((pin or "") + "\n")
            self.answer(_PATIENCE)
        except BaseException:
            self.close()
            raise

    def turn(self, request: Request) -> Turn:
        """Let it take a turn.

        Raises:
            ClientError: It did not.
        """
        self._write(f"{request}\n")
        answer = self.answer(request.warm + request.seconds + _PATIENCE)
        answer["samples"] = tuple(map(bytes.fromhex, answer["samples"]))
        return Turn(**answer)

    def answer(self, patience: float) -> dict[str, Any]:
        """The next line that it writes.

        Raises:
            ClientError: It wrote none within so many seconds, or says that it failed.
        """
        deadline = time.monotonic() + patience
        assert self._process.stdout is not None  # noqa: S101
        file = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(file, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise self._failed(f"gave no answer within {patience:.0f} s")
                chunk = os.read(file, 65536)
                if not chunk:
                    raise self._failed("ended")
                self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise self._failed(f"gave no JSON: {line[:80]!r}") from None
        if "error" in answer:
            raise self._failed(f"says: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it, at once if it does not end by itself."""
        assert self._process.stdin is not None  # noqa: S101  # it is a pipe
        assert self._process.stdout is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_FAREWELL)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> Self:
        """It runs already."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End it."""
        self.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None  # noqa: S101
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("ended") from None

    def _failed(self, how: str) -> ClientError:
        self._said.seek(0)
        said = self._said.read()[-_SAID:].decode(errors="replace").strip()
        return ClientError(f"{self.name} {how}" + (f"\n{said}" if said else ""))
