"""What commands write: tables for people, JSON for programs, notes beside both.

Results go to standard output, and nothing else does. Notes, questions and bars go to
standard error.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


_WIDE: Final = 200


def counted(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def say(text: str, style: str = "") -> None:
    """Write one line of the result."""
    console().print(Text(text, style), soft_wrap=True)


def note(text: str) -> None:
    """Write one line beside the result."""
    console(stderr=True).print(Text(text), soft_wrap=True)


def as_json(value: Any) -> None:
    """Write one JSON value. Octets in it are written as hexadecimal digits."""
    sys.stdout.write(json.dumps(value, indent=2, default=_octets) + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table. What a token calls itself is no mark-up."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console().print(shown)


def console(*, stderr: bool = False) -> Console:
    """Where to write. Made anew each time: tests and users redirect the streams."""
    stream = sys.stderr if stderr else sys.stdout
    # What reads a pipe wants lines whole, not folded to fit a terminal.
    width = None if stream.isatty() else _WIDE
    return Console(stderr=stderr, highlight=False, width=width)


@contextlib.contextmanager
def bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how many octets are done, on standard error; give what tells it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    shown = Progress(*columns, TimeRemainingColumn(), console=console(stderr=True))
    shown.disable = not sys.stderr.isatty()
    with shown:
        task = shown.add_task(title, total=total)
        yield lambda octets: shown.advance(task, octets)


@contextlib.contextmanager
def working(title: str) -> Iterator[None]:
    """Show that something takes its time, on standard error."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    shown = Progress(*columns, console=console(stderr=True), transient=True)
    shown.disable = not sys.stderr.isatty()
    with shown:
        shown.add_task(title, total=None)
        yield


def _octets(value: object) -> str:
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    return str(value)
