"""JWS and JWT made on the event loop, checked by PyJWT and by joserfc."""

from __future__ import annotations

import datetime as dt
import json
from base64 import urlsafe_b64decode
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from joserfc import jws
from joserfc.jwk import KeySet, OctKey
from pkcs11 import Attribute, KeyType, ObjectClass

from keykit import sha256
from pkcs11_pool import InvalidOption, InvalidType, KeyNotFound, LoginRequired
from pkcs11_pool.integrations.jose import JWSSigner, jwks, load_signer
from signkit import MANY, at_once, imported_without, pool_on, public_key, token_with

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken

KEYS = ["rsa", "p256", "p384", "p521", "k256", "ed25519", "ed448", "aes"]
WAYS = [
    ("rsa", "RS256"),
    ("rsa", "RS512"),
    ("rsa", "PS256"),
    ("rsa", "PS384"),
    ("rsa", "PS512"),
    ("p256", "ES256"),
    ("p384", "ES384"),
    ("p521", "ES512"),
    ("k256", "ES256K"),
    ("ed25519", "EdDSA"),
    ("ed25519", "Ed25519"),
    ("ed448", "EdDSA"),
    ("ed448", "Ed448"),
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


async def signer_of(
    pool: TokenPool, label: str, *given: Any, **named: Any
) -> JWSSigner:
    """A signer with one of the keys; with any arguments, as tests misuse it."""
    return await load_signer(pool.key(label=label), *given, **named)


def header_of(token: str) -> dict[str, Any]:
    """The protected header of a JWS."""
    part = token.partition(".")[0]
    header: dict[str, Any] = json.loads(urlsafe_b64decode(part + "=="))
    return header


@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # joserfc: use Ed25519
@pytest.mark.parametrize(("label", "alg"), WAYS)
async def test_each_algorithm_verifies_elsewhere(
    pool: TokenPool, label: str, alg: str
) -> None:
    """By PyJWT with the public key, and by joserfc with the JWKS."""
    signer = await signer_of(pool, label, alg)
    token = await signer.sign(b"payload")
    public = await public_key(pool, label)
    if alg in jwt.algorithms.get_default_algorithms():
        assert jwt.api_jws.decode(token, public, algorithms=[alg]) == b"payload"
    keys = KeySet.import_key_set(jwks([signer]))  # type: ignore[arg-type]
    seen = jws.deserialize_compact(token, keys, algorithms=[alg])
    assert seen.payload == b"payload"
    assert seen.headers() == {"alg": alg, "kid": signer.kid}


@pytest.mark.parametrize("label", ["rsa", "p256", "ed25519"])
async def test_many_tokens_are_signed_at_once(pool: TokenPool, label: str) -> None:
    """On the loop itself, through a few sessions; each one verifies."""
    signer = await signer_of(pool, label)
    made = await at_once(lambda n: signer.jwt({"number": n}))
    public = await public_key(pool, label)
    for number, token in enumerate(made):
        claims = jwt.decode(token, public, algorithms=[signer.alg])
        assert claims["number"] == number
    assert len(made) == MANY
    assert pool.stats().logins_total == 1


async def test_hmac_is_made_on_the_token(pool: TokenPool) -> None:
    """With a secret that the test knows: both libraries agree with the token."""
    secret = bytes(range(64))
    async with pool.session() as session:
        key = await session.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
                Attribute.VALUE: secret,
                Attribute.SIGN: True,
            }
        )
        for alg in ("HS256", "HS384", "HS512"):
            signer = await load_signer(key, alg, kid="mine")  # type: ignore[arg-type]
            token = await signer.sign("payload")
            assert jwt.api_jws.decode(token, secret, algorithms=[alg]) == b"payload"
            seen = jws.deserialize_compact(
                token, OctKey.import_key(secret), algorithms=[alg]
            )
            assert seen.headers() == {"alg": alg, "kid": "mine"}
            with pytest.raises(InvalidOption, match="secret key"):
                jwks([signer])


