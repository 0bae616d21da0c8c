"""JSON Web Tokens signed on a token, and checked by PyJWT with the JWKS alone."""

import asyncio
from typing import Any

import jwt
from pkcs11 import KeyType

from pkcs11_pool import TokenPool, softhsm
from pkcs11_pool.integrations.jose import jwks, load_signer


async def issue(pool: TokenPool) -> tuple[list[str], dict[str, Any]]:
    """Sign on the event loop: the tokens, and what is published to verify them."""
    signer = await load_signer(pool.key(label="jwt"), "ES256")
    users = [f"user {number}" for number in range(100)]
    tokens = [signer.jwt({"sub": user}, expires_in=300) for user in users]
    return await asyncio.gather(*tokens), jwks([signer])


async def main(token: softhsm.ThrowawayToken) -> None:
    """Make a key pair on the token, issue, verify."""
    kind: dict[str, Any] = {"curve": "secp256r1", "label": "jwt", "store": True}
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        await pool.generate_keypair(KeyType.EC, **kind)
        tokens, published = await issue(pool)
    key = jwt.PyJWKSet.from_dict(published).keys[0]
    seen = [jwt.decode(text, key, algorithms=["ES256"])["sub"] for text in tokens]
    print(f"{len(seen)} tokens verify, the last is for {seen[-1]}")


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        asyncio.run(main(throwaway))
