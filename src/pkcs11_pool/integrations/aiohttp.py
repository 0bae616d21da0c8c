"""aiohttp: the pool in the application, opened at start-up, closed at clean-up.

``docs/how-to/aiohttp.md`` shows it at work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pkcs11 import PKCS11Error

from pkcs11_pool import PoolError, TokenPool
from pkcs11_pool.integrations import extras
from pkcs11_pool.integrations.lifespan import NAME, open_pool
from pkcs11_pool.integrations.problems import problem_of

try:
    from aiohttp import web
except ModuleNotFoundError as error:
    raise extras.missing("aiohttp", error) from error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiohttp.typedefs import Handler

POOL: Final = web.AppKey(NAME, TokenPool)
"""``request.app[POOL]``; in a sub-application ``request.config_dict[POOL]``."""


def pool_context(
    make: Callable[[], TokenPool],
) -> Callable[[web.Application], AsyncIterator[None]]:
    """For ``app.cleanup_ctx``; ``make`` is called at each start."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        async with open_pool(make) as pool:
            app[POOL] = pool
            yield

    return context


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer errors of the pool and the token as ``application/problem+json``."""
    try:
        return await handler(request)
    except (PoolError, PKCS11Error) as error:
        problem = problem_of(error)
        return web.Response(
            body=problem.body, status=int(problem.status), headers=problem.headers
        )
