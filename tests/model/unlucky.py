"""The machine with faults: all kinds of steps, and all that may happen to them."""

from __future__ import annotations

from model.faults import KINDS as _FAULTS
from model.hangs import KINDS as _HANGS
from model.hangs import Hangs
from model.torn import Torn

KINDS = (*_FAULTS, *_HANGS)
"""What may happen."""


class FaultMachine(Hangs, Torn):
    """All the steps that there are, with faults, hangs and losses."""
