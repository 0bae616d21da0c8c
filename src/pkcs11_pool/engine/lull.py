"""How long an engine has had no work, and when somebody should look around in it.

Pure. Called under the engine's lock. Then sessions whose holders are forgotten are
closed, and so are spare ones.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

IDLE: Final = 0.3
"""Seconds without work after which sessions opened ahead are closed."""


class Lull:
    """The time without work.

    Attributes:
        last_work: When the last worker was done tidying.
        wanted: An idle worker was sent to look around, and has not yet.
    """

    def __init__(self, come_at: Callable[[float], None]) -> None:
        self.last_work = 0.0
        self.wanted = False
        self._come_at = come_at
        # When one is sent.
        self._look_at = inf

    def begins(self, now: float) -> None:
        """A worker goes idle, and there are sessions that may have to go."""
        if self._look_at == inf:
            self._look_at = now + IDLE
            self._come_at(self._look_at)

    def is_due(self, now: float) -> bool:
        """Whether one should be sent now. It is planned anew then."""
        due = now >= self._look_at
        if due:
            self._look_at = inf
        return due

    def next(self) -> float:
        """When the timekeeper should come for it; ``inf`` for never."""
        return self._look_at

    def lasts(self, now: float) -> bool:
        """Whether there was no work for long enough to close what is spare."""
        return now - self.last_work >= IDLE
