"""A program on a real terminal: what it shows there while it works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COMMAND: Final = (sys.executable, "-m", "pkcs11_pool")

_ROWS_AND_COLUMNS: Final = (50, 200)
_CODES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        status: Its exit status.
        out: Its standard output, unless that was the terminal too.
        raw: All that came to the terminal, with its control codes.
    """

    status: int
    out: str
    raw: str

    @property
    def screen(self) -> str:
        """The texts that came to the terminal, one after the other."""
        return _CODES.sub("", self.raw)


def on_a_terminal(
    words: Sequence[str],
    *,
    timeout: float = 60,
    both: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Ended:
    """Run a command whose standard error is a terminal; with ``both`` its output too.

    Skips the test where there are no pseudo-terminals.
    """
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    termios = pytest.importorskip("termios")
    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"no pseudo-terminal can be had here: {error}")
    termios.tcsetwinsize(theirs, _ROWS_AND_COLUMNS)
    told: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(ours, told))
    rows, columns = map(str, _ROWS_AND_COLUMNS)
    # Said twice: these variables count for more than what the terminal says.
    size = {"TERM": "xterm-256color", "LINES": rows, "COLUMNS": columns}
    environment = {**os.environ, **size, **(variables or {})}
    try:
        with subprocess.Popen(
            [*COMMAND, *words],
            stdin=subprocess.DEVNULL,
            stdout=theirs if both else subprocess.PIPE,
            stderr=theirs,
            text=True,
            env=environment,
        ) as process:
            os.close(theirs)
            reader.start()
            out, _ = process.communicate(timeout=timeout)
        reader.join()
    finally:
        os.close(ours)
    raw = b"".join(told).decode(errors="replace")
    return Ended(process.returncode, out or "", raw)


def _read_all(terminal: int, told: list[bytes]) -> None:
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how Linux says that nobody has the other end
            return
        if not part:
            return
        told.append(part)
