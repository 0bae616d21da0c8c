"""Certificates, requests and CRLs issued with asn1crypto, checked by others."""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import Encoding
from pkcs11 import Attribute, KeyType

from pkcs11_pool import InvalidOption, InvalidType, KeyNotFound
from pkcs11_pool.integrations.x509 import Issuer, Revoked, load_issuer
from poolkit import blocking
from signkit import MANY, at_once, pool_on, token_with

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken

KEYS = ["rsa", "p256", "p384", "p521", "ed25519", "ed448"]
CA = {"country_name": "DE", "organization_name": "Example", "common_name": "CA"}
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("rsa", {}),
    ("rsa", {"hash_name": "sha512"}),
    ("rsa", {"pss": True}),
    ("p256", {}),
    ("p384", {"hash_name": "sha512"}),
    ("p521", {}),
    ("ed25519", {}),
    ("ed448", {}),
]


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


async def issuer_of(pool: TokenPool, label: str, **given: Any) -> Issuer:
    """An issuer with one of the keys."""
    return await load_issuer(pool.key(label=label), CA, **given)


def read(certificate: Any) -> x509.Certificate:
    """The same as ``cryptography`` reads it."""
    return x509.load_der_x509_certificate(certificate.dump())


@pytest.mark.parametrize(("label", "given"), WAYS)
async def test_each_algorithm_verifies_elsewhere(
    pool: TokenPool, label: str, given: dict[str, Any]
) -> None:
    """Certificate, request and CRL, by ``cryptography``."""
    issuer = await issuer_of(pool, label, **given)
    root = read(await issuer.self_signed(days=10))
    root.verify_directly_issued_by(root)
    request = x509.load_der_x509_csr((await issuer.request()).dump())
    assert request.is_signature_valid
    crl = x509.load_der_x509_crl((await issuer.crl(number=1, days=1)).dump())
    assert crl.is_signature_valid(root.public_key())  # type: ignore[arg-type]
    if given.get("pss"):
        assert isinstance(root.signature_algorithm_parameters, padding.PSS)


@pytest.mark.parametrize("label", ["rsa", "p256"])
async def test_many_are_issued_at_once(pool: TokenPool, label: str) -> None:
    """On the loop itself; each verifies, and no two have the same number."""
    issuer = await issuer_of(pool, label)
    root = read(await issuer.self_signed(days=10))
    public = await pool.key(label="p384").public_key_der()
    made = await at_once(
        lambda n: issuer.certificate({"common_name": f"{n}"}, public, days=1)
    )
    leaves = [read(certificate) for certificate in made]
    for number, leaf in enumerate(leaves):
        leaf.verify_directly_issued_by(root)
        assert leaf.subject.rfc4514_string() == f"CN={number}"
    assert len({leaf.serial_number for leaf in leaves}) == MANY


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not here")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("label", "given"), WAYS)
async def test_openssl_verifies_the_chain_and_the_crl(
    pool: TokenPool, tmp_path: Path, label: str, given: dict[str, Any]
) -> None:
    """Root, intermediate and leaf, strictly, with the revocation list of each CA."""
    issuer = await issuer_of(pool, label, **given)
    root = await issuer.self_signed(days=10)
    middle_name = {"common_name": "Middle"}
    middle = await load_issuer(pool.key(label="p256"), middle_name)
    of_middle = await issuer.certificate(
        middle_name, middle.public_key, days=9, ca=True
    )
    public = await pool.key(label="rsa").public_key_der()
    leaf = await middle.certificate({"common_name": "leaf"}, public, days=8)
    gone = await middle.certificate({"common_name": "gone"}, public, days=8)
    revoked = Revoked(gone.serial_number, dt.datetime.now(dt.UTC), "key_compromise")
    lists = [
        await issuer.crl(number=1, days=1),
        await middle.crl([revoked], number=2, days=1),
    ]
    pem = Encoding.PEM
    write = {
        "root": [read(root).public_bytes(pem)],
        "middle": [read(of_middle).public_bytes(pem)],
        "crls": [x509.load_der_x509_crl(c.dump()).public_bytes(pem) for c in lists],
        "leaf": [read(leaf).public_bytes(pem)],
        "gone": [read(gone).public_bytes(pem)],
    }
    for name, parts in write.items():
        (tmp_path / name).write_bytes(b"".join(parts))
    command = ["openssl", "verify", "-x509_strict", "-crl_check_all"]
    command += ["-CAfile", "root", "-untrusted", "middle", "-CRLfile", "crls"]

    def verify(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, name],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    good, bad = await blocking(verify, "leaf"), await blocking(verify, "gone")
    assert (good.stdout, good.returncode) == ("leaf: OK\n", 0)
    assert bad.returncode != 0
    assert "certificate revoked" in bad.stderr


