"""The end of the process: pools that were left open are closed, in a moment or not.

Some modules keep what a process held that ended without ``C_Finalize``. A call that is
inside then is given up on, and with it inside nothing is finalised: the end of the
process waits for no token.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from typing import TYPE_CHECKING, Final

from pkcs11_pool.jobs import Job, Kind
from pkcs11_pool.state import PoolState

if TYPE_CHECKING:
    from pkcs11_pool.engine.token_engine import TokenEngine

_GRACE: Final = 0.2
"""Seconds for what is inside: a session that is just closed behind its caller."""
_MOST: Final = 2.0
"""Seconds for all pools together: a module may hang in ``C_Finalize``, too."""

_started: weakref.WeakSet[TokenEngine] = weakref.WeakSet()


class _Waits:
    """The thread that ends the process."""

    def __init__(self) -> None:
        self._done = threading.Event()

    def wake(self) -> bool:
        self._done.set()
        return True

    def wait(self, until: float) -> None:
        self._done.wait(max(0.0, until - time.monotonic()))


def watch(engine: TokenEngine) -> None:
    """Have it closed at the end of the process, if nobody has done so by then."""
    _started.add(engine)


@atexit.register
def _close_all() -> None:
    now = time.monotonic()
    # By the actors' threads: none can be started any more, and one may hang.
    for waiter in [_close(engine, now + _GRACE) for engine in list(_started)]:
        waiter.wait(now + _MOST)


def _close(engine: TokenEngine, deadline: float) -> _Waits:
    """Begin to close it; who must be waited for."""
    waiter = _Waits()
    # In a forked child it is the parent's, and even its lock may be held for ever.
    if engine.home.is_forked or not engine.become(PoolState.CLOSING):
        waiter.wake()
        return waiter
    engine.refuse_waiting()
    job = Job(None, Kind.ACTOR, waiter=waiter, deadline=None, stays=True)
    engine.request(job, lambda job: engine.actor.close(job, deadline))
    return waiter
