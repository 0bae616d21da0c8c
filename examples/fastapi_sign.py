"""A web service that signs: the pool opens and closes with the application.

In production: ``uvicorn fastapi_sign:app``, with the three variables set.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Annotated

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from pkcs11 import KeyType, Mechanism

from pkcs11_pool import KeyNotFound, TokenPool, pins, softhsm


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pool before the first request, close it after the last."""
    async with TokenPool(
        os.environ["MODULE"],
        token_label=os.environ["TOKEN"],
        pin=pins.env("PIN"),
        timeout=5.0,  # a request waits no longer
    ) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan)


def the_pool(request: Request) -> TokenPool:
    """The pool, as a dependency."""
    pool: TokenPool = request.app.state.pool
    return pool


Pool = Annotated[TokenPool, Depends(the_pool)]


@app.post("/sign/{label}")
async def sign(label: str, request: Request, pool: Pool) -> dict[str, str]:
    """Sign the body with the key that has this label."""
    try:
        signature = await pool.key(label=label).sign(
            await request.body(), mechanism=Mechanism.SHA256_RSA_PKCS
        )
    except KeyNotFound as error:
        raise HTTPException(404, f"no key {label!r}") from error
    return {"key": label, "signature": signature.hex()}


async def main() -> None:
    """Ask it three things, in this process."""
    transport, url = httpx.ASGITransport(app), "http://test"
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=url) as client,
    ):
        pool: TokenPool = app.state.pool
        await pool.generate_keypair(KeyType.RSA, 2048, label="signer", store=True)
        answer = (await client.post("/sign/signer", content=b"data")).json()
        print("sign", len(bytes.fromhex(answer["signature"])), "bytes")
        print("sign", (await client.post("/sign/stranger")).json())


if __name__ == "__main__":
    with softhsm.throwaway_token() as token:
        found = {"MODULE": str(token.module), "TOKEN": token.label, "PIN": "1234"}
        os.environ.update(found)
        asyncio.run(main())
