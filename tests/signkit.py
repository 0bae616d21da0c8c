"""Tokens with keys of each kind, for what signs with them.

Making keys takes longer than using them: one token with keys serves a whole file, and
each test opens a pool of its own on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import subprocess
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, KeyType, MechanismFlag

from pkcs11_pool import TokenPool, softhsm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken

T = TypeVar("T")

MANY = 200
"""How many signatures are asked for at once."""

_EC = {
    "p256": "secp256r1",
    "p384": "secp384r1",
    "p521": "secp521r1",
    "k256": "secp256k1",
}
_CURVES = MechanismFlag.SIGN | MechanismFlag.VERIFY | MechanismFlag.DERIVE


@contextlib.contextmanager
def token_with(
    soft_hsm: SoftHSM, parent: Path, keys: Iterable[str]
) -> Iterator[ThrowawayToken]:
    """A token with these keys, each by its label: rsa, p256, ed25519, aes."""
    with softhsm.token_directory(parent, softhsm=soft_hsm) as directory:
        token = directory.add_token("demo")
        asyncio.run(_make_keys(token, keys))
        yield token


def pool_on(token: ThrowawayToken, **options: Any) -> TokenPool:
    """A pool on the token, logged in when it is opened."""
    return TokenPool(
        token.module, token_label=token.label, pin=token.user_pin, **options
    )


async def _make_keys(token: ThrowawayToken, keys: Iterable[str]) -> None:
    async with pool_on(token) as pool:
        for name in keys:
            await make_key(pool, name)


async def make_key(pool: TokenPool, name: str) -> None:
    """One key, or pair of keys, with its name as label."""
    kept: dict[str, Any] = {"label": name, "id": name.encode(), "store": True}
    if name.startswith("rsa"):
        await pool.generate_keypair(KeyType.RSA, int(name[3:] or 2048), **kept)
    elif name in _EC:
        kept["capabilities"] = _CURVES
        await pool.generate_keypair(KeyType.EC, curve=_EC[name], **kept)
    elif name.startswith("ed"):
        await pool.generate_keypair(KeyType.EC_EDWARDS, curve=name, **kept)
    elif name == "hmac":
        kept["template"] = {Attribute.SIGN: True, Attribute.VERIFY: True}
        await pool.generate_key(KeyType.GENERIC_SECRET, 256, **kept)
    else:
        await pool.generate_key(KeyType.AES, 256, **kept)


@contextlib.contextmanager
def opened(token: ThrowawayToken, **options: Any) -> Iterator[TokenPool]:
    """An open pool for a test without an event loop."""
    pool = pool_on(token, **options)
    asyncio.run(pool.open())
    try:
        yield pool
    finally:
        asyncio.run(pool.close())


async def public_key(pool: TokenPool, label: str) -> Any:
    """The public key of a pair, as ``cryptography`` has it."""
    return load_der_public_key(await pool.key(label=label).public_key_der())


async def in_threads(work: Callable[[int], T], count: int = MANY) -> list[T]:
    """Call a function that blocks, many times at once: each on a thread of its own."""
    results: dict[int, T] = {}
    limiter = anyio.CapacityLimiter(count)

    async def one(number: int) -> None:
        call = functools.partial(work, number)
        results[number] = await anyio.to_thread.run_sync(call, limiter=limiter)

    async with anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(one, number)
    return [results[number] for number in range(count)]


async def at_once(work: Callable[[int], Any], count: int = MANY) -> list[Any]:
    """Await an async function many times at once."""
    results: dict[int, Any] = {}

    async def one(number: int) -> None:
        results[number] = await work(number)

    async with anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(one, number)
    return [results[number] for number in range(count)]


def imported_without(module: str, missing: str) -> str:
    """What importing a Python module says when what it stands on is not there."""
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "try:\n"
        f"    import {module}\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
