"""Sessions and logins, told while they happen on the token.

Each line is told after the token has shown it, and says whether it was as it should
be. It may know the pool. What it tells goes to whoever called it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from pkcs11 import KeyType, Mechanism

from pkcs11_pool.demo.work import Bench, ecdsa, holds
from pkcs11_pool.errors import LoginRequired, SessionObjectDestroyed
from pkcs11_pool.state import SessionState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.faces.pooled_session import PooledSession

    Tell = Callable[[str, bool], None]

_MESSAGE: Final = b"used from another session"
_IV: Final = os.urandom(16)


async def session_objects(bench: Bench, tell: Tell) -> None:
    """Follow a session object from its making to its end."""
    pool = bench.pool
    async with pool.session() as other:
        async with pool.session() as owner:
            key = await owner.generate_key(KeyType.AES, 256)
            seen = await _found(owner, key)
            tell(f"Session {owner.handle} makes an AES key, a session object", seen)
            sealed = await _encrypt(key.on(other))
            opened = await key.on(owner).decrypt(
                sealed, mechanism=Mechanism.AES_CBC_PAD, mechanism_param=_IV
            )
            tell(
                f"Session {other.handle} encrypts with it, {owner.handle} decrypts",
                opened == _MESSAGE,
            )
            number = owner.handle
        seen = await _found(other, key)
        tell(f"Session {number} closes; {other.handle} cannot find its key", not seen)
        refused = await _refused(_encrypt(key.on(other)), SessionObjectDestroyed)
        tell("Using the key now raises SessionObjectDestroyed", refused)


async def login(bench: Bench, tell: Tell) -> None:
    """Log out and in again under the eyes of a session that stays open."""
    pool = bench.pool
    async with pool.session() as session:

        async def shows(what: str, state: SessionState) -> None:
            found = (await session.info()).state
            tell(
                f"{what}: session {session.handle} is CKS_{found.name}", found is state
            )

        await shows("The pool has logged in", SessionState.RO_USER_FUNCTIONS)
        await pool.logout()
        await shows("logout()", SessionState.RO_PUBLIC_SESSION)
        digest = bytes(32)
        refused = await _refused(
            bench.ec.sign(digest, mechanism=Mechanism.ECDSA), LoginRequired
        )
        tell("Signing now raises LoginRequired", refused)
        await pool.login()
        await shows("login()", SessionState.RO_USER_FUNCTIONS)
    proof = await ecdsa(bench, _at_once, b"signed after the login")
    tell("Signing works again; cryptography verifies the signature", holds(proof))


async def _at_once(operation: Awaitable[bytes]) -> bytes:
    return await operation


async def _encrypt(key: KeyRef) -> bytes:
    return await key.encrypt(
        _MESSAGE, mechanism=Mechanism.AES_CBC_PAD, mechanism_param=_IV
    )


async def _found(session: PooledSession, key: KeyRef) -> bool:
    return key in await session.find()


async def _refused(call: Awaitable[object], error: type[Exception]) -> bool:
    try:
        await call
    except error:
        return True
    return False
