"""Private keys for ``cryptography``: its builders and others sign through the pool."""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
import inspect
from typing import TYPE_CHECKING, Any

import joserfc.jwk
import joserfc.jws
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, utils
from cryptography.hazmat.primitives.asymmetric.padding import (
    MGF1,
    OAEP,
    PSS,
    PKCS1v15,
    calculate_max_pss_salt_length,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509 import ocsp
from pkcs11 import Attribute, KeyType

from pkcs11_pool import (
    InvalidOption,
    InvalidType,
    KeyNotExportable,
    KeyNotFound,
    LoginRequired,
    WouldBlockLoop,
)
from pkcs11_pool.integrations import algorithms
from pkcs11_pool.integrations import cryptography as integration
from pkcs11_pool.integrations.cryptography import (
    load_private_key,
    load_private_key_sync,
)
from pkcs11_pool.integrations.jose import joserfc_key
from poolkit import blocking
from signkit import MANY, imported_without, in_threads, opened, pool_on, token_with

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken

KEYS = ["rsa", "p256", "p384", "p521", "k256", "ed25519", "ed448"]
SHA256 = hashes.SHA256()
# What tokens still have to do, and what they need not.
SHA1 = hashes.SHA1()  # noqa: S303
MD5 = hashes.MD5()  # noqa: S303
NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
LATER = NOW + dt.timedelta(days=1)
NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "on a token")])


@pytest.fixture(scope="module")
def token(
    soft_hsm: SoftHSM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ThrowawayToken]:
    """One token with keys for all tests of this file."""
    with token_with(soft_hsm, tmp_path_factory.mktemp("token"), KEYS) as made:
        yield made


@pytest.fixture
def threaded(token: ThrowawayToken) -> Iterator[TokenPool]:
    """An open pool for a test that runs no event loop."""
    with opened(token) as pool:
        yield pool


def loaded(pool: TokenPool, label: str) -> Any:
    """A private key for ``cryptography``; of any type, as tests misuse it."""
    return load_private_key_sync(pool.key(label=label))


# -- The abstract classes -----------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (integration.TokenRSAPrivateKey, rsa.RSAPrivateKey),
        (integration.TokenECPrivateKey, ec.EllipticCurvePrivateKey),
        (integration.TokenEd25519PrivateKey, ed25519.Ed25519PrivateKey),
        (integration.TokenEd448PrivateKey, ed448.Ed448PrivateKey),
    ],
)
def test_each_class_has_all_that_cryptography_asks_for(ours: Any, theirs: Any) -> None:
    """By the version that is installed: every abstract name, with its parameters."""
    assert issubclass(ours, theirs)
    assert ours.__abstractmethods__ == frozenset()
    names = theirs.__abstractmethods__
    assert "sign" in names
    for name in names:
        asked, given = getattr(theirs, name), getattr(ours, name)
        assert given is not asked
        if inspect.isfunction(asked):
            parameters = list(inspect.signature(asked).parameters)
            assert list(inspect.signature(given).parameters) == parameters


def test_a_key_never_leaves_its_token(threaded: TokenPool) -> None:
    """Whatever asks for its value is refused; a copy is the key itself."""
    format_ = PrivateFormat.PKCS8
    for label in ("rsa", "p256", "ed25519", "ed448"):
        key = loaded(threaded, label)
        with pytest.raises(KeyNotExportable, match=f"{label}.*never leaves the token"):
            key.private_bytes(Encoding.PEM, format_, NoEncryption())
        value = key.private_bytes_raw if label.startswith("ed") else key.private_numbers
        with pytest.raises(KeyNotExportable):
            value()
        assert copy.deepcopy(key) is copy.copy(key) is key
        assert key.token_key == threaded.key(label=label)


def test_sizes_and_curves_are_those_of_the_public_key(threaded: TokenPool) -> None:
    """As callers read them off a private key."""
    assert loaded(threaded, "rsa").key_size == 2048
    assert loaded(threaded, "p521").key_size == 521
    assert isinstance(loaded(threaded, "p384").curve, ec.SECP384R1)


