"""The soak from outside: starts it, follows its samples, says what grew."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.bench import contenders, growth
from pkcs11_pool.bench.programs import Client, ClientError
from pkcs11_pool.bench.soak import Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pkcs11_pool.bench.growth import Verdict
    from pkcs11_pool.bench.measure import Scenario
    from pkcs11_pool.bench.soak import Orders

# A sample comes at least after this many seconds, or the soak hangs.
_PATIENCE: Final = 600.0


@dataclass(frozen=True)
class Outcome:
    """What a soak came to.

    Attributes:
        backend: The event loop.
        callers: How many tasks called.
        sessions: ``max_sessions`` of the pool.
        samples: What it told of itself.
        verdicts: What became of each series.
        left: Threads of the pool that were there after it had closed.
    """

    backend: str
    callers: int
    sessions: int
    samples: Sequence[Sample]
    verdicts: Sequence[Verdict]
    left: Sequence[str]

    @property
    def good(self) -> bool:
        """Whether nothing grew and nothing was left over."""
        return not self.left and not any(one.grew for one in self.verdicts)

    @property
    def flat(self) -> bool:
        """Whether it is also certain enough that nothing did."""
        return self.good and all(one.flat for one in self.verdicts)


def run(
    scenario: Scenario,
    backend: str,
    orders: Orders,
    sessions: int,
    advance: Callable[[Sample], None],
) -> Outcome:
    """Soak on one event loop.

    Raises:
        ClientError: It crashed, hung, or an operation failed.
        growth.TooFewSamplesError: It was too short for a verdict.
    """
    words = [sys.executable, "-m", "pkcs11_pool.bench.soak"]
    words += [*contenders.arguments(scenario), backend]
    words += map(str, (orders.operations, orders.callers, sessions))
    samples = []
    with Client(words, scenario.pin, scenario.environment) as client:
        while "done" not in (told := client.answer(_PATIENCE)):
            samples.append(Sample(**told))
            advance(samples[-1])
    if samples[-1].operations != orders.operations:
        raise ClientError(
            f"{samples[-1].operations} operations ended, of {orders.operations}"
        )
    return Outcome(
        backend=backend,
        callers=orders.callers,
        sessions=sessions,
        samples=samples,
        verdicts=judge(samples, sessions),
        left=told["left"],
    )


def judge(samples: Sequence[Sample], sessions: int) -> list[Verdict]:
    """Judge all series of a soak.

    Args:
        samples: In order.
        sessions: ``max_sessions`` of the pool.
    """
    threads = sessions + growth.OTHER_THREADS
    rules: dict[str, dict[str, Any]] = {
        "memory": {"allowance": growth.MEMORY_ALLOWANCE},
        "blocks": {"allowance": growth.BLOCKS_ALLOWANCE},
        "threads": {"allowance": growth.THREADS_ALLOWANCE, "bound": threads},
        "descriptors": {"allowance": 1},
        # How many are open at a moment depends on the moment: the bound is what counts.
        "sessions": {"allowance": sessions, "bound": sessions},
        # The one more is the login's own.
        "module_sessions": {"allowance": sessions, "bound": sessions + 1},
    }
    progress = [one.operations for one in samples]
    verdicts = []
    for name, rule in rules.items():
        values = [getattr(one, name) for one in samples]
        if None not in values:  # the token may not tell
            verdicts.append(growth.judge(name, progress, values, **rule))
    return verdicts
