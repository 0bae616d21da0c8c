"""One time limit for several calls, one after another."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pkcs11_pool.errors import PoolTimeout
from pkcs11_pool.faces import arguments

if TYPE_CHECKING:
    from pkcs11_pool.faces.arguments import Timeout
    from pkcs11_pool.faces.pool import TokenPool


class TimeLeft:
    """The time limit of several calls together."""

    def __init__(self, pool: TokenPool, timeout: Timeout) -> None:
        default = pool._engine.options.timeout  # noqa: SLF001  # one package
        self._limit = arguments.timeout(timeout, default)
        self._end = time.monotonic() + self._limit if self._limit else None

    def at_first(self) -> float | None:
        """For a call that may have to wait for a session; 0: it must not."""
        return self._limit if self._end is None else self.now()

    def now(self) -> float | None:
        """For a call in the session."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise PoolTimeout("the deadline passed between two calls", "running")
        return left
