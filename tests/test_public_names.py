"""The public names: each is there, imported late, and none is forgotten."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pkcs11_pool

# Asked for by name: nothing has been imported through it by then.
_HOMES: dict[str, str] = vars(pkcs11_pool)["_HOMES"]


def imported_for_types() -> dict[str, str]:
    """The names that a type checker sees, and the modules that they are from."""
    tree = ast.parse(Path(pkcs11_pool.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: node.module or ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_what_type_checkers_see_is_what_programs_get() -> None:
    """The two lists of the package say the same."""
    seen = imported_for_types()
    assert sorted(seen) == sorted(pkcs11_pool.__all__)
    homes = {
        name: _HOMES.get(name, "pkcs11_pool.errors") for name in seen if name != "pins"
    }
    del seen["pins"]
    assert homes == seen
    assert set(_HOMES) <= set(pkcs11_pool.__all__)


@pytest.mark.parametrize("name", pkcs11_pool.__all__)
def test_each_name_is_there(name: str) -> None:
    """And in the listing of the package."""
    value = getattr(pkcs11_pool, name)
    assert value is sys.modules[_HOMES.get(name, "pkcs11_pool.errors")].__dict__.get(
        name, value
    )
    assert name in dir(pkcs11_pool)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    """As of any Python module."""
    with pytest.raises(AttributeError, match="TokenPol"):
        pkcs11_pool.TokenPol  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_alone_imports_nothing() -> None:
    """Neither python-pkcs11 nor AnyIO; a name does."""
    code = (
        "import sys, pkcs11_pool\n"
        "print({'pkcs11', 'anyio', 'structlog'} & set(sys.modules))\n"
        "pkcs11_pool.TokenPool; print('pkcs11' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["set()", "True"]
