"""What each answer of a token means: the one table, walked from end to end."""

from __future__ import annotations

import inspect

import pytest
from pkcs11 import exceptions as p11

from pkcs11_pool import errors
from pkcs11_pool.cryptoki import recovery, rv
from pkcs11_pool.cryptoki.recovery import Fault, Repeat

_CODES = sorted(code for code in rv.NAMES if code)
_CLASSES = [
    kind
    for _, kind in inspect.getmembers(p11, inspect.isclass)
    if issubclass(kind, p11.PKCS11Error)
]


@pytest.mark.parametrize("code", _CODES, ids=rv.name_of)
def test_every_code_of_the_standard_stands_in_the_table(code: int) -> None:
    """Whether python-pkcs11 has a class for it or hides it in a text."""
    assert code in recovery.FAULTS
    error = rv.error_of(code, "C_Sign")
    assert recovery.classify(error) is recovery.FAULTS[code]


def test_no_code_stands_in_two_groups() -> None:
    """Each name is written once, and every group has some."""
    named = [name for names in recovery.GROUPS.values() for name in names.split()]
    assert sorted(named) == sorted(set(named))
    assert set(recovery.FAULTS.values()) == set(Fault)


@pytest.mark.parametrize("kind", _CLASSES, ids=lambda kind: kind.__name__)
def test_every_exception_of_python_pkcs11_stands_in_the_table(
    kind: type[p11.PKCS11Error],
) -> None:
    """By its code, or by itself where it stands for none."""
    code = rv.code_of(kind())
    assert code in recovery.FAULTS if code is not None else kind in recovery.UNCODED
    assert isinstance(recovery.classify(kind()), Fault)


@pytest.mark.parametrize("code", [0x80000001, 0x8000FFFF, 0xCE534351, 0x204, 0x2FF])
def test_what_the_standard_does_not_have_is_asked_of_the_token(code: int) -> None:
    """A vendor's code is neither the caller's nor the end of the token by itself."""
    assert recovery.classify(rv.error_of(code, "C_Sign")) is Fault.UNSURE
    unmapped = p11.PKCS11Error(f"Unmapped error code {code:#x}")
    assert recovery.classify(unmapped) is Fault.UNSURE


@pytest.mark.parametrize("fault", Fault)
def test_every_group_says_what_is_repeated(fault: Fault) -> None:
    """Where the answer was lost with the token, only what may happen twice."""
    lost = fault.is_outage
    assert (fault.repeats is Repeat.HARMLESS) == lost


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (errors.LoginRequired("x"), Fault.LOGIN),
        (errors.KeyNotFound("x"), Fault.HANDLE),
        (errors.TokenUnavailable("x"), Fault.TOKEN),
        (errors.PoolClosed("x"), Fault.CALLER),
        (errors.SessionClosed("x"), Fault.CALLER),
        (errors.OutcomeUnknown("x"), Fault.CALLER),
        (KeyError("x"), Fault.CALLER),
        (p11.PKCS11Error("Initialisation error (not initialized)"), Fault.MODULE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_pool_are_the_callers(error: BaseException, fault: Fault) -> None:
    """Except for what says that the login or an object is missing."""
    assert recovery.classify(error) is fault


def test_an_unknown_outcome_is_its_causes_trouble() -> None:
    """The token has to be looked at, however the error was wrapped."""
    error = errors.OutcomeUnknown("x")
    error.__cause__ = p11.DeviceError()
    assert recovery.classify(error) is Fault.TOKEN
