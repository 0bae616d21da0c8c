"""Envelope encryption: a data key for each message, which never leaves the token."""

import asyncio
from typing import Any

from pkcs11 import KeyType, MechanismFlag

from pkcs11_pool import InvalidCiphertext, TokenPool, softhsm
from pkcs11_pool.integrations.envelope import Envelope


async def seal(pool: TokenPool) -> tuple[Envelope, bytes]:
    """Encrypt under the first KEK, then let the second one take its place."""
    old, new = pool.key(label="kek-2025"), pool.key(label="kek-2026")
    blob = await Envelope({"2025": old}).encrypt(b"card 4711", {"tenant": "7"})
    envelope = Envelope({"2026": new, "2025": old})
    return envelope, await envelope.rewrap(blob)


async def main(token: softhsm.ThrowawayToken) -> None:
    """Make two KEKs on the token, encrypt, rotate, decrypt."""
    kept: dict[str, Any] = {"store": True}
    kept["capabilities"] = MechanismFlag.WRAP | MechanismFlag.UNWRAP
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        for label in ("kek-2025", "kek-2026"):
            await pool.generate_key(KeyType.AES, 256, label=label, **kept)
        envelope, blob = await seal(pool)
        data = await envelope.decrypt(blob, {"tenant": "7"})
        try:
            await envelope.decrypt(blob, {"tenant": "8"})
        except InvalidCiphertext:
            print(f"tenant 7 reads {data!r}; tenant 8 cannot")


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        asyncio.run(main(throwaway))
