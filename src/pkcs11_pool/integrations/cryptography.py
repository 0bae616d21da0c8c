"""Private keys for ``cryptography`` that stay on the token.

They are its own abstract classes, over the blocking face: whatever signs with a
private key of ``cryptography`` signs through the pool (X.509, CSR, CRL and OCSP
builders, PyJWT, joserfc), from as many worker threads as you like. On a thread that
runs an event loop each use raises ``WouldBlockLoop``.
``docs/how-to/sign-certificates.md`` shows them at work.

The public key is read once, and everything that needs no private key is done by
``cryptography`` itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, Self, TypeVar

from pkcs11 import KDF, Attribute, KeyType, Mechanism

from pkcs11_pool import pins
from pkcs11_pool.errors import InvalidOption, InvalidType, KeyNotExportable
from pkcs11_pool.faces import arguments
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.faces.waiting import blocking
from pkcs11_pool.integrations import algorithms, extras, paddings

try:
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_der_public_key,
    )
except ModuleNotFoundError as error:
    raise extras.missing("cryptography", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
    from cryptography.utils import Buffer

    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.faces.pool import TokenPool
    from pkcs11_pool.integrations.algorithms import Algorithm

__all__ = [
    "TokenECPrivateKey",
    "TokenEd448PrivateKey",
    "TokenEd25519PrivateKey",
    "TokenPrivateKey",
    "TokenRSAPrivateKey",
    "load_private_key",
    "load_private_key_sync",
]

PublicT = TypeVar("PublicT")


class _TokenKey(Generic[PublicT]):
    """What all private keys on a token have in common."""

    def __init__(self, key: KeyRef, public_key: PublicT, pin: pins.Pin | None) -> None:
        self._key = key
        self._public_key = public_key
        self._pin = pin

    @property
    def token_key(self) -> KeyRef:
        """The key of the pool, for what ``cryptography`` has no words for."""
        return self._key

    def public_key(self) -> PublicT:
        """The public key; it was read when this was loaded."""
        return self._public_key

    def private_numbers(self) -> NoReturn:
        """Refuse.

        Raises:
            KeyNotExportable: Always: the key never leaves the token.
        """
        self._refuse()

    def private_bytes(
        self,
        encoding: object,
        format: object,  # noqa: A002  # as cryptography names it
        encryption_algorithm: object,
    ) -> NoReturn:
        """Refuse.

        Raises:
            KeyNotExportable: Always: the key never leaves the token.
        """
        del encoding, format, encryption_algorithm
        self._refuse()

    def private_bytes_raw(self) -> NoReturn:
        """Refuse.

        Raises:
            KeyNotExportable: Always: the key never leaves the token.
        """
        self._refuse()

    def __copy__(self) -> Self:
        """Itself: it only refers to the key."""
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> Self:
        """Itself: it only refers to the key."""
        return self

    def __repr__(self) -> str:
        """Which key it is; never the PIN."""
        return f"<{type(self).__name__} {self._key!r}>"

    def _refuse(self) -> NoReturn:
        message = (
            f"{self._key!r} never leaves the token: sign or decrypt with this object, "
            "or export its public_key()"
        )
        raise KeyNotExportable(message)

    def _sign(
        self, data: object, algorithm: Algorithm, *, prehashed: bool = False
    ) -> bytes:
        octets = arguments.octets(data, "data")
        given = algorithm.digest(octets) if prehashed else algorithm.message(octets)
        return self._key.sync.sign(given[0], pin=self._pin, **given[1])


class TokenRSAPrivateKey(_TokenKey[rsa.RSAPublicKey], rsa.RSAPrivateKey):
    """An RSA key on a token: PKCS#1 v1.5 and PSS signatures, PKCS#1 and OAEP."""

    @property
    def key_size(self) -> int:
        """Bits of the modulus."""
        return self._public_key.key_size

    def sign(
        self,
        data: Buffer,
        padding: Any,
        algorithm: Any,
    ) -> bytes:
        """Sign ``data``: see ``cryptography``'s ``RSAPrivateKey.sign``.

        Args:
            data: The message, or its digest with ``Prehashed``.
            padding: ``PKCS1v15()``, or ``PSS`` with ``MGF1``; ``PSS.AUTO`` is for
                verification only.
            algorithm: A hash, ``Prehashed``, or ``NoDigestInfo`` with ``PKCS1v15``.

        Raises:
            InvalidOption: The padding or hash cannot be used.
            WouldBlockLoop: This thread runs an event loop.

        Cryptoki:
            ``C_SignInit``, ``C_Sign`` with ``CKM_RSA_PKCS`` or ``CKM_RSA_PKCS_PSS``.
        """
        way, prehashed = paddings.signature(padding, algorithm, self.key_size)
        return self._sign(data, way, prehashed=prehashed)

    def decrypt(self, ciphertext: bytes, padding: Any) -> bytes:
        """Decrypt: see ``cryptography``'s ``RSAPrivateKey.decrypt``.

        With ``PKCS1v15`` do not let others see whether this raised: they could
        decrypt with it (RFC 8017, "RSAES-PKCS1-v1_5"). Use OAEP.

        Args:
            ciphertext: As long as the modulus.
            padding: ``OAEP`` with ``MGF1``, or ``PKCS1v15()``. SoftHSM2 does OAEP with
                SHA-1 and no label only.

        Raises:
            InvalidOption: The padding cannot be used.
            WouldBlockLoop: This thread runs an event loop.

        Cryptoki:
            ``C_DecryptInit``, ``C_Decrypt``.
        """
        octets = arguments.octets(ciphertext, "ciphertext")
        mechanism, param = paddings.decryption(padding)
        return self._key.sync.decrypt(
            octets, mechanism=mechanism, mechanism_param=param, pin=self._pin
        )


