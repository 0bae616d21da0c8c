"""Certificates by cryptography's own builder, signed on a token, many at once."""

import asyncio
import datetime as dt

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from pkcs11 import KeyType

from pkcs11_pool import TokenPool, softhsm
from pkcs11_pool.integrations.cryptography import load_private_key


async def issue(pool: TokenPool) -> list[x509.Certificate]:
    """Load the private key once, then sign with it on worker threads."""
    ca = await load_private_key(pool.key(label="ca"))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Example CA")])
    now = dt.datetime.now(dt.UTC)
    until = now + dt.timedelta(days=90)
    make = x509.CertificateBuilder(name, name, ca.public_key(), 1, now, until)
    jobs = [asyncio.to_thread(make.sign, ca, hashes.SHA256()) for _ in range(50)]
    return await asyncio.gather(*jobs)


async def main(token: softhsm.ThrowawayToken) -> None:
    """Make a key pair on the token, issue, verify."""
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        await pool.generate_keypair(KeyType.RSA, 2048, label="ca", store=True)
        certificates = await issue(pool)
    for certificate in certificates:
        certificate.verify_directly_issued_by(certificate)  # raises if it is not
    print(f"{len(certificates)} certificates verify")


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        asyncio.run(main(throwaway))
