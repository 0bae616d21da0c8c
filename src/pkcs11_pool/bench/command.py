"""What the options of ``python -m pkcs11_pool bench`` ask for, one after another."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pkcs11_pool.bench import (
    contenders,
    imports,
    measure,
    programs,
    soaking,
    tokens,
)
from pkcs11_pool.bench.growth import TooFewSamplesError
from pkcs11_pool.bench.record import Record, machine
from pkcs11_pool.bench.report import Terminal
from pkcs11_pool.bench.soak import Orders

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11_pool.bench.measure import Contender, Plan, Scenario
    from pkcs11_pool.bench.options import Options

GOOD: Final = 0
BAD: Final = 1
CANNOT_RUN: Final = 2
INTERRUPTED: Final = 130

_IMPORT_ROUNDS: Final = 15
# Seconds that a turn takes besides its own: opening a pool, the last calls.
_OVERHEAD: Final = 0.3
_KEEP_EVERY: Final = 10.0


def run(options: Options) -> int:
    """Run the benchmark and return its exit status.

    Returns:
        0: done. 1: a result is wrong, a client failed, something grew, or importing
        costs too much. 2: a soak was too short to tell.

    Raises:
        SoftHSMUnavailable, PoolError, pkcs11.PKCS11Error, OSError: It could not
            begin.
    """
    terminal = Terminal(to_stderr=options.json)
    record = Record()
    try:
        good = _run(options, terminal, record)
    except TooFewSamplesError as error:
        terminal.note(str(error))
        return CANNOT_RUN
    except programs.ClientError as error:
        terminal.note(str(error))
        return BAD
    write(options.output, options.plots, record, terminal)
    if options.json:
        sys.stdout.write(record.as_text())
    return GOOD if good else BAD


def _run(options: Options, terminal: Terminal, record: Record) -> bool:
    if options.import_time:
        record.machine = machine()
        record.imports = import_times(terminal)
        return record.imports.good
    with _scenario(options, terminal) as scenario:
        record.machine = machine(scenario.title)
        if options.soak is not None:
            return _soak(options, options.soak, scenario, terminal, record)
        return _measure(options, scenario, terminal, record)


def import_times(terminal: Terminal) -> imports.ImportTimes:
    """Measure importing, and show it."""
    done = 0
    with terminal.bar("importing", _IMPORT_ROUNDS + 1) as move:

        def advance() -> None:
            nonlocal done
            done += 1
            move(done, "")

        times = imports.run(_IMPORT_ROUNDS, advance)
    terminal.imports(times, imports.MOST)
    return times


@contextlib.contextmanager
def _scenario(options: Options, terminal: Terminal) -> Iterator[Scenario]:
    with contextlib.ExitStack() as stack:
        if options.token is None:
            token = stack.enter_context(tokens.throwaway(terminal.note))
        else:
            token = tokens.given(options.token)
        yield stack.enter_context(tokens.with_keys(token))


def _measure(
    options: Options, scenario: Scenario, terminal: Terminal, record: Record
) -> bool:
    with tempfile.TemporaryDirectory(prefix="pkcs11-pool-bench-") as directory:
        record.notes += [
            f"{name} is left out: it is not installed" for name in options.missing
        ]
        taking_part = [
            contenders.pool(b, options.max_sessions) for b in options.backends
        ]
        taking_part = bare(Path(directory), record) + taking_part
        plan = measure.Plan(
            blocks=[[scenario]],
            contenders=taking_part,
            operations=options.operations,
            callers=options.callers,
            rounds=options.depth.rounds,
            warm=options.depth.warm,
            seconds=options.depth.seconds,
        )
        record.settings["max_sessions"] = options.max_sessions or "twice the callers"
        measured(plan, terminal, record)
    terminal.figures(record)
    return not record.failed


def bare(directory: Path, record: Record) -> list[Contender]:
    """The bare module, where there is a C compiler."""
    try:
        return contenders.bare(programs.compile_c(programs.BARE, directory))
    except programs.NoCompilerError as error:
        record.notes.append(f"the bare module is left out: {error}")
        return []


def measured(
    plan: Plan, terminal: Terminal, record: Record, kept: Path | None = None
) -> None:
    """Measure, with a bar; what is measured is in the record at once.

    Args:
        plan: What.
        terminal: Where progress is shown.
        record: Where the figures go.
        kept: A file that has them, too, from time to time.
    """
    record.begin(plan)
    minutes = plan.turns * (plan.warm + plan.seconds + _OVERHEAD) / 60
    terminal.note(f"{plan.turns} turns, about {max(1, round(minutes))} minutes")
    done = -1  # it is told before each turn
    saved = time.monotonic()
    with terminal.bar("turns", plan.turns) as move:

        def advance(what: str) -> None:
            nonlocal done, saved
            done += 1
            move(done, what)
            if kept is not None and time.monotonic() > saved + _KEEP_EVERY:
                record.write(kept)
                saved = time.monotonic()

        measure.run(plan, advance, record.results)


def _soak(
    options: Options,
    operations: int,
    scenario: Scenario,
    terminal: Terminal,
    record: Record,
) -> bool:
    loops = ",".join(options.backends)
    record.settings["command"] = (
        f"python -m pkcs11_pool bench --soak {operations} --backends {loops}"
    )
    for backend in options.backends:
        for callers in options.callers:
            orders = Orders(operations, callers)
            sessions = options.max_sessions or 2 * callers
            outcome = soak(scenario, backend, orders, sessions, terminal)
            record.soaks.append(outcome)
    return all(outcome.good for outcome in record.soaks)


def soak(
    scenario: Scenario, backend: str, orders: Orders, sessions: int, terminal: Terminal
) -> soaking.Outcome:
    """Soak on one event loop, with a bar, and show what came of it."""
    with terminal.bar(f"soak, {backend}", orders.operations) as move:
        outcome = soaking.run(
            scenario,
            backend,
            orders,
            sessions,
            lambda sample: move(sample.operations, f"{sample.memory >> 20} MiB"),
        )
    terminal.soak(outcome)
    return outcome


def write(
    output: Path | None, plots: Path | None, record: Record, terminal: Terminal
) -> None:
    """Write the files that were asked for."""
    if output is not None:
        record.write(output)
        terminal.note(f"figures in {output}")
    if plots is not None:
        from pkcs11_pool.bench.plots import draw  # noqa: PLC0415  # slow, and optional

        draw(record, plots)
        terminal.note(f"pictures in {os.fspath(plots)}")
