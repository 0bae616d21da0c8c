"""What the pool has to reach, and whether it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benchmarks import scenarios
from pkcs11_pool.bench.measure import REFERENCE, Cell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11_pool.bench.measure import Spread
    from pkcs11_pool.bench.record import Record

_CALLERS: Final = (1, 8, 64)
_LOOPS: Final = ("pool-asyncio", "pool-uvloop")
_ALL: Final = (*_LOOPS, "pool-trio")

#: Scenario, operation, clients, and what 1, 8 and 64 callers must reach.
_TO_BARE: Final = (
    (scenarios.LOCAL, "p256", _LOOPS, (0.40, 0.50, 0.60)),
    (scenarios.LOCAL, "p256", ("pool-trio",), (0.33, 0.42, 0.55)),
    (scenarios.LOCAL, "rsa2048", _ALL, (0.75, 0.80, 0.90)),
    (scenarios.NETWORK, "p256", _LOOPS, (1.5, 1.1, 0.55)),
    (scenarios.NETWORK, "p256", ("pool-trio",), (1.4, 0.75, 0.50)),
)
#: Scenario, and what 1, 8 and 64 callers must reach against python-pkcs11 by hand
#: under one lock, on the same event loop.
_TO_HAND: Final = (
    (scenarios.LOCAL, (4.0, 4.0, 4.0)),
    (scenarios.NETWORK, (5.0, None, 40.0)),
)
_HAND: Final = {"pool-asyncio": "hand-lock-asyncio", "pool-trio": "hand-lock-trio"}
#: Against itself with few keys on the token.
_GROWTH: Final = 0.90


@dataclass(frozen=True)
class Target:
    """One figure that must be reached.

    Attributes:
        cell: Whose.
        to: Against what.
        least: The median ratio that is enough.
    """

    cell: Cell
    to: Cell
    least: float

    def reached(self, record: Record) -> Spread | None:
        """What was reached; None where it was not measured."""
        return record.results.ratio(self.cell, self.to)

    def met(self, record: Record) -> bool | None:
        """Whether it was reached; None where it was not measured."""
        reached = self.reached(record)
        return None if reached is None else reached.median >= self.least


def targets() -> Iterator[Target]:
    """All of them."""
    for scenario, operation, clients, needed in _TO_BARE:
        for client in clients:
            for callers, least in zip(_CALLERS, needed, strict=True):
                cell = Cell(scenario, operation, callers, client)
                yield Target(cell, cell.of(REFERENCE), least)
    for scenario, wanted in _TO_HAND:
        for client, hand in _HAND.items():
            for callers, enough in zip(_CALLERS, wanted, strict=True):
                cell = Cell(scenario, "p256", callers, client)
                if enough is not None:
                    yield Target(cell, cell.of(hand), enough)
    few, many = scenarios.GROWTH[0], scenarios.GROWTH[-1]
    for client in _HAND:
        base = Cell(scenarios.growing(few), "p256", 1, client)
        full = Cell(scenarios.growing(many), "p256", 1, client)
        yield Target(full, base, _GROWTH)


def measured(record: Record) -> list[Target]:
    """Those that something was measured for."""
    return [one for one in targets() if one.reached(record) is not None]


def missed(record: Record) -> list[Target]:
    """Those that were not reached."""
    return [one for one in targets() if one.met(record) is False]
