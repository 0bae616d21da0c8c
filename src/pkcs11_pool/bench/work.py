"""The operations that are measured: their keys, and how their results are checked.

The keys are token objects, because each client is a process of its own. What a client
counted is believed only if its samples are right, as ``cryptography`` sees it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, KeyType, ObjectClass

from pkcs11_pool.bench.turns import DIGEST, IV, PAYLOAD, RANDOM_BITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pkcs11_pool.faces.pool import TokenPool

#: The keys that are made, by the operation that they are for.
KEYS: Final = ("p256", "rsa2048", "aes", "hmac")

_BLOCK_BITS: Final = 128
_P256_BYTES: Final = 32


@dataclass(frozen=True)
class Material:
    """What is known outside of the token.

    Attributes:
        prefix: What all labels begin with.
        p256: Public key.
        rsa2048: Public key.
        aes: The imported AES key.
        hmac: The imported secret.
    """

    prefix: str
    p256: ec.EllipticCurvePublicKey
    rsa2048: rsa.RSAPublicKey
    aes: bytes = field(repr=False)
    hmac: bytes = field(repr=False)

    def wrong(self, operation: str, samples: Sequence[bytes]) -> int:
        """How many results of an operation are not what they should be."""
        if operation == "random":
            right = {one for one in samples if len(one) * 8 == RANDOM_BITS}
            return len(samples) - len(right)
        return sum(not self._right(operation, one) for one in samples)

    def _right(self, operation: str, result: bytes) -> bool:
        try:
            return bool(getattr(self, f"_right_{operation}")(result))
        except InvalidSignature:
            return False

    def _right_p256(self, result: bytes) -> bool:
        # DER begins so, and is never 64 bytes long on this curve but by a rare chance.
        if len(result) == 2 * _P256_BYTES:
            r, s = result[:_P256_BYTES], result[_P256_BYTES:]
            result = utils.encode_dss_signature(
                int.from_bytes(r, "big"), int.from_bytes(s, "big")
            )
        how = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
        self.p256.verify(result, DIGEST, how)
        return True

    def _right_rsa2048(self, result: bytes) -> bool:
        self.rsa2048.verify(result, DIGEST, padding.PKCS1v15(), hashes.SHA256())
        return True

    def _right_aes(self, result: bytes) -> bool:
        pad = PKCS7(_BLOCK_BITS).padder()
        cipher = Cipher(algorithms.AES(self.aes), modes.CBC(IV)).encryptor()
        padded = pad.update(PAYLOAD) + pad.finalize()
        return result == cipher.update(padded) + cipher.finalize()

    def _right_hmac(self, result: bytes) -> bool:
        return result == hmac.digest(self.hmac, PAYLOAD, "sha256")

    def _right_verify(self, result: bytes) -> bool:
        # Clients raise or end when a signature does not hold.
        return result in {b"", b"\x01"}

    def _right_digest(self, result: bytes) -> bool:
        return result == hashlib.sha256(PAYLOAD).digest()


async def make_keys(pool: TokenPool, prefix: str) -> Material:
    """Make the keys on the token."""
    rsa_public, _ = await pool.generate_keypair(
        KeyType.RSA, 2048, label=f"{prefix}-rsa2048", id=b"rsa2048", store=True
    )
    ec_public, _ = await pool.generate_keypair(
        KeyType.EC, curve="secp256r1", label=f"{prefix}-p256", id=b"p256", store=True
    )
    aes, secret = os.urandom(32), os.urandom(32)
    uses = {Attribute.ENCRYPT: True, Attribute.DECRYPT: True}
    await _import(pool, KeyType.AES, f"{prefix}-aes", aes, uses)
    uses = {Attribute.SIGN: True, Attribute.VERIFY: True}
    await _import(pool, KeyType.GENERIC_SECRET, f"{prefix}-hmac", secret, uses)
    rsa_key = load_der_public_key(await rsa_public.public_key_der())
    ec_key = load_der_public_key(await ec_public.public_key_der())
    return Material(
        prefix=prefix,
        p256=cast("ec.EllipticCurvePublicKey", ec_key),
        rsa2048=cast("rsa.RSAPublicKey", rsa_key),
        aes=aes,
        hmac=secret,
    )


async def _import(
    pool: TokenPool,
    kind: KeyType,
    label: str,
    value: bytes,
    uses: dict[Attribute, bool],
) -> None:
    template: dict[Attribute, object] = {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: kind,
        Attribute.VALUE: value,
        Attribute.LABEL: label,
        Attribute.TOKEN: True,
        Attribute.PRIVATE: True,
        **uses,
    }
    await pool.create_object(template)
