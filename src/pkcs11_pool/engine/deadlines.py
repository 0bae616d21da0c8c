"""Which jobs are due when: buckets of a tick, so that many share one look.

Pure. Adding and removing cost the same however many jobs there are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkcs11_pool.jobs import Job

TICK = 0.01
"""Seconds. A deadline is rounded up to the next tick, never down."""


class Deadlines:
    """The deadlines of the jobs of one engine."""

    def __init__(self) -> None:
        self._buckets: dict[int, set[Job]] = {}

    def watch(self, job: Job) -> float | None:
        """Heed a job's deadline; a time to look, if none was planned for its tick."""
        if job.deadline is None:
            return None
        tick = math.ceil(job.deadline / TICK)
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.add(job)
            return None
        self._buckets[tick] = {job}
        return tick * TICK

    def unwatch(self, job: Job) -> None:
        """Its deadline does not matter any more."""
        if job.deadline is None:
            return
        tick = math.ceil(job.deadline / TICK)
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.discard(job)
            if not bucket:
                del self._buckets[tick]

    def due(self, now: float) -> list[Job]:
        """The jobs whose deadline has passed. They stay until ``unwatch``."""
        ticks = sorted(tick for tick in self._buckets if tick * TICK <= now)
        return [job for tick in ticks for job in self._buckets[tick]]

    def next(self) -> float:
        """When the next one is due; ``inf`` for never."""
        return min(self._buckets, default=math.inf) * TICK
