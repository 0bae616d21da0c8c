"""JSON Web Signatures and tokens made on the event loop, and the JWKS to check them.

.. code-block:: python

    from pkcs11_pool.integrations.jose import jwks, load_signer

    signer = await load_signer(pool.key(label="p256"), "ES256")
    token = await signer.jwt({"sub": "alice"}, expires_in=300)
    key_set = jwks([signer])  # for /.well-known/jwks.json

Verifying needs no private key: leave it to PyJWT or joserfc, with the JWKS.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, KeyType

from pkcs11_pool import pins
from pkcs11_pool.errors import InvalidOption, InvalidType
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.integrations import algorithms, extras

try:
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_der_public_key
    from joserfc.jwk import ECKey, OKPKey, RSAKey
except ModuleNotFoundError as error:
    raise extras.missing("jose", error) from error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from joserfc.jwk import KeyParameters

    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.integrations.algorithms import Algorithm

__all__ = ["JWSSigner", "joserfc_key", "jwks", "load_signer"]

_RSA: Final = {
    **{f"RS{n}": algorithms.rsa_pkcs1(f"sha{n}") for n in (256, 384, 512)},
    **{f"PS{n}": algorithms.rsa_pss(f"sha{n}") for n in (256, 384, 512)},
}
_EC: Final = {
    "ES256": ("secp256r1", algorithms.ecdsa("sha256", 256, der=False)),
    "ES384": ("secp384r1", algorithms.ecdsa("sha384", 384, der=False)),
    "ES512": ("secp521r1", algorithms.ecdsa("sha512", 521, der=False)),
    "ES256K": ("secp256k1", algorithms.ecdsa("sha256", 256, der=False)),
}
_HMAC: Final = {f"HS{n}": algorithms.hmac(f"sha{n}") for n in (256, 384, 512)}
_SHORTEST: Final = {"HS256": 32, "HS384": 48, "HS512": 64}
"""Bytes that the key must have at least (RFC 7518, "HMAC with SHA-2 Functions")."""
_TIMES: Final = ("exp", "iat", "nbf")
_FORBIDDEN: Final = ("b64", "crit")


class JWSSigner:
    """Signs with one key of the pool and one algorithm; made by :func:`load_signer`.

    Attributes:
        alg: The ``alg`` of every header.
        kid: The ``kid`` of every header; None: there is none.
    """

    def __init__(
        self,
        key: KeyRef,
        alg: str,
        algorithm: Algorithm,
        *,
        kid: str | None,
        public: dict[str, Any] | None,
        pin: pins.Pin | None,
    ) -> None:
        self.alg = alg
        self.kid = kid
        self._key = key
        self._algorithm = algorithm
        self._public = public
        self._pin = pin

    @property
    def public_jwk(self) -> dict[str, Any]:
        """The public key as a JWK (RFC 7517), with its ``kid``, ``alg`` and ``use``.

        Raises:
            InvalidOption: It signs with a secret key, which has no public half.
        """
        if self._public is None:
            raise InvalidOption(f"{self.alg} has a secret key: it is in no JWKS")
        return dict(self._public)

    async def sign(
        self,
        payload: bytes | str,
        headers: Mapping[str, Any] | None = None,
        *,
        timeout: Timeout = DEFAULT,
    ) -> str:
        """A JWS in the compact form (RFC 7515).

        Args:
            payload: Bytes, or text as UTF-8.
            headers: What else the protected header holds, ``typ`` for example.
            timeout: Seconds.

        Raises:
            InvalidOption: A header contradicts the signer, or cannot be JSON.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``.
        """
        if isinstance(payload, str):
            payload = payload.encode()
        if not isinstance(payload, (bytes, bytearray, memoryview)):
            kind = type(payload).__name__
            raise InvalidType(f"payload must be bytes or text, not {kind}; see jwt()")
        signed = f"{_base64(self._header(headers))}.{_base64(bytes(payload))}"
        signature = await self._algorithm.sign(
            self._key, signed.encode(), pin=self._pin, timeout=timeout
        )
        return f"{signed}.{_base64(signature)}"

    async def jwt(
        self,
        claims: Mapping[str, Any],
        *,
        expires_in: float | dt.timedelta | None = None,
        headers: Mapping[str, Any] | None = None,
        timeout: Timeout = DEFAULT,
    ) -> str:
        """A JSON Web Token (RFC 7519), with ``iat`` set to now.

        Args:
            claims: The claims; ``exp``, ``iat`` and ``nbf`` may be aware datetimes.
                What they say wins.
            expires_in: Seconds from ``iat`` to ``exp``.
            headers: As for :meth:`sign`; ``typ`` is ``JWT`` unless it is given.
            timeout: Seconds.

        Raises:
            InvalidOption: A claim or header cannot be used.

        Cancellation:
            As :meth:`sign`.

        Cryptoki:
            As :meth:`sign`.
        """
        payload = _json(_dated(claims, expires_in), "claims")
        given = {"typ": "JWT", **_mapping(headers or {}, "headers")}
        return await self.sign(payload, given, timeout=timeout)

    def _header(self, headers: Mapping[str, Any] | None) -> bytes:
        given = _mapping(headers or {}, "headers")
        own = (
            {"alg": self.alg}
            if self.kid is None
            else {"alg": self.alg, "kid": self.kid}
        )
        for name, value in own.items():
            if given.get(name, value) != value:
                message = f"{name} is {value!r} for this signer, not {given[name]!r}"
                raise InvalidOption(message)
        for name in _FORBIDDEN:
            if name in given:
                raise InvalidOption(f"the header {name!r} is not supported")
        return _json({**own, **given}, "headers")

    def __repr__(self) -> str:
        """Which key and algorithm; never the PIN."""
        return f"<JWSSigner {self.alg} {self._key!r}>"


@hides_pins
async def load_signer(
    key: KeyRef,
    alg: str | None = None,
    *,
    kid: str | None = None,
    pin: str | None = None,
    timeout: Timeout = DEFAULT,
) -> JWSSigner:
    """A signer for JWS and JWT; keep it as long as the pool is open.

    Args:
        key: Names both halves of a pair, or a secret key for ``HS…``.
        alg: ``RS256``, ``PS256``, ``ES256``, ``EdDSA``, ``HS256``, … None: by the key;
            ``RS256`` for RSA.
        kid: None: the thumbprint of the public key (RFC 7638); a secret key has none.
        pin: For keys with ``CKA_ALWAYS_AUTHENTICATE``; or ``PROTECTED_AUTH``.
        timeout: Seconds for reading the public key.

    Raises:
        InvalidOption: The key cannot sign with ``alg``.
        KeyNotFound: There is no such key, or its public half is missing.

    Cancellation:
        The caller goes at once; reading changes nothing.

    Cryptoki:
        ``C_GetAttributeValue``, once.
    """
    checked = None if pin is None else pins.checked(pin)  # type: ignore[arg-type]
    ref = algorithms.check_key(key)
    _check_names(alg, kid)
    if alg in _HMAC:
        await _check_secret(ref, alg, timeout)
        way = _HMAC[alg]
        return JWSSigner(ref, alg, way, kid=kid, public=None, pin=checked)
    public_key = load_der_public_key(await ref.public_key_der(timeout=timeout))
    alg, way = _way(public_key, alg)
    jwk = _public_jwk(public_key)
    kid = kid or jwk.thumbprint()
    public = {**jwk.as_dict(private=False), "kid": kid, "alg": alg, "use": "sig"}
    return JWSSigner(ref, alg, way, kid=kid, public=public, pin=checked)


def jwks(signers: Iterable[JWSSigner]) -> dict[str, list[dict[str, Any]]]:
    """The public keys of signers as a JWK Set (RFC 7517).

    While a key is replaced, give the old and the new one: tokens of both verify.

    Raises:
        InvalidOption: One signs with a secret key, or two have the same ``kid``.
    """
    keys = [signer.public_jwk for signer in signers]
    kids = [key["kid"] for key in keys]
    if len(set(kids)) != len(kids):
        raise InvalidOption(f"two keys have the same kid: {kids}")
    return {"keys": keys}


def joserfc_key(
    private_key: Any, parameters: KeyParameters | None = None
) -> RSAKey | ECKey | OKPKey:
    """A key for joserfc out of one of ``pkcs11_pool.integrations.cryptography``.

    joserfc's own ``import_key`` asks a private key for its numbers.

    Args:
        private_key: What ``load_private_key`` gave.
        parameters: Further members of the JWK, as joserfc takes them.

    Raises:
        InvalidOption: joserfc knows no such key.
    """
    public = _public_jwk(private_key.public_key())
    values = public.as_dict(private=False)
    return type(public)(private_key, values, parameters)


def _public_jwk(public_key: object) -> RSAKey | ECKey | OKPKey:
    if isinstance(public_key, rsa.RSAPublicKey):
        return RSAKey.import_key(public_key)
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return ECKey.import_key(public_key)
    if isinstance(public_key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
        return OKPKey.import_key(public_key)
    raise InvalidOption(f"JOSE signs with no {type(public_key).__name__}")


def _check_names(alg: object, kid: object) -> None:
    if alg is not None and alg not in (*_RSA, *_EC, *_HMAC, *_EDWARDS):
        known = ", ".join((*_RSA, *_EC, *_EDWARDS, *_HMAC))
        raise InvalidOption(f"alg must be one of {known}, not {alg!r}")
    if kid is not None and not (isinstance(kid, str) and kid):
        raise InvalidType(f"kid must be a text, not {kid!r}")


_EDWARDS: Final[dict[str, tuple[type, ...]]] = {
    "EdDSA": (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey),
    "Ed25519": (ed25519.Ed25519PublicKey,),
    "Ed448": (ed448.Ed448PublicKey,),
}


def _way(public_key: object, alg: str | None) -> tuple[str, Algorithm]:
    """The algorithms of a kind of key: which one, and how the token does it."""
    fitting: dict[str, Algorithm] = {}
    kind = type(public_key).__name__
    if isinstance(public_key, rsa.RSAPublicKey):
        fitting = _RSA
    elif isinstance(public_key, ec.EllipticCurvePublicKey):
        kind = f"key on {public_key.curve.name}"
        fitting = {
            name: way
            for name, (curve, way) in _EC.items()
            if curve == public_key.curve.name
        }
    else:
        fitting = {
            name: algorithms.eddsa()
            for name, kinds in _EDWARDS.items()
            if isinstance(public_key, kinds)
        }
    if not fitting:
        raise InvalidOption(f"JOSE has no algorithm for a {kind}")
    if alg is None:
        alg = next(iter(fitting))
    if alg not in fitting:
        message = f"a {kind} signs with {', '.join(fitting)}, not with {alg}"
        raise InvalidOption(message)
    return alg, fitting[alg]


async def _check_secret(key: KeyRef, alg: str, timeout: Timeout) -> None:
    names = (Attribute.KEY_TYPE, Attribute.VALUE_LEN)
    secret = algorithms.secret_key(key)
    seen = await secret.attributes(names, timeout=timeout)
    kind = seen.get(Attribute.KEY_TYPE)
    if kind not in algorithms.SECRET_KEY_TYPES:
        name = kind.name if isinstance(kind, KeyType) else kind
        message = f"{alg} signs with a secret key (GENERIC_SECRET), not with {name}"
        raise InvalidOption(message)
    size = seen.get(Attribute.VALUE_LEN, _SHORTEST[alg])
    if size < _SHORTEST[alg]:
        message = f"{alg} needs a key of {_SHORTEST[alg]} bytes, not of {size}"
        raise InvalidOption(message)


def _dated(
    claims: Mapping[str, Any], expires_in: float | dt.timedelta | None
) -> dict[str, Any]:
    made = {"iat": int(time.time()), **_mapping(claims, "claims")}
    for name in _TIMES:
        if isinstance(moment := made.get(name), dt.datetime):
            if moment.tzinfo is None:
                raise InvalidOption(f"{name} must be a datetime with a time zone")
            made[name] = int(moment.timestamp())
    if expires_in is not None and "exp" not in made:
        if isinstance(expires_in, dt.timedelta):
            expires_in = expires_in.total_seconds()
        if not isinstance(expires_in, (int, float)) or expires_in <= 0:
            raise InvalidOption("expires_in must be a number of seconds above 0")
        made["exp"] = int(made["iat"] + expires_in)
    return made


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise InvalidType(f"{name} must be a mapping, not {type(value).__name__}")


def _json(value: object, name: str) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"{name} cannot be JSON: {error}") from error


def _base64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
