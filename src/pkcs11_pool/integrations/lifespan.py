"""A pool that is opened when an application starts and closed when it stops.

What the web frameworks have in common; each has a few lines of its own beside it.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from pkcs11_pool import InvalidType, PoolError, TokenPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

NAME: Final = "pkcs11_pool"
"""Where the pool is kept in an application's state."""


@asynccontextmanager
async def open_pool(make: Callable[[], TokenPool]) -> AsyncIterator[TokenPool]:
    """A pool for the life of an application.

    Args:
        make: Makes the pool. It is called at each start: a pool is opened once, while
            an application may start several times, as in tests.

    Raises:
        InvalidType: ``make`` is not callable, or does not make a pool.
        PoolError: It does not open; see :meth:`TokenPool.open`. A note on the error
            says that the application does not start for it.
    """
    pool = make() if callable(make) else None
    if not isinstance(pool, TokenPool):
        message = "give a callable that makes a TokenPool: lambda: TokenPool(...)"
        raise InvalidType(message)
    try:
        await pool.open()
    except PoolError as error:
        error.add_note(f"the application does not start without the pool {pool.name!r}")
        raise
    try:
        yield pool
    finally:
        await pool.close()


def not_running() -> PoolError:
    """The error for a handler that asks for the pool of no running application."""
    return PoolError(
        "there is no pool: the application's lifespan did not run (a test client must "
        "be entered, a server must have lifespan on), or it was not given to the "
        "application"
    )
