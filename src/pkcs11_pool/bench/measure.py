"""The measuring itself: clients take short turns in rotation, round after round.

A machine is never quite idle, so a figure by itself says little. Clients that are
compared take their turns right after each other; a ratio is formed within a round and
the median over the rounds is told, with the least and the greatest.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pkcs11_pool.bench.programs import Client, ClientError, Turn
from pkcs11_pool.bench.turns import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Mapping, Sequence

    from pkcs11_pool.bench.work import Material

#: The client that ratios are formed against.
REFERENCE: Final = "bare"


@dataclass(frozen=True)
class Scenario:
    """A token under some circumstances.

    Attributes:
        name: In JSON and on the command line.
        title: In tables.
        module: The Cryptoki module that clients load.
        label: The token's label.
        slot_id: The slot that it is in, for clients that cannot go by the label.
        pin: The user's PIN.
        material: The keys there.
        environment: Variables that clients get.
        operations: What is measured here; None for all that the plan has.
        callers: The same for numbers of callers.
        clients: The same for clients.
    """

    name: str
    title: str
    module: str
    label: str
    slot_id: int
    pin: str | None = field(repr=False)
    material: Material
    environment: Mapping[str, str] = field(default_factory=dict)
    operations: Sequence[str] | None = None
    callers: Sequence[int] | None = None
    clients: Sequence[str] | None = None


@dataclass(frozen=True)
class Contender:
    """A client that takes part.

    Attributes:
        name: In JSON and on the command line.
        title: In tables.
        command: Gives the words of its command for a scenario.
        operations: What it can do; None for all.
    """

    name: str
    title: str
    command: Callable[[Scenario], Sequence[str]]
    operations: frozenset[str] | None = None


@dataclass(frozen=True)
class Cell:
    """One figure: a client at one operation, with so many callers, in a scenario."""

    scenario: str
    operation: str
    callers: int
    client: str

    def of(self, client: str) -> Cell:
        """The same for another client."""
        return Cell(self.scenario, self.operation, self.callers, client)


@dataclass(frozen=True)
class Spread:
    """A median and how far the turns lay apart."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread | None:
        """The spread of some values; None of none."""
        return cls.of(values) if values else None


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        blocks: Scenarios; those of one block take turns with each other.
        contenders: The clients.
        operations: By name.
        callers: Numbers of callers.
        rounds: Turns of each cell.
        warm: Seconds of each turn that do not count.
        seconds: Seconds of each turn that count.
    """

    blocks: Sequence[Sequence[Scenario]]
    contenders: Sequence[Contender]
    operations: Sequence[str]
    callers: Sequence[int]
    rounds: int
    warm: float
    seconds: float

    def groups(self, block: Sequence[Scenario]) -> Iterator[list[Cell]]:
        """The cells of a block; those of one group are compared with each other."""
        for operation in self.operations:
            for callers in self.callers:
                group = [
                    Cell(scenario.name, operation, callers, contender.name)
                    for scenario in block
                    if _within(scenario.operations, operation)
                    and _within(scenario.callers, callers)
                    for contender in self.contenders
                    if _within(scenario.clients, contender.name)
                    and _within(contender.operations, operation)
                ]
                if group:
                    yield group

    @property
    def turns(self) -> int:
        """How many turns are taken in all."""
        groups = (group for block in self.blocks for group in self.groups(block))
        return self.rounds * sum(map(len, groups))


def _within(chosen: Container[object] | None, one: object) -> bool:
    return chosen is None or one in chosen


@dataclass
class Results:
    """What was measured.

    Attributes:
        turns: By cell, the turn of each round; None where the client failed.
        wrong: How many samples were wrong, by cell.
        checked: How many samples were looked at, by cell.
        failures: What clients that failed said, by scenario and client.
    """

    turns: dict[Cell, list[Turn | None]] = field(
        default_factory=lambda: defaultdict(list)
    )
    wrong: dict[Cell, int] = field(default_factory=lambda: defaultdict(int))
    checked: dict[Cell, int] = field(default_factory=lambda: defaultdict(int))
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def rate(self, cell: Cell) -> Spread | None:
        """Operations in a second."""
        return Spread.over([turn.rate for turn in self._good(cell)])

    def p50(self, cell: Cell) -> Spread | None:
        """Median microseconds of one operation."""
        return Spread.over([turn.p50_us for turn in self._good(cell)])

    def p99(self, cell: Cell) -> Spread | None:
        """Microseconds that 99 of 100 operations stayed within."""
        return Spread.over([turn.p99_us for turn in self._good(cell)])

    def ratio(self, cell: Cell, to: Cell | None = None) -> Spread | None:
        """Throughput against another cell, by default the bare module's beside it.

        None where the other was not measured.
        """
        to = to or cell.of(REFERENCE)
        pairs = zip(self.turns.get(cell, ()), self.turns.get(to, ()), strict=False)
        return Spread.over(
            [mine.rate / its.rate for mine, its in pairs if mine and its and its.rate]
        )

    def operations(self, cell: Cell) -> int:
        """How many operations counted."""
        return sum(turn.operations for turn in self._good(cell))

    def _good(self, cell: Cell) -> list[Turn]:
        return [turn for turn in self.turns.get(cell, ()) if turn is not None]


def run(
    plan: Plan, advance: Callable[[str], None], results: Results | None = None
) -> Results:
    """Measure.

    Args:
        plan: What.
        advance: Called before each turn with what comes next.
        results: Where to put the figures, each when it is there: who gives this has
            them also when it is interrupted.
    """
    results = Results() if results is None else results
    for block in plan.blocks:
        with contextlib.ExitStack() as stack:
            _Block(plan, block, results, stack).run(advance)
    return results


class _Block:
    """Scenarios whose clients take turns. A client runs as long as its block."""

    def __init__(
        self,
        plan: Plan,
        block: Sequence[Scenario],
        results: Results,
        stack: contextlib.ExitStack,
    ) -> None:
        self._plan = plan
        self._groups = list(plan.groups(block))
        self._scenarios = {scenario.name: scenario for scenario in block}
        self._contenders = {one.name: one for one in plan.contenders}
        self._results = results
        self._stack = stack
        self._clients: dict[tuple[str, str], Client] = {}

    def run(self, advance: Callable[[str], None]) -> None:
        for number in range(self._plan.rounds):
            for group in self._groups:
                # Whoever comes first finds another machine than who comes last.
                first = number % len(group)
                for cell in group[first:] + group[:first]:
                    advance(f"{cell.scenario} {cell.operation} {cell.callers}")
                    self._results.turns[cell].append(self._turn(cell))

    def _turn(self, cell: Cell) -> Turn | None:
        key = cell.scenario, cell.client
        if key in self._results.failures:
            return None
        plan, scenario = self._plan, self._scenarios[cell.scenario]
        request = Request(cell.operation, cell.callers, plan.warm, plan.seconds)
        try:
            turn = self._client(scenario, cell.client).turn(request)
        except (ClientError, OSError) as error:
            self._results.failures[key] = str(error)
            return None
        wrong = scenario.material.wrong(cell.operation, turn.samples)
        self._results.checked[cell] += len(turn.samples)
        self._results.wrong[cell] += wrong
        return turn

    def _client(self, scenario: Scenario, name: str) -> Client:
        key = scenario.name, name
        if key not in self._clients:
            command = self._contenders[name].command(scenario)
            client = Client(command, scenario.pin, scenario.environment)
            self._clients[key] = self._stack.enter_context(client)
        return self._clients[key]
