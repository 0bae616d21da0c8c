"""Results that wait a moment for others, so that one wake-up of a loop serves many.

Called under the engine's lock. A moment is a millisecond at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pkcs11_pool.jobs import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.jobs import Bell, Job, Waiter

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
        if rare or job.kind is _LEASE or (self.waiters and self.is_late(now)):
            return False
        self.add(job, now)
        return True

    def add(self, job: Job, now: float) -> None:
        """Hold a result back: for a moment, whatever happens to those at work."""
        if not self.waiters:
            self._since = now
            self._look_later(now)
        self.waiters.append(job.waiter)

    def is_late(self, now: float) -> bool:
        """Whether those that are held back have waited long enough."""
        return now - self._since > _LATE

    def take(self) -> list[Waiter]:
        """All of them, to be woken now."""
        taken, self.waiters = self.waiters, []
        return taken


def wake(waiters: list[Waiter]) -> None:
    """Wake callers, without the lock: each loop once, when all on it are there.

    Whoever wakes a loop lets go of the interpreter's lock meanwhile. If that came after
    the first of them already, the loop would take it alone, and so on with each.
    """
    if len(waiters) == 1:
        waiters[0].wake()
        return
    for bell in line_up(waiters):
        bell.ring()


def line_up(waiters: list[Waiter]) -> set[Bell]:
    """Get callers ready to be woken; what is to be rung then."""
    bells = {waiter.line_up() for waiter in waiters}
    return {bell for bell in bells if bell is not None}
