"""One of each operation, and how somebody else checks what came of it.

The pool does one half, ``cryptography`` and ``hashlib`` do the other: a token that
only agreed with itself would prove nothing. An operation gives a proof, which is
looked at later, so that checking does not slow down what is measured.

It may know the pool and ``cryptography``. It knows no event loop and no terminal.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import MGF, Attribute, GCMParams, KeyType, Mechanism, ObjectClass

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.faces.pool import TokenPool

    Proof = Callable[[], bool]
    Lap = Callable[[Awaitable[bytes]], Awaitable[bytes]]

RSA_KEY: Final = "demo-rsa-2048"
EC_KEY: Final = "demo-p256"
AES_KEY: Final = "demo-aes-256"
KNOWN_AES_KEY: Final = "demo-aes-256-imported"

_SHA256_LENGTH: Final = 32
_BLOCK_BITS: Final = 128
_RANDOM_BITS: Final = 256


@dataclass(frozen=True)
class Material:
    """What others know of the token's keys.

    Attributes:
        rsa: The public half of a key pair that the token made.
        ec: The same, on P-256.
        aes: The AES key that was imported. The one that the token made stays there.
    """

    rsa: rsa.RSAPublicKey
    ec: ec.EllipticCurvePublicKey
    aes: bytes = field(repr=False)


async def make_keys(pool: TokenPool) -> Material:
    """Make the demo's keys on the token, and import one."""
    rsa_public, _ = await pool.generate_keypair(
        KeyType.RSA, 2048, label=RSA_KEY, store=True
    )
    ec_public, _ = await pool.generate_keypair(
        KeyType.EC, curve="secp256r1", label=EC_KEY, store=True
    )
    await pool.generate_key(KeyType.AES, 256, label=AES_KEY, store=True)
    known = os.urandom(32)
    await pool.create_object(
        {**aes_template(known, KNOWN_AES_KEY), Attribute.TOKEN: True}
    )
    rsa_key = load_der_public_key(await rsa_public.public_key_der())
    ec_key = load_der_public_key(await ec_public.public_key_der())
    return Material(
        rsa=cast("rsa.RSAPublicKey", rsa_key),
        ec=cast("ec.EllipticCurvePublicKey", ec_key),
        aes=known,
    )


def aes_template(value: bytes, label: str) -> dict[Attribute, object]:
    """Return the template of an AES key whose value is known here."""
    return {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.AES,
        Attribute.VALUE: value,
        Attribute.LABEL: label,
        Attribute.ENCRYPT: True,
        Attribute.DECRYPT: True,
    }


class Bench:
    """The keys in both hands: as the pool names them, and as others know them."""

    def __init__(self, pool: TokenPool, material: Material) -> None:
        self.pool = pool
        self.material = material
        self.rsa: KeyRef = pool.key(label=RSA_KEY)
        self.ec: KeyRef = pool.key(label=EC_KEY)
        self.aes: KeyRef = pool.key(label=AES_KEY)
        self.known_aes: KeyRef = pool.key(label=KNOWN_AES_KEY)
        # Random bytes cannot be checked by anybody; that none come twice can.
        self.seen: set[bytes] = set()


async def ecdsa(bench: Bench, lap: Lap, message: bytes) -> Proof:
    """Sign with P-256. The token signs the digest: SoftHSM2 2.6 takes no message."""
    digest = hashlib.sha256(message).digest()
    signature = await lap(
        bench.ec.sign(digest, mechanism=Mechanism.ECDSA, signature_format="der")
    )
    return lambda: verified_ecdsa(bench.material.ec, signature, message)


def verified_ecdsa(
    key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes
) -> bool:
    """Check a P-256 signature over a message with ``cryptography``."""
    digest = hashlib.sha256(message).digest()
    key.verify(signature, digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    return True


async def rsa_pkcs1(bench: Bench, lap: Lap, message: bytes) -> Proof:
    """Sign with RSA, padded as in PKCS #1 v1.5."""
    signature = await lap(bench.rsa.sign(message, mechanism=Mechanism.SHA256_RSA_PKCS))
    return lambda: _verified_rsa(bench, signature, message, padding.PKCS1v15())


async def rsa_pss(bench: Bench, lap: Lap, message: bytes) -> Proof:
    """Sign with RSA-PSS."""
    signature = await lap(
        bench.rsa.sign(
            message,
            mechanism=Mechanism.SHA256_RSA_PKCS_PSS,
            mechanism_param=(Mechanism.SHA256, MGF.SHA256, _SHA256_LENGTH),
        )
    )
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), _SHA256_LENGTH)
    return lambda: _verified_rsa(bench, signature, message, pss)