# -- Signatures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "digest", [SHA1, hashes.SHA224(), SHA256, hashes.SHA384(), hashes.SHA512()]
)
def test_rsa_signatures_verify_with_each_padding(
    threaded: TokenPool, digest: hashes.HashAlgorithm
) -> None:
    """``cryptography`` itself verifies them, hashed here or by the caller."""
    key = loaded(threaded, "rsa")
    mgf = MGF1(digest)
    hashed = hashes.Hash(digest)
    hashed.update(b"message")
    ready = hashed.finalize()
    # Who verifies says the number: OpenSSL takes any salt for ``MAX_LENGTH``.
    most = calculate_max_pss_salt_length(key.public_key(), digest)
    for padding, strict in (
        (PKCS1v15(), PKCS1v15()),
        (PSS(mgf, PSS.MAX_LENGTH), PSS(mgf, most)),
        (PSS(mgf, PSS.DIGEST_LENGTH), PSS(mgf, digest.digest_size)),
        (PSS(mgf, 0), PSS(mgf, 0)),
    ):
        for signature in (
            key.sign(b"message", padding, digest),
            key.sign(ready, padding, utils.Prehashed(digest)),
        ):
            key.public_key().verify(signature, b"message", strict, digest)


@pytest.mark.skipif(
    not hasattr(utils, "NoDigestInfo"), reason="this cryptography has no NoDigestInfo"
)
def test_rsa_signs_what_stands_in_no_digest_info(threaded: TokenPool) -> None:
    """As it is, with PKCS#1 v1.5 only."""
    key, bare = loaded(threaded, "rsa"), utils.NoDigestInfo()
    signature = key.sign(b"as it is", PKCS1v15(), bare)
    public = key.public_key()
    assert (
        public.recover_data_from_signature(signature, PKCS1v15(), bare) == b"as it is"
    )
    with pytest.raises(InvalidOption, match="PKCS1v15 only"):
        key.sign(b"as it is", PSS(MGF1(SHA256), 32), bare)


@pytest.mark.parametrize("label", ["p256", "p384", "p521", "k256"])
@pytest.mark.parametrize("digest", [SHA1, SHA256, hashes.SHA512()])
def test_ecdsa_signatures_verify_on_each_curve(
    threaded: TokenPool, label: str, digest: hashes.HashAlgorithm
) -> None:
    """Also with a digest that is longer than the order of the curve."""
    key = loaded(threaded, label)
    hashed = hashes.Hash(digest)
    hashed.update(b"message")
    for data, how in (
        (b"message", digest),
        (bytearray(b"message"), digest),
        (hashed.finalize(), utils.Prehashed(digest)),
    ):
        signature = key.sign(data, ec.ECDSA(how))
        key.public_key().verify(signature, b"message", ec.ECDSA(digest))


def test_a_digest_longer_than_the_order_is_cut_before_it_is_sent() -> None:
    """SoftHSM2 would do it; the standard leaves modules that answer DATA_LEN_RANGE."""
    digest = hashlib.sha512(b"message").digest()
    for bits, sent in ((256, digest[:32]), (384, digest[:48]), (521, digest)):
        assert algorithms.ecdsa("sha512", bits).message(b"message")[0] == sent


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("ed25519", integration.TokenEd25519PrivateKey),
        ("ed448", integration.TokenEd448PrivateKey),
    ],
)
def test_eddsa_signatures_verify(threaded: TokenPool, label: str, kind: Any) -> None:
    """On both curves, of a message of any length."""
    key = loaded(threaded, label)
    assert type(key) is kind
    for data in (b"", b"message", bytes(100_000)):
        key.public_key().verify(key.sign(data), data)


# -- What else a private key does -----------------------------------------------------


def test_rsa_decrypts(threaded: TokenPool) -> None:
    """What ``cryptography`` encrypted, with both paddings."""
    key = loaded(threaded, "rsa")
    for padding in (PKCS1v15(), OAEP(MGF1(SHA1), SHA1, None)):
        sealed = key.public_key().encrypt(b"secret", padding)
        assert key.decrypt(sealed, padding) == b"secret"


@pytest.mark.parametrize("label", ["p256", "p384", "p521"])
def test_the_shared_secret_is_that_of_the_peer(threaded: TokenPool, label: str) -> None:
    """ECDH: both sides agree, and no session object stays behind."""
    key = loaded(threaded, label)
    peer = ec.generate_private_key(key.curve)
    shared = key.exchange(ec.ECDH(), peer.public_key())
    assert shared == peer.exchange(ec.ECDH(), key.public_key())
    left = threaded.run_sync(
        lambda s: list(s.get_objects({Attribute.KEY_TYPE: KeyType.GENERIC_SECRET}))
    )
    assert left == []


