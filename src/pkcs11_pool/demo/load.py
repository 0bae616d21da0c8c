"""Many tasks, one pool: the load, and what is known of it afterwards.

Tasks take their work from one list. Each operation is timed as its caller sees it,
waiting included. What came of it is checked at the end, so that throughput is the
pool's and not that of the checks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
from pkcs11 import PKCS11Error

from pkcs11_pool.demo.calls import CallCount
from pkcs11_pool.demo.work import KINDS, Bench, holds, plan
from pkcs11_pool.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from pkcs11_pool.demo.calls import CountingFunctions
    from pkcs11_pool.demo.work import Kind, Material, Proof
    from pkcs11_pool.faces.pool import TokenPool

    Advance = Callable[[int], None]


@dataclass(frozen=True)
class Outcome:
    """What a load came to.

    Attributes:
        backend: The event loop: ``asyncio`` or ``trio``.
        tasks: How many shared the work.
        sessions: How many operations could be on the token at once.
        operations: How many there were to do.
        seconds: From the first call to the last result.
        latencies: Seconds of each operation that ended well, by title.
        verified: How many operations were found right, by title.
        errors: What was raised, as text.
        sessions_opened: By the pool, for this load; a few are opened ahead.
        logins: Since the pool was opened.
        calls: ``C_`` functions called for this load.
    """

    backend: str
    tasks: int
    sessions: int
    operations: int
    seconds: float
    latencies: Mapping[str, Sequence[float]]
    verified: Mapping[str, int]
    errors: Sequence[str]
    sessions_opened: int
    logins: int
    calls: Mapping[str, int]

    @property
    def total_verified(self) -> int:
        """How many operations were found right."""
        return sum(self.verified.values())

    @property
    def done(self) -> int:
        """How many operations gave a result, right or wrong."""
        return sum(map(len, self.latencies.values()))

    @property
    def calls_per_operation(self) -> float:
        """``C_`` calls for each operation."""
        return sum(self.calls.values()) / self.operations

    @property
    def throughput(self) -> float:
        """Operations in a second."""
        return self.done / self.seconds

    def percentile(self, percent: int, title: str | None = None) -> float | None:
        """Latency, in seconds, that so many percent stayed within.

        Args:
            percent: From 1 to 100.
            title: Of one kind of operation; None for all together.
        """
        chosen = self.latencies if title is None else [title]
        ordered = sorted(lap for kind in chosen for lap in self.latencies[kind])
        if not ordered:
            return None
        # The nearest rank: a latency that was really seen, not one between two.
        return ordered[-(-len(ordered) * percent // 100) - 1]


class Load:
    """One run of the work, from many tasks."""

    def __init__(self, bench: Bench, operations: int, advance: Advance) -> None:
        self._bench = bench
        self._advance = advance
        self._work: deque[tuple[int, Kind]] = deque(enumerate(plan(operations)))
        self.latencies: dict[str, list[float]] = {kind.title: [] for kind in KINDS}
        self.proofs: list[tuple[Kind, Proof]] = []
        self.errors: list[str] = []

    async def run(self, tasks: int) -> float:
        """Do all the work; return the seconds that it took."""
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(self._task)
        return time.perf_counter() - began

    async def _task(self) -> None:
        # Popping is safe: all tasks run on this one thread, and it awaits nothing.
        while self._work:
            number, kind = self._work.popleft()
            await self._once(number, kind)
            self._advance(kind.operations)

    async def _once(self, number: int, kind: Kind) -> None:
        laps = self.latencies[kind.title]

        async def lap(operation: Awaitable[bytes]) -> bytes:
            began = time.perf_counter()
            result = await operation
            laps.append(time.perf_counter() - began)
            return result

        message = f"message {number} of {kind.title}".encode()
        try:
            proof = await kind.work(self._bench, lap, message)
        except (PoolError, PKCS11Error) as error:
            self.errors.append(f"{kind.title}: {type(error).__name__}: {error}")
        else:
            self.proofs.append((kind, proof))

    def check(self, advance: Advance) -> Counter[str]:
        """Look at every proof; count the operations that were right, by title."""
        right: Counter[str] = Counter()
        for kind, proof in self.proofs:
            if holds(proof):
                right[kind.title] += kind.operations
            advance(kind.operations)
        return right


async def run(
    pool: TokenPool, material: Material, orders: Orders, bars: tuple[Advance, Advance]
) -> Outcome:
    """Put an open pool under load, then check all results."""
    load = Load(Bench(pool, material), orders.operations, bars[0])
    calls = CallCount(orders.functions)
    seconds = await load.run(orders.tasks)
    counted, stats = calls.snapshot(), pool.stats()
    return Outcome(
        backend=orders.backend,
        tasks=orders.tasks,
        sessions=stats.sessions_max,
        operations=orders.operations,
        seconds=seconds,
        latencies=load.latencies,
        verified=load.check(bars[1]),
        errors=load.errors,
        sessions_opened=counted.get("C_OpenSession", 0),
        logins=stats.logins_total,
        calls=counted,
    )


@dataclass(frozen=True)
class Orders:
    """What to do on which event loop.

    Attributes:
        backend: The event loop.
        operations: How many operations.
        tasks: How many tasks share them.
        functions: What counts the calls of the pool.
    """

    backend: str
    operations: int
    tasks: int
    functions: CountingFunctions
