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


NOT_FOR_THE_POOL = {
    "getpass": "PINs that are typed",
    "pathlib": "nothing; structlog and AnyIO do without",
    "pkcs11_pool.faces.administration": "tokens that are initialised",
    "pkcs11_pool.login.tokens": "the same",
    "pkcs11_pool.softhsm": "tests and demos",
    "pkcs11_pool.uri": "PKCS#11 URIs",
    "random": "the rest between tries, when a token is lost",
    "secrets": "nothing; os.urandom is what it calls",
    "shlex": "URIs with a program, and messages",
    "trio": "loops of trio",
    "uvloop": "loops of uvloop",
}
"""What ``from pkcs11_pool import TokenPool`` leaves alone, and who imports it."""

WATCHED = """\
import sys
sys.modules["rich"] = None  # structlog imports it where it is, at a great cost
count = 0
def watch(frame, event, argument):
    global count
    count += 1
    return watch
sys.settrace(watch)
{}
sys.settrace(None)
print(count, *sys.modules)
"""


def watched(statement: str) -> tuple[int, set[str]]:
    """How many lines and calls of Python an import is, and all that is there then."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(statement)],
        capture_output=True,
        text=True,
        check=True,
    )
    count, *modules = done.stdout.split()
    return int(count), set(modules)


def test_a_pool_imports_what_each_pool_needs_and_no_more() -> None:
    """What few need is imported when they need it; and it adds up to little.

    Lines are counted and not seconds: the benchmark measures those.
    """
    base, before = watched("import anyio, pkcs11, structlog")
    whole, there = watched("from pkcs11_pool import TokenPool")
    there -= before
    assert there & set(NOT_FOR_THE_POOL) == set()
    top = ("asgi", "bench", "chaos", "cli", "demo", "faults", "integrations")
    assert not [
        one
        for one in there
        if one.startswith("pkcs11_pool.") and one.split(".")[1] in top
    ]
    assert whole <= 1.35 * base
