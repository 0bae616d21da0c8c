"""The shortest way through everything, on a real token."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import KeyType, Mechanism

if TYPE_CHECKING:
    from pkcs11_pool import TokenPool


async def test_a_signature_made_through_the_pool_verifies_elsewhere(
    pool: TokenPool,
) -> None:
    """An independent library checks what the token signed."""
    await pool.generate_keypair(
        KeyType.EC, curve="secp256r1", label="signer", store=True
    )
    key = pool.key(label="signer")
    digest = hashlib.sha256(b"message").digest()
    signature = await key.sign(
        digest, mechanism=Mechanism.ECDSA, signature_format="der"
    )
    public = load_der_public_key(await key.public_key_der())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature, digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