def test_a_peer_on_another_curve_is_refused(threaded: TokenPool) -> None:
    """Before anything is sent."""
    key = loaded(threaded, "p256")
    peer = ec.generate_private_key(ec.SECP384R1()).public_key()
    with pytest.raises(InvalidOption, match="peer's key is on secp384r1"):
        key.exchange(ec.ECDH(), peer)
    with pytest.raises(InvalidType, match="EllipticCurvePublicKey"):
        key.exchange(ec.ECDH(), b"point")
    with pytest.raises(InvalidType, match=r"ec\.ECDH"):
        key.exchange("ecdh", peer)


# -- At the door --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "algorithm", "error", "says"),
    [
        ("PKCS1v15", SHA256, InvalidType, "padding must be PKCS1v15 or PSS"),
        (OAEP(MGF1(SHA256), SHA256, None), SHA256, InvalidType, "not OAEP"),
        (PKCS1v15(), "sha256", InvalidType, "a hash or Prehashed"),
        (PKCS1v15(), None, InvalidType, "a hash or Prehashed"),
        (PKCS1v15(), MD5, InvalidOption, "no token signs with md5"),
        (PKCS1v15(), hashes.BLAKE2b(64), InvalidOption, "no token signs with blake2b"),
        (PSS(MGF1(SHA256), PSS.AUTO), SHA256, InvalidOption, "for verification"),
        (PSS(MGF1(SHA256), 500), SHA256, InvalidOption, "222 bytes of salt"),
        (PSS(MGF1(MD5), 1), SHA256, InvalidOption, "md5"),
        (PSS("mgf", 32), SHA256, InvalidOption, "MGF1"),  # type: ignore[arg-type]
        (PKCS1v15(), utils.Prehashed(SHA256), InvalidOption, "32 bytes, not 7"),
    ],
)
def test_a_wrong_padding_or_hash_is_refused(
    threaded: TokenPool, padding: Any, algorithm: Any, error: Any, says: str
) -> None:
    """With our own error, which says what would do; the token is not asked."""
    key = loaded(threaded, "rsa")
    before = threaded.stats().operations_total
    with pytest.raises(error, match=says):
        key.sign(b"message", padding, algorithm)
    assert threaded.stats().operations_total == before


def test_other_wrong_arguments_are_refused_too(threaded: TokenPool) -> None:
    """Of the other keys, of decryption and of loading."""
    p256, rsa_key = loaded(threaded, "p256"), loaded(threaded, "rsa")
    with pytest.raises(InvalidType, match=r"ec\.ECDSA"):
        p256.sign(b"message", SHA256)
    with pytest.raises(InvalidOption, match="not deterministic"):
        p256.sign(b"message", ec.ECDSA(SHA256, deterministic_signing=True))
    with pytest.raises(InvalidType, match="data must be bytes"):
        p256.sign("message", ec.ECDSA(SHA256))
    with pytest.raises(InvalidType, match="OAEP or PKCS1v15"):
        rsa_key.decrypt(bytes(256), PSS(MGF1(SHA256), 32))
    with pytest.raises(InvalidType, match="must be a KeyRef"):
        load_private_key_sync("rsa")  # type: ignore[arg-type]
    with pytest.raises(KeyNotFound):
        loaded(threaded, "nobody")


async def test_on_a_loop_thread_each_use_says_so(token: ThrowawayToken) -> None:
    """Ours and the builder of ``cryptography`` alike; loading has its async form."""
    async with pool_on(token) as pool:
        rsa_key: Any = await load_private_key(pool.key(label="rsa"))
        p256: Any = await load_private_key(pool.key(label="p256"))
        says = "await the async form, or call from a worker thread"
        with pytest.raises(WouldBlockLoop, match=says):
            rsa_key.sign(b"message", PKCS1v15(), SHA256)
        with pytest.raises(WouldBlockLoop, match=says):
            rsa_key.decrypt(bytes(256), PKCS1v15())
        with pytest.raises(WouldBlockLoop, match=says):
            p256.exchange(ec.ECDH(), p256.public_key())
        with pytest.raises(WouldBlockLoop, match=says):
            load_private_key_sync(pool.key(label="rsa"))
        with pytest.raises(WouldBlockLoop, match=says):
            certificate(p256, 1)


