"""What people see: a bar while it runs, tables at the end.

Where there is no terminal it writes plain lines without control codes. It knows what
was measured, not how.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pkcs11_pool.bench.turns import OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkcs11_pool.bench.imports import ImportTimes
    from pkcs11_pool.bench.measure import Spread
    from pkcs11_pool.bench.record import Record
    from pkcs11_pool.bench.soaking import Outcome

ONLY_RATIOS = (
    "Only ratios mean anything on another machine; there are none here, because the "
    "bare module was not measured."
)


class Terminal:
    """Tells people what happens and what came of it.

    The bar goes to standard error, the tables to standard output, or to standard error
    too where that is for something else.
    """

    def __init__(self, *, to_stderr: bool = False) -> None:
        self.console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
        self._bars = Console(stderr=True, highlight=False)

    def say(self, text: str, style: str = "") -> None:
        """Write one line."""
        self.console.print(Text(text, style), soft_wrap=True)

    def note(self, text: str) -> None:
        """Write one line about the run itself, on standard error."""
        self._bars.print(Text(text), soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Show a progress bar; give what moves it to a step and names what comes."""
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._bars,
            disable=not self._bars.is_terminal,
        ) as progress:
            task = progress.add_task(title, total=total)
            told = 0
            began = time.monotonic()

            def move(done: int, what: str) -> None:
                nonlocal told
                progress.update(task, completed=done, description=f"{title} {what}")
                # A log gets a line for each tenth: long runs must show that they live.
                if progress.disable and done * 10 // total > told:
                    told = done * 10 // total
                    left = (time.monotonic() - began) * (total - done) / done
                    self.note(
                        f"{title} {what}: {done:,} of {total:,}, about {left:.0f} s "
                        "to go"
                    )

            yield move
            progress.update(task, completed=total, description=title)

    def figures(self, record: Record) -> None:
        """Show all figures, a table for each scenario and operation."""
        seen = {(cell.scenario, cell.operation): None for cell in record.cells()}
        for scenario, operation in seen:
            title = f"{OPERATIONS[operation]}, {record.scenarios[scenario]}"
            self.say(f"\n{title}", "bold")
            self.console.print(_table(record, scenario, operation))
        if any(record.results.ratio(cell) is None for cell in record.cells()):
            self.say(ONLY_RATIOS, "dim")
        for line in (*record.notes, *record.failed):
            self.say(line, "red" if line in record.failed else "")

    def soak(self, outcome: Outcome) -> None:
        """Show what a soak came to."""
        last = outcome.samples[-1]
        rate = last.operations / last.seconds
        self.say(
            f"\n{outcome.backend}: {last.operations:,} operations from "
            f"{outcome.callers} callers in {last.seconds:,.0f} s, {rate:,.0f}/s",
            "bold",
        )
        names = ("first", "last", "most", "rise", "± 95 %", "allowed", "bound", "")
        table = _columns("", *names)
        for one in outcome.verdicts:
            scale = 2**20 if one.name == "memory" else 1
            cells = (one.first, one.last, one.most)
            table.add_row(
                f"{one.name}, MiB" if scale > 1 else one.name.replace("_", " "),
                *(_short(value / scale) for value in cells),
                _short(one.rise / scale),
                _short(one.error / scale),
                f"{one.allowance / scale:,.0f}",
                "" if one.bound is None else f"{one.bound:,.0f}",
                one.told,
            )
        self.console.print(table)
        for name in outcome.left:
            self.say(f"left over after the pool was closed: thread {name}", "red")

    def imports(self, times: ImportTimes, most: float) -> None:
        """Show what importing costs."""
        table = _columns("import", "ms", "least", "most")
        rows = {
            "anyio, pkcs11, structlog": times.dependencies,
            "pkcs11_pool": times.package,
        }
        for name, spread in rows.items():
            values = (spread.median, spread.least, spread.most)
            table.add_row(name, *(f"{value * 1000:.0f}" for value in values))
        self.console.print(table)
        self.say(f"{spread_text(times.ratio)} times; at most {most} are allowed")


def _short(value: float) -> str:
    return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"  # noqa: PLR2004


def _columns(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    return table


def _table(record: Record, scenario: str, operation: str) -> Table:
    names = ("client", "callers", "op/s", "to bare (least-most)", "p50 ms", "p99 ms")
    table = _columns(*names)
    callers: int | None = None
    for cell in record.cells(scenario, operation):
        if callers not in {None, cell.callers}:
            table.add_section()
        callers = cell.callers
        results = record.results
        rate, ratio = results.rate(cell), results.ratio(cell)
        table.add_row(
            record.contenders[cell.client],
            str(cell.callers),
            f"{rate.median:,.0f}" if rate else "failed",
            spread_text(ratio) if ratio else "",
            _milliseconds(results.p50(cell)),
            _milliseconds(results.p99(cell)),
        )
    return table


def spread_text(spread: Spread) -> str:
    """A ratio with its spread, as in all tables."""
    return f"{spread.median:.2f} ({spread.least:.2f}-{spread.most:.2f})"


def _milliseconds(spread: Spread | None) -> str:
    return f"{spread.median / 1000:.3g}" if spread else ""
