"""What the demo shows: lines, bars and tables on a terminal, or one JSON object.

Where there is no terminal it writes plain lines without control codes. It may know
what a load came to; it must not know how to make one.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from pkcs11_pool.demo.work import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

    from pkcs11_pool.demo.load import Outcome

_MOST_ERRORS = 5


class Terminal:
    """Tells people what happens, while it happens.

    Attributes:
        wrong: The lines told that were not as they should be.
    """

    def __init__(self, *, to_stderr: bool) -> None:
        self.console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
        self.wrong: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        """Write one line."""
        self.console.print(Text(text, style), soft_wrap=True)

    def title(self, text: str) -> None:
        """Write the heading of what comes next."""
        self.say(f"\n{text}", "bold")

    def tell(self, text: str, right: bool) -> None:  # noqa: FBT001  # a callback
        """Write what was seen, and whether it was right."""
        self.say(f"  {'ok   ' if right else 'WRONG'} {text}", "" if right else "red")
        if not right:
            self.wrong.append(text)

    def event(
        self, _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> Any:
        """Show the pool's own log event, if it is about the login; a processor."""
        name = str(event.pop("event"))
        if name.startswith(("login.", "logout.")):
            keys = " ".join(f"{key}={value}" for key, value in sorted(event.items()))
            self.say(f"  log   {name} {keys}", "dim")
        raise structlog.DropEvent

    @contextmanager
    def log(self) -> Iterator[None]:
        """Show the pool's log here, for the length of a block."""
        before = structlog.get_config() if structlog.is_configured() else None
        structlog.configure(processors=[self.event], cache_logger_on_first_use=False)
        try:
            yield
        finally:
            structlog.reset_defaults()
            if before is not None:
                structlog.configure(**before)

    @contextmanager
    def bars(
        self, titles: Sequence[str], total: int
    ) -> Iterator[list[Callable[[int], None]]]:
        """Show a progress bar for each title; give what moves each of them."""
        width = max(map(len, titles))
        with Progress(
            TextColumn(f"  {{task.description:{width}}}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self.console,
        ) as progress:

            def mover(title: str) -> Callable[[int], None]:
                task = progress.add_task(title, total=total)
                return lambda steps: progress.advance(task, steps)

            yield [mover(title) for title in titles]

    def outcome(self, outcome: Outcome) -> None:
        """Show what one load came to, by kind of operation."""
        table = _table("operation", "checked by")
        for name in ("done", "verified", "p50 ms", "p99 ms"):
            table.add_column(name, justify="right")
        for kind in KINDS:
            table.add_row(
                kind.title,
                kind.checked,
                f"{len(outcome.latencies[kind.title]):,}",
                f"{outcome.verified.get(kind.title, 0):,}",
                _milliseconds(outcome.percentile(50, kind.title)),
                _milliseconds(outcome.percentile(99, kind.title)),
            )
        self.console.print(table)
        counts = [f"{name} {count:,}" for name, count in outcome.calls.items()]
        self.say(f"C_ calls: {', '.join(counts)}", "dim")
        for error in outcome.errors[:_MOST_ERRORS]:
            self.say(f"  failed: {error}", "red")
        if len(outcome.errors) > _MOST_ERRORS:
            self.say(f"  and {len(outcome.errors) - _MOST_ERRORS:,} more", "red")

    def summary(self, outcomes: Sequence[Outcome]) -> None:
        """Show all loads side by side."""
        table = _table("event loop")
        columns = (
            "operations",
            "sessions\nopened",
            "logins",
            "C_ calls per\noperation",
        )
        for name in (*columns, "op/s", "p50 ms", "p99 ms"):
            table.add_column(name, justify="right")
        for outcome in outcomes:
            table.add_row(
                outcome.backend,
                f"{outcome.operations:,}",
                f"{outcome.sessions_opened:,}",
                f"{outcome.logins:,}",
                f"{outcome.calls_per_operation:.2f}",
                f"{outcome.throughput:,.0f}",
                _milliseconds(outcome.percentile(50)),
                _milliseconds(outcome.percentile(99)),
            )
        self.console.print(table)
        sessions = max(outcome.sessions for outcome in outcomes)
        self.say(f"Latency includes the wait for one of {sessions} sessions.")


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name)
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def as_data(outcome: Outcome) -> Mapping[str, object]:
    """Return what a load came to, for JSON."""
    return {
        "event_loop": outcome.backend,
        "tasks": outcome.tasks,
        "sessions": outcome.sessions,
        "operations": outcome.operations,
        "verified": outcome.total_verified,
        "errors": list(outcome.errors),
        "seconds": round(outcome.seconds, 6),
        "operations_per_second": round(outcome.throughput, 1),
        "sessions_opened": outcome.sessions_opened,
        "logins": outcome.logins,
        "calls": dict(outcome.calls),
        "calls_per_operation": round(outcome.calls_per_operation, 3),
        "latency_ms": _latencies(outcome, None),
        "kinds": {
            kind.title: {
                "checked_by": kind.checked,
                "operations": len(outcome.latencies[kind.title]),
                "verified": outcome.verified.get(kind.title, 0),
                "latency_ms": _latencies(outcome, kind.title),
            }
            for kind in KINDS
        },
    }


def _latencies(outcome: Outcome, title: str | None) -> dict[str, float | None]:
    found = {f"p{n}": outcome.percentile(n, title) for n in (50, 99)}
    return {
        name: None if value is None else round(value * 1000, 3)
        for name, value in found.items()
    }


def write(text: str) -> None:
    """Write a line on standard output, whatever the terminal is told elsewhere."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