def test_a_key_that_wants_the_pin_each_time_gets_it(
    threaded: TokenPool, token: ThrowawayToken
) -> None:
    """``pin=`` is given once, goes with each use, and shows nowhere."""

    def make(session: Any) -> None:
        template = {Attribute.ALWAYS_AUTHENTICATE: True}
        session.generate_keypair(
            KeyType.RSA, 1024, label="each", store=True, private_template=template
        )

    threaded.run_sync(make, rw=True)
    ref = threaded.key(label="each")
    without, key = (
        load_private_key_sync(ref),
        load_private_key_sync(ref, pin=token.user_pin),
    )
    assert isinstance(key, rsa.RSAPrivateKey)
    assert isinstance(without, rsa.RSAPrivateKey)
    with pytest.raises(LoginRequired, match="give pin="):
        without.sign(b"message", PKCS1v15(), SHA256)
    signature = key.sign(b"message", PKCS1v15(), SHA256)
    key.public_key().verify(signature, b"message", PKCS1v15(), SHA256)
    assert token.user_pin not in repr(key) + repr(vars(key))
    with pytest.raises(InvalidType, match="a PIN is a str"):
        load_private_key_sync(ref, pin=1234)  # type: ignore[arg-type]


def test_a_public_key_may_come_from_elsewhere(threaded: TokenPool) -> None:
    """A token may hold a private key and a certificate only."""
    known = loaded(threaded, "p256").public_key()
    ref = threaded.key(label="p256", key_type=KeyType.EC)
    before = threaded.stats().operations_total
    key = load_private_key_sync(ref, public_key=known)
    assert threaded.stats().operations_total == before
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signature = key.sign(b"message", ec.ECDSA(SHA256))
    known.verify(signature, b"message", ec.ECDSA(SHA256))
    with pytest.raises(InvalidOption, match="not of a X25519PublicKey"):
        load_private_key_sync(ref, public_key=x25519_key())


def x25519_key() -> Any:
    """A public key that signs nothing."""
    from cryptography.hazmat.primitives.asymmetric import x25519  # noqa: PLC0415

    return x25519.X25519PrivateKey.generate().public_key()


# -- Builders, and libraries that sign with such keys ---------------------------------


def certificate(key: Any, serial: int, digest: Any = SHA256) -> x509.Certificate:
    """A self-signed certificate."""
    builder = x509.CertificateBuilder(
        issuer_name=NAME,
        subject_name=NAME,
        public_key=key.public_key(),
        serial_number=serial,
        not_valid_before=NOW,
        not_valid_after=LATER,
    )
    return builder.sign(key, digest)


@pytest.mark.parametrize("label", ["rsa", "p256", "ed25519", "ed448"])
async def test_many_certificates_are_signed_at_once(
    token: ThrowawayToken, label: str
) -> None:
    """From as many worker threads, through a few sessions; each one verifies."""
    digest = None if label.startswith("ed") else SHA256
    async with pool_on(token) as pool:
        key = await load_private_key(pool.key(label=label))
        made = await in_threads(lambda n: certificate(key, n + 1, digest))
        assert pool.stats().logins_total == 1
    assert [cert.serial_number for cert in made] == list(range(1, MANY + 1))
    for cert in made:
        cert.verify_directly_issued_by(cert)


def request(key: Any, digest: Any) -> bool:
    """A CSR; whether its own key verifies it."""
    made = x509.CertificateSigningRequestBuilder(NAME).sign(key, digest)
    return made.is_signature_valid


def crl(key: Any, digest: Any) -> bool:
    """A CRL; whether its issuer verifies it."""
    revoked = x509.RevokedCertificateBuilder(7, NOW).build()
    builder = x509.CertificateRevocationListBuilder(NAME, NOW, LATER, [], [revoked])
    return builder.sign(key, digest).is_signature_valid(key.public_key())


def ocsp_response(key: Any, digest: Any) -> bool:
    """An OCSP response; raises if the signature is not one of this key."""
    cert = certificate(key, 9, digest)
    answer = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=cert,
            issuer=cert,
            algorithm=SHA256,
            cert_status=ocsp.OCSPCertStatus.GOOD,
            this_update=NOW,
            next_update=LATER,
            revocation_time=None,
            revocation_reason=None,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, cert)
        .sign(key, digest)
    )
    how: tuple[Any, ...] = ()
    if isinstance(key, rsa.RSAPrivateKey):
        how = (PKCS1v15(), SHA256)
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        how = (ec.ECDSA(SHA256),)
    key.public_key().verify(answer.signature, answer.tbs_response_bytes, *how)
    return True


