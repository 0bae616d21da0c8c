"""The soak: very many operations in one process, and whether anything of it grows.

    python -m pkcs11_pool.bench.soak MODULE LABEL PREFIX BACKEND N CALLERS SESSIONS

A process of its own does the work and watches itself: nothing else lives there that
could grow. The first line on standard input is the PIN. Each line of standard output
is one sample, as JSON; the last one says that it is done.

The work is what a service does, what goes wrong included: results, callers that are
cancelled or late, and sessions that are kept for a block.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread
from pkcs11 import Mechanism

from pkcs11_pool.bench import turns
from pkcs11_pool.bench.client import operation_of
from pkcs11_pool.cryptoki.interface import UNAVAILABLE, RawTokenInfo
from pkcs11_pool.errors import PoolTimeout
from pkcs11_pool.faces.pool import TokenPool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

#: How many samples are taken, spread over the whole run.
SAMPLES: Final = 250
#: Mostly signatures.
_CYCLE: Final = ("p256", "hmac", "p256", "aes", "p256", "digest", "verify", "random")
#: How the names of the pool's threads begin.
_THREADS: Final = "pkcs11-pool"
_GRACE: Final = 5.0
_EVERY: Final = {"lease": 97, "late": 101, "cancelled": 103}


@dataclass(frozen=True)
class Sample:
    """What the process had at one moment.

    Attributes:
        operations: How many had ended.
        seconds: Since the beginning.
        memory: Resident memory in bytes.
        blocks: Python's own blocks of memory, about one for each object, after a
            collection of garbage: what is still reachable. What leaks a small object
            now and then shows here long before it does in ``memory``.
        threads: All threads of the process.
        descriptors: Open files, pipes and sockets.
        sessions: Open sessions as the pool counts them.
        module_sessions: The same as the token tells, the login's own included; None
            where it does not tell.
    """

    operations: int
    seconds: float
    memory: int
    blocks: int
    threads: int
    descriptors: int
    sessions: int
    module_sessions: int | None


@dataclass(frozen=True)
class Orders:
    """What to do.

    Attributes:
        operations: How many.
        callers: How many tasks share them.
    """

    operations: int
    callers: int


def memory() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def threads() -> int:
    """All threads of this process, those that Python does not know included."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def descriptors() -> int:
    """The open files of this process, without the one that lists them."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1


def module_sessions(pool: TokenPool) -> int | None:
    """How many sessions the token says this process has open."""
    info = RawTokenInfo()
    rv = pool.lib.functions.C_GetTokenInfo(pool.token.slot_id, ctypes.byref(info))
    told = int(info.sessions)
    return None if rv or told == UNAVAILABLE else told


class Soak:
    """One run."""

    def __init__(
        self, pool: TokenPool, orders: Orders, tell: Callable[[Sample], None]
    ) -> None:
        self._pool = pool
        self._orders = orders
        self._tell = tell
        self._work: dict[str, Callable[[], Awaitable[object]]] = {}
        self._taken = 0
        self._done = 0
        self._next_sample = 0
        self._began = 0.0

    async def run(self, prefix: str) -> None:
        """Do all of it."""
        for name in set(_CYCLE):
            self._work[name] = await operation_of(self._pool, prefix, name)
        self._began = time.monotonic()
        await self._sample()
        async with anyio.create_task_group() as group:
            for _ in range(self._orders.callers):
                group.start_soon(self._call)
        await self._sample()

    async def _call(self) -> None:
        while self._taken < self._orders.operations:
            number = self._taken
            self._taken += 1
            await self._once(number)
            self._done += 1
            if self._done >= self._next_sample:
                self._next_sample += max(1, self._orders.operations // SAMPLES)
                await self._sample()

    async def _once(self, number: int) -> None:
        for name, every in _EVERY.items():
            if number % every == every - 1:
                await getattr(self, f"_{name}")()
                return
        await self._work[_CYCLE[number % len(_CYCLE)]]()

    async def _lease(self) -> None:
        async with self._pool.session() as session:
            await session.digest(turns.PAYLOAD, mechanism=Mechanism.SHA256)

    async def _late(self) -> None:
        with contextlib.suppress(PoolTimeout):
            await self._pool.digest(
                turns.PAYLOAD, mechanism=Mechanism.SHA256, timeout=1e-5
            )

    async def _cancelled(self) -> None:
        with anyio.move_on_after(1e-5):
            await self._work["p256"]()

    async def _sample(self) -> None:
        told = await anyio.to_thread.run_sync(module_sessions, self._pool)
        resident = memory()
        gc.collect()
        self._tell(
            Sample(
                operations=self._done,
                seconds=time.monotonic() - self._began,
                memory=resident,
                blocks=sys.getallocatedblocks(),
                threads=threads(),
                descriptors=descriptors(),
                sessions=self._pool.stats().sessions_open,
                module_sessions=told,
            )
        )


def left_over() -> list[str]:
    """The pool's threads that are still there when it has closed."""
    theirs = [one for one in threading.enumerate() if one.name.startswith(_THREADS)]
    for thread in theirs:
        thread.join(_GRACE)  # one that has just done its last work needs a moment
    return [one.name for one in theirs if one.is_alive()]


def _print(sample: Sample) -> None:
    turns.tell(json.dumps(asdict(sample)))


async def _main(pool: TokenPool, orders: Orders, prefix: str) -> None:
    async with pool:
        await Soak(pool, orders, _print).run(prefix)


def main(words: Sequence[str]) -> int:
    """Soak, and tell each sample as it is taken."""
    module, label, prefix, backend, *rest = words
    operations, callers, sessions = map(int, rest)
    pin = sys.stdin.readline().rstrip("\n") or None
    pool = TokenPool(module, token_label=label, pin=pin, max_sessions=sessions)
    orders = Orders(operations, callers)
    turns.tell('{"ready": true}')
    anyio.run(_main, pool, orders, prefix, **turns.BACKENDS[backend])
    turns.tell(json.dumps({"done": True, "left": left_over()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