async def test_a_short_secret_is_refused(pool: TokenPool) -> None:
    """RFC 7518 wants as many bytes as the digest has."""
    async with pool.session() as session:
        key = await session.generate_key(KeyType.GENERIC_SECRET, 256)
        await load_signer(key, "HS256")
        with pytest.raises(InvalidOption, match="needs a key of 64 bytes, not of 32"):
            await load_signer(key, "HS512")


async def test_the_algorithm_follows_from_the_key(pool: TokenPool) -> None:
    """Where nothing else is said."""
    wanted = {"rsa": "RS256", "p256": "ES256", "p384": "ES384", "p521": "ES512"}
    for label, alg in {**wanted, "k256": "ES256K", "ed25519": "EdDSA"}.items():
        assert (await signer_of(pool, label)).alg == alg
    assert (await signer_of(pool, "ed25519", "Ed25519")).alg == "Ed25519"


@pytest.mark.parametrize(
    ("label", "alg", "says"),
    [
        ("rsa", "ES256", "a RSAPublicKey signs with RS256, .*, not with ES256"),
        ("p256", "ES384", "a key on secp256r1 signs with ES256, not with ES384"),
        ("p256", "RS256", "a key on secp256r1 signs with ES256"),
        ("p384", "EdDSA", "signs with ES384, not with EdDSA"),
        ("ed25519", "Ed448", "signs with EdDSA, Ed25519, not with Ed448"),
        ("aes", "HS256", "not with AES"),
        ("rsa", "none", "alg must be one of RS256"),
        ("rsa", 256, "alg must be one of RS256"),
    ],
)
async def test_a_key_that_does_not_fit_is_refused(
    pool: TokenPool, label: str, alg: Any, says: str
) -> None:
    """When the signer is loaded, and not in production at the first token."""
    with pytest.raises(InvalidOption, match=says):
        await signer_of(pool, label, alg)


async def test_a_pair_of_keys_makes_no_hmac(pool: TokenPool) -> None:
    """However it is named."""
    with pytest.raises(KeyNotFound, match="label='rsa' secret_key"):
        await signer_of(pool, "rsa", "HS256")
    private = pool.key(label="rsa", object_class=ObjectClass.PRIVATE_KEY)
    with pytest.raises(InvalidOption, match="HS256 signs with a secret key"):
        await load_signer(private, "HS256")


async def test_the_kid_is_the_thumbprint(pool: TokenPool) -> None:
    """RFC 7638, over the members that PyJWT finds too; or what the user says."""
    signer = await signer_of(pool, "p256")
    jwk = signer.public_jwk
    assert {"alg": "ES256", "use": "sig", "kty": "EC"}.items() <= jwk.items()
    assert "d" not in jwk
    canonical = {name: jwk[name] for name in ("crv", "kty", "x", "y")}
    written = json.dumps(canonical, separators=(",", ":"), sort_keys=True).encode()
    assert urlsafe_b64decode(f"{signer.kid}=") == sha256(written)
    named = await signer_of(pool, "p256", kid="2026-11")
    assert header_of(await named.sign(b""))["kid"] == "2026-11"
    assert named.public_jwk["kid"] == "2026-11"


async def test_a_key_set_verifies_tokens_of_each_key(pool: TokenPool) -> None:
    """As an issuer publishes it while keys are replaced."""
    signers = [await signer_of(pool, label) for label in ("rsa", "p256", "ed25519")]
    published = json.loads(json.dumps(jwks(signers)))
    keys = {key.key_id: key for key in jwt.PyJWKSet.from_dict(published).keys}
    for signer in signers:
        token = await signer.jwt({"sub": signer.alg}, expires_in=60)
        key = keys[header_of(token)["kid"]]
        claims = jwt.decode(token, key, algorithms=[signer.alg])
        assert claims["sub"] == signer.alg
    with pytest.raises(InvalidOption, match="same kid"):
        jwks([signers[0], signers[0]])


