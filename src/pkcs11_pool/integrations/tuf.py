"""A signer for securesystemslib, and so for TUF and in-toto.

.. code-block:: python

    from securesystemslib.signer import Signer

    from pkcs11_pool.integrations.tuf import load_signer, register

    register(pool)  # once; then URIs of the scheme "pkcs11-pool:" find it
    signer = await load_signer(pool.key(label="p256"))
    uri, public_key = signer.uri, signer.public_key  # to keep with the metadata
    signer = Signer.from_priv_key_uri(uri, public_key)
    signature = await asyncio.to_thread(signer.sign, b"payload")

securesystemslib's ``sign`` blocks: on a thread that runs an event loop it raises
``WouldBlockLoop``. There ``await signer.sign_async(payload)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from pkcs11_pool import pins
from pkcs11_pool.errors import InvalidOption, InvalidType
from pkcs11_pool.faces.arguments import DEFAULT, Timeout, octets
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.faces.pool import TokenPool
from pkcs11_pool.integrations import algorithms, extras
from pkcs11_pool.state import PoolState
from pkcs11_pool.uri import Pkcs11URI

try:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_der_public_key
    from securesystemslib.signer import (
        SIGNER_FOR_URI_SCHEME,
        Signature,
        Signer,
        SSlibKey,
    )
except ModuleNotFoundError as error:
    raise extras.missing("tuf", error) from error

if TYPE_CHECKING:
    from securesystemslib.signer import Key, SecretsHandler

    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.integrations.algorithms import Algorithm

__all__ = ["SCHEME", "PoolSigner", "load_signer", "register"]

SCHEME: Final = "pkcs11-pool"
"""The scheme of the private key URIs; what follows is as in RFC 7512."""

_RSA: Final = {
    **{f"rsassa-pss-sha{n}": algorithms.rsa_pss(f"sha{n}") for n in (256, 384, 512)},
    **{
        f"rsa-pkcs1v15-sha{n}": algorithms.rsa_pkcs1(f"sha{n}") for n in (256, 384, 512)
    },
    "rsassa-pss-sha224": algorithms.rsa_pss("sha224"),
    "rsa-pkcs1v15-sha224": algorithms.rsa_pkcs1("sha224"),
}
_EC: Final = {
    "secp256r1": ("ecdsa-sha2-nistp256", algorithms.ecdsa("sha256", 256)),
    "secp384r1": ("ecdsa-sha2-nistp384", algorithms.ecdsa("sha384", 384)),
    "secp521r1": ("ecdsa-sha2-nistp521", algorithms.ecdsa("sha512", 521)),
}
_WAYS: Final = {**_RSA, **dict(_EC.values()), "ed25519": algorithms.eddsa()}

_registered: WeakSet[TokenPool] = WeakSet()


class PoolSigner(Signer):
    """A ``Signer`` with a key of the pool, by :func:`load_signer` or from a URI."""

    def __init__(
        self, key: KeyRef, public_key: SSlibKey, pin: pins.Pin | None = None
    ) -> None:
        self._key = key
        self._public_key = public_key
        self._pin = pin
        self._way = _way_of(public_key)

    @property
    def public_key(self) -> SSlibKey:
        """The public key, as securesystemslib verifies with it."""
        return self._public_key

    @property
    def uri(self) -> str:
        """The private key URI, with token and name of the key; no secret is in it.

        Raises:
            InvalidOption: The key is named by what a URI does not hold.
            PoolClosed: The pool was never open: its token is not known yet.
        """
        key = self._key
        pool: TokenPool = key._calls._pool()  # type: ignore[assignment]  # noqa: SLF001  # one package
        label, id_ = algorithms.name_of(key)
        if label is None and id_ is None:
            raise InvalidOption(f"{key!r} has neither label nor id for a URI")
        token = pool.token
        named = Pkcs11URI(
            token=token.label, serial=token.serial.decode(), object=label, id=id_
        )
        return f"{SCHEME}:{named.format().partition(':')[2]}"

    def sign(self, payload: bytes) -> Signature:
        """Sign ``payload``.

        Raises:
            WouldBlockLoop: This thread runs an event loop.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``.
        """
        data, options = self._way.message(octets(payload, "payload"))
        made = self._key.sync.sign(data, pin=self._pin, **options)
        return Signature(self._public_key.keyid, made.hex())

    async def sign_async(
        self, payload: bytes, *, timeout: Timeout = DEFAULT
    ) -> Signature:
        """Sign ``payload`` on the event loop.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``.
        """
        data = octets(payload, "payload")
        made = await self._way.sign(self._key, data, pin=self._pin, timeout=timeout)
        return Signature(self._public_key.keyid, made.hex())

    @classmethod
    def from_priv_key_uri(
        cls,
        priv_key_uri: str,
        public_key: Key,
        secrets_handler: SecretsHandler | None = None,
    ) -> PoolSigner:
        """The signer of a URI; no I/O. ``Signer.from_priv_key_uri`` comes here.

        Args:
            priv_key_uri: As :attr:`uri` gave it.
            public_key: Its public key.
            secrets_handler: Not asked: the pool is logged in.

        Raises:
            InvalidOption: No open pool, or more than one, that was registered has the
                token; or ``public_key`` cannot be used.
            InvalidURI: The URI cannot be read.
        """
        del secrets_handler
        if not isinstance(public_key, SSlibKey):
            kind = type(public_key).__name__
            raise InvalidType(f"public_key must be an SSlibKey, not {kind}")
        scheme, _, rest = str(priv_key_uri).partition(":")
        if scheme != SCHEME:
            raise InvalidOption(f"the URI must begin with '{SCHEME}:'")
        named = Pkcs11URI.parse(f"pkcs11:{rest}")
        key = _pool_of(named).key(label=named.object, id=named.id)
        return cls(key, public_key)

    def __repr__(self) -> str:
        """Which key and scheme; never the PIN."""
        return f"<PoolSigner {self._public_key.scheme} {self._key!r}>"


def register(pool: TokenPool) -> None:
    """Let private key URIs find this pool, while it is open.

    Raises:
        InvalidType: It is no pool.
    """
    if not isinstance(pool, TokenPool):
        raise InvalidType(f"register takes a TokenPool, not {type(pool).__name__}")
    _registered.add(pool)


@hides_pins
async def load_signer(
    key: KeyRef,
    scheme: str | None = None,
    *,
    keyid: str | None = None,
    pin: str | None = None,
    timeout: Timeout = DEFAULT,
) -> PoolSigner:
    """A signer for a key of the pool; keep it as long as the pool is open.

    Args:
        key: Names both halves of an RSA, EC or Ed25519 pair.
        scheme: ``"rsassa-pss-sha256"``, ``"ecdsa-sha2-nistp256"``, … None: by the key;
            ``"rsassa-pss-sha256"`` for RSA.
        keyid: None: as securesystemslib computes it.
        pin: For keys with ``CKA_ALWAYS_AUTHENTICATE``; or ``PROTECTED_AUTH``.
        timeout: Seconds for reading the public key.

    Raises:
        InvalidOption: The key cannot sign with ``scheme``.
        KeyNotFound: The token has no such public key.

    Cancellation:
        The caller goes at once; reading changes nothing.

    Cryptoki:
        ``C_GetAttributeValue``, once.
    """
    checked = None if pin is None else pins.checked(pin)  # type: ignore[arg-type]
    ref = algorithms.check_key(key)
    public = load_der_public_key(await ref.public_key_der(timeout=timeout))
    fitting = _fitting(public)
    if scheme is None:
        scheme = next(iter(fitting), None)
    if scheme not in fitting:
        known = ", ".join(fitting) or "no scheme"
        kind = type(public).__name__
        raise InvalidOption(f"a {kind} of this kind signs with {known}, not {scheme}")
    return PoolSigner(ref, SSlibKey.from_crypto(public, keyid, scheme), checked)


def _fitting(public: object) -> dict[str, Algorithm]:
    """The schemes for a kind of key, the usual one first."""
    if isinstance(public, rsa.RSAPublicKey):
        return _RSA
    if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in _EC:
        return dict([_EC[public.curve.name]])
    if isinstance(public, ed25519.Ed25519PublicKey):
        return {"ed25519": algorithms.eddsa()}
    return {}


def _way_of(public_key: SSlibKey) -> Algorithm:
    try:
        return _WAYS[public_key.scheme]
    except KeyError:
        message = f"no key of a token signs with {public_key.scheme!r}"
        raise InvalidOption(message) from None


def _pool_of(named: Pkcs11URI) -> TokenPool:
    """The one registered pool that is open on the token of a URI."""
    found = [
        pool
        for pool in list(_registered)
        if pool.state in {PoolState.READY, PoolState.RECOVERING}
        and named.token in {None, pool.token.label}
        and named.serial in {None, pool.token.serial.decode()}
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InvalidOption("no open pool has this token: register(pool) once")
    raise InvalidOption("several pools have such a token: give its serial in the URI")


SIGNER_FOR_URI_SCHEME[SCHEME] = PoolSigner
