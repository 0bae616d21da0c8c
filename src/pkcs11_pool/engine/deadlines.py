"""Which jobs are due when: buckets of a tick, so that many share one look.

Pure. Adding and removing cost the same however many jobs there are.
"""

from __future__ import annotations

from math import ceil, inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkcs11_pool.jobs import Job

TICK = 0.01
"""Seconds. A deadline is rounded up to the next tick, never down."""


class Deadlines:
    """The deadlines of the jobs of one engine."""

    def __init__(self) -> None:
        self._buckets: dict[int, set[Job]] = {}
        # The tick of the job that came last: that bucket stays when it is empty, for
        # the next one.
        self._last = 0
        self._bucket: set[Job] = set()
        # When it is looked next.
        self._planned = inf

    def watch(self, job: Job) -> float | None:
        """Heed a job's deadline; a time to look, if none so early was planned."""
        deadline = job.deadline
        if deadline is None:
            return None
        job.tick = tick = ceil(deadline / TICK)
        if tick == self._last:
            self._bucket.add(job)
            return None
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.add(job)
            return None
        if not self._buckets.get(self._last, True):
            del self._buckets[self._last]
        self._last = tick
        self._buckets[tick] = self._bucket = {job}
        look = tick * TICK
        if look >= self._planned:
            return None
        self._planned = look
        return look

    def unwatch(self, job: Job) -> None:
        """Its deadline does not matter any more."""
        bucket = self._buckets.get(job.tick)
        if bucket is not None:
            bucket.discard(job)
            if not bucket and job.tick != self._last:
                del self._buckets[job.tick]

    def due(self, now: float) -> list[Job]:
        """The jobs whose deadline has passed. They stay until ``unwatch``."""
        ticks = sorted(tick for tick in self._buckets if tick * TICK <= now)
        return [job for tick in ticks for job in self._buckets[tick]]

    def next(self) -> float:
        """When the next one is due, and it will be looked; ``inf`` for never."""
        used = (tick for tick, bucket in self._buckets.items() if bucket)
        self._planned = min(used, default=inf) * TICK
        return self._planned
