"""Ten thousand signatures in order, in bounded memory, with an error among them."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from pkcs11 import KeyType, Mechanism

from pkcs11_pool import TokenPool, softhsm

COUNT = 10_000
BAD = 4_321


async def digests() -> AsyncIterator[Any]:
    """What is to be signed, as it comes from a database or a queue.

    Taken as signatures are: never are more than a few of them in memory.
    """
    for number in range(COUNT):
        # One row has no digest. That must not spoil the others.
        yield None if number == BAD else number.to_bytes(32, "big")


async def main(token: softhsm.ThrowawayToken) -> None:
    """Sign them all."""
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        await pool.generate_keypair(KeyType.EC, curve="secp256r1", id=b"1", store=True)
        key, ecdsa = pool.key(id=b"1"), Mechanism.ECDSA
        began = time.monotonic()
        good = number = 0
        async for made in key.sign_many(digests(), mechanism=ecdsa, return_errors=True):
            if isinstance(made, Exception):
                print(f"number {number}: {type(made).__name__}: {made}")
            else:
                good += 1
            number += 1
        seconds = time.monotonic() - began
        stats = pool.stats()
    print(f"{good} signatures in {seconds:.1f} s, {good / seconds:,.0f} a second")
    print(f"{stats.logins_total} login, {stats.sessions_max} sessions at most")


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        asyncio.run(main(throwaway))
