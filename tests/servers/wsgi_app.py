"""A WSGI application whose workers are forked after it was loaded (``--preload``).

With ``TEST_OPEN=early`` the pool is opened before the fork, which is the mistake.
"""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

import anyio
from pkcs11 import Mechanism

from pkcs11_pool import ForkedProcess, PoolState, TokenPool

if TYPE_CHECKING:
    from collections.abc import Callable

pool = TokenPool(
    os.environ["TEST_MODULE"],
    token_label=os.environ["TEST_TOKEN"],
    pin=lambda: os.environ["TEST_PIN"],
)
_opening = threading.Lock()

if os.environ.get("TEST_OPEN") == "early":
    anyio.run(pool.open)


def _answer(data: bytes) -> dict[str, Any]:
    with _opening:
        if pool.state is PoolState.NEW:
            anyio.run(pool.open)
    try:
        signature = pool.key(label="signer").sync.sign(
            data, mechanism=Mechanism.ECDSA, signature_format="der"
        )
    except ForkedProcess as error:
        return {"pid": os.getpid(), "refused": str(error)}
    return {"pid": os.getpid(), "signature": signature.hex()}


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
    """Sign the body."""
    data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(_answer(data)).encode()]
