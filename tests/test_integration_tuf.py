"""A signer for securesystemslib, verified by securesystemslib's own keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pkcs11 import Attribute, KeyType
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Signer, SSlibKey

from pkcs11_pool import InvalidOption, InvalidType, InvalidURI, WouldBlockLoop
from pkcs11_pool.integrations.tuf import PoolSigner, load_signer, register
from poolkit import blocking
from signkit import (
    MANY,
    at_once,
    imported_without,
    in_threads,
    pool_on,
    token_with,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken

KEYS = ["rsa", "p256", "p384", "p521", "k256", "ed25519"]
WAYS = [
    ("rsa", "rsassa-pss-sha224"),
    ("rsa", "rsassa-pss-sha256"),
    ("rsa", "rsassa-pss-sha384"),
    ("rsa", "rsassa-pss-sha512"),
    ("rsa", "rsa-pkcs1v15-sha224"),
    ("rsa", "rsa-pkcs1v15-sha256"),
    ("rsa", "rsa-pkcs1v15-sha384"),
    ("rsa", "rsa-pkcs1v15-sha512"),
    ("p256", "ecdsa-sha2-nistp256"),
    ("p384", "ecdsa-sha2-nistp384"),
    ("p521", "ecdsa-sha2-nistp521"),
    ("ed25519", "ed25519"),
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


async def signer_of(pool: TokenPool, label: str, *given: Any, **named: Any) -> Any:
    """A signer with one of the keys; of any type, as tests misuse it."""
    return await load_signer(pool.key(label=label), *given, **named)


@pytest.mark.parametrize(("label", "scheme"), WAYS)
async def test_each_scheme_verifies_elsewhere(
    pool: TokenPool, label: str, scheme: str
) -> None:
    """By securesystemslib, from a thread and from the loop, and as it is written."""
    signer = await signer_of(pool, label, scheme)
    made = [await signer.sign_async(b"data"), await blocking(signer.sign, b"data")]
    written = signer.public_key.to_dict()
    key = SSlibKey.from_dict(signer.public_key.keyid, dict(written))
    assert key.scheme == scheme
    for signature in made:
        key.verify_signature(signature, b"data")
        with pytest.raises(UnverifiedSignatureError):
            key.verify_signature(signature, b"other data")


@pytest.mark.parametrize("label", ["rsa", "p256", "ed25519"])
async def test_many_are_signed_at_once(pool: TokenPool, label: str) -> None:
    """From as many threads, and on the loop."""
    signer = await signer_of(pool, label)
    made = await in_threads(lambda n: signer.sign(b"%d" % n))
    also = await at_once(lambda n: signer.sign_async(b"%d" % n))
    assert len(made) == len(also) == MANY
    for number in range(MANY):
        for signature in (made[number], also[number]):
            signer.public_key.verify_signature(signature, b"%d" % number)


async def test_the_scheme_follows_from_the_key(pool: TokenPool) -> None:
    """Where nothing else is said: the one that securesystemslib takes, too."""
    for label in ("rsa", "p256", "p384", "p521", "ed25519"):
        signer = await signer_of(pool, label)
        default = SSlibKey.from_crypto(signer.public_key._crypto_key())  # noqa: SLF001
        assert signer.public_key == default


async def test_a_uri_finds_the_key_again(pool: TokenPool) -> None:
    """Through securesystemslib, without I/O, once the pool is registered."""
    loaded = await signer_of(pool, "p256")
    assert loaded.uri.startswith("pkcs11-pool:token=demo;")
    assert loaded.uri.endswith(";object=p256")
    with pytest.raises(InvalidOption, match="register"):
        Signer.from_priv_key_uri(loaded.uri, loaded.public_key)
    register(pool)
    signer = Signer.from_priv_key_uri(loaded.uri, loaded.public_key)
    assert isinstance(signer, PoolSigner)
    assert signer.uri == loaded.uri
    signature = await blocking(signer.sign, b"data")
    signer.public_key.verify_signature(signature, b"data")
    by_id = await load_signer(pool.key(id=b"p384"))
    assert by_id.uri.endswith(";id=%70%33%38%34")
    again = Signer.from_priv_key_uri(by_id.uri, by_id.public_key)
    signature = await blocking(again.sign, b"data")
    by_id.public_key.verify_signature(signature, b"data")
    uri = loaded.uri
    await pool.close()
    with pytest.raises(InvalidOption, match="no open pool has this token"):
        Signer.from_priv_key_uri(uri, loaded.public_key)


async def test_on_a_loop_thread_sign_says_what_to_do(pool: TokenPool) -> None:
    """There ``sign_async`` is the way."""
    signer = await signer_of(pool, "p256")
    with pytest.raises(WouldBlockLoop, match="await the async form"):
        signer.sign(b"data")


@pytest.mark.parametrize(
    ("label", "scheme", "says"),
    [
        ("rsa", "ecdsa-sha2-nistp256", "RSAPublicKey .* rsassa-pss-sha256, .*nistp256"),
        ("p256", "ecdsa-sha2-nistp384", "signs with ecdsa-sha2-nistp256, not"),
        ("p256", "rsassa-pss-sha256", "signs with ecdsa-sha2-nistp256, not"),
        ("k256", None, "signs with no scheme"),
        ("ed25519", "ml-dsa-44/1", "signs with ed25519, not"),
    ],
)
async def test_a_key_that_does_not_fit_is_refused(
    pool: TokenPool, label: str, scheme: str | None, says: str
) -> None:
    """When the signer is loaded."""
    with pytest.raises(InvalidOption, match=says):
        await signer_of(pool, label, scheme)


async def test_other_wrong_arguments_are_refused(pool: TokenPool) -> None:
    """Each with what would do."""
    signer = await signer_of(pool, "p256")
    register(pool)
    unknown = SSlibKey("id", "ecdsa", "of-tomorrow", {"public": ""})
    make: Any = PoolSigner.from_priv_key_uri
    key: Any = signer.public_key
    for uri, given, error, says in (
        ("hsm:2", key, InvalidOption, "must begin with 'pkcs11-pool:'"),
        ("pkcs11-pool:token=x;object=p256", key, InvalidOption, "no open pool"),
        ("pkcs11-pool:object=p256;object=x", key, InvalidURI, "object"),
        ("pkcs11-pool:token=demo", key, InvalidOption, "label"),
        (signer.uri, "key", InvalidType, "must be an SSlibKey"),
        (signer.uri, unknown, InvalidOption, "signs with 'of-tomorrow'"),
    ):
        with pytest.raises(error, match=says):
            make(uri, given)
    with pytest.raises(InvalidType, match="payload must be bytes"):
        await signer.sign_async("text")
    with pytest.raises(InvalidType, match="register takes a TokenPool"):
        register("pool")  # type: ignore[arg-type]
    with pytest.raises(InvalidType, match="must be a KeyRef"):
        await load_signer("p256")  # type: ignore[arg-type]


async def test_the_pin_goes_with_each_signature(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """For a key that wants it, and it shows nowhere."""
    template = {Attribute.ALWAYS_AUTHENTICATE: True}
    public, private = await pool.generate_keypair(
        KeyType.RSA, 1024, id=b"each", store=True, private_template=template
    )
    try:
        signer = await load_signer(
            pool.key(id=b"each"), "rsa-pkcs1v15-sha256", pin=token.user_pin
        )
        signer.public_key.verify_signature(await signer.sign_async(b"data"), b"data")
        assert token.user_pin not in repr(signer) + repr(vars(signer)) + signer.uri
    finally:
        await private.destroy()
        await public.destroy()


@pytest.mark.parametrize("missing", ["securesystemslib", "cryptography"])
def test_without_its_extra_the_import_says_what_to_install(missing: str) -> None:
    """The name of the extra, ready to be pasted."""
    said = imported_without("pkcs11_pool.integrations.tuf", missing)
    assert "pip install 'pkcs11-pool[tuf]'" in said
