"""Envelope encryption: each record under a key of its own, wrapped by the token's.

The token's key never leaves it. What is stored beside a record, its wrapped key and an
IV, opens it only on this token.
"""

import asyncio
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from pkcs11_pool import KeyRef, TokenPool, softhsm

WRAP = Mechanism.AES_KEY_WRAP
MAY_LEAVE = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}


@dataclass(frozen=True)
class Record:
    """What is stored. None of it is secret."""

    wrapped_key: bytes
    iv: bytes
    sealed: bytes


async def seal(pool: TokenPool, master: KeyRef, data: bytes) -> Record:
    """Encrypt with a fresh key, in this process; wrap that key on the token."""
    async with pool.session() as session:  # the fresh key ends with the block
        fresh = await session.generate_key(KeyType.AES, 256, template=MAY_LEAVE)
        value = (await fresh.attributes([Attribute.VALUE]))[Attribute.VALUE]
        wrapped = await master.wrap_key(fresh, mechanism=WRAP)
    iv = await pool.generate_random(96)  # bits
    return Record(wrapped, iv, AESGCM(value).encrypt(iv, data, None))


async def unseal(pool: TokenPool, master: KeyRef, record: Record) -> bytes:
    """Let the token unwrap the key, into a session and not for longer."""
    async with pool.session() as session:
        secret = ObjectClass.SECRET_KEY
        key = await master.on(session).unwrap_key(
            secret, KeyType.AES, record.wrapped_key, mechanism=WRAP, template=MAY_LEAVE
        )
        value = (await key.attributes([Attribute.VALUE]))[Attribute.VALUE]
    return AESGCM(value).decrypt(record.iv, record.sealed, None)


async def main(token: softhsm.ThrowawayToken) -> None:
    """Seal a few records, and open them again."""
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        master = await pool.generate_key(KeyType.AES, 256, label="master", store=True)
        told = await master.attributes([Attribute.EXTRACTABLE])
        print("the master key may leave the token:", told[Attribute.EXTRACTABLE])
        texts = [f"record {number}".encode() for number in range(20)]
        records = await asyncio.gather(*(seal(pool, master, text) for text in texts))
        print("a record's wrapped key has", len(records[0].wrapped_key), "bytes")
        again = await asyncio.gather(*(unseal(pool, master, r) for r in records))
        print(f"{sum(map(texts.__contains__, again))} of {len(texts)} records open")


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        asyncio.run(main(throwaway))
