"""PDF signatures made on the event loop, validated by pyHanko itself."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest
from asn1crypto import algos
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding
from pyhanko.pdf_utils.generic import ArrayObject, NumberObject, StreamObject
from pyhanko.pdf_utils.incremental_writer import IncrementalPdfFileWriter
from pyhanko.pdf_utils.reader import PdfFileReader
from pyhanko.pdf_utils.writer import PageObject, PdfFileWriter
from pyhanko.sign.signers import PdfSignatureMetadata, PdfSigner
from pyhanko.sign.validation import validate_pdf_signature
from pyhanko_certvalidator import ValidationContext

from pkcs11_pool import InvalidOption, InvalidType, KeyNotFound, WrongLoop
from pkcs11_pool.integrations.pdf import load_signer
from pkcs11_pool.integrations.x509 import load_issuer
from poolkit import ASYNCIO_ONLY, blocking
from signkit import MANY, at_once, imported_without, pool_on, token_with

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken

KEYS = ["rsa", "p256", "p521", "ed25519", "ed448"]


@pytest.fixture(scope="module")
def token(
    soft_hsm: SoftHSM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ThrowawayToken]:
    """One token with keys for all tests of this file."""
    with token_with(soft_hsm, tmp_path_factory.mktemp("token"), KEYS) as made:
        yield made


@pytest.fixture
async def pool(token: ThrowawayToken) -> AsyncIterator[TokenPool]:
    """An open pool on that token."""
    async with pool_on(token) as opened:
        yield opened


async def certificate_of(pool: TokenPool, label: str) -> Any:
    """A certificate of one of the keys for itself, signed through the pool."""
    issuer = await load_issuer(pool.key(label=label), {"common_name": label})
    return await issuer.self_signed(days=10, ca=False, uses={"non_repudiation"})


def pdf(number: int = 0) -> io.BytesIO:
    """A PDF to sign; no two are alike."""
    writer, file = PdfFileWriter(), io.BytesIO()
    contents = writer.add_object(StreamObject(stream_data=b"%%%d" % number))
    box = ArrayObject(map(NumberObject, (0, 0, 595, 842)))
    writer.insert_page(PageObject(contents=contents, media_box=box))
    writer.write(file)
    return file


async def signed(signer: Any, number: int = 0, **meta: Any) -> io.BytesIO:
    """A PDF with a signature."""
    given = PdfSignatureMetadata(field_name="Signature1", **meta)
    writer = IncrementalPdfFileWriter(pdf(number))
    made: io.BytesIO = await PdfSigner(given, signer).async_sign_pdf(writer)
    return made


def status_of(file: io.BytesIO, trusted: Any) -> Any:
    """What pyHanko says of the signature. It runs an event loop of its own."""
    # Of its own: asn1crypto takes an object apart while it encodes it.
    root = asn1.Certificate.load(trusted.dump())
    trust = ValidationContext(trust_roots=[root])
    return validate_pdf_signature(PdfFileReader(file).embedded_signatures[0], trust)


@ASYNCIO_ONLY
@pytest.mark.parametrize(
    ("label", "given", "mechanism"),
    [
        ("rsa", {}, "sha256_rsa"),
        ("rsa", {"prefer_pss": True}, "rsassa_pss"),
        ("p256", {}, "sha256_ecdsa"),
        ("p521", {}, "sha512_ecdsa"),
        ("ed25519", {}, "ed25519"),
        ("ed448", {}, "ed448"),
    ],
)
async def test_pyhanko_validates_each_kind_of_signature(
    pool: TokenPool, label: str, given: dict[str, Any], mechanism: str
) -> None:
    """Intact, valid and trusted, made the way that was asked for."""
    own = await certificate_of(pool, label)
    signer = await load_signer(pool.key(label=label), own, **given)
    file = await signed(signer)
    status = await blocking(status_of, file, own)
    assert status.bottom_line
    assert status.pkcs7_signature_mechanism == mechanism


@ASYNCIO_ONLY
@pytest.mark.parametrize("label", ["rsa", "p256"])
async def test_many_pdfs_are_signed_at_once(pool: TokenPool, label: str) -> None:
    """Two hundred raw signatures, and enough whole documents to be sure."""
    own = await certificate_of(pool, label)
    signer = await load_signer(pool.key(label=label), own)
    key = x509.load_der_x509_certificate(own.dump()).public_key()
    raw = await at_once(lambda n: signer.async_sign_raw(b"%d" % n, "sha256"))
    assert len(raw) == MANY
    how = signer.get_signature_mechanism_for_digest("sha256")
    for number, signature in enumerate(raw):
        verify(key, signature, b"%d" % number, how)
    files = await at_once(lambda n: signed(signer, n), 20)
    states = await blocking(lambda: [status_of(file, own) for file in files])
    assert all(status.bottom_line for status in states)


def verify(key: Any, signature: bytes, data: bytes, how: Any) -> None:
    """By ``cryptography``; raises if it is not one of this key."""
    if how.signature_algo == "ecdsa":
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    else:
        key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())


async def test_a_thread_signs_where_pyhanko_has_no_loop(pool: TokenPool) -> None:
    """It knows asyncio only: from trio, use its blocking form on a worker thread."""
    own = await certificate_of(pool, "p256")
    signer = await load_signer(pool.key(label="p256"), own)
    given = PdfSignatureMetadata(field_name="Signature1")

    def sign(number: int) -> Any:
        writer = IncrementalPdfFileWriter(pdf(number))
        file = PdfSigner(given, signer).sign_pdf(writer)
        return status_of(file, own)

    states = await at_once(lambda n: blocking(sign, n), 10)
    assert all(status.bottom_line for status in states)


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_on_trio_each_awaited_signature_says_what_to_do(pool: TokenPool) -> None:
    """Of a file and of other data; what it says to do then signs."""
    own = await certificate_of(pool, "p256")
    signer = await load_signer(pool.key(label="p256"), own)
    before = pool.stats().operations_total
    with pytest.raises(WrongLoop, match=r"run_sync\(signer\.sign_pdf, writer"):
        await signed(signer)
    with pytest.raises(WrongLoop, match="asyncio only"):
        await signer.async_sign_general_data(b"data", "sha256")
    assert pool.stats().operations_total == before
    writer = IncrementalPdfFileWriter(pdf())
    pdf_signer = PdfSigner(PdfSignatureMetadata(field_name="Signature1"), signer)
    file = await anyio.to_thread.run_sync(pdf_signer.sign_pdf, writer)
    assert (await blocking(status_of, file, own)).bottom_line


@ASYNCIO_ONLY
async def test_a_changed_document_is_not_valid(pool: TokenPool) -> None:
    """The validator of these tests can say no."""
    own = await certificate_of(pool, "p256")
    signer = await load_signer(pool.key(label="p256"), own)
    data = bytearray((await signed(signer)).getvalue())
    place = data.index(b"595")
    data[place : place + 3] = b"596"
    status = await blocking(status_of, io.BytesIO(data), own)
    assert not status.bottom_line


@ASYNCIO_ONLY
async def test_a_chain_is_embedded(pool: TokenPool) -> None:
    """Whoever trusts the root alone finds the certificates in between."""
    root_issuer = await load_issuer(pool.key(label="rsa"), {"common_name": "root"})
    root = await root_issuer.self_signed(days=10)
    issuer = await load_issuer(pool.key(label="p521"), {"common_name": "middle"})
    middle = await root_issuer.certificate(
        issuer.name, issuer.public_key, days=9, ca=True
    )
    public = await pool.key(label="p256").public_key_der()
    own = await issuer.certificate(
        {"common_name": "me"}, public, days=8, uses={"non_repudiation"}
    )
    signer = await load_signer(pool.key(label="p256"), own, chain=[middle])
    status = await blocking(status_of, await signed(signer), root)
    assert status.bottom_line
    alone = await load_signer(pool.key(label="p256"), own)
    status = await blocking(status_of, await signed(alone), root)
    assert not status.trusted


async def test_a_certificate_may_come_in_each_form(pool: TokenPool) -> None:
    """Of asn1crypto, of ``cryptography``, DER and PEM."""
    own = await certificate_of(pool, "p256")
    theirs = x509.load_der_x509_certificate(own.dump())
    for form in (own, theirs, own.dump(), theirs.public_bytes(Encoding.PEM)):
        signer = await load_signer(pool.key(label="p256"), form, chain=[form])
        assert signer.signing_cert is not None
        assert signer.signing_cert.dump() == own.dump()


async def test_a_certificate_of_another_key_is_refused(pool: TokenPool) -> None:
    """When the signer is loaded: nobody could verify what it signs."""
    own = await certificate_of(pool, "rsa")
    with pytest.raises(InvalidOption, match="rsa is not one of <KeyRef label='p256'>"):
        await load_signer(pool.key(label="p256"), own)
    for wrong, error, says in (
        (b"junk", InvalidOption, "DER or PEM"),
        (5, InvalidType, "not int"),
    ):
        with pytest.raises(error, match=says):
            await load_signer(pool.key(label="p256"), wrong)
    with pytest.raises(InvalidType, match="must be a KeyRef"):
        await load_signer("p256", own)  # type: ignore[arg-type]
    lost = await load_signer(pool.key(label="nobody"), own)
    with pytest.raises(KeyNotFound):
        await lost.async_sign_raw(b"", "sha256")


async def test_a_hash_that_does_not_fit_is_refused(pool: TokenPool) -> None:
    """With our own error, before anything is signed."""
    own = await certificate_of(pool, "rsa")
    fixed = algos.SignedDigestAlgorithm({"algorithm": "sha512_rsa"})
    signer = await load_signer(pool.key(label="rsa"), own, signature_mechanism=fixed)
    with pytest.raises(InvalidOption, match="signs with sha512, not with sha256"):
        await signer.async_sign_raw(b"data", "sha256")
    signer = await load_signer(pool.key(label="rsa"), own)
    with pytest.raises(InvalidOption, match="no token signs with 'md5'"):
        await signer.async_sign_raw(b"data", "md5")


@pytest.mark.parametrize("label", KEYS)
async def test_a_dry_run_leaves_room_and_signs_nothing(
    pool: TokenPool, label: str
) -> None:
    """As much as any signature of the key may need."""
    own = await certificate_of(pool, label)
    signer = await load_signer(pool.key(label=label), own)
    before = pool.stats().operations_total
    room = len(await signer.async_sign_raw(b"data", "sha256", dry_run=True))
    assert pool.stats().operations_total == before
    for _ in range(5):
        size = len(await signer.async_sign_raw(b"data", "sha256"))
        assert size <= room <= size + 12


async def test_the_pin_does_not_show(pool: TokenPool, token: ThrowawayToken) -> None:
    """It is kept for keys that want it each time."""
    own = await certificate_of(pool, "rsa")
    key = pool.key(label="rsa")
    signer = await load_signer(key, own, pin=token.user_pin)
    assert token.user_pin not in repr(signer)
    assert repr(signer._pin) == "***"  # noqa: SLF001


def test_without_its_extra_the_import_says_what_to_install() -> None:
    """The name of the extra, ready to be pasted."""
    said = imported_without("pkcs11_pool.integrations.pdf", "pyhanko")
    assert "pip install 'pkcs11-pool[pdf]'" in said
