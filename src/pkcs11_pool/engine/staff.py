"""The workers: who is idle, who is busy, and whom to wake for a new job.

Called under the engine's lock. The worker that went idle last is woken first, and a
new one is started only when none is idle.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.engine.awake import Awake
    from pkcs11_pool.jobs import Thread

_FULL: Final = 0.0005
"""Seconds for which enough workers stay enough, while none goes idle."""
_LOOK: Final = 0.005
"""Seconds after which it is looked at jobs for which nobody was woken."""


class Staff:
    """The workers of one engine.

    Attributes:
        workers: All but those that are lost.
        idle: Those that sleep; the one that went idle last is the last.
        awake: Those that are at work.
        busy: How many have a job, tidying included.
        running: How many jobs have no result yet.
        tidying: How many other threads close sessions opened ahead.
        looked_after: Whether the timekeeper comes to look at jobs for which nobody was
            woken.
        full_until: Until when it is not asked again whether enough workers are awake:
            they were, and none of them has gone idle since.
    """

    def __init__(
        self,
        most: int,
        awake: Awake,
        start: Callable[[], Thread],
        come_at: Callable[[float], None],
    ) -> None:
        self.workers: set[Thread] = set()
        self.idle: list[Thread] = []
        self.awake = awake
        self.busy = self.running = self.tidying = 0
        self.looked_after = False
        self.full_until = 0.0
        #: How many there may be.
        self.most = most
        self._start = start
        self._come_at = come_at

    @property
    def has_hand(self) -> bool:
        """Whether somebody is there for one more job."""
        return bool(self.idle) or len(self.workers) < self.most

    def wake_one(self, now: float) -> bool:
        """Wake the worker that went idle last, or start one; False if enough are.

        The next of those takes the job then. Should all be inside long calls, the
        timekeeper comes and wakes more.
        """
        awake = self.awake
        if awake.is_full(now):
            if not awake.coming:
                self.full_until = now + _FULL
            self.look_later(now)
            return False
        if self.idle:
            worker = self.idle.pop()
            worker.wake()
        elif len(self.workers) < self.most:
            worker = self._start()
            self.workers.add(worker)
        else:
            return False
        awake.woken(worker, now)
        return True

    def look_later(self, now: float) -> None:
        """Have the timekeeper come soon: what was put off may not be done else."""
        if not self.looked_after:
            self.looked_after = True
            self._come_at(now + _LOOK)

    def next_look(self, now: float) -> float:
        """When the timekeeper should come for that; ``inf`` for never."""
        return now + _LOOK if self.looked_after else inf

    def goes_idle(self, worker: Thread) -> None:
        """A worker finds nothing to do."""
        self.awake.ended(worker)
        self.full_until = 0.0
        if worker in self.workers:
            self.idle.append(worker)
