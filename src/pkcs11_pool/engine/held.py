"""Results that wait a moment for others, so that one wake-up of a loop serves many.

Called under the engine's lock. A moment is a millisecond at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pkcs11_pool.jobs import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.jobs import Job, Waiter

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_LEASE: Final = Kind.LEASE
_LATE: Final = 0.001
"""Seconds that a result may wait for others."""


class Held:
    """Callers whose results are there and who are woken together, in a moment.

    Attributes:
        waiters: They. Whoever takes them wakes them, without the lock.
    """

    def __init__(self, look_later: Callable[[float], None]) -> None:
        self.waiters: list[Waiter] = []
        self._look_later = look_later
        # When the first of them was held back, and when the last result was there.
        self._since = 0.0
        self._last = 0.0

    def hold(self, job: Job, now: float) -> bool:
        """Whether a result is held back for the next one, which will be there soon.

        While workers have enough to do without its caller, and results come faster
        than one in a millisecond: then none is late. Where all workers are inside all
        the same, the timekeeper comes.
        """
        rare = now - self._last > _LATE
        self._last = now
        if rare or job.kind is _LEASE:
            return False
        if not self.waiters:
            self._since = now
            self._look_later(now)
        elif self.is_late(now):
            return False
        self.waiters.append(job.waiter)
        return True

    def is_late(self, now: float) -> bool:
        """Whether those that are held back have waited long enough."""
        return now - self._since > _LATE

    def take(self) -> list[Waiter]:
        """All of them, to be woken now."""
        taken, self.waiters = self.waiters, []
        return taken
