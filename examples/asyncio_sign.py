"""A hundred RSA signatures at once on asyncio: one login, eight sessions at most."""

import asyncio

from pkcs11 import KeyType, Mechanism

from pkcs11_pool import TokenPool, softhsm


async def main(token: softhsm.ThrowawayToken) -> None:
    """Make a key on the token and sign with it, many times at once."""
    how = Mechanism.SHA256_RSA_PKCS
    messages = [f"message {number}".encode() for number in range(100)]
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        await pool.generate_keypair(KeyType.RSA, 2048, label="signer", store=True)
        key = pool.key(label="signer")
        made = await asyncio.gather(*(key.sign(m, mechanism=how) for m in messages))
        pairs = zip(messages, made, strict=True)
        right = [await key.verify(m, s, mechanism=how) for m, s in pairs]
        logins = pool.stats().logins_total
    print(f"{sum(right)} of {len(made)} signatures verify, after {logins} login")


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        asyncio.run(main(throwaway))
