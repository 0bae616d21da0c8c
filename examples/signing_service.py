"""A signing service on FastAPI: sign, verify, JWKS, health, metrics, a status page.

    uvicorn --factory signing_service:from_environment

takes PKCS11_MODULE, PKCS11_TOKEN, PKCS11_PIN, and OPS_PASSWORD for the status page.
Run by itself it serves a throwaway SoftHSM2 token on port 8000.
"""

import asyncio
import hashlib
import os
import sys
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from pkcs11 import KeyType, Mechanism
from pydantic import BaseModel, ConfigDict, Field

from pkcs11_pool import TokenPool, pins, softhsm
from pkcs11_pool.asgi import BasicAuth, StatusApp
from pkcs11_pool.integrations.fastapi import Pool, handle_errors, open_pool
from pkcs11_pool.integrations.jose import JWSSigner, jwks, load_signer
from pkcs11_pool.integrations.lifespan import NAME

LABEL = "signer"
ES256_BYTES = 64


class Payload(BaseModel):
    """What to sign."""

    model_config = ConfigDict(extra="forbid")
    payload: str = Field(max_length=65_536, description="Text; signed as UTF-8")


class Signed(BaseModel):
    """A JWS in the compact form (RFC 7515)."""

    model_config = ConfigDict(extra="forbid")
    jws: str = Field(max_length=200_000)


class Verdict(BaseModel):
    """Whether a JWS is one of this service's."""

    valid: bool


class Problem(BaseModel):
    """What went wrong (RFC 9457); ``code`` is the class of the pool's error."""

    type: str
    title: str
    status: int
    detail: str
    code: str


PROBLEM: Any = {"application/problem+json": {"schema": Problem.model_json_schema()}}
PROBLEMS: Any = {
    400: {"description": "The body cannot be read, or the token does not take it"},
    502: {"description": "The token failed", "content": PROBLEM},
    503: {"description": "Busy, or the token is down", "content": PROBLEM},
    504: {"description": "The token did not answer in time", "content": PROBLEM},
}


def the_signer(request: Request) -> JWSSigner:
    """The signer that start-up has loaded, as a dependency."""
    signer: JWSSigner = request.state.signer
    return signer


Signer = Annotated[JWSSigner, Depends(the_signer)]


async def sign(body: Payload, signer: Signer) -> Signed:
    """Sign a text with ES256."""
    return Signed(jws=await signer.sign(body.payload))


async def verify(body: Signed, pool: Pool) -> Verdict:
    """Check a JWS with the public key on the token."""
    content, _, last = body.jws.rpartition(".")
    try:
        signature = urlsafe_b64decode(last + "=" * (-len(last) % 4))
    except ValueError:
        return Verdict(valid=False)
    if len(signature) != ES256_BYTES or not content.isascii():
        return Verdict(valid=False)
    digest = hashlib.sha256(content.encode()).digest()
    key = pool.key(label=LABEL)
    good = await key.verify(digest, signature, mechanism=Mechanism.ECDSA)
    return Verdict(valid=good)


async def key_set(signer: Signer) -> dict[str, Any]:
    """The public keys (RFC 7517)."""
    return jwks([signer])


def create_app(make: Callable[[], TokenPool], status: StatusApp) -> FastAPI:
    """The service on a pool of its own, with the status app below ``/pools``."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with open_pool(make) as pool:
            signer = await load_signer(pool.key(label=LABEL), "ES256")
            yield {NAME: pool, "signer": signer}

    app = FastAPI(title="Signing service", version="1", lifespan=lifespan)
    handle_errors(app)
    app.post("/sign", responses=PROBLEMS)(sign)
    app.post("/verify", responses=PROBLEMS)(verify)
    app.get("/.well-known/jwks.json")(key_set)
    app.mount("/pools", status)
    return app


def from_environment() -> FastAPI:
    """The service on the token that the environment names."""

    def make() -> TokenPool:
        return TokenPool(
            os.environ["PKCS11_MODULE"],
            token_label=os.environ["PKCS11_TOKEN"],
            pin=pins.env("PKCS11_PIN"),
            timeout=5.0,  # no request waits longer for the token
            max_waiting=1_000,  # and no queue grows longer
        )

    guard = BasicAuth("ops", os.environ["OPS_PASSWORD"])
    return create_app(make, StatusApp(guard=guard, allowed_hosts=["*"]))


async def make_key(token: softhsm.ThrowawayToken) -> None:
    """Make the key pair that the service signs with."""
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", label=LABEL, store=True
        )


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    with softhsm.throwaway_token() as throwaway:
        asyncio.run(make_key(throwaway))
        service = create_app(
            lambda: TokenPool(
                throwaway.module, token_label=throwaway.label, pin="1234"
            ),
            StatusApp(allow_anonymous=True),
        )
        print(f"http://localhost:{port}/docs and http://localhost:{port}/pools/")
        uvicorn.run(service, port=port, log_level="warning")
