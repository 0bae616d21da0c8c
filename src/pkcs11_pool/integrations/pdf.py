"""PDF and CMS signatures by pyHanko, made on the event loop.

``docs/how-to/sign-pdf.md`` shows it at work.

As many documents at once as you like: the digest of each is made by pyHanko, and what
reaches the token is one short signature. That loop is asyncio's, for pyHanko knows no
other: on trio each awaited signature raises ``WrongLoop``, which says what to do.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from asn1crypto import keys, pem, x509
from asn1crypto.algos import SignedDigestAlgorithm

from pkcs11_pool import pins
from pkcs11_pool.errors import InvalidOption, InvalidType, KeyNotFound, WrongLoop
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.integrations import algorithms, extras

try:
    from pyhanko.sign.signers.pdf_cms import Signer
    from pyhanko_certvalidator.registry import SimpleCertificateStore
except ModuleNotFoundError as error:
    raise extras.missing("pdf", error) from error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asn1crypto import cms
    from pyhanko_certvalidator.registry import CertificateStore

    from pkcs11_pool.faces.keyref import KeyRef

__all__ = ["PoolSigner", "load_signer"]


class PoolSigner(Signer):
    """pyHanko's ``Signer`` with a key of the pool; made by :func:`load_signer`.

    Many threads may sign with it. What pyHanko is given of it is a copy each time:
    asn1crypto takes an object apart while it encodes it.
    """

    def __init__(
        self,
        key: KeyRef,
        certificate: x509.Certificate,
        chain: Iterable[x509.Certificate] = (),
        *,
        mechanism: SignedDigestAlgorithm | None = None,
        pin: pins.Pin | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._key = key
        self._pin = pin
        self._own: bytes = certificate.dump()
        self._chain: list[bytes] = [item.dump() for item in chain]
        self._mechanism = None if mechanism is None else mechanism.dump()
        self._public = algorithms.settled(certificate.public_key)

    @property
    def signing_cert(self) -> x509.Certificate:
        """The signer's certificate."""
        return x509.Certificate.load(self._own)

    @property
    def cert_registry(self) -> CertificateStore:
        """The certificates to embed."""
        registry = SimpleCertificateStore()  # type: ignore[no-untyped-call]
        for der in self._chain:
            registry.register(x509.Certificate.load(der))
        return registry

    @property
    def signature_mechanism(self) -> SignedDigestAlgorithm | None:
        """What was asked for, if it was."""
        der = self._mechanism
        return None if der is None else SignedDigestAlgorithm.load(der)

    async def async_sign(self, *args: Any, **options: Any) -> cms.ContentInfo:
        """Make a CMS signature of a digest, as pyHanko's ``Signer`` does.

        All of pyHanko's ways to sign come through here: PDF files and other data.

        Raises:
            WrongLoop: This is not asyncio. On trio sign on a worker thread instead:
                ``await anyio.to_thread.run_sync(signer.sign_pdf, writer)``.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            As :meth:`async_sign_raw`.
        """
        if not _is_asyncio():
            message = (
                "pyHanko signs on asyncio only. Elsewhere use its blocking form on a "
                "worker thread: await anyio.to_thread.run_sync(signer.sign_pdf, writer)"
            )
            raise WrongLoop(message)
        made: cms.ContentInfo = await super().async_sign(*args, **options)
        return made

    async def async_sign_raw(
        self,
        data: bytes,
        digest_algorithm: str,
        dry_run: bool = False,  # noqa: FBT001, FBT002  # as pyHanko calls it
    ) -> bytes:
        """Sign what pyHanko has put together.

        Args:
            data: The signed attributes.
            digest_algorithm: The hash, as pyHanko calls it.
            dry_run: Give as many bytes as the signature may have, and sign nothing.

        Raises:
            InvalidOption: No token signs so.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``.
        """
        if dry_run:
            return bytes(_most_bytes(self._public))
        name = digest_algorithm.lower()
        identifier = self.get_signature_mechanism_for_digest(name)
        way = algorithms.of_identifier(identifier, self._public, name)
        return await way.sign(self._key, data, pin=self._pin)

    def __repr__(self) -> str:
        """Which key it is; never the PIN."""
        return f"<PoolSigner {self._key!r}>"


async def load_signer(
    key: KeyRef,
    certificate: Any,
    *,
    chain: Iterable[Any] = (),
    prefer_pss: bool = False,
    signature_mechanism: SignedDigestAlgorithm | None = None,
    embed_roots: bool = True,
    pin: str | None = None,
    timeout: Timeout = DEFAULT,
) -> PoolSigner:
    """A signer for pyHanko; keep it as long as the pool is open.

    Args:
        key: Names both halves of an RSA, EC or Ed pair.
        certificate: The signer's: of asn1crypto, of ``cryptography``, DER or PEM.
        chain: Certificates to embed, up to the root.
        prefer_pss: As pyHanko takes it: RSASSA-PSS where it is an RSA key.
        signature_mechanism: As pyHanko takes it.
        embed_roots: As pyHanko takes it.
        pin: For keys with ``CKA_ALWAYS_AUTHENTICATE``; or ``PROTECTED_AUTH``.
        timeout: Seconds for reading the public key.

    Raises:
        InvalidOption: The certificate is not one of this key, or cannot be read.

    Cancellation:
        The caller goes at once; reading changes nothing.

    Cryptoki:
        ``C_GetAttributeValue``, once, to compare key and certificate.
    """
    pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
    checked = None if pin is None else pins.checked(pin)  # type: ignore[arg-type]
    ref, own = algorithms.check_key(key), _certificate(certificate)
    await _check_pair(ref, own, timeout)
    return PoolSigner(
        ref,
        own,
        map(_certificate, chain),
        mechanism=signature_mechanism,
        pin=checked,
        prefer_pss=prefer_pss,
        embed_roots=embed_roots,
    )


def _is_asyncio() -> bool:
    """Whether a task of asyncio runs here; trio may be its guest, and has none."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


async def _check_pair(key: KeyRef, own: x509.Certificate, timeout: Timeout) -> None:
    """Refuse a certificate of another key: nobody could verify what it signs."""
    try:
        der = await key.public_key_der(timeout=timeout)
    except KeyNotFound:
        return  # a token may hold a private key and a certificate only
    public = keys.PublicKeyInfo.load(der)
    if public.sha256 != own.public_key.sha256:
        subject = own.subject.human_friendly
        raise InvalidOption(f"the certificate of {subject} is not one of {key!r}")


def _certificate(value: Any) -> x509.Certificate:
    if isinstance(value, x509.Certificate):
        return value
    if hasattr(value, "public_bytes"):
        from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
            Encoding,
        )

        value = value.public_bytes(Encoding.DER)
    if not isinstance(value, bytes):
        kind = type(value).__name__
        message = f"a certificate is one of asn1crypto or cryptography, not {kind}"
        raise InvalidType(message)
    try:
        if pem.detect(value):
            _, _, value = pem.unarmor(value)
        made = x509.Certificate.load(value, strict=True)
        _ = made.native  # read, so that what is no certificate is seen here
    except ValueError as error:
        raise InvalidOption("a certificate cannot be read: DER or PEM?") from error
    return made


def _most_bytes(public: keys.PublicKeyInfo) -> int:
    """The bytes that a signature with this key has at most."""
    if public.algorithm == "rsa":
        return (int(public.bit_size) + 7) // 8
    if public.algorithm == "ec":
        # Two numbers in DER, each with a header and perhaps a zero in front.
        return 2 * ((int(public.bit_size) + 7) // 8 + 3) + 3
    return 64 if public.algorithm == "ed25519" else 114