class TokenECPrivateKey(
    _TokenKey[ec.EllipticCurvePublicKey], ec.EllipticCurvePrivateKey
):
    """An elliptic curve key on a token: ECDSA, and ECDH where the token can."""

    @property
    def curve(self) -> ec.EllipticCurve:
        """Its curve."""
        return self._public_key.curve

    @property
    def key_size(self) -> int:
        """Bits of the curve."""
        return self._public_key.curve.key_size

    def sign(self, data: Buffer, signature_algorithm: Any) -> bytes:
        """Sign ``data`` with ``ec.ECDSA(hash)``; the signature is DER.

        Raises:
            InvalidOption: The algorithm cannot be used; a deterministic signature was
                asked for, which no token promises.
            WouldBlockLoop: This thread runs an event loop.

        Cryptoki:
            ``C_SignInit``, ``C_Sign`` with ``CKM_ECDSA``.
        """
        if not isinstance(signature_algorithm, ec.ECDSA):
            kind = type(signature_algorithm).__name__
            message = f"signature_algorithm must be ec.ECDSA(hash), not {kind}"
            raise InvalidType(message)
        if getattr(signature_algorithm, "deterministic_signing", False):
            raise InvalidOption("a token chooses the nonce itself: not deterministic")
        name, prehashed = paddings.hash_of(signature_algorithm.algorithm)
        way = algorithms.ecdsa(name, self.key_size)
        return self._sign(data, way, prehashed=prehashed)

    def exchange(
        self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey
    ) -> bytes:
        """The secret shared with a peer (ECDH), as ``cryptography`` gives it.

        The secret leaves the token: derive a key of it. To keep it there use
        ``token_key.on(session).derive_key(...)``.

        Raises:
            InvalidOption: The peer's key is on another curve.
            WouldBlockLoop: This thread runs an event loop.

        Cryptoki:
            ``C_DeriveKey`` with ``CKM_ECDH1_DERIVE`` into a session of its own, then
            ``C_GetAttributeValue`` of ``CKA_VALUE``.
        """
        if not isinstance(algorithm, ec.ECDH):
            raise InvalidType("algorithm must be ec.ECDH()")
        if not isinstance(peer_public_key, ec.EllipticCurvePublicKey):
            raise InvalidType("peer_public_key must be an EllipticCurvePublicKey")
        if peer_public_key.curve.name != self.curve.name:
            message = (
                f"the peer's key is on {peer_public_key.curve.name}, this one on "
                f"{self.curve.name}"
            )
            raise InvalidOption(message)
        point = peer_public_key.public_bytes(
            Encoding.X962, PublicFormat.UncompressedPoint
        )
        return blocking(_shared_secret(self._key, point, self.key_size))


