"""The core stands on three packages, and each integration on its own extra alone.

Nobody can install every combination; so each Python module is imported in a process
that has what its extra brings, with all that this needs, and finds nothing else.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pkcs11_pool import cli, integrations

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE: list[str] = PROJECT["project"]["dependencies"]
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]

NEEDS = {
    "aiohttp": "aiohttp",
    "cryptography": "cryptography",
    "fastapi": "fastapi",
    "jose": "jose",
    "litestar": "litestar",
    "opentelemetry": "otel",
    "paddings": "cryptography",
    "pdf": "pdf",
    "prometheus": "prometheus",
    "quart": "quart",
    "settings": "settings",
    "spans": "otel",
    "starlette": "starlette",
    "tuf": "tuf",
}
"""The extra of each Python module in ``integrations``; the others need none."""

ALONE = """\
import importlib, sys
from importlib.machinery import PathFinder

refused = set(sys.argv[1].split(","))


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in refused:
            return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
for name in sys.argv[2:]:
    importlib.import_module(name)
    print(name)
"""


def modules() -> dict[str, list[str]]:
    """The Python modules that each extra is for; none: what the core alone imports."""
    found: dict[str, list[str]] = {
        "none": [
            f"pkcs11_pool.{name}" for name in ("faces.pool", "asgi", "pins", "uri")
        ],
        "bench": ["pkcs11_pool.bench.command"],
        "cli": [
            f"{cli.__name__}.{info.name}" for info in pkgutil.iter_modules(cli.__path__)
        ],
        "demo": ["pkcs11_pool.demo"],
    }
    for info in pkgutil.iter_modules(integrations.__path__):
        extra = NEEDS.get(info.name, "none")
        found.setdefault(extra, []).append(f"{integrations.__name__}.{info.name}")
    return found


def brought(wanted: Iterable[str]) -> set[str]:
    """The distributions that these requirements bring, with all that they need."""
    found: set[str] = set()
    left = [Requirement(text) for text in wanted]
    seen: set[tuple[str, str]] = set()
    while left:
        one = left.pop()
        name = canonicalize_name(one.name)
        found.add(name)
        for extra in (*sorted(one.extras), ""):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # not for this Python
            requirements = map(Requirement, needs)
            left += [
                need
                for need in requirements
                if need.marker is None or need.marker.evaluate({"extra": extra})
            ]
    return found


@functools.cache
def owners() -> dict[str, set[str]]:
    """The distributions that each name is from; one may be from several."""
    found = importlib.metadata.packages_distributions()
    return {name: set(map(canonicalize_name, them)) for name, them in found.items()}


def others(extra: str) -> set[str]:
    """The names of all that is installed here and not brought by this extra."""
    there = brought([*CORE, *EXTRAS.get(extra, ())]) | {"pkcs11-pool"}
    return {name for name, them in owners().items() if not them & there}


def test_the_core_stands_on_three_packages() -> None:
    """All else is an extra: nobody who only signs installs a web framework."""
    names = {Requirement(text).name for text in CORE}
    assert names == {"anyio", "python-pkcs11", "structlog"}
    assert set(modules()) - {"none"} <= set(EXTRAS)


@pytest.mark.parametrize("extra", sorted(modules()))
def test_a_module_needs_what_its_extra_brings_and_no_more(extra: str) -> None:
    """Whatever else happens to be installed beside it here."""
    refused = others(extra)
    assert {"pytest", "hypothesis"} <= refused
    done = subprocess.run(
        [sys.executable, "-c", ALONE, ",".join(sorted(refused)), *modules()[extra]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == modules()[extra], done.stderr
