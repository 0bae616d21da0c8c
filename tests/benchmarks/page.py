"""docs/benchmarks.md, written from the figures and from nothing else."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import scenarios, targets
from pkcs11_pool.bench import growth, imports, options
from pkcs11_pool.bench.measure import Cell
from pkcs11_pool.bench.record import Record, read
from pkcs11_pool.bench.report import spread_text
from pkcs11_pool.bench.turns import OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from benchmarks.targets import Target
    from pkcs11_pool.bench.soaking import Outcome

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
PICTURES: Final = Path("_static/bench")
#: Beside the pictures: the longest soak so far.
SOAK: Final = "soak.json"

_TOP: Final = """\
# Benchmarks

Made by one command, which writes this page anew:

    {command}

{machine}.

What is compared are clients: programs that make the same calls as fast as they can,
from 1, 8 and 64 callers at once. They take turns of {seconds} s, {rounds} rounds of
them, so that what else the machine does hits all of them alike. An operation counts
when it ends inside the turn. A figure is the median over the rounds; in brackets
are the least and the greatest. Samples of the results of every turn are verified by
`cryptography`.

**Only ratios can be compared with those of another machine.** They are formed
against the *bare* module in the same round: C, a thread for each caller, and for
each operation `C_OpenSession, C_SignInit, C_Sign, C_CloseSession` with a remembered
handle. *Bare, kept* is the same with one session for each thread that stays open,
so two calls. *Bare, handed over* is C as well: each caller has another thread do its
operations, and waits. Two threads are woken for each then, as for every client that
leaves an event loop free, and nothing else is done. The pool has `max_sessions` of
{max_sessions}, and makes each operation in a fresh session. *One core* is the pool in a
process that is bound to one core, where waking is cheap.

*Java SunPKCS11* and *Go crypto11* pool sessions and keep them. *By hand* is
python-pkcs11 on AnyIO's threads, a session and a lookup for each operation: under
one lock, the only safe form as it is shipped, or with OS locks in the module and
eight threads. *PyKCS11* runs on AnyIO's threads too, with a fresh session for each
operation and a remembered handle.

For a token of yours: `python -m pkcs11_pool bench --module FILE --token-label LABEL
--pin-prompt`, or with a `--uri`. It makes keys there, and destroys them at the end.
"""

_GROWTH: Final = """\
## Keys on the token

P-256 signatures from one caller, against the same client with {few} keys. *By hand*
looks its key up each time.
"""

_SOAK: Final = """\
## Flat for ever

One process, one pool, {callers} callers: signatures, HMAC, AES, digests,
verification and random numbers, with cancelled and late callers and sessions kept
for a block among them. The process watches itself: resident memory, Python's own
blocks of memory (about one for each object), threads, file descriptors, and sessions.

    {command}

{machine}.

The first {warm:.0%} are warm-up. What follows is cut into ten, and a line goes through
the ten means. *Rise* is how much it rises in all, with its 95 % confidence interval.
*Flat* is what does not rise by more than is allowed even at the upper end of that, and
never exceeds its bound; one object leaked in 400 operations would show.
"""

_IMPORT: Final = """\
## Importing

