"""What is done to the token, and when: by a seed, so that it can be done again.

It may know the server and the book; it does not know what the load does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread

from pkcs11_pool.errors import PoolTimeout, TokenUnavailable

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from pkcs11_pool.chaos.load import Book
    from pkcs11_pool.chaos.server import TokenServer
    from pkcs11_pool.faces.pool import TokenPool

KINDS: Final = ("kill", "stop", "logout")
_WEIGHTS: Final = (5, 2, 3)
_REFUSALS: Final = (PoolTimeout, TokenUnavailable)


@dataclass(frozen=True)
class Fault:
    """One thing that is done to the token.

    Attributes:
        kind: ``kill``: the server is killed, and started again. ``stop``: it is
            stopped, and goes on. ``logout``: other code in the process logs out.
        rest: Seconds of peace before it.
        length: Seconds that the token is away.
    """

    kind: str
    rest: float
    length: float


def plan(rng: random.Random, seconds: float) -> list[Fault]:
    """Faults for so many seconds of load; the last few are left in peace."""
    faults: list[Fault] = []
    used = 0.0
    while True:
        (kind,) = rng.choices(KINDS, _WEIGHTS)
        length = 0.0 if kind == "logout" else rng.uniform(0.2, 4.0)
        fault = Fault(kind, rng.uniform(1.0, 6.0), length)
        used += fault.rest + fault.length
        if used > seconds - 3.0:
            return faults
        faults.append(fault)


class Mischief:
    """Does what was planned.

    Attributes:
        done: How much of it, by kind.
    """

    def __init__(
        self,
        server: TokenServer,
        pool: TokenPool,
        book: Book,
        tell: Callable[[Fault], None] = lambda _fault: None,
    ) -> None:
        self.done: Counter[str] = Counter()
        self._server = server
        self._pool = pool
        self._book = book
        self._tell = tell

    async def run(self, faults: list[Fault]) -> None:
        """All of it, one after the other."""
        for fault in faults:
            await anyio.sleep(fault.rest)
            self._tell(fault)
            if await self._do(fault):
                self.done[fault.kind] += 1

    async def _do(self, fault: Fault) -> bool:
        if fault.kind == "logout":
            try:
                await self._pool.run(self._log_out)
            except _REFUSALS:
                return False  # it waits in line as everybody does
            return True
        away = self._server.kill if fault.kind == "kill" else self._server.stop
        back = self._server.start if fault.kind == "kill" else self._server.go_on
        await anyio.to_thread.run_sync(away)
        try:
            await anyio.sleep(fault.length)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(back)
        self._book.token_is_back(self._server.came_back)
        return True

    def _log_out(self, session: Any) -> int:
        """Behind the pool's back, as other code in the process might."""
        return self._pool.lib.functions.C_Logout(session.handle)
