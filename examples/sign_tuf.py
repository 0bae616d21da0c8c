"""Metadata for TUF or in-toto signed on a token, verified by securesystemslib."""

import asyncio

from pkcs11 import KeyType
from securesystemslib.signer import Key, Signature, Signer

from pkcs11_pool import TokenPool, softhsm
from pkcs11_pool.integrations.tuf import load_signer, register


async def sign(pool: TokenPool, files: list[bytes]) -> tuple[Key, list[Signature]]:
    """By the URI that is kept with the metadata, as securesystemslib's users do."""
    register(pool)
    loaded = await load_signer(pool.key(label="root"))
    signer = Signer.from_priv_key_uri(loaded.uri, loaded.public_key)
    jobs = [asyncio.to_thread(signer.sign, file) for file in files]
    return loaded.public_key, await asyncio.gather(*jobs)


async def main(token: softhsm.ThrowawayToken) -> None:
    """Make a key pair on the token, sign, verify."""
    files = [b"metadata %d" % number for number in range(100)]
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", label="root", store=True
        )
        key, signatures = await sign(pool, files)
    for file, signature in zip(files, signatures, strict=True):
        key.verify_signature(signature, file)  # raises if it is not
    print(f"{len(signatures)} signatures verify")


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        asyncio.run(main(throwaway))
