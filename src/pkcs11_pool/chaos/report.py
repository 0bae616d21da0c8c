"""What chaos shows: a line that moves while it runs, and the figures at the end.

It may know what came of the load; it must not know how to make one.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pkcs11_pool.chaos.faults import Fault
    from pkcs11_pool.chaos.load import Book
    from pkcs11_pool.stats import PoolStats


@dataclass(kw_only=True)
class Report:
    """What came of it.

    Attributes:
        lost: Acknowledged, and not on the token.
        strange: On the token, and nobody was told.
        leaked: What was left over when all callers were gone.
    """

    seed: int
    loop: str
    tasks: int
    seconds: float
    book: Book
    faults: Mapping[str, int]
    stats: PoolStats
    lost: list[str]
    strange: list[str]
    leaked: list[str]

    @property
    def wrong(self) -> list[str]:
        """Everything that must not be, but losses and leaks."""
        return [*self.book.wrong, *(f"{label} is strange" for label in self.strange)]

    @property
    def is_well(self) -> bool:
        """Whether nothing is lost, wrong or left over."""
        return not (self.lost or self.wrong or self.leaked)

    @property
    def longest(self) -> float | None:
        """Seconds, at most, from the token's return to the next result."""
        return max(self.book.returns, default=None)

    def as_data(self) -> dict[str, Any]:
        """All figures, for JSON."""
        book = self.book
        return {
            "seed": self.seed,
            "loop": self.loop,
            "tasks": self.tasks,
            "seconds": round(self.seconds, 1),
            "operations": book.total,
            "operations_by_kind": dict(sorted(book.acknowledged.items())),
            "refused": dict(sorted(book.refused.items())),
            "cancelled": book.cancelled,
            "faults": dict(self.faults),
            "recoveries": self.stats.recoveries_total,
            "calls_lost": self.stats.calls_lost,
            "outages": len(book.returns),
            "longest_return_seconds": self.longest and round(self.longest, 3),
            "lost": self.lost,
            "wrong": self.wrong,
            "leaked": self.leaked,
        }


class Screen:
    """Tells people what happens, while it happens."""

    def __init__(self, *, to_stderr: bool) -> None:
        self.console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """Write one line."""
        self.console.print(Text(text, style), soft_wrap=True)

    def fault(self, fault: Fault) -> None:
        """A fault comes."""
        length = f" for {fault.length:.1f} s" if fault.length else ""
        self.say(f"  {fault.kind}{length}", "yellow")

    @contextmanager
    def live(self, seconds: float) -> Iterator[Callable[[str], None]]:
        """A line that moves; gives what changes its text."""
        columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=seconds)
            began = time.monotonic()

            def show(text: str) -> None:
                done = min(time.monotonic() - began, seconds)
                progress.update(task, completed=done, description=text)

            yield show

    def show(self, report: Report) -> None:
        """The figures."""
        data = report.as_data()
        table = Table(box=box.SIMPLE, show_header=False)
        for name, value in data.items():
            if isinstance(value, dict):
                shown = ", ".join(f"{key} {count:,}" for key, count in value.items())
            elif isinstance(value, list):
                shown = str(len(value))
            else:
                shown = f"{value:,}" if isinstance(value, int) else str(value)
            style = "red" if isinstance(value, list) and value else ""
            # A seed is no quantity.
            shown = str(value) if name == "seed" else shown
            table.add_row(name.replace("_", " "), Text(shown or "none", style))
        self.console.print(table)
        for text in [*report.lost, *report.wrong, *report.leaked]:
            self.say(f"not as it should be: {text}", "red")
