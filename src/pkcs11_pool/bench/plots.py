"""Pictures of what was measured, as SVG. The only place that knows matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pkcs11_pool.bench.turns import OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pkcs11_pool.bench.measure import Cell, Results, Spread
    from pkcs11_pool.bench.record import Record
    from pkcs11_pool.bench.soaking import Outcome

_STYLE: Final[Any] = {
    # Text stays text: small files. The salt keeps an unchanged picture unchanged.
    "svg.fonttype": "none",
    "svg.hashsalt": "pkcs11-pool",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.markersize": 3,
}
# The pool has colours and whole lines; what it is compared with is broken or grey.
_LINES: Final[dict[str, dict[str, Any]]] = {
    "bare": {"color": "black", "linewidth": 2},
    "kept": {"color": "black", "linestyle": ":"},
    "handed": {"color": "black", "linestyle": "--"},
    "pool-asyncio": {"color": "tab:blue", "linewidth": 2},
    "pool-uvloop": {"color": "tab:cyan", "linewidth": 2},
    "pool-trio": {"color": "tab:green", "linewidth": 2},
    "one-core-asyncio": {"color": "tab:blue", "linestyle": "--"},
    "one-core-trio": {"color": "tab:green", "linestyle": "--"},
}
_OTHERS: Final = (
    *("tab:red", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive"),
)


def draw(record: Record, directory: Path) -> list[Path]:
    """Draw all that there is; return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    with mpl.rc_context(_STYLE):
        for scenario in record.scenarios:
            for operation in OPERATIONS:
                cells = list(record.cells(scenario, operation))
                if len({cell.callers for cell in cells}) > 1:
                    figure = _by_callers(record, cells)
                    made.append(_save(figure, directory / f"{scenario}-{operation}"))
        made += [
            _save(_soak(outcome), directory / f"soak-{outcome.backend}")
            for outcome in record.soaks
        ]
    return made


def _save(figure: Figure, path: Path) -> Path:
    path = path.with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path


def _by_callers(record: Record, cells: Sequence[Cell]) -> Figure:
    """Throughput, p50 and p99 against callers."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels: dict[str, Callable[[Results, Cell], Spread | None]] = {
        "operations per second": lambda results, cell: results.rate(cell),
        "p50, ms": lambda results, cell: results.p50(cell),
        "p99, ms": lambda results, cell: results.p99(cell),
    }
    first = cells[0]
    title = f"{OPERATIONS[first.operation]}, {record.scenarios[first.scenario]}"
    figure.suptitle(title)
    others = iter(_OTHERS * 4)
    styles: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell.client not in styles:
            plain = {"linestyle": "--"}
            known = _LINES.get(cell.client)
            styles[cell.client] = known or plain | {"color": next(others)}
    for number, (name, read) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 3, number + 1)
        scale = 1 if number == 0 else 1000
        for client, style in styles.items():
            mine = [cell for cell in cells if cell.client == client]
            _line(axes, record, mine, read, scale=scale, style=style)
        axes.set(title=name, xlabel="callers", xscale="log", yscale="log")
        callers = sorted({cell.callers for cell in cells})
        axes.set_xticks(callers, [str(count) for count in callers])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", frameon=False)
    return figure


def _line(
    axes: Any,
    record: Record,
    cells: Sequence[Cell],
    read: Callable[[Results, Cell], Spread | None],
    *,
    scale: float,
    style: dict[str, Any],
) -> None:
    """A line through the medians, with a bar from the least to the greatest turn."""
    found = [(cell.callers, read(record.results, cell)) for cell in cells]
    points = [(callers, spread) for callers, spread in found if spread]
    at = [callers for callers, _ in points]
    axes.plot(
        at,
        [spread.median / scale for _, spread in points],
        marker="s",
        label=record.contenders[cells[0].client],
        **style,
    )
    # One broken line for all bars: it takes far less room in the file than many.
    bars = [
        (callers, end / scale)
        for callers, spread in points
        for end in (spread.least, spread.most, math.nan)
    ]
    axes.plot(*zip(*bars, strict=True), color=style["color"], linewidth=0.8, alpha=0.5)


def _soak(outcome: Outcome) -> Figure:
    """Each series against the operations that had ended."""
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    last = outcome.samples[-1]
    figure.suptitle(
        f"{last.operations:,} operations, {outcome.backend}, {outcome.callers} callers"
    )
    progress = [one.operations / 1e6 for one in outcome.samples]
    panels: dict[str, list[float]] = {
        "memory, MiB": [one.memory / 2**20 for one in outcome.samples],
        "blocks, thousands": [one.blocks / 1e3 for one in outcome.samples],
        "threads": [one.threads for one in outcome.samples],
        "file descriptors": [one.descriptors for one in outcome.samples],
        "sessions": [one.sessions for one in outcome.samples],
    }
    for number, (name, values) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        axes.plot(progress, values, linewidth=1)
        axes.set(title=name, xlabel="million operations")
        axes.set_ylim(0, max(values) * 1.15 or 1)
    return figure
