"""python-pkcs11 by hand, the way an async service calls it without a pool.

    python by_hand.py MODULE TOKEN-LABEL KEY-PREFIX lock|os-locks asyncio|trio

Each operation opens a session, looks its key up and uses it, on a thread of AnyIO's.
One session stays open all the time and holds the login.

lock: the module is initialised as python-pkcs11 does it, for one thread, so that one
lock around each operation is the only safe form. os-locks: the module is told that
several threads will call, which python-pkcs11 cannot do by itself; eight at most.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread
import pkcs11
from pkcs11 import Mechanism, ObjectClass

from pkcs11_pool.bench import turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pkcs11_pool.bench.turns import Request

CKF_OS_LOCKING_OK: Final = 2
MECHANISMS: Final = {
    "p256": Mechanism.ECDSA,
    "rsa2048": Mechanism.SHA256_RSA_PKCS,
}


class InitializeArgs(ctypes.Structure):
    """``CK_C_INITIALIZE_ARGS``: four functions, flags, and a reserved pointer."""

    _fields_ = (
        ("functions", ctypes.c_void_p * 4),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_void_p),
    )


class ByHand:
    """A token, and how one operation is made on it."""

    def __init__(self, module: str, label: str, prefix: str, *, os_locks: bool) -> None:
        self.library = pkcs11.lib(module)
        if os_locks:
            self.library.finalize()
            arguments = InitializeArgs(flags=CKF_OS_LOCKING_OK)
            real = initialize_of(module)
            if code := real(ctypes.byref(arguments)):
                raise RuntimeError(f"C_Initialize answered {code:#x}")
        self.token = self.library.get_token(token_label=label)
        self.prefix = prefix
        self.guard: contextlib.AbstractContextManager[object] = (
            contextlib.nullcontext() if os_locks else threading.Lock()
        )
        self.threads = 8 if os_locks else None

    def sign(self, name: str) -> bytes:
        """One signature."""
        with self.guard, self.token.open() as session:
            key: Any = session.get_key(
                object_class=ObjectClass.PRIVATE_KEY, label=f"{self.prefix}-{name}"
            )
            signature: bytes = key.sign(turns.DIGEST, mechanism=MECHANISMS[name])
            return signature

    async def take(self, request: Request) -> str:
        """Take one turn."""
        limiter = anyio.CapacityLimiter(self.threads) if self.threads else None

        async def operation() -> bytes:
            return await anyio.to_thread.run_sync(
                self.sign, request.operation, limiter=limiter
            )

        return await turns.take(request, operation)


def initialize_of(module: str) -> Callable[..., int]:
    """``C_Initialize`` by way of the function list: the second entry of it."""
    library = ctypes.CDLL(module)
    found = ctypes.c_void_p()
    library.C_GetFunctionList(ctypes.byref(found))
    assert found.value is not None
    entry = found.value + ctypes.sizeof(ctypes.c_void_p)
    address = ctypes.c_void_p.from_address(entry).value
    assert address is not None
    real: Callable[..., int] = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(
        address
    )
    return real


def main(words: Sequence[str]) -> int:
    """Take turns until standard input ends."""
    module, label, prefix, how, backend = words
    pin = sys.stdin.readline().rstrip("\n")
    hand = ByHand(module, label, prefix, os_locks=how == "os-locks")
    login = hand.token.open(user_pin=pin)
    for request in turns.requests():
        try:
            answer = anyio.run(hand.take, request, **turns.BACKENDS[backend])
        except Exception as error:  # noqa: BLE001  # the answer says it
            turns.tell(json.dumps({"error": repr(error)}))
            return 1
        turns.tell(answer)
    login.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
