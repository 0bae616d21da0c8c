"""FastAPI: the pool as a dependency.

``docs/how-to/fastapi.md`` shows it at work.
"""

from __future__ import annotations

from typing import Annotated

from pkcs11_pool import TokenPool
from pkcs11_pool.integrations import extras
from pkcs11_pool.integrations.lifespan import open_pool
from pkcs11_pool.integrations.starlette import get_pool, handle_errors, lifespan

try:
    from fastapi import Depends
except ModuleNotFoundError as error:
    raise extras.missing("fastapi", error) from error

__all__ = ["Pool", "get_pool", "handle_errors", "lifespan", "open_pool"]

Pool = Annotated[TokenPool, Depends(get_pool)]
"""The type of a parameter that is the pool."""
