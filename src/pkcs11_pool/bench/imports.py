"""What importing the package costs, against importing what it stands on.

Each import happens in a fresh interpreter; the two kinds take turns.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pkcs11_pool.bench.measure import Spread

if TYPE_CHECKING:
    from collections.abc import Callable

#: The package may cost so many times what its three dependencies cost.
MOST: Final = 1.5

_PROGRAM: Final = """\
import time
began = time.perf_counter()
{statement}
print(time.perf_counter() - began)
"""
_DEPENDENCIES: Final = "import anyio, pkcs11, structlog"
# A name: the package alone imports nothing before one is asked for.
_PACKAGE: Final = "from pkcs11_pool import TokenPool"


@dataclass(frozen=True)
class ImportTimes:
    """Seconds, and the ratio of those that were measured right after each other."""

    dependencies: Spread
    package: Spread
    ratio: Spread

    @property
    def good(self) -> bool:
        """Whether it costs no more than it may."""
        return self.ratio.median <= MOST


def run(rounds: int, advance: Callable[[], None]) -> ImportTimes:
    """Measure.

    Args:
        rounds: How often; one more, at the beginning, does not count.
        advance: Called after each round.
    """
    seen: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        seen.append((_seconds(_DEPENDENCIES), _seconds(_PACKAGE)))
        advance()
    # The first round may have compiled files and filled the disk cache.
    dependencies, package = zip(*seen[1:], strict=True)
    return ImportTimes(
        dependencies=Spread.of(dependencies),
        package=Spread.of(package),
        ratio=Spread.of([whole / base for base, whole in seen[1:]]),
    )


def _seconds(statement: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)