BUILDERS = [request, crl, ocsp_response]


@pytest.mark.parametrize("label", ["rsa", "p256", "ed25519", "ed448"])
@pytest.mark.parametrize("build", BUILDERS)
def test_the_other_builders_sign_too(
    threaded: TokenPool, label: str, build: Callable[[Any, Any], bool]
) -> None:
    """CSR, CRL and OCSP response: each verifies by its own means."""
    digest = None if label.startswith("ed") else SHA256
    assert build(loaded(threaded, label), digest)


@pytest.mark.parametrize("label", ["p256", "ed25519"])
async def test_many_of_the_other_builders_sign_at_once(
    token: ThrowawayToken, label: str
) -> None:
    """All three side by side, from as many worker threads; each one verifies."""
    digest = None if label.startswith("ed") else SHA256
    async with pool_on(token) as pool:
        key = await load_private_key(pool.key(label=label))
        turns = len(BUILDERS)
        made = await in_threads(lambda n: BUILDERS[n % turns](key, digest))
        assert made == [True] * MANY
        assert pool.stats().logins_total == 1


def test_a_certificate_may_be_signed_with_pss(threaded: TokenPool) -> None:
    """The builder asks for the padding, and the token makes it."""
    key = loaded(threaded, "rsa")
    builder = x509.CertificateBuilder(NAME, NAME, key.public_key(), 1, NOW, LATER)
    pss = PSS(MGF1(SHA256), PSS.DIGEST_LENGTH)
    cert = builder.sign(key, SHA256, rsa_padding=pss)
    cert.verify_directly_issued_by(cert)


@pytest.mark.parametrize(
    ("label", "algorithm"),
    [
        ("rsa", "RS256"),
        ("rsa", "PS384"),
        ("p256", "ES256"),
        ("p384", "ES384"),
        ("p521", "ES512"),
        ("ed25519", "EdDSA"),
        ("ed448", "EdDSA"),
    ],
)
def test_pyjwt_signs_with_the_key(
    threaded: TokenPool, label: str, algorithm: str
) -> None:
    """And verifies with the public key alone."""
    key = loaded(threaded, label)
    token = jwt.encode({"sub": "x"}, key, algorithm=algorithm)
    assert jwt.decode(token, key.public_key(), algorithms=[algorithm]) == {"sub": "x"}


async def test_pyjwt_and_joserfc_sign_many_at_once(token: ThrowawayToken) -> None:
    """One signs and the other verifies, from many threads."""
    async with pool_on(token) as pool:
        key: Any = await load_private_key(pool.key(label="p256"))
        jwk = joserfc_key(key)
        header = {"alg": "ES256"}
        payload = [f"message {number}".encode() for number in range(MANY)]
        ours = await in_threads(
            lambda n: joserfc.jws.serialize_compact(header, payload[n], jwk)
        )
        theirs = await in_threads(
            lambda n: jwt.api_jws.encode(payload[n], key, algorithm="ES256")
        )
    public = key.public_key()
    signer = joserfc.jwk.ECKey.import_key(public)
    for n in range(MANY):
        assert jwt.api_jws.decode(ours[n], public, algorithms=["ES256"]) == payload[n]
        assert joserfc.jws.deserialize_compact(theirs[n], signer).payload == payload[n]


async def test_it_is_loaded_where_awaiting_is_and_used_where_not(
    token: ThrowawayToken,
) -> None:
    """One operation to load it; none of the signing stands on the loop."""
    async with pool_on(token) as pool:
        before = pool.stats().operations_total
        key: Any = await load_private_key(pool.key(label="ed25519"))
        assert pool.stats().operations_total == before + 1
        signature = await blocking(key.sign, b"message")
    key.public_key().verify(signature, b"message")


def test_without_its_extra_the_import_says_what_to_install() -> None:
    """The name of the extra, ready to be pasted."""
    said = imported_without("pkcs11_pool.integrations.cryptography", "cryptography")
    assert "pip install 'pkcs11-pool[cryptography]'" in said