async def test_a_certificate_says_what_it_is_for(pool: TokenPool) -> None:
    """By its extensions; the user's own take the place of ours."""
    issuer = await issuer_of(pool, "p256")
    root = read(await issuer.self_signed(days=10))
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    uses = root.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (uses.key_cert_sign, uses.crl_sign, uses.digital_signature) == (
        True,
        True,
        False,
    )
    start = dt.datetime(2049, 12, 31, tzinfo=dt.UTC)
    names = [asn1.GeneralName("dns_name", "web.example")]
    leaf = read(
        await issuer.certificate(
            {"common_name": "web"},
            issuer.public_key,
            days=1,
            uses={"key_agreement"},
            serial_number=4711,
            not_before=start,
            extensions=[
                {"extn_id": "subject_alt_name", "extn_value": names},
                {"extn_id": "key_identifier", "extn_value": b"mine"},
            ],
        )
    )
    got = leaf.extensions.get_extension_for_class
    assert not got(x509.BasicConstraints).value.ca
    assert got(x509.KeyUsage).value.key_agreement
    assert got(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName) == [
        "web.example"
    ]
    assert got(x509.SubjectKeyIdentifier).value.digest == b"mine"
    assert leaf.serial_number == 4711
    assert leaf.not_valid_before_utc == start
    assert leaf.not_valid_after_utc == start + dt.timedelta(days=1)  # in 2050


async def test_a_request_is_certified(pool: TokenPool) -> None:
    """What the one asks for, the other issues."""
    ca, web = await issuer_of(pool, "rsa"), await issuer_of(pool, "p256")
    names = [asn1.GeneralName("dns_name", "web.example")]
    wanted = [{"extn_id": "subject_alt_name", "extn_value": names}]
    request = await web.request(extensions=wanted)
    seen = x509.load_der_x509_csr(request.dump())
    assert seen.is_signature_valid
    (asked,) = seen.extensions
    assert asked.oid == x509.SubjectAlternativeName.oid
    info = request["certification_request_info"]
    leaf = await ca.certificate(info["subject"], info["subject_pk_info"], days=1)
    read(leaf).verify_directly_issued_by(read(await ca.self_signed(days=2)))
    assert read(leaf).public_key() == seen.public_key()


async def test_wrong_arguments_are_refused(pool: TokenPool) -> None:
    """Before anything is signed, each with what would do."""
    issuer: Any = await issuer_of(pool, "p256")
    key = issuer.public_key
    naive = dt.datetime(2030, 1, 1)  # noqa: DTZ001
    wrong: Any = {"not a part": "x"}
    calls = [
        (issuer_of(pool, "nobody"), KeyNotFound, "nobody"),
        (issuer_of(pool, "p256", hash_name="md5"), InvalidOption, "one of sha1"),
        (issuer_of(pool, "p256", pss=True), InvalidOption, "pss is for RSA"),
        (issuer_of(pool, "ed25519", hash_name="sha256"), InvalidOption, "its own hash"),
        (issuer_of(pool, "p256", pin=5), InvalidType, "a PIN is a str"),
        (load_issuer("key", CA), InvalidType, "must be a KeyRef"),  # type: ignore[arg-type]
        (load_issuer(pool.key("p256"), "CN=x"), InvalidType, "a mapping of its parts"),
        (load_issuer(pool.key("p256"), wrong), InvalidOption, "the name cannot be"),
        (
            issuer.certificate({}, b"no DER", days=1),
            InvalidOption,
            "no DER of a public",
        ),
        (issuer.certificate({}, "pem", days=1), InvalidType, "DER or a PublicKeyInfo"),
        (issuer.certificate({}, key, days=0), InvalidOption, "a number above 0"),
        (issuer.certificate({}, key, days=1, not_before=naive), InvalidOption, "zone"),
        (issuer.crl([4711], number=1, days=1), InvalidType, r"Revoked\(\.\.\.\)"),
    ]
    before = pool.stats().operations_total
    for call, error, says in calls:
        with pytest.raises(error, match=says):
            await call
    keys_read = 5  # each issuer that was asked for has its public key read
    assert pool.stats().operations_total <= before + keys_read


async def test_the_pin_goes_with_each_signature(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """For a key that wants it, and it shows nowhere."""
    template = {Attribute.ALWAYS_AUTHENTICATE: True}
    public, private = await pool.generate_keypair(
        KeyType.RSA, 1024, id=b"each", store=True, private_template=template
    )
    try:
        issuer = await load_issuer(pool.key(id=b"each"), CA, pin=token.user_pin)
        root = read(await issuer.self_signed(days=1))
        root.verify_directly_issued_by(root)
        assert token.user_pin not in repr(issuer) + repr(vars(issuer))
    finally:
        await private.destroy()
        await public.destroy()
