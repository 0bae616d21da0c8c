"""A call that blocks, made aside on a thread of its own, and waited for to its end.

Not by ``anyio.to_thread``: asyncio's own ``Task.cancel()`` would leave it, and nobody
would know what became of the call.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pkcs11_pool.faces.waiting import checkpoint, current_waiter
from pkcs11_pool.jobs import Job, Kind, Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.engine.token_engine import TokenEngine

T = TypeVar("T")


class _NoEngine:
    """Stands in for the engine, where there is none."""

    def cancel(self, job: Job) -> bool:
        """Its caller may go when it is done, and not before."""
        return job.phase is Phase.SETTLED

    def forget(self, job: Job) -> None:
        """The thread comes to its end by itself."""


async def aside(func: Callable[..., T], *arguments: Any) -> T:
    """Call ``func`` on a thread; its result, through every cancellation."""
    await checkpoint()
    waiter = current_waiter()
    job = Job(None, Kind.ACTOR, waiter=waiter, deadline=None, changes=True)

    def work() -> None:
        try:
            job.result = func(*arguments)
        except BaseException as error:  # noqa: BLE001  # raised again at the caller
            job.error = error
        job.phase = Phase.SETTLED
        waiter.wake()

    job.phase = Phase.RUNNING
    threading.Thread(target=work, name="pkcs11-pool aside", daemon=True).start()
    result: T = await waiter.result(cast("TokenEngine", _NoEngine()), job)
    return result
