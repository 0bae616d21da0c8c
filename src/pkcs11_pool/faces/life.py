"""The life of a pool as its caller sees it: opened once, closed whatever comes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pkcs11_pool import events
from pkcs11_pool.engine import end_of_process
from pkcs11_pool.errors import PoolClosed, PoolTimeout
from pkcs11_pool.faces.requests import request
from pkcs11_pool.faces.waiting import checkpoint
from pkcs11_pool.state import PoolState

if TYPE_CHECKING:
    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.jobs import Job


async def open_pool(engine: TokenEngine) -> None:
    """Start the actor, and have it open the pool; what fails is closed again."""
    engine.home.check()
    await checkpoint()
    if not engine.start_here():
        message = (
            f"this pool is {engine.state.value}, and a pool is opened once: use "
            "it as it is, or make a new TokenPool"
        )
        raise PoolClosed(message)
    engine.actor.start()
    end_of_process.watch(engine)
    try:
        await request(engine, engine.actor.open, engine.options.open_timeout)
    except BaseException:
        await _shut(engine, grace=0.0)
        raise
    engine.opened()
    events.info(events.POOL_OPENED, token=str(engine.actor.info))


async def close_pool(engine: TokenEngine) -> None:
    """Close it, in whichever state it is."""
    engine.home.check()
    if engine.state is PoolState.NEW:
        engine.become(PoolState.CLOSED)
    elif engine.state is not PoolState.CLOSED:
        await _shut(engine, grace=engine.options.close_timeout)


async def _shut(engine: TokenEngine, grace: float) -> None:
    first = engine.become(PoolState.CLOSING)
    if first:
        engine.refuse_waiting()
    limit = grace + 2 * engine.options.close_timeout

    def post(job: Job) -> None:
        engine.actor.close(job, time.monotonic() + grace)

    try:
        await request(engine, post, limit, stays=True)
    except PoolClosed:
        # Another task closed it meanwhile.
        return
    except PoolTimeout:
        # The actor itself hangs in the module; its thread is a daemon.
        events.warning(events.POOL_FAILED, name=engine.options.name)
    finally:
        if engine.become(PoolState.CLOSED):
            events.info(events.POOL_CLOSED, name=engine.options.name)
