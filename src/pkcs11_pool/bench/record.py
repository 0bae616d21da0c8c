"""What was measured, to be written down and read again: JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.bench.growth import Verdict
from pkcs11_pool.bench.imports import ImportTimes
from pkcs11_pool.bench.measure import Cell, Results, Spread
from pkcs11_pool.bench.programs import Turn
from pkcs11_pool.bench.soak import Sample
from pkcs11_pool.bench.soaking import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pkcs11_pool.bench.measure import Plan

_PACKAGES: Final = ("anyio", "trio", "uvloop", "python-pkcs11")


@dataclass
class Record:
    """All of one run.

    Attributes:
        machine: Where it was made, and with which versions.
        settings: How long was measured.
        scenarios: Titles of the scenarios, by name.
        contenders: Titles of the clients, by name.
        results: The figures.
        notes: What was left out, and why.
        soaks: What soaks came to.
        imports: What importing costs.
    """

    machine: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    scenarios: dict[str, str] = field(default_factory=dict)
    contenders: dict[str, str] = field(default_factory=dict)
    results: Results = field(default_factory=Results)
    notes: list[str] = field(default_factory=list)
    soaks: list[Outcome] = field(default_factory=list)
    imports: ImportTimes | None = None

    def begin(self, plan: Plan) -> None:
        """What is measured by a plan comes in."""
        self.settings |= {
            "rounds": plan.rounds,
            "seconds": plan.seconds,
            "warm": plan.warm,
        }
        for block in plan.blocks:
            self.scenarios |= {one.name: one.title for one in block}
        self.contenders |= {one.name: one.title for one in plan.contenders}

    def cells(
        self, scenario: str | None = None, operation: str | None = None
    ) -> Iterator[Cell]:
        """What was measured, in order; of one scenario or operation alone if given."""
        for cell in self.results.turns:
            if scenario in {None, cell.scenario} and operation in {
                None,
                cell.operation,
            }:
                yield cell

    @property
    def failed(self) -> list[str]:
        """What went wrong, a line each. Empty when all is well."""
        results = self.results
        lines = [
            f"{scenario}, {client}: {said}"
            for (scenario, client), said in results.failures.items()
        ]
        lines += [
            f"{cell.scenario}, {cell.client}, {cell.operation}, {cell.callers}: "
            f"{wrong} of {results.checked[cell]} results are wrong"
            for cell, wrong in results.wrong.items()
            if wrong
        ]
        return lines

    def write(self, path: Path) -> None:
        """Write it to a file."""
        # In one step: who is interrupted here has the file as it was before.
        new = path.with_name(f"{path.name}.new")
        new.write_text(self.as_text(), encoding="utf-8")
        new.replace(path)

    def as_text(self) -> str:
        """It as JSON, a line for each figure: short, and a change shows where it is."""
        data = self.as_data()
        lines = [json.dumps(one) for one in data.pop("cells")]
        cells = ",\n  ".join(lines)
        rest = json.dumps(data)
        return f'{rest[:-1]},\n "cells": [\n  {cells}\n ]}}\n'

    def as_data(self) -> dict[str, Any]:
        """As JSON can hold it. What can be reckoned from the turns is there as well."""
        return {
            "machine": self.machine,
            "settings": self.settings,
            "scenarios": self.scenarios,
            "contenders": self.contenders,
            "notes": self.notes,
            "failures": [
                {"scenario": scenario, "client": client, "said": said}
                for (scenario, client), said in self.results.failures.items()
            ],
            "cells": [self._cell(cell) for cell in self.results.turns],
            "soaks": [asdict(one) | {"good": one.good} for one in self.soaks],
            "imports": asdict(self.imports) if self.imports else None,
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        results = self.results
        turns = [turn and asdict(turn) for turn in results.turns[cell]]
        for turn in turns:
            if turn:
                del turn["samples"]  # they are checked, and nobody needs them again
        return asdict(cell) | {
            "operations_per_second": _spread(results.rate(cell)),
            "ratio_to_bare": _spread(results.ratio(cell)),
            "p50_us": _spread(results.p50(cell)),
            "p99_us": _spread(results.p99(cell)),
            "operations": results.operations(cell),
            "checked": results.checked[cell],
            "wrong": results.wrong[cell],
            "turns": turns,
        }


def _spread(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else asdict(spread)


def read(path: Path) -> Record:
    """Read a file that `Record.write` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    record = Record(
        **{
            name: data[name]
            for name in ("machine", "settings", "scenarios", "contenders", "notes")
        }
    )
    results = record.results
    for failure in data["failures"]:
        results.failures[failure["scenario"], failure["client"]] = failure["said"]
    for one in data["cells"]:
        cell = Cell(*(one[name] for name in Cell.__dataclass_fields__))
        results.turns[cell] = [
            turn and Turn(**turn, samples=()) for turn in one["turns"]
        ]
        results.checked[cell] = one["checked"]
        results.wrong[cell] = one["wrong"]
    record.soaks = [_outcome(one) for one in data["soaks"]]
    if data["imports"]:
        times = {name: Spread(**one) for name, one in data["imports"].items()}
        record.imports = ImportTimes(**times)
    return record


def _outcome(data: Mapping[str, Any]) -> Outcome:
    given = {name: data[name] for name in ("backend", "callers", "sessions", "left")}
    return Outcome(
        **given,
        samples=[Sample(**one) for one in data["samples"]],
        verdicts=[Verdict(**one) for one in data["verdicts"]],
    )


def machine(module: str | None = None) -> dict[str, str]:
    """Describe this machine, without its name.

    Args:
        module: What the Cryptoki module says of itself.
    """
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    found |= {name: _version(name) for name in _PACKAGES if _version(name)}
    return found | ({"module": module} if module else {})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if "model name" in line)
    return next(named, platform.machine())


def in_order(names: Sequence[str], known: Mapping[str, object]) -> list[str]:
    """Those names that are known, in the order of what is known."""
    return [name for name in known if name in names]
