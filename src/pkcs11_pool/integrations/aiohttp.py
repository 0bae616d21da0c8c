"""aiohttp: the pool in the application, opened at start-up, closed at clean-up.

``docs/how-to/aiohttp.md`` shows it at work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

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
    from collections.abc import AsyncIterator, Awaitable, Callable

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


def mount_status(
    app: web.Application, path: str, status: Callable[..., Awaitable[None]]
) -> None:
    """Serve the status app, which is one of ASGI, below a path.

    Args:
        app: The application that has the pool, or a part of it.
        path: Where, ``"/pools"``.
        status: A :class:`~pkcs11_pool.asgi.StatusApp`.
    """
    root = path.rstrip("/")

    async def answer(request: web.Request) -> web.Response:
        return await _asked(request, status)

    for below in (root, f"{root}/{{below:.*}}"):
        app.router.add_route("*", below, answer)


async def _asked(
    request: web.Request, status: Callable[..., Awaitable[None]]
) -> web.Response:
    """The answer of an ASGI application that reads no body and sends one at once."""
    sent: dict[str, Any] = {}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: dict[str, Any]) -> None:
        sent.update(message)

    pool = request.config_dict.get(POOL)
    below = request.match_info.get("below", "")
    scope = {
        "type": "http",
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        # All that is before it: in a sub-application more than `path`.
        "root_path": request.path.removesuffix(below).rstrip("/"),
        "query_string": request.query_string.encode(),
        "headers": [(name.lower(), value) for name, value in request.raw_headers],
        "client": (request.remote, 0),
        "state": {} if pool is None else {NAME: pool},
    }
    await status(scope, receive, send)
    headers = [(name.decode(), value.decode()) for name, value in sent["headers"]]
    return web.Response(body=sent["body"], status=sent["status"], headers=headers)


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
