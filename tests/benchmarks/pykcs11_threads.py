"""PyKCS11 on AnyIO's threads: a fresh session for each operation, a remembered handle.

    python pykcs11_threads.py MODULE TOKEN-LABEL KEY-PREFIX asyncio|trio

PyKCS11 initialises the module for several threads by itself.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread
import PyKCS11
from PyKCS11 import LowLevel

from pkcs11_pool.bench import turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pkcs11_pool.bench.turns import Request

MECHANISMS: Final = {
    "p256": LowLevel.CKM_ECDSA,
    "rsa2048": LowLevel.CKM_SHA256_RSA_PKCS,
}


class Token:
    """A token, and how one operation is made on it."""

    def __init__(self, module: str, label: str, prefix: str, pin: str) -> None:
        self.library = PyKCS11.PyKCS11Lib()
        self.library.load(module)
        self.slot = next(
            slot
            for slot in self.library.getSlotList(tokenPresent=True)
            if self.library.getTokenInfo(slot).label.strip() == label
        )
        self.prefix = prefix
        self.session = self.library.openSession(self.slot)
        self.session.login(pin)
        self.keys: dict[str, Any] = {}

    def key(self, name: str) -> Any:
        """The handle of a private key, found once."""
        if name not in self.keys:
            self.keys[name] = self.session.findObjects(
                [
                    (LowLevel.CKA_CLASS, LowLevel.CKO_PRIVATE_KEY),
                    (LowLevel.CKA_LABEL, f"{self.prefix}-{name}"),
                ]
            )[0]
        return self.keys[name]

    def sign(self, name: str) -> bytes:
        """One signature."""
        session = self.library.openSession(self.slot)
        try:
            how = PyKCS11.Mechanism(MECHANISMS[name], None)
            return bytes(session.sign(self.key(name), turns.DIGEST, how))
        finally:
            session.closeSession()

    async def take(self, request: Request) -> str:
        """Take one turn."""
        self.key(request.operation)

        async def operation() -> bytes:
            return await anyio.to_thread.run_sync(self.sign, request.operation)

        return await turns.take(request, operation)


def main(words: Sequence[str]) -> int:
    """Take turns until standard input ends."""
    module, label, prefix, backend = words
    token = Token(module, label, prefix, sys.stdin.readline().rstrip("\n"))
    for request in turns.requests():
        try:
            answer = anyio.run(token.take, request, **turns.BACKENDS[backend])
        except Exception as error:  # noqa: BLE001  # the answer says it
            turns.tell(json.dumps({"error": repr(error)}))
            return 1
        turns.tell(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
