"""Quart: the pool of the current application.

``docs/how-to/quart.md`` shows it at work.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from pkcs11 import PKCS11Error

from pkcs11_pool import PoolError, TokenPool
from pkcs11_pool.integrations import extras
from pkcs11_pool.integrations.lifespan import NAME, not_running, open_pool
from pkcs11_pool.integrations.problems import problem_of

try:
    from quart import Quart, Response, current_app
except ModuleNotFoundError as error:
    raise extras.missing("quart", error) from error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def install(app: Quart, make: Callable[[], TokenPool]) -> None:
    """Open a pool while the application serves, and answer its errors.

    Args:
        app: The application.
        make: Makes the pool; called at each start.
    """
    # Not `while_serving`: its generator serves for one start of the application.
    stack = AsyncExitStack()

    @app.before_serving
    async def start() -> None:
        app.extensions[NAME] = await stack.enter_async_context(open_pool(make))

    @app.after_serving
    async def stop() -> None:
        app.extensions.pop(NAME, None)
        await stack.aclose()

    app.register_error_handler(PoolError, _answer)
    app.register_error_handler(PKCS11Error, _answer)


def mount_status(app: Quart, path: str, status: Callable[..., Awaitable[None]]) -> None:
    """Serve the status app below a path.

    Args:
        app: The application that has the pool.
        path: Where, ``"/pools"``.
        status: A :class:`~pkcs11_pool.asgi.StatusApp`.
    """
    root, others = path.rstrip("/"), app.asgi_app

    async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and f"{scope['path']}/".startswith(f"{root}/"):
            pool = app.extensions.get(NAME)
            state = {} if pool is None else {NAME: pool}
            own = {**scope, "root_path": root, "state": state}
            await status(own, receive, send)
        else:
            await others(scope, receive, send)

    app.asgi_app = asgi_app  # type: ignore[method-assign]  # as Quart has it


def current_pool() -> TokenPool:
    """The pool of the application that handles this request.

    Raises:
        PoolError: There is none: the application does not serve.
    """
    pool = current_app.extensions.get(NAME)
    if not isinstance(pool, TokenPool):
        raise not_running()
    return pool


def _answer(error: Exception) -> Response:
    problem = problem_of(error)
    return Response(problem.body, int(problem.status), problem.headers)
