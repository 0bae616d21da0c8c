"""What importing the package costs, against importing what it stands on.

Each import happens in a fresh interpreter; the two kinds take turns. What counts is
the processor's time: other processes do not. Bytecode is kept between them, as it is
wherever a package is installed, and whatever this machine is set to.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pkcs11_pool.bench.measure import Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: The package may cost so many times what its three dependencies cost.
MOST: Final = 1.5

_PROGRAM: Final = """\
import time
began = time.process_time()
{statement}
print(time.process_time() - began)
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
    with tempfile.TemporaryDirectory(prefix="pkcs11-pool-bench-") as directory:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": directory}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(rounds + 1):
            dependencies = _seconds(_DEPENDENCIES, environment)
            seen.append((dependencies, _seconds(_PACKAGE, environment)))
            advance()
    # The first round has compiled the files.
    bases, wholes = zip(*seen[1:], strict=True)
    return ImportTimes(
        dependencies=Spread.of(bases),
        package=Spread.of(wholes),
        ratio=Spread.of([whole / base for base, whole in seen[1:]]),
    )


def _seconds(statement: str, environment: Mapping[str, str]) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return float(done.stdout)
