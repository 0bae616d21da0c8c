"""The pool as a client of the benchmark, on one event loop.

    python -m pkcs11_pool.bench.client MODULE TOKEN-LABEL KEY-PREFIX BACKEND [SESSIONS]

The first line on standard input is the PIN, each further line a turn.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import anyio
from pkcs11 import Mechanism

from pkcs11_pool.bench import turns
from pkcs11_pool.faces.pool import TokenPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pkcs11_pool.bench.turns import Operation, Request


async def operation_of(pool: TokenPool, prefix: str, name: str) -> Operation:
    """The operation of that name, ready to be called."""
    if name == "digest":
        return lambda: pool.digest(turns.PAYLOAD, mechanism=Mechanism.SHA256)
    if name == "random":
        return lambda: pool.generate_random(turns.RANDOM_BITS)
    key = pool.key(label=f"{prefix}-{'p256' if name == 'verify' else name}")
    if name == "aes":
        return lambda: key.encrypt(
            turns.PAYLOAD, mechanism=Mechanism.AES_CBC_PAD, mechanism_param=turns.IV
        )
    if name == "verify":
        signature = await key.sign(turns.DIGEST, mechanism=Mechanism.ECDSA)

        async def verify() -> bytes:
            right = await key.verify(turns.DIGEST, signature, mechanism=Mechanism.ECDSA)
            return b"\x01" if right else b"\x00"

        return verify
    data, mechanism = {
        "p256": (turns.DIGEST, Mechanism.ECDSA),
        "rsa2048": (turns.DIGEST, Mechanism.SHA256_RSA_PKCS),
        "hmac": (turns.PAYLOAD, Mechanism.SHA256_HMAC),
    }[name]
    return lambda: key.sign(data, mechanism=mechanism)


async def turn(request: Request, options: dict[str, Any], prefix: str) -> str:
    """Take one turn, in a pool of its own: its size depends on the callers."""
    async with TokenPool(**options) as pool:
        operation = await operation_of(pool, prefix, request.operation)
        # The key is found once, as by every client that remembers its handle. On a
        # full token that takes longer than the warm-up.
        await operation()
        return await turns.take(request, operation)


def main(words: Sequence[str]) -> int:
    """Take turns until standard input ends."""
    module, label, prefix, backend, *sessions = words
    pin = sys.stdin.readline().rstrip("\n") or None
    options: dict[str, Any] = {"module": module, "token_label": label, "pin": pin}
    for request in turns.requests():
        size = int(sessions[0]) if sessions else 2 * request.callers
        options["max_sessions"] = size
        try:
            answer = anyio.run(
                turn, request, options, prefix, **turns.BACKENDS[backend]
            )
        except Exception as error:  # noqa: BLE001  # the answer says it
            turns.tell(json.dumps({"error": f"{type(error).__name__}: {error}"}))
            return 1
        turns.tell(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
