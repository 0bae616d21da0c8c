"""Whether something grew. Pure arithmetic over the samples of a soak.

Samples that follow each other resemble each other: what is high at one moment is high
at the next. So they are not taken for so many independent ones. What is left after the
warm-up is cut into a few blocks; a line goes through the means of these, and its rise
has the confidence interval that Student's distribution gives it. It is flat if not even
the upper end of the interval is more than what is allowed. It grew if it rises by more
than that, and not by chance. Between the two, nothing can be said: soak longer.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The part of a run, at its beginning, in which caches fill and threads start.
WARM_UP: Final = 0.2
#: Memory that may come or go: the allocator keeps what it will need again.
MEMORY_ALLOWANCE: Final = 4 * 1024 * 1024
#: The same in Python's blocks: each sample finds other calls under way.
BLOCKS_ALLOWANCE: Final = 2000
#: Threads are started when they are needed, and more of them at some moments.
THREADS_ALLOWANCE: Final = 4
#: Threads that are not workers: the main one, the actor, the timekeeper, AnyIO's own.
OTHER_THREADS: Final = 16
_BLOCKS: Final = 10
#: Student's t at 97.5 %, with as many degrees of freedom as blocks, less two.
_STUDENT: Final = 2.306


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
        error: The half of the 95 % confidence interval of the rise.
        allowance: The rise that is no growth.
        bound: What no sample may exceed; None where nothing bounds it.
    """

    name: str
    first: float
    last: float
    most: float
    rise: float
    error: float
    allowance: float
    bound: float | None

    @property
    def grew(self) -> bool:
        """Whether it rises all the time, or went past its bound."""
        past = self.bound is not None and self.most > self.bound
        return self.rise > max(self.allowance, self.error) or past

    @property
    def flat(self) -> bool:
        """Whether it is certain enough that it does not."""
        return not self.grew and self.rise + self.error <= self.allowance

    @property
    def told(self) -> str:
        """In a word."""
        return "GREW" if self.grew else "flat" if self.flat else "unclear"


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
    if len(kept) < 2 * _BLOCKS:
        raise TooFewSamplesError(f"{len(kept)} samples of {name} after the warm-up")
    at, seen = zip(*kept, strict=True)
    slope, error = _line(at, seen)
    return Verdict(
        name=name,
        first=seen[0],
        last=seen[-1],
        most=max(seen),
        rise=slope * (at[-1] - at[0]),
        error=error * (at[-1] - at[0]),
        allowance=allowance,
        bound=bound,
    )


def _line(at: Sequence[float], seen: Sequence[float]) -> tuple[float, float]:
    """The slope of a line through the means of blocks, and how uncertain it is."""
    edges = [len(at) * number // _BLOCKS for number in range(_BLOCKS + 1)]
    pairs = list(itertools.pairwise(edges))
    x = [statistics.fmean(at[low:high]) for low, high in pairs]
    y = [statistics.fmean(seen[low:high]) for low, high in pairs]
    slope, base = statistics.linear_regression(x, y)
    middle = statistics.fmean(x)
    spread = sum((one - middle) ** 2 for one in x)
    off = sum((b - base - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, _STUDENT * math.sqrt(off / (_BLOCKS - 2) / spread)
