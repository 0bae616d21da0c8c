"""The docstrings of public names: the sections of the house, and no false names."""

from __future__ import annotations

import builtins
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pkcs11
import pytest
from pkcs11 import exceptions

import pkcs11_pool
from pkcs11_pool.faces import parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADER = Path(__file__).parent / "faultmodule" / "cryptoki.h"
NEWER = {"C_EncapsulateKey", "C_DecapsulateKey"}
"""Functions of PKCS#11 v3.2, which the fault module does not have."""

AWAITED_LATER = {
    "decrypt_stream",
    "encrypt_stream",
    "map",
    "security_officer",
    "session",
    "sign_many",
}
"""Plain methods whose result is for ``async with`` or ``async for``."""


def members() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All public methods and functions, with a name to show."""
    found = [getattr(pkcs11_pool, name) for name in pkcs11_pool.__all__]
    found += [parameters.ParametersRef, parameters.LocalParameters]
    for item in found:
        if inspect.isfunction(item):
            yield item.__name__, item
        if not inspect.isclass(item) or issubclass(item, Exception):
            continue
        for name in dir(item):
            method = inspect.unwrap(getattr(item, name))
            method = getattr(method, "__func__", method)
            ours = getattr(method, "__module__", None) or ""
            public = not name.startswith("_") or name == "__anext__"
            if public and inspect.isfunction(method) and ours.startswith("pkcs11_pool"):
                yield f"{item.__name__}.{name}", method


def section(method: Callable[..., Any], name: str) -> str:
    """A section of a docstring; empty if there is none."""
    doc = inspect.getdoc(method) or ""
    found = re.search(rf"(?ms)^{name}:\n(.*?)(?=^\S|\Z)", doc)
    return found[1] if found else ""


ALL = dict(members())
AWAITED = [
    name
    for name, method in ALL.items()
    if inspect.iscoroutinefunction(method) or method.__name__ in AWAITED_LATER
]


@pytest.mark.parametrize("name", sorted(AWAITED))
@pytest.mark.parametrize("title", ["Cancellation", "Cryptoki"])
def test_what_is_awaited_says_what_a_cancelled_caller_finds(
    name: str, title: str
) -> None:
    """And which functions of the module it calls."""
    assert section(ALL[name], title)


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_error_that_a_docstring_names_is_one(name: str) -> None:
    """A renamed error is renamed here, too."""
    said = section(ALL[name], "Raises")
    listed = re.findall(r"(?m)^    (\w[\w., ]*):", said)
    names = [one.strip() for line in listed for one in line.split(",")]
    assert bool(names) == bool(said)
    for one in names:
        last = one.removeprefix("pkcs11.")
        places = [pkcs11_pool, pkcs11, exceptions, builtins]
        kinds = [getattr(place, last, None) for place in places]
        assert any(inspect.isclass(k) and issubclass(k, Exception) for k in kinds), one


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_function_that_a_docstring_names_is_in_the_standard(name: str) -> None:
    """``C_Sign`` is one, ``C_SignData`` is not."""
    known = set(re.findall(r"\bC_\w+", HEADER.read_text())) | NEWER
    said = set(re.findall(r"\bC_\w+", inspect.getdoc(ALL[name]) or ""))
    assert said <= known


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_parameter_is_explained(name: str) -> None:
    """Ruff sees that none is forgotten; this, that none is there that is not taken."""
    said = set(re.findall(r"(?m)^    \*{0,2}(\w+):", section(ALL[name], "Args")))
    assert said <= set(inspect.signature(ALL[name]).parameters)