`from pkcs11_pool import TokenPool` takes {ratio} times what importing its three
dependencies takes ({package:.0f} ms and {base:.0f} ms of the processor, medians of
interpreters started in turns, with their bytecode there). At most {most} are allowed.
`import pkcs11_pool` alone imports nothing.
"""

_COMMAND: Final = "python tests/benchmarks/run.py --docs"
_MISSED: Final = {True: "met", False: "**missed**", None: "not measured"}


def check() -> None:
    """Refuse at once what could not be written at the end.

    Raises:
        options.BadOptionError: There is no docs directory, or matplotlib is missing.
    """
    if not DOCS.is_dir():
        raise options.BadOptionError("--docs: this is no checkout, there is no docs/")
    if not options.can_plot():
        raise options.BadOptionError(options.NO_MATPLOTLIB.format("--docs"))


def write(record: Record) -> list[Path]:
    """Write the page, its pictures and the figures; return the files."""
    from pkcs11_pool.bench.plots import draw  # noqa: PLC0415  # slow, and optional

    pictures = DOCS / PICTURES
    soaks = _longest(record, pictures / SOAK)
    # A picture of what is no longer measured must not stay.
    shutil.rmtree(pictures, ignore_errors=True)
    made = draw(dataclasses.replace(record, soaks=soaks.soaks), pictures)
    figures = [pictures / "figures.json"]
    dataclasses.replace(record, soaks=[]).write(figures[0])
    if soaks.soaks:
        figures.append(pictures / SOAK)
        soaks.write(figures[1])
    page = DOCS / "benchmarks.md"
    text = "\n".join(_page(record, soaks, {path.name for path in made}))
    page.write_text(text, encoding="utf-8")
    return [page, *figures, *made]


def _longest(record: Record, kept: Path) -> Record:
    """What has the longest soak: this run, or one before, which took its time."""
    mine = Record(
        machine=record.machine,
        settings={"command": record.settings.get("command", _COMMAND)},
        soaks=record.soaks,
    )
    if not kept.exists():
        return mine
    before = read(kept)
    return mine if _length(mine) >= _length(before) else before


def _length(record: Record) -> int:
    return min((one.samples[-1].operations for one in record.soaks), default=0)


def _described(machine: Mapping[str, str]) -> str:
    return ", ".join(
        [
            f"{machine['cores']} cores of {machine['processor']}",
            machine["system"],
            f"Python {machine['python']}",
            *(
                f"{name} {machine[name]}"
                for name in ("anyio", "trio", "uvloop", "python-pkcs11", "module")
                if name in machine
            ),
            machine["date"],
        ]
    )


def _page(record: Record, soaks: Record, pictures: set[str]) -> Iterator[str]:
    given = {"command": _COMMAND, **record.settings}
    yield _TOP.format(machine=_described(record.machine), **given)
    yield from _targets(record)
    for scenario in record.scenarios:
        if not scenario.startswith(scenarios.KEYS):
            yield from _scenario(record, scenario, pictures)
    yield from _growth(record)
    yield from _soaks(soaks, record, pictures)
    if times := record.imports:
        yield _IMPORT.format(
            ratio=spread_text(times.ratio),
            package=times.package.median * 1000,
            base=times.dependencies.median * 1000,
            most=imports.MOST,
        )
    if lines := [*record.notes, *record.failed]:
        yield "## Left out\n"
        yield from (f"- {line.splitlines()[0]}" for line in lines)
        yield ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown: the first column to the left, the others to the right."""
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'--:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _scenario(record: Record, scenario: str, pictures: set[str]) -> Iterator[str]:
    for operation in OPERATIONS:
        if not list(record.cells(scenario, operation)):
            continue
        title = f"{OPERATIONS[operation]}, {record.scenarios[scenario]}"
        yield f"## {title}\n"
        yield from _figures(record, scenario, operation)
        picture = f"{scenario}-{operation}.svg"
        if picture in pictures:
            yield f"![{title}: throughput and latency]({PICTURES / picture})\n"


def _figures(record: Record, scenario: str, operation: str) -> Iterator[str]:
    """A row for each client, two columns for each number of callers."""
    cells = list(record.cells(scenario, operation))
    counts = sorted({cell.callers for cell in cells})
    head = ["client"]
    for count in counts:
        who = "1 caller" if count == 1 else f"{count} callers"
        head += [f"{who}: to bare", "op/s", "p50 / p99 ms"]
    rows = []
    for client in dict.fromkeys(cell.client for cell in cells):
        row = [record.contenders[client]]
        for count in counts:
            row += next(
                (
                    _three(record, cell)
                    for cell in cells
                    if (cell.client, cell.callers) == (client, count)
                ),
                [""] * 3,  # it was interrupted before
            )
        rows.append(row)
    yield from table(head, rows)


def _three(record: Record, cell: Cell) -> list[str]:
    results = record.results
    rate, ratio = results.rate(cell), results.ratio(cell)
    p50, p99 = results.p50(cell), results.p99(cell)
    if rate is None or p50 is None or p99 is None:
        return ["failed", "", ""]
    return [
        spread_text(ratio) if ratio else "",
        f"{rate.median:,.0f}",
        f"{p50.median / 1000:.3g} / {p99.median / 1000:.3g}",
    ]


