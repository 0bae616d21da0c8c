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

import secrets
from typing import TYPE_CHECKING, Any, Final

from asn1crypto import crl, csr, x509

from pkcs11_pool import pins
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.integrations import algorithms
from pkcs11_pool.integrations.fields import (
    Revoked,
    algorithm_of,
    days_of,
    entry_of,
    extensions_of,
    moment,
    name_of,
    public_key_of,
    time_of,
)

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from asn1crypto import algos, keys

    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.integrations.fields import NameLike, PublicKeyLike

__all__ = ["Issuer", "Revoked", "load_issuer"]

_SERIAL_BITS: Final = 159
"""Random serial numbers, positive in 20 bytes (RFC 5280, "Serial Number")."""
_CA_USES: Final = {"key_cert_sign", "crl_sign"}
_LEAF_USES: Final = {"digital_signature"}


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
        start = moment(not_before, "not_before")
        public = public_key_of(public_key)
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
                    "not_before": time_of(start),
                    "not_after": time_of(start + days_of(days)),
                },
                "subject": name_of(subject),
                "subject_public_key_info": public,
                "extensions": extensions_of(own, extensions),
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
            wanted = extensions_of({}, extensions)
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
        start = moment(this_update, "this_update")
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
            "this_update": time_of(start),
            "next_update": time_of(start + days_of(days)),
            "crl_extensions": extensions_of(own, ()),
        }
        # An empty list must be left out (RFC 5280, "Revoked Certificates").
        if entries := [entry_of(item) for item in revoked]:
            fields["revoked_certificates"] = entries
        return await self.sign_crl(crl.TbsCertList(fields), timeout=timeout)

    async def _sign(self, structure: Any, timeout: Timeout) -> bytes:
        return await self._way.sign(
            self._key, structure.dump(), pin=self._pin, timeout=timeout
        )

    def __repr__(self) -> str:
        """Who, and with which key; never the PIN."""
        return f"<Issuer {self.name.human_friendly!r} {self._key!r}>"


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
    pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
    checked = None if pin is None else pins.checked(pin)  # type: ignore[arg-type]
    ref, who = algorithms.check_key(key), name_of(name)
    public = public_key_of(await ref.public_key_der(timeout=timeout))
    return Issuer(ref, who, public, algorithm_of(public, hash_name, pss=pss), checked)
