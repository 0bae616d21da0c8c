"""What a pool tells of itself: gauges read off its structures, and counters.

Pure. A gauge is never derived from counters; a counter only grows, and so does each
bucket of a histogram.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

BOUNDS: Final = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Upper bounds of the buckets of a histogram, in seconds; above the last is one more.

From a token in the same process (tens of microseconds) to the default ``timeout``.
"""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long many things took: how many fell into each bucket.

    Attributes:
        counts: One number for each bucket of :data:`BOUNDS`, and one for what took
            longer than the last. A time that equals a bound is in its bucket.
        seconds: The sum of all times.
    """

    counts: tuple[int, ...]
    seconds: float

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def percentile(self, percent: float) -> float | None:
        """What so many of a hundred stayed within, in seconds; None: there were none.

        As exact as the buckets are: within one, times are taken to be spread evenly.
        What is above the last bound counts as the last bound.
        """
        rank = self.count * percent / 100
        if not rank:
            return None
        below = 0
        edges = pairwise((0.0, *BOUNDS, BOUNDS[-1]))
        for (low, high), count in zip(edges, self.counts, strict=True):
            if count and below + count >= rank:
                return low + (high - low) * (rank - below) / count
            below += count
        return BOUNDS[-1]

    def since(self, earlier: Histogram) -> Histogram:
        """What came after an earlier snapshot of the same pool."""
        pairs = zip(self.counts, earlier.counts, strict=True)
        return Histogram(
            tuple(now - then for now, then in pairs), self.seconds - earlier.seconds
        )


class Times:
    """A histogram that is being made. Written under the engine's lock only."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count one more, or none. On the way of every operation: keep it short."""
        self.seconds += seconds * times
        self.counts[bisect_left(BOUNDS, seconds)] += times

    def snapshot(self) -> Histogram:
        """What was counted so far."""
        return Histogram(tuple(self.counts), self.seconds)


@dataclass(frozen=True, slots=True)
class RecentError:
    """An error of an operation, without its text: that may name a key.

    Attributes:
        at: When, in seconds since 1970.
        type: The name of its class.
        code: The ``CKR_…`` behind it, or None.
    """

    at: float
    type: str
    code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A snapshot of a pool, taken under its lock."""

    #: The most sessions that operations and leases may have open at present.
    sessions_max: int
    #: Sessions open now, the anchor not counted.
    sessions_open: int
    #: Sessions opened ahead, that no operation has used.
    sessions_ahead: int
    #: Sessions held by open ``PooledSession`` objects.
    sessions_leased: int
    #: Operations on a worker, until their result is posted.
    operations_running: int
    #: Operations that wait for a session.
    operations_waiting: int
    #: Calls given up on that the module still holds.
    calls_stuck: int
    #: Operations that ended, in whichever way.
    operations_total: int
    #: Operations that ended with an error of the token or of the pool.
    operations_failed: int
    #: Operations whose caller was cancelled.
    operations_cancelled: int
    #: Operations whose deadline passed.
    operations_timed_out: int
    #: Operations that found no free session when they came.
    waits_total: int
    #: Time spent waiting by those, in seconds.
    wait_seconds_total: float
    #: Time spent on workers by all operations, in seconds.
    run_seconds_total: float
    #: ``C_OpenSession`` calls that gave a session.
    sessions_opened_total: int
    #: ``C_Login`` calls that were accepted.
    logins_total: int
    #: ``C_Login`` calls that were refused.
    logins_failed_total: int
    #: Times that a lost login or token was restored.
    recoveries_total: int
    #: Calls given up on while the module held the thread.
    calls_lost: int
    #: The last error of the pool or the token, as ``Type: text``, or None.
    last_error: str | None
    #: From coming to starting, of everything that started or that its deadline
    #: ended before: operations, and requests for a session.
    wait_times: Histogram
    #: From starting to the result, or to the deadline, of all operations.
    run_times: Histogram
    #: The last errors of operations, the newest last.
    recent_errors: tuple[RecentError, ...]


@dataclass(slots=True, eq=False, repr=False)
class Counters:
    """The counters of a pool. Written under the engine's lock only."""

    operations_total: int = 0
    operations_failed: int = 0
    operations_cancelled: int = 0
    operations_timed_out: int = 0
    waits_total: int = 0
    wait_seconds_total: float = 0.0
    run_seconds_total: float = 0.0
    sessions_opened_total: int = 0
    logins_total: int = 0
    logins_failed_total: int = 0
    recoveries_total: int = 0
    calls_lost: int = 0
    last_error: str | None = None
