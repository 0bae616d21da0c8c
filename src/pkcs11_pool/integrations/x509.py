"""Certificates, requests and CRLs issued on the event loop, with asn1crypto.

.. code-block:: python

    from pkcs11_pool.integrations.x509 import load_issuer

    ca = await load_issuer(pool.key(label="signer"), {"common_name": "Example CA"})
    root = await ca.self_signed(days=3650)
    public = await pool.key(label="p256").public_key_der()
    cert = await ca.certificate({"common_name": "web"}, public, days=90)

Nothing waits on a thread: each signature is one awaited operation of the pool. What
the helpers do not have, ``sign_certificate``, ``sign_request`` and ``sign_crl`` sign.
asn1crypto comes with python-pkcs11. ``pkcs11_pool.integrations.cryptography`` is the
way for ``cryptography``'s builders.
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from asn1crypto import algos, crl, csr, keys, x509

from pkcs11_pool import pins
from pkcs11_pool.errors import InvalidOption, InvalidType
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.integrations import algorithms

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pkcs11_pool.faces.keyref import KeyRef

__all__ = ["Issuer", "Revoked", "load_issuer"]

NameLike: TypeAlias = Mapping[str, Any] | x509.Name
PublicKeyLike: TypeAlias = bytes | keys.PublicKeyInfo

_SERIAL_BITS: Final = 159
"""Random serial numbers, positive in 20 bytes (RFC 5280, "Serial Number")."""
_LAST_UTC_YEAR: Final = 2049
_HASHES: Final = ((256, "sha256"), (384, "sha384"))
_CA_USES: Final = {"key_cert_sign", "crl_sign"}
_LEAF_USES: Final = {"digital_signature"}


@dataclass(frozen=True, slots=True)
class Revoked:
    """A certificate that a CRL lists.

    Attributes:
        serial_number: Its serial number.
        date: When it was revoked; aware.
        reason: As asn1crypto names it: ``"key_compromise"``, ``"superseded"``, …
    """

    serial_number: int
    date: dt.datetime
    reason: str | None = None


class Issuer:
    """A name and the key that signs for it; made by :func:`load_issuer`.

    Attributes:
        name: Who issues.
        public_key: The public key of the key.
        algorithm: What stands in each structure as its signature algorithm.
    """

    def __init__(
        self,
        key: KeyRef,
        name: x509.Name,
        public_key: keys.PublicKeyInfo,
        algorithm: algos.SignedDigestAlgorithm,
        pin: pins.Pin | None,
    ) -> None:
        self.name = algorithms.settled(name)
        self.public_key = algorithms.settled(public_key)
        self.algorithm = algorithms.settled(algorithm)
        self._key = key
        self._pin = pin
        self._way = algorithms.of_identifier(algorithm, public_key)

    async def sign_certificate(
        self, tbs: x509.TbsCertificate, *, timeout: Timeout = DEFAULT
    ) -> x509.Certificate:
        """Sign a certificate; its ``signature`` is set to the algorithm.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``.
        """
        tbs["signature"] = self.algorithm
        made = x509.Certificate(
            {
                "tbs_certificate": tbs,
                "signature_algorithm": self.algorithm,
                "signature_value": await self._sign(tbs, timeout),
            }
        )
        return x509.Certificate.load(made.dump())

    async def sign_request(
        self, info: csr.CertificationRequestInfo, *, timeout: Timeout = DEFAULT
    ) -> csr.CertificationRequest:
        """Sign a certification request (PKCS #10, RFC 2986).

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``.
        """
        made = csr.CertificationRequest(
            {
                "certification_request_info": info,
                "signature_algorithm": self.algorithm,
                "signature": await self._sign(info, timeout),
            }
        )
        return csr.CertificationRequest.load(made.dump())

    async def sign_crl(
        self, tbs: crl.TbsCertList, *, timeout: Timeout = DEFAULT
    ) -> crl.CertificateList:
        """Sign a CRL; its ``signature`` is set to the algorithm.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``.
        """
        tbs["signature"] = self.algorithm
        made = crl.CertificateList(
            {
                "tbs_cert_list": tbs,
                "signature_algorithm": self.algorithm,
                "signature": await self._sign(tbs, timeout),
            }
        )
        return crl.CertificateList.load(made.dump())

    async def certificate(
        self,
        subject: NameLike,
        public_key: PublicKeyLike,
        *,
        days: float,
        ca: bool = False,
        uses: AbstractSet[str] | None = None,
        extensions: Sequence[Mapping[str, Any]] = (),
        serial_number: int | None = None,
        not_before: dt.datetime | None = None,
        timeout: Timeout = DEFAULT,
    ) -> x509.Certificate:
        """Issue a certificate (RFC 5280).

        It has basic constraints, key usage and both key identifiers, unless
        ``extensions`` has its own.

        Args:
            subject: Whose it is: a name, or its parts as asn1crypto calls them.
            public_key: What ``await key.public_key_der()`` gives, or a
                ``PublicKeyInfo``, of a request for example.
            days: How long it is valid.
            ca: Whether the subject may issue certificates itself.
            uses: Its key usage, as asn1crypto calls them. None: ``key_cert_sign`` and
                ``crl_sign`` of a CA, ``digital_signature`` of others.
            extensions: More of them, as asn1crypto takes them: ``extn_id``,
                ``critical``, ``extn_value``.
            serial_number: None: a random one.
            not_before: From when on; aware. None: now.
            timeout: Seconds.

        Raises:
            InvalidOption: An argument cannot be used.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``.
        """
        start = _moment(not_before, "not_before")
        public = _public_key(public_key)
        own = {
            "basic_constraints": (True, {"ca": ca}),
            "key_usage": (True, set(uses or (_CA_USES if ca else _LEAF_USES))),
            "key_identifier": (False, public.sha1),
            "authority_key_identifier": (
                False,
                {"key_identifier": self.public_key.sha1},
            ),
        }
        number = secrets.randbits(_SERIAL_BITS) if serial_number is None else None
        tbs = x509.TbsCertificate(
            {
                "version": "v3",
                "serial_number": serial_number if number is None else number + 1,
                "signature": self.algorithm,
                "issuer": self.name,
                "validity": {
                    "not_before": _time(start),
                    "not_after": _time(start + _days(days)),
                },
                "subject": _name(subject),
                "subject_public_key_info": public,
                "extensions": _extensions(own, extensions),
            }
        )
        return await self.sign_certificate(tbs, timeout=timeout)

    async def self_signed(
        self,
        *,
        days: float,
        ca: bool = True,
        uses: AbstractSet[str] | None = None,
        extensions: Sequence[Mapping[str, Any]] = (),
        timeout: Timeout = DEFAULT,
    ) -> x509.Certificate:
        """A certificate of the issuer for itself: see :meth:`certificate`.

        Cancellation:
            As :meth:`certificate`.

        Cryptoki:
            As :meth:`certificate`.
        """
        return await self.certificate(
            self.name,
            self.public_key,
            days=days,
            ca=ca,
            uses=uses,
            extensions=extensions,
            timeout=timeout,
        )

    async def request(
        self,
        *,
        extensions: Sequence[Mapping[str, Any]] = (),
        timeout: Timeout = DEFAULT,
    ) -> csr.CertificationRequest:
        """A request (PKCS #10) that somebody else certifies this name and key.

        Cancellation:
            As :meth:`certificate`.

        Cryptoki:
            As :meth:`certificate`.
        """
        attributes = []
        if extensions:
            wanted = _extensions({}, extensions)
            attributes = [{"type": "extension_request", "values": [wanted]}]
        info = csr.CertificationRequestInfo(
            {
                "version": "v1",
                "subject": self.name,
                "subject_pk_info": self.public_key,
                "attributes": attributes,
            }
        )
        return await self.sign_request(info, timeout=timeout)

    async def crl(
        self,
        revoked: Iterable[Revoked] = (),
        *,
        number: int,
        days: float,
        this_update: dt.datetime | None = None,
        timeout: Timeout = DEFAULT,
    ) -> crl.CertificateList:
        """A list of certificates that the issuer has revoked (RFC 5280).

        Args:
            revoked: Which.
            number: Larger in each list than in the one before.
            days: Until the next one.
            this_update: Aware; None: now.
            timeout: Seconds.

        Cancellation:
            As :meth:`certificate`.

        Cryptoki:
            As :meth:`certificate`.
        """
        start = _moment(this_update, "this_update")
        own = {
            "authority_key_identifier": (
                False,
                {"key_identifier": self.public_key.sha1},
            ),
            "crl_number": (False, number),
        }
        fields: dict[str, Any] = {
            "version": "v2",
            "signature": self.algorithm,
            "issuer": self.name,
            "this_update": _time(start),
            "next_update": _time(start + _days(days)),
            "crl_extensions": _extensions(own, ()),
        }
        # An empty list must be left out (RFC 5280, "Revoked Certificates").
        if entries := [_entry(item) for item in revoked]:
            fields["revoked_certificates"] = entries
        return await self.sign_crl(crl.TbsCertList(fields), timeout=timeout)

    async def _sign(self, structure: Any, timeout: Timeout) -> bytes:
        return await self._way.sign(
            self._key, structure.dump(), pin=self._pin, timeout=timeout
        )

    def __repr__(self) -> str:
        """Who, and with which key; never the PIN."""
        return f"<Issuer {self.name.human_friendly!r} {self._key!r}>"


@hides_pins
async def load_issuer(
    key: KeyRef,
    name: NameLike,
    *,
    hash_name: str | None = None,
    pss: bool = False,
    pin: str | None = None,
    timeout: Timeout = DEFAULT,
) -> Issuer:
    """An issuer with a key of the pool; keep it as long as the pool is open.

    Args:
        key: Names both halves of an RSA, EC or Ed pair.
        name: Who issues: a name, or its parts as asn1crypto calls them. For a CA that
            has a certificate: its ``subject``.
        hash_name: ``"sha256"``, … None: as strong as the key.
        pss: Sign with RSASSA-PSS, where it is an RSA key.
        pin: For keys with ``CKA_ALWAYS_AUTHENTICATE``; or ``PROTECTED_AUTH``.
        timeout: Seconds for reading the public key.

    Raises:
        InvalidOption: The key or the hash cannot sign certificates.
        KeyNotFound: The token has no such public key.

    Cancellation:
        The caller goes at once; reading changes nothing.

    Cryptoki:
        ``C_GetAttributeValue``, once.
    """
    checked = None if pin is None else pins.checked(pin)  # type: ignore[arg-type]
    ref, who = algorithms.check_key(key), _name(name)
    public = _public_key(await ref.public_key_der(timeout=timeout))
    return Issuer(ref, who, public, _algorithm(public, hash_name, pss=pss), checked)


def _algorithm(
    public: keys.PublicKeyInfo, hash_name: str | None, *, pss: bool
) -> algos.SignedDigestAlgorithm:
    kind = public.algorithm
    if kind in {"ed25519", "ed448"}:
        if hash_name is not None or pss:
            raise InvalidOption(f"{kind} has its own hash: leave out hash_name and pss")
        return algos.SignedDigestAlgorithm({"algorithm": kind})
    if kind not in {"rsa", "ec"}:
        raise InvalidOption(f"certificates are not signed here with a {kind} key")
    if hash_name is None:
        bits = public.bit_size if kind == "ec" else 0
        hash_name = next((h for most, h in _HASHES if bits <= most), "sha512")
    if hash_name not in algorithms.HASHES:
        known = ", ".join(algorithms.HASHES)
        raise InvalidOption(f"hash_name must be one of {known}, not {hash_name!r}")
    if kind == "ec":
        if pss:
            raise InvalidOption("pss is for RSA keys")
        return algos.SignedDigestAlgorithm({"algorithm": f"{hash_name}_ecdsa"})
    if not pss:
        return algos.SignedDigestAlgorithm({"algorithm": f"{hash_name}_rsa"})
    digest = {"algorithm": hash_name}
    return algos.SignedDigestAlgorithm(
        {
            "algorithm": "rsassa_pss",
            "parameters": {
                "hash_algorithm": digest,
                "mask_gen_algorithm": {"algorithm": "mgf1", "parameters": digest},
                "salt_length": algorithms.digest_size(hash_name),
            },
        }
    )


def _name(value: object) -> x509.Name:
    if isinstance(value, x509.Name):
        return value
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        message = f"a name is an asn1crypto Name or a mapping of its parts, not {kind}"
        raise InvalidType(message)
    try:
        return x509.Name.build(dict(value))
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"the name cannot be used: {error}") from error


def _public_key(value: object) -> keys.PublicKeyInfo:
    if isinstance(value, keys.PublicKeyInfo):
        return value
    if not isinstance(value, bytes):
        message = (
            f"public_key must be DER or a PublicKeyInfo, not {type(value).__name__}"
        )
        raise InvalidType(message)
    try:
        found = keys.PublicKeyInfo.load(value, strict=True)
        _ = found.algorithm  # read, so that what it is no key of is seen here
    except ValueError as error:
        raise InvalidOption("public_key is no DER of a public key") from error
    return found


def _extensions(
    own: Mapping[str, tuple[bool, Any]], given: Sequence[Mapping[str, Any]]
) -> x509.Extensions:
    replaced = {item.get("extn_id") for item in given}
    made = [
        {"extn_id": name, "critical": critical, "extn_value": value}
        for name, (critical, value) in own.items()
        if name not in replaced
    ]
    return [*made, *map(dict, given)]


def _entry(item: object) -> dict[str, Any]:
    if not isinstance(item, Revoked):
        raise InvalidType(f"revoked must hold Revoked(...), not {type(item).__name__}")
    entry: dict[str, Any] = {
        "user_certificate": item.serial_number,
        "revocation_date": _time(_moment(item.date, "date")),
    }
    if item.reason is not None:
        reason = {"extn_id": "crl_reason", "extn_value": item.reason}
        entry["crl_entry_extensions"] = [reason]
    return entry


def _moment(value: dt.datetime | None, name: str) -> dt.datetime:
    if value is None:
        value = dt.datetime.now(dt.UTC)
    if not isinstance(value, dt.datetime) or value.tzinfo is None:
        raise InvalidOption(f"{name} must be a datetime with a time zone")
    return value.astimezone(dt.UTC).replace(microsecond=0)


def _days(days: object) -> dt.timedelta:
    if not isinstance(days, (int, float)) or not days > 0:
        raise InvalidOption("days must be a number above 0")
    return dt.timedelta(days=days)


def _time(moment: dt.datetime) -> x509.Time:
    """The form that RFC 5280 wants for the year."""
    form = "utc_time" if moment.year <= _LAST_UTC_YEAR else "general_time"
    return x509.Time({form: moment})
