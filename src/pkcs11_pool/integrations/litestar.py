"""Litestar: a plugin that opens the pool, gives it to handlers, and answers errors.

``docs/how-to/litestar.md`` shows it at work.
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
    from litestar.datastructures import State  # noqa: TC002  # Litestar reads it
    from litestar.di import NamedDependency, Provide
    from litestar.plugins import InitPlugin
    from litestar.response import Response
except ModuleNotFoundError as error:
    raise extras.missing("litestar", error) from error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from litestar import Litestar, Request
    from litestar.config.app import AppConfig

Pool = NamedDependency[TokenPool]
"""The type of a parameter that is the pool."""


class PoolPlugin(InitPlugin):
    """Opens a pool at start-up and closes it at shutdown.

    Args:
        make: Makes the pool; called at each start.
        dependency: The name of the parameter by which handlers get it.
    """

    def __init__(
        self, make: Callable[[], TokenPool], *, dependency: str = "pool"
    ) -> None:
        self._make = make
        self._dependency = dependency

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Add the pool to an application."""
        app_config.lifespan.append(self._lifespan)
        provide = Provide(get_pool, sync_to_thread=False)
        app_config.dependencies[self._dependency] = provide
        app_config.exception_handlers[PoolError] = _answer
        app_config.exception_handlers[PKCS11Error] = _answer
        return app_config

    @asynccontextmanager
    async def _lifespan(self, app: Litestar) -> AsyncIterator[None]:
        async with open_pool(self._make) as pool:
            app.state[NAME] = pool
            yield


def get_pool(state: State) -> TokenPool:
    """The pool of an application, from its state.

    Raises:
        PoolError: There is none: the lifespan did not run.
    """
    pool = state.get(NAME)
    if not isinstance(pool, TokenPool):
        raise not_running()
    return pool


def _answer(_request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    problem = problem_of(error)
    headers = problem.headers
    media_type = headers.pop("Content-Type")
    return Response(
        problem.body,
        status_code=int(problem.status),
        headers=headers,
        media_type=media_type,
    )
