"""``C_Finalize`` and ``C_Initialize`` of a module in use, for all pools on it.

A module whose server went away often stays broken until it is initialised anew.
That ends every session of the process on it, so all pools stand back first: it is
done when nobody is inside, or not at all.

Source: PKCS#11 v3.1, "C_Finalize": no other thread may be inside.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pkcs11_pool.errors import TokenUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pkcs11_pool.cryptoki.module import Member, Module


class Renewal:
    """What one pool asks of the others, and what they answer.

    Attributes:
        deadline: On the monotonic clock: until then they may still come to rest.
        done: Set when it is over, whether it was done or not.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.done = threading.Event()
        self._answers = threading.Semaphore(0)
        self._refused = False

    def answer(self, *, ready: bool) -> None:
        """One pool stands back, or cannot."""
        self._refused |= not ready
        self._answers.release()

    def wait(self, pools: int) -> bool:
        """Whether so many pools stand back, all of them."""
        for _ in range(pools):
            left = max(0.0, self.deadline - time.monotonic())
            if not self._answers.acquire(timeout=left):
                return False
        return not self._refused


@contextmanager
def renewing(
    module: Module, others: Sequence[Member], deadline: float
) -> Iterator[None]:
    """Have all other pools on a module stand back for the length of a block.

    Raises:
        TokenUnavailable: One of them has calls inside, or does the same just now; or
            a call that was given up on is inside.
    """
    _check_no_lost_call(module)
    if not module.renewing.acquire(blocking=False):
        message = f"another pool initialises {module.path} anew"
        raise TokenUnavailable(message)
    renewal = Renewal(deadline)
    try:
        for other in others:
            other.stand_back(renewal)
        if not renewal.wait(len(others)):
            message = f"another pool has calls inside {module.path}"
            raise TokenUnavailable(message)
        yield
    finally:
        renewal.done.set()
        module.renewing.release()


def _check_no_lost_call(module: Module) -> None:
    if module.lost_calls:
        message = (
            f"{module.lost_calls} calls that were given up on are still inside "
            f"{module.path}, so it cannot be initialised anew: only a new process can "
            "help"
        )
        raise TokenUnavailable(message)
