"""The way back to a token that was lost: which step follows which, and when.

Pure. From the gentlest to the hardest: look whether anything is lost at all; find
the token and open a session; initialise the module anew; log in. What fails is
tried again after a rest, and each rest is longer than the one before.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random

FIRST_REST: Final = 0.05
"""Seconds."""
LONGEST_REST: Final = 1.0
"""Seconds; so much later than the token, at most, the pool is back."""


class Step(Enum):
    """What is done next about a token that may be lost."""

    LOOK = "look"
    """Is the anchor alive, and is it the same token?"""
    FIND = "find"
    """Find the token, in its slot or in another; open a new anchor."""
    INITIALIZE = "initialize"
    """``C_Finalize`` and ``C_Initialize``, for all pools on the module."""
    LOG_IN = "log_in"
    """Log the user in, if he was."""
    REST = "rest"
    """Wait, then find again."""
    WELL = "well"
    """Nothing was lost."""
    DONE = "done"
    """All is back."""


_AFTER: Final = {
    (Step.LOOK, True): Step.WELL,
    (Step.LOOK, False): Step.FIND,
    (Step.FIND, True): Step.LOG_IN,
    (Step.FIND, False): Step.REST,
    (Step.INITIALIZE, True): Step.FIND,
    (Step.INITIALIZE, False): Step.REST,
    (Step.LOG_IN, True): Step.DONE,
    (Step.LOG_IN, False): Step.REST,
}
ENDS: Final = frozenset({Step.REST, Step.WELL, Step.DONE})
"""Where there is nothing to do at present."""


def first(*, lost: bool) -> Step:
    """The first step of a round, by whether it is more than a doubt."""
    return Step.FIND if lost else Step.LOOK


def after(step: Step, *, well: bool, initialize: bool) -> Step:
    """The step that follows.

    Args:
        step: The one that was taken.
        well: Whether it went well.
        initialize: Whether the module may be initialised anew in this round.
    """
    if step in (Step.FIND, Step.LOG_IN) and not well and initialize:
        return Step.INITIALIZE
    return _AFTER[step, well]


def may_initialize(round_: int, *, others: bool) -> bool:
    """Whether a round may initialise the module anew, when it finds no token.

    Where other pools on the module are well, it disturbs them: so seldom, and
    ever more seldom, for a token that may be gone for good.

    Args:
        round_: The number of the round, from 1.
        others: Whether other pools on the module are well.
    """
    return not others or (round_ > 1 and round_ & (round_ - 1) == 0)


class Backoff:
    """How long to rest before the next round.

    Each rest is twice the one before, up to a limit, and cut by up to a half at
    random: processes that lost the same token must not come back in step.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng
        self._next = FIRST_REST

    def rest(self) -> float:
        """Seconds until the next round."""
        rest, self._next = self._next, min(2 * self._next, LONGEST_REST)
        if self._rng is None:
            import random  # noqa: PLC0415  # for a token that was lost

            self._rng = random.Random()  # noqa: S311  # no secret
        return rest * self._rng.uniform(0.5, 1.0)
