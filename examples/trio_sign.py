"""Sign with P-256 on trio, and let another library check the signature."""

import hashlib

import trio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import KeyType, Mechanism

from pkcs11_pool import TokenPool, softhsm


async def main(token: softhsm.ThrowawayToken) -> None:
    """Make a key pair on the token, sign with it, verify without it."""
    message = b"signed on a token"
    digest = hashlib.sha256(message).digest()  # CKM_ECDSA signs a digest
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        await pool.generate_keypair(KeyType.EC, curve="secp256r1", id=b"1", store=True)
        key, ecdsa = pool.key(id=b"1"), Mechanism.ECDSA
        signature = await key.sign(digest, mechanism=ecdsa, signature_format="der")
        public = load_der_public_key(await key.public_key_der())
    if isinstance(public, ec.EllipticCurvePublicKey):
        public.verify(signature, message, ec.ECDSA(hashes.SHA256()))  # raises if not
        print("the signature verifies")


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        trio.run(main, throwaway)
