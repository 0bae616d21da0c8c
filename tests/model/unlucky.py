"""The machine with faults: all kinds of steps, and all that may happen to them."""

from __future__ import annotations

from model.amid import Amid
from model.hangs import Hangs
from model.torn import Torn


class FaultMachine(Hangs, Torn, Amid):
    """All the steps that there are, with faults, hangs and losses."""
