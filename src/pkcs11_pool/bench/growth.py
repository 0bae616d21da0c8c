"""Whether something grew. Pure arithmetic over the samples of a soak."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The part of a run, at its beginning, in which caches fill and threads start.
WARM_UP: Final = 0.2
#: Memory that may come or go: the allocator keeps what it will need again.
MEMORY_ALLOWANCE: Final = 4 * 1024 * 1024
#: Threads that are not workers: the main one, the actor, the timekeeper, AnyIO's own.
OTHER_THREADS: Final = 16
_LEAST_SAMPLES: Final = 5


@dataclass(frozen=True)
class Verdict:
    """What became of one series of samples.

    Attributes:
        name: What was sampled.
        first: The first sample after the warm-up.
        last: The last sample.
        most: The greatest after the warm-up.
        rise: By how much a line through the samples rises, over all of the run that is
            no warm-up.
        allowance: The rise that is no growth.
        bound: What no sample may exceed; None where nothing bounds it.
    """

    name: str
    first: float
    last: float
    most: float
    rise: float
    allowance: float
    bound: float | None

    @property
    def grew(self) -> bool:
        """Whether it rises all the time, or went past its bound."""
        past = self.bound is not None and self.most > self.bound
        return self.rise > self.allowance or past


class TooFewSamplesError(ValueError):
    """Nothing can be said about so few samples: let the soak run longer."""


def judge(
    name: str,
    progress: Sequence[float],
    values: Sequence[float],
    *,
    allowance: float,
    bound: float | None = None,
) -> Verdict:
    """Judge one series.

    Args:
        name: What it is.
        progress: How many operations had ended at each sample.
        values: The samples.
        allowance: The rise of the fitted line that is no growth.
        bound: What no sample may exceed after the warm-up.

    Raises:
        TooFewSamplesError: Hardly any samples are left after the warm-up.
    """
    begin = progress[-1] * WARM_UP if progress else 0
    kept = [
        (at, value) for at, value in zip(progress, values, strict=True) if at >= begin
    ]
    if len(kept) < _LEAST_SAMPLES:
        raise TooFewSamplesError(f"{len(kept)} samples of {name} after the warm-up")
    at, seen = zip(*kept, strict=True)
    slope = statistics.linear_regression(at, seen).slope
    return Verdict(
        name=name,
        first=seen[0],
        last=seen[-1],
        most=max(seen),
        rise=slope * (at[-1] - at[0]),
        allowance=allowance,
        bound=bound,
    )
