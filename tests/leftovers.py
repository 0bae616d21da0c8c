"""Frees the module of what a test left open, so that it fails alone.

A module has one state per process. Where a test ends in the middle its pool may be
open still, or closed around a call that was inside, and then it is finalised by
nobody: each test after it would be told that the module is in use.
"""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING, Any

from pkcs11_pool import TokenPool
from pkcs11_pool.cryptoki import module as modules
from pkcs11_pool.faces.waiting import blocking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pkcs11_pool.cryptoki.module import Module

LIMIT = 20.0
"""Seconds for closing one pool, and for finalising one module."""
_OVER = {"new", "closed"}


def close(pools: Iterable[TokenPool]) -> list[str]:
    """Close each of them, also when another one does not close; what went wrong."""
    wrong = []
    for pool in pools:
        if pool.state.value not in _OVER:
            wrong += _within_limit(f"{pool} is not closed", lambda p=pool: _shut(p))  # type: ignore[misc]
    return wrong


def _shut(pool: TokenPool) -> None:
    blocking(pool.close())


def free_modules() -> list[str]:
    """Finalise what is initialised still, and forget it; what that was."""
    left = [m for m in _known().values() if m.initialized and not m.forked]
    if not left:
        return []
    # Seldom: whatever else is found like this costs each test nothing.
    close([found for found in gc.get_objects() if type(found) is TokenPool])
    told = []
    for module in left:
        told.append(f"{module.path} was left initialised")
        # A call that was given up on, and that nothing holds up any more.
        deadline = time.monotonic() + LIMIT
        while module.lost_calls and time.monotonic() < deadline:
            time.sleep(0.01)
        if module.initialized:
            told += _within_limit("it is not finalised", module.library.finalize)
            _forget(module)
    return told


def _forget(module: Module) -> None:
    """Nobody knows what the pools on it still hold: the next one has it anew."""
    for key, known in list(_known().items()):
        if known is module:
            del _known()[key]


def _known() -> dict[str, Module]:
    return modules._modules  # noqa: SLF001  # there is no public way


def _within_limit(what: str, act: Callable[[], Any]) -> list[str]:
    """Do it on a thread of its own, which may hang; what went wrong."""
    wrong: list[str] = [f"{what} within {LIMIT} s"]

    def run() -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001  # told, and the next one comes
            wrong[:] = [f"{what}: {type(error).__name__}: {error}"]
        else:
            wrong.clear()

    thread = threading.Thread(target=run, name="leftovers", daemon=True)
    thread.start()
    thread.join(LIMIT)
    return list(wrong)
