"""The clients that the package brings along: the bare module, and the pool."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pkcs11_pool.bench.measure import Contender

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pkcs11_pool.bench.measure import Scenario


def bare(program: Path) -> list[Contender]:
    """The bare module, called from C: a session for each operation, and one kept."""
    return [
        _bare(program, "bare", "bare", "fresh"),
        _bare(program, "kept", "bare, kept", "kept"),
    ]


def handed(program: Path) -> Contender:
    """The bare module, each operation handed to another thread and waited for."""
    return _bare(program, "handed", "bare, handed over", "handed")


def _bare(program: Path, name: str, title: str, mode: str) -> Contender:
    return Contender(name, title, lambda s: [str(program), *arguments(s), mode])


def pool(backend: str, sessions: int | None = None) -> Contender:
    """The pool on one event loop.

    Args:
        backend: Which.
        sessions: ``max_sessions``; None for twice the callers.
    """
    program = [sys.executable, "-m", "pkcs11_pool.bench.client"]
    size = [] if sessions is None else [str(sessions)]

    def command(scenario: Scenario) -> Sequence[str]:
        return [*program, *arguments(scenario), backend, *size]

    return Contender(f"pool-{backend}", f"pkcs11_pool, {backend}", command)


def arguments(scenario: Scenario) -> list[str]:
    """What every client is told: module, token, and how its keys begin."""
    return [scenario.module, scenario.label, scenario.material.prefix]
