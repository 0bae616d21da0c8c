"""A small CA on the event loop: a root and its leaves, checked by cryptography."""

import asyncio

from asn1crypto.x509 import Certificate
from cryptography import x509
from pkcs11 import KeyType

from pkcs11_pool import TokenPool, softhsm
from pkcs11_pool.integrations.x509 import load_issuer


async def issue(pool: TokenPool) -> tuple[Certificate, list[Certificate]]:
    """Sign with asn1crypto's structures: each signature is awaited, no thread waits."""
    ca = await load_issuer(pool.key(label="ca"), {"common_name": "Example CA"})
    root = await ca.self_signed(days=3650)
    public = await pool.key(label="web").public_key_der()
    names = [{"common_name": f"{number}.example"} for number in range(100)]
    return root, await asyncio.gather(
        *(ca.certificate(name, public, days=90) for name in names)
    )


async def main(token: softhsm.ThrowawayToken) -> None:
    """Make two key pairs on the token, issue, verify."""
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        await pool.generate_keypair(KeyType.RSA, 2048, label="ca", store=True)
        await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", label="web", store=True
        )
        root, leaves = await issue(pool)
    issuer = x509.load_der_x509_certificate(root.dump())
    issuer.verify_directly_issued_by(issuer)  # raises if it is not
    for leaf in leaves:
        x509.load_der_x509_certificate(leaf.dump()).verify_directly_issued_by(issuer)
    print(f"{len(leaves)} certificates verify")


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        asyncio.run(main(throwaway))
