"""An ASGI application with a pool of its own in each worker process."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from pkcs11 import Mechanism
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from pkcs11_pool import TokenPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

# Made when the module is loaded; does no I/O, so a fork after it is harmless.
pool = TokenPool(
    os.environ["TEST_MODULE"],
    token_label=os.environ["TEST_TOKEN"],
    pin=lambda: os.environ["TEST_PIN"],
)


@asynccontextmanager
async def _lifespan(_app: Starlette) -> AsyncIterator[None]:
    async with pool:
        yield


async def _sign(request: Request) -> JSONResponse:
    key = pool.key(label="signer")
    signature = await key.sign(
        await request.body(), mechanism=Mechanism.ECDSA, signature_format="der"
    )
    return JSONResponse({"pid": os.getpid(), "signature": signature.hex()})


app = Starlette(
    routes=[Route("/sign", _sign, methods=["POST"])],
    lifespan=_lifespan,
)
