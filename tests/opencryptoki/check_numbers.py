"""Objects and sessions whose numbers are given to the next one at once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import KeyType, Mechanism
from pkcs11.exceptions import PKCS11Error

from opencryptoki.ocktoken import MODULE, USER_PIN
from pkcs11_pool import KeyNotFound, SessionObjectDestroyed
from poolkit import blocking

if TYPE_CHECKING:
    from conftest import MakePool
    from pkcs11_pool import KeyRef, TokenPool

_DATA = b"data"
_INFO = bytes.fromhex("3031300d060960864801650304020105000420")
"""What PKCS#1 puts before a SHA-256 hash."""

# Another process destroys the key and makes one of another name in its place.
_REPLACE = """
import sys, anyio
from pkcs11 import KeyType, ObjectClass
from pkcs11_pool import TokenPool

async def main(module, pin):
    async with TokenPool(module, token_label="ock", pin=pin) as pool:
        for kind in ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY:
            await pool.key(label="first", object_class=kind).destroy()
        await pool.generate_keypair(KeyType.RSA, 1024, label="second", store=True)

anyio.run(main, *sys.argv[1:])
"""


async def _pair(pool: TokenPool, label: str) -> tuple[KeyRef, KeyRef]:
    pair: tuple[KeyRef, KeyRef] = await pool.generate_keypair(
        KeyType.RSA, 1024, label=label, store=True
    )
    return pair


async def _sign(key: KeyRef) -> bytes:
    digest = hashlib.sha256(_DATA).digest()
    return await key.sign(_INFO + digest, mechanism=Mechanism.RSA_PKCS)


async def _verify(public: KeyRef, signature: bytes) -> None:
    key: Any = load_der_public_key(await public.public_key_der())
    key.verify(signature, _DATA, PKCS1v15(), SHA256())


async def test_a_number_of_a_destroyed_key_signs_for_nobody(
    make_pool: MakePool,
) -> None:
    """The next key gets the number at once; the old name is not found any more."""
    async with make_pool() as pool:
        public, private = await _pair(pool, "first")
        kept = pool.key(label="first")
        await _verify(public, await _sign(kept))
        await private.destroy()
        await public.destroy()
        other, _ = await _pair(pool, "second")
        with pytest.raises(KeyNotFound):
            await _sign(kept)
        await _verify(other, await _sign(pool.key(label="second")))


async def test_a_key_that_another_process_replaced_signs_for_nobody(
    make_pool: MakePool,
) -> None:
    """With ``handle_max_age=0`` each use is verified, whoever changed the token."""
    async with make_pool(handle_max_age=0) as pool:
        public, _ = await _pair(pool, "first")
        kept = pool.key(label="first")
        await _verify(public, await _sign(kept))
        await blocking(
            subprocess.run,
            [sys.executable, "-c", _REPLACE, str(MODULE), USER_PIN],
            check=True,
        )
        with pytest.raises(KeyNotFound):
            await _sign(kept)


async def test_a_kept_session_reaches_no_stranger(make_pool: MakePool) -> None:
    """The next session has the same number; the kept one is refused, its close too."""
    async with make_pool() as pool:
        kept = await pool.run(lambda session: session)
        async with pool.session(rw=True) as session:
            with pytest.raises(PKCS11Error):
                kept.generate_key(KeyType.AES, 128)
            with pytest.raises(PKCS11Error):
                kept.close()
            assert (await session.info()).rw


async def test_a_session_object_ends_with_its_owner(make_pool: MakePool) -> None:
    """Its number is the next one's at once; the old reference is refused."""
    async with make_pool() as pool:
        async with pool.session() as session:
            secret = await session.generate_key(KeyType.AES, 128)
            sealed = await secret.encrypt(bytes(16), mechanism=Mechanism.AES_ECB)
        async with pool.session() as session:
            other = await session.generate_key(KeyType.AES, 128)
            with pytest.raises(SessionObjectDestroyed):
                await secret.encrypt(bytes(16), mechanism=Mechanism.AES_ECB)
            assert await other.encrypt(bytes(16), mechanism=Mechanism.AES_ECB) != sealed