async def test_a_jwt_has_its_times(pool: TokenPool) -> None:
    """Now, and until when; what the claims say wins."""
    signer = await signer_of(pool, "p256")
    public = await public_key(pool, "p256")
    moment = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)

    async def made(claims: dict[str, Any], **named: Any) -> dict[str, Any]:
        token = await signer.jwt(claims, **named)
        assert header_of(token)["typ"] == "JWT"
        read = {"verify_iat": False, "verify_exp": False}
        seen: dict[str, Any] = jwt.decode(
            token,
            public,
            algorithms=["ES256"],
            options=read,  # type: ignore[arg-type]
        )
        return seen

    before = int(dt.datetime.now(dt.UTC).timestamp())
    claims = await made({"sub": "x"}, expires_in=300)
    assert 0 <= claims["iat"] - before <= 60
    assert claims["exp"] - claims["iat"] == 300
    claims = await made({"iat": 5, "exp": moment}, expires_in=dt.timedelta(hours=1))
    assert (claims["iat"], claims["exp"]) == (5, 4102444800)
    claims = await made({"iat": 5}, expires_in=dt.timedelta(hours=1))
    assert claims["exp"] == 3605


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"alg": "none"}, "alg is 'ES256' for this signer"),
        ({"kid": "another"}, "kid is"),
        ({"b64": False}, "'b64' is not supported"),
        ({"crit": ["exp"]}, "'crit' is not supported"),
        ({"x": object()}, "headers cannot be JSON"),
        ({"x": float("nan")}, "headers cannot be JSON"),
    ],
)
async def test_a_header_that_contradicts_is_refused(
    pool: TokenPool, headers: dict[str, Any], says: str
) -> None:
    """Nothing is signed with it."""
    signer = await signer_of(pool, "p256")
    before = pool.stats().operations_total
    with pytest.raises(InvalidOption, match=says):
        await signer.sign(b"payload", headers)
    assert pool.stats().operations_total == before


async def test_other_wrong_arguments_are_refused(pool: TokenPool) -> None:
    """Each with what would do."""
    signer: Any = await signer_of(pool, "p256")
    for wrong, error, says in (
        (signer.sign({"sub": "x"}), InvalidType, "see jwt"),
        (signer.sign(b"", ["typ"]), InvalidType, "headers must be a mapping"),
        (signer.jwt("sub"), InvalidType, "claims must be a mapping"),
        (signer.jwt({}, expires_in=-1), InvalidOption, "above 0"),
        (signer.jwt({"exp": dt.datetime.min}), InvalidOption, "a time zone"),  # noqa: DTZ901
        (signer.jwt({"x": b""}), InvalidOption, "claims cannot be JSON"),
        (signer_of(pool, "p256", kid=5), InvalidType, "kid must be a text"),
        (signer_of(pool, "p256", pin=5), InvalidType, "a PIN is a str"),
        (signer_of(pool, "nobody"), KeyNotFound, "nobody"),
        (load_signer("p256"), InvalidType, "must be a KeyRef"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=says):
            await wrong


async def test_the_pin_goes_with_each_signature(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """For a key that wants it, and it shows nowhere."""
    _, key = await pool.generate_keypair(
        KeyType.EC,
        curve="secp256r1",
        id=b"each",
        store=True,
        private_template={Attribute.ALWAYS_AUTHENTICATE: True},
    )
    try:
        named = pool.key(id=b"each")
        signer = await load_signer(named, pin=token.user_pin)
        made = await signer.sign(b"payload")
        keys = KeySet.import_key_set(jwks([signer]))  # type: ignore[arg-type]
        assert jws.deserialize_compact(made, keys).payload == b"payload"
        assert token.user_pin not in repr(signer) + repr(vars(signer))
        with pytest.raises(LoginRequired):
            await (await load_signer(named)).sign(b"payload")
    finally:
        await key.destroy()
        await pool.key(id=b"each").destroy()


@pytest.mark.parametrize("missing", ["joserfc", "cryptography"])
def test_without_its_extra_the_import_says_what_to_install(missing: str) -> None:
    """The name of the extra, ready to be pasted."""
    said = imported_without("pkcs11_pool.integrations.jose", missing)
    assert "pip install 'pkcs11-pool[jose]'" in said