def _growth(record: Record) -> Iterator[str]:
    few = scenarios.growing(scenarios.GROWTH[0])
    if few not in record.scenarios:
        return
    yield _GROWTH.format(few=scenarios.GROWTH[0])
    names = [scenarios.growing(keys) for keys in scenarios.GROWTH]
    rows = []
    for base in record.cells(few):
        row = [record.contenders[base.client]]
        for name in names:
            cell = Cell(name, base.operation, base.callers, base.client)
            rate, ratio = record.results.rate(cell), record.results.ratio(cell, base)
            ratio_text = spread_text(ratio) if ratio else "failed"
            row += [f"{rate.median:,.0f}/s" if rate else "", ratio_text]
        del row[2]  # to itself
        rows.append(row)
    head = ["client", f"{scenarios.GROWTH[0]:,} keys"]
    for keys in scenarios.GROWTH[1:]:
        head += [f"{keys:,} keys", "ratio"]
    yield from table(head, rows)


def _soaks(soaks: Record, record: Record, pictures: set[str]) -> Iterator[str]:
    if not soaks.soaks:
        return
    yield _SOAK.format(
        callers=soaks.soaks[0].callers,
        warm=growth.WARM_UP,
        command=soaks.settings["command"],
        machine=_described(soaks.machine),
    )
    for soak in soaks.soaks:
        yield f"{_came_to(soak)}\n"
        rows = []
        for one in soak.verdicts:
            scale = 2**20 if one.name == "memory" else 1
            values = (one.first, one.last, one.most)
            rows.append(
                [
                    f"{one.name}, MiB" if scale > 1 else one.name.replace("_", " "),
                    *(f"{value / scale:,.1f}" for value in values),
                    f"{one.rise / scale:,.2f} ± {one.error / scale:,.2f}",
                    f"{one.allowance / scale:,.0f}",
                    "" if one.bound is None else f"{one.bound:,.0f}",
                    one.told,
                ]
            )
        head = ["after warm-up", "first", "last", "most", "rise", "allowed", "bound"]
        head += [""]
        yield from table(head, rows)
        picture = f"soak-{soak.backend}.svg"
        if picture in pictures:
            yield f"![Soak on {soak.backend}]({PICTURES / picture})\n"
    if record.soaks and soaks.soaks != record.soaks:
        yield "And once more, in the run that made the tables above:\n"
        yield from (f"- {_came_to(soak)}" for soak in record.soaks)
        yield ""


def _came_to(soak: Outcome) -> str:
    last = soak.samples[-1]
    told = "**something grew**"
    if soak.good:
        told = "nothing grew" if soak.flat else "nothing grew that could be told"
    return (
        f"{soak.backend}: {last.operations:,} operations in {last.seconds:,.0f} s, "
        f"{told}."
    )


def _targets(record: Record) -> Iterator[str]:
    measured = targets.measured(record)
    if not measured:
        return
    met = sum(bool(one.met(record)) for one in measured)
    yield "## Targets\n"
    yield f"{met} of {len(measured)} are met. A target is met by the median."
    yield "Where the time goes: [](explanation/way-of-an-operation.md).\n"
    rows = []
    for one in measured:
        reached = one.reached(record)
        text = spread_text(reached) if reached else ""
        verdict = _MISSED[one.met(record)]
        rows.append([_named(record, one), f"{one.least:.2f}", text, verdict])
    yield from table(["target", "at least", "reached", ""], rows)


def _named(record: Record, target: Target) -> str:
    """What a target is about, in words."""
    cell, to = target.cell, target.to
    who = "1 caller" if cell.callers == 1 else f"{cell.callers} callers"
    where = record.scenarios[cell.scenario]
    against = (
        record.contenders[to.client]
        if to.client != cell.client
        else record.scenarios[to.scenario]
    )
    what = OPERATIONS[cell.operation]
    client = record.contenders[cell.client]
    return f"{client}: {what}, {where}, {who}, to {against}"


def verdicts(record: Record) -> Iterator[str]:
    """Target by target, a line each, for a terminal."""
    measured = targets.measured(record)
    if measured:
        yield "\nTargets"
    for one in measured:
        reached = one.reached(record)
        text = spread_text(reached) if reached else ""
        verdict = "met   " if one.met(record) else "MISSED"
        yield f"  {verdict} {text:20} of {one.least:5.2f}  {_named(record, one)}"
