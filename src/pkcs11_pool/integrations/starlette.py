"""Starlette: the pool is opened at start-up and closed at shutdown.

``docs/how-to/starlette.md`` shows it at work.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from pkcs11 import PKCS11Error

from pkcs11_pool import PoolError, TokenPool
from pkcs11_pool.integrations import extras
from pkcs11_pool.integrations.lifespan import NAME, not_running, open_pool
from pkcs11_pool.integrations.problems import problem_of

try:
    from starlette.requests import (  # noqa: TC002  # FastAPI reads the annotations
        HTTPConnection,
        Request,
    )
    from starlette.responses import Response
except ModuleNotFoundError as error:
    raise extras.missing("starlette", error) from error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from starlette.applications import Starlette


def lifespan(
    make: Callable[[], TokenPool],
) -> Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """A lifespan for an application. For one of your own, see :func:`open_pool`."""

    @asynccontextmanager
    async def run(_app: Any) -> AsyncIterator[Mapping[str, Any]]:
        async with open_pool(make) as pool:
            yield {NAME: pool}

    return run


def get_pool(connection: HTTPConnection) -> TokenPool:
    """The pool, from a request or a websocket.

    Raises:
        PoolError: There is none: the lifespan did not run.
    """
    pool = getattr(connection.state, NAME, None)
    if not isinstance(pool, TokenPool):
        raise not_running()
    return pool


def handle_errors(app: Starlette) -> None:
    """Answer errors of the pool and the token as ``application/problem+json``."""
    app.add_exception_handler(PoolError, _answer)
    app.add_exception_handler(PKCS11Error, _answer)


def _answer(_request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    return Response(problem.body, int(problem.status), problem.headers)