class TokenEd25519PrivateKey(
    _TokenKey[ed25519.Ed25519PublicKey], ed25519.Ed25519PrivateKey
):
    """An Ed25519 key on a token."""

    def sign(self, data: Buffer) -> bytes:
        """Sign ``data`` (RFC 8032).

        Raises:
            WouldBlockLoop: This thread runs an event loop.

        Cryptoki:
            ``C_SignInit``, ``C_Sign`` with ``CKM_EDDSA``.
        """
        return self._sign(data, algorithms.eddsa())


class TokenEd448PrivateKey(_TokenKey[ed448.Ed448PublicKey], ed448.Ed448PrivateKey):
    """An Ed448 key on a token."""

    def sign(self, data: Buffer) -> bytes:
        """Sign ``data`` (RFC 8032), with an empty context.

        Raises:
            WouldBlockLoop: This thread runs an event loop.

        Cryptoki:
            ``C_SignInit``, ``C_Sign`` with ``CKM_EDDSA``.
        """
        return self._sign(data, algorithms.eddsa())


TokenPrivateKey = (
    TokenRSAPrivateKey
    | TokenECPrivateKey
    | TokenEd25519PrivateKey
    | TokenEd448PrivateKey
)

_KINDS: Final[tuple[tuple[type, Callable[..., Any]], ...]] = (
    (rsa.RSAPublicKey, TokenRSAPrivateKey),
    (ec.EllipticCurvePublicKey, TokenECPrivateKey),
    (ed25519.Ed25519PublicKey, TokenEd25519PrivateKey),
    (ed448.Ed448PublicKey, TokenEd448PrivateKey),
)


async def load_private_key(
    key: KeyRef,
    *,
    public_key: PublicKeyTypes | None = None,
    pin: str | None = None,
    timeout: Timeout = DEFAULT,
) -> TokenPrivateKey:
    """A private key for ``cryptography``, out of a key of the pool.

    Load it on the event loop, sign with it on worker threads. It may be kept as long
    as the pool is open.

    Args:
        key: Names both halves: ``pool.key(label=...)`` or ``pool.key(id=...)``.
        public_key: Its public key, where the token has none: from the certificate.
        pin: For keys with ``CKA_ALWAYS_AUTHENTICATE``; or ``PROTECTED_AUTH``.
        timeout: Seconds for reading the public key.

    Raises:
        KeyNotFound: The token has no such public key: give ``public_key``.
        InvalidOption: ``cryptography`` has no private key of this kind.

    Cancellation:
        The caller goes at once; reading changes nothing.

    Cryptoki:
        ``C_GetAttributeValue``, once; nothing with ``public_key``.
    """
    pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
    checked = None if pin is None else pins.checked(pin)  # type: ignore[arg-type]
    ref = algorithms.check_key(key)
    if public_key is None:
        public_key = load_der_public_key(await ref.public_key_der(timeout=timeout))
    for kind, make in _KINDS:
        if isinstance(public_key, kind):
            made: TokenPrivateKey = make(ref, public_key, checked)
            return made
    kind_name = type(public_key).__name__
    message = f"private keys are made of RSA, EC and Ed keys, not of a {kind_name}"
    raise InvalidOption(message)


def load_private_key_sync(
    key: KeyRef,
    *,
    public_key: PublicKeyTypes | None = None,
    pin: str | None = None,
    timeout: Timeout = DEFAULT,
) -> TokenPrivateKey:
    """The blocking twin of :func:`load_private_key`.

    Raises:
        WouldBlockLoop: This thread runs an event loop.

    Cryptoki:
        As :func:`load_private_key`.
    """
    pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
    return blocking(
        load_private_key(key, public_key=public_key, pin=pin, timeout=timeout)
    )


async def _shared_secret(key: KeyRef, point: bytes, bits: int) -> bytes:
    """Derive in a session that ends with it, and read the value before."""
    pool: TokenPool = key._calls._pool()  # type: ignore[assignment]  # noqa: SLF001  # one package
    async with pool.session() as session:
        secret = await key.on(session).derive_key(
            KeyType.GENERIC_SECRET,
            (bits + 7) // 8 * 8,
            mechanism=Mechanism.ECDH1_DERIVE,
            mechanism_param=(KDF.NULL, None, point),
            template={Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True},
        )
        value: bytes = (await secret.attributes([Attribute.VALUE]))[Attribute.VALUE]
        return value