def _verified_rsa(
    bench: Bench,
    signature: bytes,
    message: bytes,
    how: padding.PKCS1v15 | padding.PSS,
) -> bool:
    bench.material.rsa.verify(signature, message, how, hashes.SHA256())
    return True


async def aes_gcm(bench: Bench, lap: Lap, message: bytes) -> Proof:
    """Encrypt on the token with the imported key; decrypted outside of it."""
    nonce = os.urandom(12)
    sealed = await lap(
        bench.known_aes.encrypt(
            message,
            mechanism=Mechanism.AES_GCM,
            mechanism_param=GCMParams(nonce, None, 128),
        )
    )
    return lambda: AESGCM(bench.material.aes).decrypt(nonce, sealed, None) == message


async def aes_cbc(bench: Bench, lap: Lap, message: bytes) -> Proof:
    """Decrypt on the token what was encrypted outside of it."""
    iv = os.urandom(16)
    pad = PKCS7(_BLOCK_BITS).padder()
    cipher = Cipher(algorithms.AES(bench.material.aes), modes.CBC(iv)).encryptor()
    padded = pad.update(message) + pad.finalize()
    sealed = cipher.update(padded) + cipher.finalize()
    opened = await lap(
        bench.known_aes.decrypt(
            sealed, mechanism=Mechanism.AES_CBC_PAD, mechanism_param=iv
        )
    )
    return lambda: opened == message


async def aes_both_ways(bench: Bench, lap: Lap, message: bytes) -> Proof:
    """Encrypt and decrypt with the key that never left the token: two operations."""
    how, iv = Mechanism.AES_CBC_PAD, os.urandom(16)
    sealed = await lap(bench.aes.encrypt(message, mechanism=how, mechanism_param=iv))
    opened = await lap(bench.aes.decrypt(sealed, mechanism=how, mechanism_param=iv))
    return lambda: opened == message and message not in sealed


async def sha256(bench: Bench, lap: Lap, message: bytes) -> Proof:
    """Let the token compute a digest."""
    digest = await lap(bench.pool.digest(message, mechanism=Mechanism.SHA256))
    return lambda: digest == hashlib.sha256(message).digest()


async def random_bytes(bench: Bench, lap: Lap, message: bytes) -> Proof:
    """Take random bytes from the token."""
    del message
    drawn = await lap(bench.pool.generate_random(_RANDOM_BITS))

    def proof() -> bool:
        fresh = len(drawn) * 8 == _RANDOM_BITS and drawn not in bench.seen
        bench.seen.add(drawn)
        return fresh

    return proof


@dataclass(frozen=True)
class Kind:
    """A kind of work.

    Attributes:
        title: In the tables.
        checked: Who checks it, or how.
        work: The pool's half; gives the proof.
        operations: How many operations of the pool it takes.
    """

    title: str
    checked: str
    work: Callable[[Bench, Lap, bytes], Awaitable[Proof]]
    operations: int = 1


_ECDSA: Final = Kind("ECDSA P-256 sign", "cryptography", ecdsa)
_PKCS1: Final = Kind("RSA-2048 PKCS #1 sign", "cryptography", rsa_pkcs1)
_PSS: Final = Kind("RSA-2048 PSS sign", "cryptography", rsa_pss)
_GCM: Final = Kind("AES-256 GCM encrypt", "cryptography", aes_gcm)
_CBC: Final = Kind("AES-256 CBC decrypt", "cryptography", aes_cbc)
_BOTH: Final = Kind("AES-256 CBC both ways", "compared", aes_both_ways, 2)
_SHA256: Final = Kind("SHA-256", "hashlib", sha256)
_RANDOM: Final = Kind("256 random bits", "no two alike", random_bytes)

KINDS: Final = (_ECDSA, _PKCS1, _PSS, _GCM, _CBC, _BOTH, _SHA256, _RANDOM)
# What a service does, mixed: mostly signatures. Every third operation is one on P-256.
_CYCLE: Final = (
    *(_ECDSA, _PKCS1, _GCM, _ECDSA, _SHA256, _BOTH),
    *(_ECDSA, _PSS, _CBC, _ECDSA, _RANDOM),
)


def plan(operations: int) -> Sequence[Kind]:
    """Return work that takes exactly so many operations."""
    planned: list[Kind] = []
    left = operations
    while left:
        kind = _CYCLE[len(planned) % len(_CYCLE)]
        # At the very end there may be no room for what takes two.
        kind = kind if kind.operations <= left else _SHA256
        planned.append(kind)
        left -= kind.operations
    return planned


def holds(proof: Proof) -> bool:
    """Whether a proof convinces; ``cryptography`` says no by raising."""
    try:
        return proof()
    except (InvalidSignature, InvalidTag, ValueError):
        return False
