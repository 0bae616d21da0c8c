"""What an engine counts: how operations ended, and how long they took.

Pure. Called under the engine's lock. Gauges are no part of it: they are read off the
structures.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.stats import Counters, RecentError, Times

if TYPE_CHECKING:
    from pkcs11_pool.jobs import Job

RECENT: Final = 20
"""How many errors are remembered for the statistics."""


class Tally:
    """The counters and histograms of one engine.

    Attributes:
        counters: What is counted at once.
        waits: How long jobs waited.
        done: How long operations took that ended well and are not counted yet. Whoever
            appends to it calls ``count`` when there are ``Times.MANY``.
    """

    def __init__(self) -> None:
        self.counters = Counters()
        self.waits = Times()
        self.done: list[float] = []
        self._runs = Times()
        self._recent: deque[RecentError] = deque(maxlen=RECENT)

    def count(self) -> None:
        """Count the operations that ended well: many at once cost each of them less."""
        done, self.done = self.done, []
        self.counters.operations_total += len(done)
        self.counters.run_seconds_total += sum(done)
        self._runs.fresh += done
        self._runs.count()
        self.waits.count()

    def ran(self, job: Job, seconds: float) -> None:
        """Any job was so long on a worker, up to its result or its deadline."""
        self._runs.add(seconds, job.is_operation)

    def ended(self, job: Job, error: BaseException | None) -> None:
        """An operation has its result, and a caller to hear of it."""
        counters = self.counters
        counters.operations_total += job.is_operation
        if error is None:
            return
        counters.operations_failed += job.is_operation
        counters.last_error = f"{type(error).__name__}: {error}"
        code = rv.code_of(error)
        name = None if code is None else rv.name_of(code)
        self._recent.append(RecentError(time.time(), type(error).__name__, name))

    def cancelled(self, job: Job) -> None:
        """The caller went before the end."""
        self.counters.operations_cancelled += job.is_operation
        self.counters.operations_total += job.is_operation

    def refused(self, job: Job) -> None:
        """It would have had to wait, and must not."""
        counters = self.counters
        counters.operations_timed_out += job.is_operation
        counters.operations_failed += job.is_operation
        counters.operations_total += job.is_operation

    def waits_from_now(self, job: Job) -> None:
        """It finds no session, or has to give the one that it had back."""
        if not job.waited:
            job.waited = True
            self.counters.waits_total += 1

    def add(self, counts: dict[str, int]) -> None:
        """Add to the counters."""
        for name, count in counts.items():
            setattr(self.counters, name, getattr(self.counters, name) + count)

    def snapshot(self) -> dict[str, Any]:
        """All of it, by the names that ``PoolStats`` has for it."""
        self.count()
        counted: dict[str, Any] = {
            name: getattr(self.counters, name) for name in Counters.__slots__
        }
        return counted | {
            "wait_times": self.waits.snapshot(),
            "run_times": self._runs.snapshot(),
            "recent_errors": tuple(self._recent),
        }
