"""What a caller asks of the login actor, and waits for: open, close, log in or out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pkcs11_pool.faces.waiting import current_waiter
from pkcs11_pool.jobs import Job, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.engine.token_engine import TokenEngine


async def request(
    engine: TokenEngine,
    post: Callable[[Job], None],
    limit: float | None,
    *,
    stays: bool = False,
) -> Any:
    """Ask, and wait for the answer.

    Args:
        engine: The one that the actor serves.
        post: The actor's method, that takes the job.
        limit: Seconds; None: as long as it takes.
        stays: It is done, and waited for, whatever comes.
    """
    engine.home.check()
    waiter = current_waiter()
    job = Job(
        None,
        Kind.ACTOR,
        waiter=waiter,
        deadline=None if limit is None else time.monotonic() + limit,
        stays=stays,
        holder=waiter.holder,
    )
    engine.request(job, post)
    return await waiter.result(engine, job)
