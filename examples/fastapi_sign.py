"""A web service that signs: the pool opens and closes with the application.

In production: ``uvicorn fastapi_sign:app``, with the three variables set.
"""

import asyncio
import os
from typing import Any

import httpx
from fastapi import FastAPI, Request
from pkcs11 import KeyType, Mechanism

from pkcs11_pool import TokenPool, pins, softhsm
from pkcs11_pool.asgi import StatusApp
from pkcs11_pool.integrations.fastapi import Pool, handle_errors, lifespan


def make_pool() -> TokenPool:
    """Called at each start: a pool is opened once."""
    return TokenPool(
        os.environ["MODULE"],
        token_label=os.environ["TOKEN"],
        pin=pins.env("PIN"),
        timeout=5.0,  # a request waits no longer
        max_waiting=1_000,  # and no queue grows longer
    )


app = FastAPI(lifespan=lifespan(make_pool))
handle_errors(app)  # as problems in JSON
# For operators and probes; where not everybody may look, give guard= instead.
app.mount("/pools", StatusApp(allow_anonymous=True))


@app.post("/sign/{label}")
async def sign(label: str, request: Request, pool: Pool) -> dict[str, str]:
    """Sign the body with the key that has this label."""
    data = await request.body()
    key, how = pool.key(label=label), Mechanism.SHA256_RSA_PKCS
    return {"signature": (await key.sign(data, mechanism=how)).hex()}


# -- Tried in this process, on a throwaway token --------------------------------------


async def main() -> None:
    """Make a key, start the application, and ask it three things."""
    async with make_pool() as pool:
        await pool.generate_keypair(KeyType.RSA, 2048, label="signer", store=True)
    async with app.router.lifespan_context(app) as state:

        async def server(scope: Any, receive: Any, send: Any) -> None:
            # Each request has what the lifespan left.
            await app({**scope, "state": dict(state or {})}, receive, send)

        transport, url = httpx.ASGITransport(server), "http://localhost"
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            answer = (await client.post("/sign/signer", content=b"data")).json()
            print("sign", len(bytes.fromhex(answer["signature"])), "bytes")
            print("sign", (await client.post("/sign/stranger")).json()["detail"])
            print("ready?", (await client.get("/pools/readyz")).text.strip())


if __name__ == "__main__":
    with softhsm.throwaway_token() as token:
        found = {"MODULE": str(token.module), "TOKEN": token.label, "PIN": "1234"}
        os.environ.update(found)
        asyncio.run(main())
