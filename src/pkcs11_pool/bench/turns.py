"""One turn of one client: so many callers, one operation, one window of time.

Clients are programs. Each takes turns on standard input, one to a line: operation,
callers, seconds to warm up, seconds to count. It answers each with one JSON object on
standard output. Turns are short, so that clients can take them in rotation: what the
machine does meanwhile hits all of them alike.

An operation counts when it ends inside the window. The callers go on until the window
closes, so nothing is measured while some of them have already stopped.

The clients in Python share this code. It may know an event loop, but no pool.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    Operation = Callable[[], Awaitable[bytes]]

#: What is measured, by name. bare.c has the same.
OPERATIONS: Final[dict[str, str]] = {
    "p256": "P-256 signature",
    "rsa2048": "RSA-2048 signature",
    "aes": "AES-256-CBC, 1 KiB",
    "hmac": "HMAC-SHA-256, 1 KiB",
    "verify": "P-256 verification",
    "digest": "SHA-256, 1 KiB",
    "random": "32 random bytes",
}

#: What is signed, or its digest: 32 bytes. bare.c has the same.
DIGEST: Final = bytes(range(32))
#: What is encrypted, digested and authenticated: 1 KiB.
PAYLOAD: Final = bytes(range(256)) * 4
IV: Final = bytes(range(16))
RANDOM_BITS: Final = 256

_MOST_SAMPLES: Final = 16
_SAMPLE_EVERY: Final = 101

BACKENDS: Final[dict[str, dict[str, Any]]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


@dataclass(frozen=True)
class Request:
    """What a client is asked to do.

    Attributes:
        operation: Name of the operation.
        callers: How many call at once, each again when it has its result.
        warm: Seconds before anything counts.
        seconds: Seconds that count.
    """

    operation: str
    callers: int
    warm: float
    seconds: float

    @classmethod
    def parse(cls, line: str) -> Request:
        """Read what `__str__` wrote."""
        operation, callers, warm, seconds = line.split()
        return cls(operation, int(callers), float(warm), float(seconds))

    def __str__(self) -> str:
        """The line for a client, without its end."""
        return f"{self.operation} {self.callers} {self.warm} {self.seconds}"


class Stopwatch:
    """Counts what ends inside the window."""

    def __init__(self, request: Request) -> None:
        self.request = request
        began = time.perf_counter_ns()
        self.start = began + round(request.warm * 1e9)
        self.stop = self.start + round(request.seconds * 1e9)
        self.laps: list[int] = []
        self.total = 0
        self.samples: list[bytes] = []

    def lap(self, began: int, ended: int, result: bytes) -> None:
        """Count one result."""
        if self.total % _SAMPLE_EVERY == 0:
            self.samples.append(result)
        self.total += 1
        if self.start <= ended <= self.stop:
            self.laps.append(ended - began)

    def answer(self) -> str:
        """What came of it, as the client tells it."""
        laps = sorted(self.laps)
        return json.dumps(
            {
                "operations": len(laps),
                "seconds": self.request.seconds,
                "total": self.total,
                "p50_us": percentile(laps, 50),
                "p99_us": percentile(laps, 99),
                "samples": [one.hex() for one in self.samples[:_MOST_SAMPLES]],
            }
        )


def percentile(laps: Sequence[int], percent: int) -> float:
    """The nearest rank among sorted nanoseconds, in microseconds: a lap really seen."""
    return laps[-(-len(laps) * percent // 100) - 1] / 1000 if laps else 0.0


async def take(request: Request, operation: Operation) -> str:
    """Let the callers call until the window closes; return the answer."""
    watch = Stopwatch(request)
    clock, lap, stop = time.perf_counter_ns, watch.lap, watch.stop

    async def call() -> None:
        while (began := clock()) < stop:
            result = await operation()
            lap(began, clock(), result)

    async with anyio.create_task_group() as group:
        for _ in range(request.callers):
            group.start_soon(call)
    return watch.answer()


def requests() -> Iterator[Request]:
    """The turns that are asked for, after the client has said that it is ready."""
    tell('{"ready": true}')
    for line in sys.stdin:
        yield Request.parse(line)


def tell(answer: str) -> None:
    """Answer with one line."""
    sys.stdout.write(answer + "\n")
    sys.stdout.flush()
