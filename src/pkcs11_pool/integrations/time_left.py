"""One time limit for several calls, one after another."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

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
        self._begun = False

    def at_first(self) -> float | None:
        """For a call that may have to wait for a session; 0: it must not.

        Raises:
            PoolTimeout: The time is over.
        """
        if self._end is None:
            return self._limit
        if self._begun:
            return self.now()
        self._begun = True
        return self._left("the deadline passed before the first call", "waiting")

    def now(self) -> float | None:
        """For a call in the session.

        Raises:
            PoolTimeout: The time is over, after some calls.
        """
        return self._left("the deadline passed between two calls", "running")

    def _left(self, text: str, phase: Literal["waiting", "running"]) -> float | None:
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise PoolTimeout(text, phase)
        return left
