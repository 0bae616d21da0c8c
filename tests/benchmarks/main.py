"""The command line of the comparison."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import page, peers, scenarios, targets
from pkcs11_pool import softhsm
from pkcs11_pool.bench import command, measure, options, programs, record, tokens
from pkcs11_pool.bench.growth import TooFewSamplesError
from pkcs11_pool.bench.report import Terminal
from pkcs11_pool.bench.soak import Orders
from pkcs11_pool.bench.turns import OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pkcs11_pool.bench.measure import Scenario
    from pkcs11_pool.bench.record import Record

#: Where the figures are while they are measured, and stay when that is interrupted.
KEPT: Final = Path(__file__).resolve().parents[2] / "build" / "benchmarks.json"
SOAK_CALLERS: Final = 16
SOAK_BACKENDS: Final = ("asyncio", "trio")


def parser() -> argparse.ArgumentParser:
    """The words that it takes."""
    whole = argparse.ArgumentParser(
        prog="run.py",
        description="Measure the pool next to its peers, in turns, in one run.",
        epilog="python tests/benchmarks/run.py --docs writes docs/benchmarks.md anew.",
    )
    what = whole.add_argument_group("what is measured")
    what.add_argument(
        "--only",
        type=_word(options.names(tuple(OPERATIONS))),
        metavar="NAME,...",
        help="operations (default: all locally, p256 behind a network)",
    )
    what.add_argument(
        "--callers",
        type=_word(options.numbers),
        default=options.CALLERS,
        metavar="N,...",
        help="(default: 1,8,64)",
    )
    what.add_argument(
        "--peers",
        type=_peers,
        default=peers.NAMES,
        metavar="NAME,...",
        help=f"of {', '.join(peers.NAMES)}, or how some begin (default: all)",
    )
    what.add_argument(
        "--scenarios",
        type=_word(options.names(scenarios.NAMES)),
        metavar="NAME,...",
        help="of local, network, keys (default: all; with --only the first two)",
    )
    what.add_argument(
        "--soak",
        type=_word(options.count),
        metavar="N",
        help="soak as well, N operations on each of asyncio and trio; on the page "
        "stays the longest so far",
    )
    what.add_argument(
        "--import-time", action="store_true", help="measure importing as well"
    )
    _add_depth(whole)
    _add_output(whole)
    whole.add_argument(
        "--docs",
        action="store_true",
        help="write docs/benchmarks.md, with a soak and importing, from all of it",
    )
    whole.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="measure nothing: take the figures of an earlier --output",
    )
    whole.add_argument(
        "--check", action="store_true", help="status 1 if a target was missed"
    )
    return whole


def _word(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of a word, as argparse wants it to complain."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except options.BadOptionError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _add_depth(parser: argparse.ArgumentParser) -> None:
    depth = parser.add_argument_group("how long")
    depth.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    depth.add_argument(
        "--rounds",
        type=_word(options.count),
        metavar="N",
        help="turns of each figure",
    )
    depth.add_argument(
        "--seconds",
        type=_word(options.duration),
        metavar="S",
        help="that count, of each turn",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("where it goes, besides the terminal")
    output.add_argument("--output", type=Path, metavar="FILE", help="all figures")
    output.add_argument(
        "--plots", type=Path, metavar="DIRECTORY", help="pictures, as SVG"
    )


def _peers(text: str) -> list[str]:
    try:
        return peers.chosen(text.split(","))
    except KeyError as error:
        raise argparse.ArgumentTypeError(
            f"{error} is none of {', '.join(peers.NAMES)}, nor how one begins"
        ) from None


@dataclass(frozen=True)
class Run:
    """One run of the measurements.

    Attributes:
        given: The words of the command line.
        terminal: Where progress is shown.
        record: What was measured so far.
        kept: The file that has it, too; None for none.
    """

    given: argparse.Namespace
    terminal: Terminal
    record: Record
    kept: Path | None = None

    def all(self) -> None:
        """Measure whatever was asked for."""
        with contextlib.ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            self._compare(Path(name), stack)
        self.keep()
        if self.given.import_time or self.given.docs:
            self.record.imports = command.import_times(self.terminal)
            self.keep()
        soak = self.given.soak or (options.SOAK if self.given.docs else None)
        if soak:
            self._soak(soak)
            self.keep()

    def keep(self) -> None:
        """Have the file say what was measured so far."""
        if self.kept is not None:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            self.record.write(self.kept)

    def _compare(self, directory: Path, stack: contextlib.ExitStack) -> None:
        tell = self.terminal.note
        found = peers.Peers(directory, self.given.peers)
        self.record.notes += found.notes
        for note in found.notes:
            tell(note)
        wanted = self.given.scenarios or (
            scenarios.NAMES[:2] if self.given.only else scenarios.NAMES
        )
        blocks: list[Sequence[Scenario]] = []
        # Each token has a directory of its own. Clients are told theirs; this process
        # sees the one that was made last.
        if scenarios.KEYS in wanted:
            blocks.append(stack.enter_context(scenarios.growth(tell)))
        near = stack.enter_context(scenarios.local(tell))
        if scenarios.NETWORK in wanted:
            far = scenarios.network(near, directory)
            blocks.insert(0, [self._limited(far)])
        if scenarios.LOCAL in wanted:
            blocks.insert(0, [near])
        self._measure(blocks, found)

    def _limited(self, far: Scenario) -> Scenario:
        if self.given.only:
            return far
        return dataclasses.replace(far, operations=("p256",))

    def _measure(self, blocks: list[Sequence[Scenario]], found: peers.Peers) -> None:
        depth = options.depth_of(self.given)
        plan = measure.Plan(
            blocks=blocks,
            contenders=found.found,
            operations=self.given.only or list(OPERATIONS),
            callers=self.given.callers,
            rounds=depth.rounds,
            warm=depth.warm,
            seconds=depth.seconds,
        )
        self.record.settings["max_sessions"] = "twice the callers"
        self.keep()
        command.measured(plan, self.terminal, self.record, self.kept)

    def _soak(self, operations: int) -> None:
        orders = Orders(operations, SOAK_CALLERS)
        with (
            tokens.throwaway(self.terminal.note) as token,
            tokens.with_keys(token, "soak") as scenario,
        ):
            for backend in SOAK_BACKENDS:
                sessions = 2 * SOAK_CALLERS
                try:
                    outcome = command.soak(
                        scenario, backend, orders, sessions, self.terminal
                    )
                except (programs.ClientError, TooFewSamplesError) as error:
                    # What was measured before is worth having all the same.
                    self.record.notes.append(f"the soak on {backend} failed: {error}")
                    self.terminal.note(self.record.notes[-1])
                else:
                    self.record.soaks.append(outcome)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, write; return the exit status."""
    whole = parser()
    given = whole.parse_args(arguments)
    terminal = Terminal()
    run: Run | None = None
    try:
        options.check_output(given)
        if given.docs:
            page.check()
        if given.source is not None:
            seen = record.read(given.source)
        else:
            seen = record.Record(machine=record.machine(about()))
            seen.settings["command"] = told(
                sys.argv[1:] if arguments is None else arguments
            )
            run = Run(
                given, terminal, seen, given.output or (KEPT if given.docs else None)
            )
            run.all()
    except (options.BadOptionError, softhsm.SoftHSMUnavailable, OSError) as error:
        terminal.note(str(error))
        return command.CANNOT_RUN
    except KeyboardInterrupt:
        terminal.note("stopped")
        if run is not None and run.kept is not None:
            run.keep()
            terminal.note(
                f"what was measured is in {run.kept}: --from that file shows it, and "
                "with --docs it goes to the page"
            )
        return command.INTERRUPTED
    return conclude(given, seen, terminal)


def about() -> str:
    """What SoftHSM2 says of itself."""
    said = softhsm.ensure().run_util(Path(os.devnull), "--version").strip()
    return f"SoftHSM {said}"


def told(words: Sequence[str]) -> str:
    """The command, without the places of this machine."""
    without = {"--output", "--plots", "--from"}
    kept = [
        word
        for before, word in zip(("", *words), words, strict=False)
        if word not in without and before not in without
    ]
    return " ".join(["python tests/benchmarks/run.py", *kept])


def conclude(given: argparse.Namespace, seen: Record, terminal: Terminal) -> int:
    """Show what was measured, target by target, and write what was asked for."""
    terminal.figures(seen)
    for line in page.verdicts(seen):
        terminal.say(line)
    command.write(given.output, given.plots, seen, terminal)
    if given.docs:
        for path in page.write(seen):
            terminal.note(f"written: {path}")
    bad = bool(seen.failed) or (given.check and bool(targets.missed(seen)))
    return command.BAD if bad else command.GOOD


if __name__ == "__main__":
    sys.exit(main())
