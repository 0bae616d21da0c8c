"""What the ledger reads out of a log: rules that are broken, and none that are not."""

from __future__ import annotations

from typing import Any

import pytest

from faultmodule import CKR, Call
from model.ledger import Broken, Ledger

_SLOT = 7


class _Log:
    """The log of a module, written by the test."""

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def add(self, function: str, session: int, number: int | None, rv: int = 0) -> None:
        """One more call, after all others."""
        at = len(self._calls) + 1
        self._calls.append(
            Call(at, function, session, number, rv, 1, 10 * at, 10 * at + 5, _SLOT)
        )

    def calls(self, *, after: int) -> list[Call]:
        """As the fault module gives them."""
        return self._calls[after:]


@pytest.fixture
def log() -> _Log:
    """An empty one."""
    return _Log()


@pytest.fixture
def ledger(log: _Log) -> Ledger:
    """A ledger that reads it."""
    module: Any = log
    return Ledger(module, set)


def test_a_number_that_a_public_session_object_had_is_learnt_of_the_next_one(
    log: _Log, ledger: Ledger
) -> None:
    """It may be free and another object's within one step, and is looked up by then."""
    log.add("C_OpenSession", 1, None)
    ledger.outliving = {4}
    log.add("C_CreateObject", 1, 4)
    ledger.read()
    ledger.outliving = set()
    log.add("C_OpenSession", 2, None)
    log.add("C_GetAttributeValue", 2, 4)
    ledger.read()


def test_a_number_that_nobody_looked_up_is_no_number(log: _Log, ledger: Ledger) -> None:
    """Whoever uses it has it from an earlier login."""
    log.add("C_OpenSession", 1, None)
    log.add("C_GetAttributeValue", 1, 4)
    with pytest.raises(Broken, match="looked up in login -1"):
        ledger.read()


def test_what_the_module_failed_to_make_is_counted_anew_in_each_step(
    log: _Log, ledger: Ledger
) -> None:
    """Only its vague answers, and only to calls that make an object."""
    log.add("C_OpenSession", 1, None)
    log.add("C_CreateObject", 1, None, CKR.GENERAL_ERROR)
    log.add("C_CloseSession", 1, None)
    log.add("C_OpenSession", 2, None)
    log.add("C_FindObjectsInit", 2, None, CKR.GENERAL_ERROR)
    log.add("C_CloseSession", 2, None)
    ledger.read()
    assert ledger.failed_to_make == 1
    ledger.read()
    assert ledger.failed_to_make == 0
