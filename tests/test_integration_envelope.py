"""Envelope encryption: what leaves the token, what is refused, and how KEKs rotate."""

from __future__ import annotations

import functools
import itertools
import struct
from typing import TYPE_CHECKING, Any

import anyio
import pkcs11
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap
from pkcs11 import Attribute, KeyType, MechanismFlag

from keykit import SECRET, data_of, make_secret
from pkcs11_pool import (
    InvalidCiphertext,
    InvalidOption,
    InvalidType,
    KeyNotFound,
    PoolTimeout,
)
from pkcs11_pool.integrations import time_left
from pkcs11_pool.integrations.envelope import Envelope, kek_of
from poolkit import (
    LAST_RESORT,
    Hold,
    eventually,
    given_up,
    hangs,
)
from signkit import MANY, at_once, pool_on, token_with

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken

CONTEXT = {"tenant": "7", "table": "cards"}
_WRAPS = MechanismFlag.WRAP | MechanismFlag.UNWRAP


@pytest.fixture(scope="module")
def token(
    soft_hsm: SoftHSM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ThrowawayToken]:
    """One token with KEKs for all tests of this file."""
    made = tmp_path_factory.mktemp("token")
    with token_with(soft_hsm, made, ["kek-a", "kek-b", "rsa"]) as one:
        yield one


@pytest.fixture
async def pool(token: ThrowawayToken) -> AsyncIterator[TokenPool]:
    """An open pool on that token."""
    async with pool_on(token) as opened:
        yield opened


def one_kek(pool: TokenPool, label: str = "kek-a", **options: Any) -> Envelope:
    """An envelope with one KEK, under its own label."""
    return Envelope({label: pool.key(label=label)}, **options)


async def left_on(pool: TokenPool) -> list[Any]:
    """The session objects that are there."""
    return await pool.run(lambda s: list(s.get_objects({Attribute.TOKEN: False})))


@pytest.mark.parametrize("size", [0, 1, 1000, 200_000])
async def test_what_was_encrypted_is_decrypted(pool: TokenPool, size: int) -> None:
    """Also nothing, and more than goes to the token in one call; no key is left."""
    envelope, data = one_kek(pool), data_of(size)
    blob = await envelope.encrypt(data, CONTEXT)
    assert await envelope.decrypt(blob, CONTEXT) == data
    assert kek_of(blob) == "kek-a"
    assert await left_on(pool) == []


async def test_the_blob_is_what_its_standards_say(pool: TokenPool) -> None:
    """With a KEK that the test knows, other code unwraps the key and decrypts."""
    kek = await make_secret(pool, label="known", wrap=True, unwrap=True)
    try:
        envelope = Envelope({"known": kek})
        blob = await envelope.encrypt(b"data", {"b": "2", "a": "1"})
    finally:
        await kek.destroy()
    magic, header, rest = blob[:5], blob[5:9], blob[9:]
    assert magic == b"P11E\x01"
    wrap, of_name, of_key = struct.unpack(">BBH", header)
    assert (wrap, rest[:of_name]) == (1, b"known")
    wrapped, rest = rest[of_name:][:of_key], rest[of_name + of_key :]
    data_key = aes_key_unwrap(SECRET, wrapped)
    assert len(data_key) == 32
    texts = [struct.pack(">I", len(t)) + t for t in (b"a", b"1", b"b", b"2")]
    aad = magic + b"m" + b"".join(texts)
    assert AESGCM(data_key).decrypt(rest[:12], rest[12:], aad) == b"data"


async def test_each_message_has_its_own_key_and_nonce(pool: TokenPool) -> None:
    """So no nonce is used twice with a key, however many messages there are."""
    envelope = one_kek(pool)
    blobs = await at_once(lambda _: envelope.encrypt(b"the same"))
    start = 9 + len("kek-a")
    assert len({blob[start : start + 40] for blob in blobs}) == MANY
    assert len({blob[start + 40 : start + 52] for blob in blobs}) == MANY
    opened = await at_once(lambda n: envelope.decrypt(blobs[n]))
    assert opened == [b"the same"] * MANY


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_blob_that_was_changed_anywhere_is_refused(pool: TokenPool) -> None:
    """Each of its bytes counts, and so does its length."""
    envelope = one_kek(pool)
    blob = await envelope.encrypt(b"data", CONTEXT)
    for place in range(len(blob)):
        changed = bytearray(blob)
        changed[place] ^= 1
        with pytest.raises(InvalidCiphertext):
            await envelope.decrypt(bytes(changed), CONTEXT)
        with pytest.raises(InvalidCiphertext):
            await envelope.decrypt(blob[:place], CONTEXT)
    with pytest.raises(InvalidCiphertext, match="another context or KEK") as caught:
        await envelope.decrypt(blob + b"\0", CONTEXT)
    assert isinstance(caught.value.__cause__, pkcs11.PKCS11Error)
    other = await envelope.encrypt(b"data", CONTEXT)
    with pytest.raises(InvalidCiphertext):
        await envelope.decrypt(blob[:-20] + other[-20:], CONTEXT)


@pytest.mark.parametrize(
    "other",
    [
        *(None, {}, {"tenant": "7"}, {"tenant": "7table"}, b"tenant7"),
        *({**CONTEXT, "x": ""}, {**CONTEXT, "tenant": "8"}),
    ],
)
async def test_another_context_is_refused(pool: TokenPool, other: Any) -> None:
    """It is authenticated, though it is not in the blob."""
    envelope = one_kek(pool)
    blob = await envelope.encrypt(b"data", CONTEXT)
    assert b"cards" not in blob
    with pytest.raises(InvalidCiphertext):
        await envelope.decrypt(blob, other)


async def test_the_order_of_a_context_does_not_count(pool: TokenPool) -> None:
    """A mapping has none; nothing and an empty one are the same; bytes will do."""
    envelope = one_kek(pool)
    blob = await envelope.encrypt(b"data", CONTEXT)
    turned = dict(reversed(CONTEXT.items()))
    assert await envelope.decrypt(blob, turned) == b"data"
    assert await envelope.decrypt(await envelope.encrypt(b"data"), {}) == b"data"
    blob = await envelope.encrypt(b"data", b"context")
    assert await envelope.decrypt(blob, bytearray(b"context")) == b"data"


@pytest.mark.parametrize(
    ("label", "wrap"),
    [("kek-a", "aes-kw"), ("kek-a", "aes-kwp"), ("rsa", "rsa-oaep-sha1")],
)
async def test_each_way_to_wrap(pool: TokenPool, label: str, wrap: str) -> None:
    """With the AES keys and the RSA pair that SoftHSM2 does."""
    envelope = one_kek(pool, label, wrap=wrap)
    blob = await envelope.encrypt(b"data", CONTEXT)
    assert await envelope.decrypt(blob, CONTEXT) == b"data"
    assert await left_on(pool) == []


@pytest.mark.parametrize(
    ("label", "wrap", "ways"),
    [
        # SoftHSM2 does OAEP with SHA-1 alone.
        ("rsa", "rsa-oaep-sha256", ["rsa-oaep-sha1"]),
        # The default is for AES keys.
        ("rsa", "aes-kw", ["rsa-oaep-sha1"]),
        ("kek-a", "rsa-oaep-sha1", ["aes-kw", "aes-kwp"]),
    ],
)
async def test_a_way_that_the_kek_lacks_is_told_with_those_that_it_has(
    pool: TokenPool, label: str, wrap: str, ways: list[str]
) -> None:
    """The token was asked for each of them; what it answered is the cause."""
    with pytest.raises(InvalidOption, match=f"does not wrap by '{wrap}'") as caught:
        await one_kek(pool, label, wrap=wrap).encrypt(b"data")
    assert str(caught.value).endswith(
        "give " + " or ".join(f"wrap={way!r}" for way in ways)
    )
    assert isinstance(caught.value.__cause__, pkcs11.PKCS11Error)
    assert await left_on(pool) == []
    for way in ways:
        envelope = one_kek(pool, label, wrap=way)
        assert await envelope.decrypt(await envelope.encrypt(b"data")) == b"data"


async def test_a_key_that_wraps_in_no_way_is_told(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Then another kind of KEK is needed; any other error is the token's own."""
    async with make_pool(module=fault.path) as pool:
        rule = fault.on("C_WrapKey", answer=0x70, every=True)
        with pytest.raises(InvalidOption, match="another KEK, an AES key or an RSA"):
            await one_kek(pool).encrypt(b"data")
        fault.remove(rule)
        fault.on("C_WrapKey", answer=0x06, every=True)
        with pytest.raises(pkcs11.exceptions.FunctionFailed):
            await one_kek(pool).encrypt(b"data")


async def test_a_new_kek_takes_over(pool: TokenPool) -> None:
    """Old blobs open, new ones are wrapped by it, and rewrapped ones need no other."""
    old = one_kek(pool)
    both = Envelope(
        {"rsa": pool.key(label="rsa"), "kek-a": pool.key(label="kek-a")},
        wrap="rsa-oaep-sha1",
    )
    new = one_kek(pool, "rsa", wrap="rsa-oaep-sha1")
    blob = await old.encrypt(b"data", CONTEXT)
    assert await both.decrypt(blob, CONTEXT) == b"data"
    moved = await both.rewrap(blob)
    assert (kek_of(blob), kek_of(moved)) == ("kek-a", "rsa")
    assert kek_of(await both.encrypt(b"data")) == "rsa"
    assert await new.decrypt(moved, CONTEXT) == b"data"
    assert await both.rewrap(moved) == moved
    with pytest.raises(InvalidCiphertext):
        await new.decrypt(moved)  # the context is what it was
    with pytest.raises(InvalidCiphertext, match="by the KEK 'kek-a'; here are only"):
        await new.decrypt(blob, CONTEXT)
    assert await left_on(pool) == []


async def test_what_was_changed_is_not_rewrapped(pool: TokenPool) -> None:
    """Where the wrapped key was; the message is looked at when it is decrypted."""
    both = Envelope({label: pool.key(label=label) for label in ("kek-b", "kek-a")})
    blob = bytearray(await one_kek(pool).encrypt(b"data"))
    blob[20] ^= 1
    with pytest.raises(InvalidCiphertext):
        await both.rewrap(bytes(blob))


async def test_a_kek_of_the_same_name_but_another_key_opens_nothing(
    pool: TokenPool,
) -> None:
    """The name only says which key to try."""
    blob = await one_kek(pool).encrypt(b"data")
    with pytest.raises(InvalidCiphertext):
        await Envelope({"kek-a": pool.key(label="kek-b")}).decrypt(blob)


async def test_a_data_key_for_use_outside(pool: TokenPool) -> None:
    """As a KMS gives it: in the clear, which shows nowhere, and sealed."""
    envelope = one_kek(pool)
    made = await envelope.generate_data_key(CONTEXT)
    assert len(made.plaintext) == 32
    assert await envelope.decrypt(made.sealed, CONTEXT) == made.plaintext
    assert made.plaintext.hex() not in repr(made)
    assert str(made.plaintext) not in repr(made)
    assert len((await envelope.generate_data_key(nbits=128)).plaintext) == 16
    with pytest.raises(InvalidCiphertext):
        await envelope.decrypt(made.sealed)


async def test_the_data_key_cannot_be_read(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """While it decrypts it is sensitive and not extractable, whoever asks the token."""
    async with make_pool(module=fault.path) as pool:
        envelope = one_kek(pool)
        blob = await envelope.encrypt(b"data")
        fault.on("C_DecryptInit", hang="before")
        names = [Attribute.SENSITIVE, Attribute.EXTRACTABLE, Attribute.VALUE]
        async with anyio.create_task_group() as group:
            group.start_soon(envelope.decrypt, blob)
            await hangs(fault, "C_DecryptInit")
            (key,) = await pool.find({Attribute.TOKEN: False})
            seen = await key.attributes(names)
            fault.release()
    assert seen == {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}


WITH_TIMEOUT: dict[str, Any] = {
    "encrypt": lambda envelope, _blob, **time: envelope.encrypt(b"data", **time),
    "decrypt": lambda envelope, blob, **time: envelope.decrypt(blob, **time),
    "rewrap": lambda envelope, blob, **time: envelope.rewrap(blob, **time),
    "generate_data_key": lambda envelope, _blob, **time: envelope.generate_data_key(
        **time
    ),
}
"""Each coroutine of an envelope, called with a time limit."""


@pytest.mark.parametrize("call", WITH_TIMEOUT.values(), ids=WITH_TIMEOUT)
@pytest.mark.parametrize(
    ("of_the_pool", "given"),
    [(0.05, {}), (None, {"timeout": 0.05}), (None, {"timeout": 0})],
)
async def test_who_waits_for_a_session_waits_no_longer_than_was_said(
    token: ThrowawayToken, call: Any, of_the_pool: float | None, given: Any
) -> None:
    """For some time, or not at all; the pool's own limit is where nothing is said."""
    async with pool_on(token, max_sessions=1, timeout=of_the_pool) as pool:
        old = await one_kek(pool, "kek-b").encrypt(b"data", timeout=LAST_RESORT)
        new, kek = pool.key(label="kek-a"), pool.key(label="kek-b")
        envelope = Envelope({"kek-a": new, "kek-b": kek})
        async with anyio.create_task_group() as group:
            with Hold() as hold:
                group.start_soon(functools.partial(pool.run, hold, timeout=None))
                await hold.entered()
                with anyio.fail_after(LAST_RESORT), pytest.raises(PoolTimeout) as late:
                    await call(envelope, old, **given)
                assert late.value.phase == "waiting"
        assert await call(envelope, old, timeout=LAST_RESORT)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("encrypt", "C_GenerateKey"),
        ("encrypt", "C_WrapKey"),
        ("encrypt", "C_Encrypt"),
        ("decrypt", "C_UnwrapKey"),
        ("decrypt", "C_Decrypt"),
        ("rewrap", "C_UnwrapKey"),
        ("rewrap", "C_WrapKey"),
        ("generate_data_key", "C_GenerateRandom"),
        ("generate_data_key", "C_WrapKey"),
    ],
)
async def test_a_call_that_hangs_is_given_up_in_time(
    make_pool: MakePool, fault: FaultModule, name: str, function: str
) -> None:
    """Whichever it is; and nothing of it stays on the token."""
    async with make_pool(module=fault.path, close_timeout=0.05) as pool:
        old = await one_kek(pool, "kek-b").encrypt(b"data")
        keks = {label: pool.key(label=label) for label in ("kek-a", "kek-b")}
        fault.on(function, hang="before")
        await given_up(
            pool,
            lambda: WITH_TIMEOUT[name](Envelope(keks), old, timeout=LAST_RESORT),
            hangs(fault, function),
        )
        fault.release()
        fault.clear()
        await eventually(lambda: not pool.stats().calls_stuck)
        assert await left_on(pool) == []


async def test_the_time_limit_is_for_all_calls_together(
    pool: TokenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first took, the second does not have."""
    envelope = one_kek(pool)
    blob = await envelope.encrypt(b"data")

    class Clock:
        """A minute goes by whenever somebody looks."""

        monotonic = itertools.count(0, 60).__next__

    monkeypatch.setattr(time_left, "time", Clock)
    for call in WITH_TIMEOUT.values():
        if call is not WITH_TIMEOUT["rewrap"]:  # under its KEK already
            assert await call(envelope, blob, timeout=600)
            with pytest.raises(PoolTimeout, match="between two calls") as caught:
                await call(envelope, blob, timeout=100)
            assert caught.value.phase == "running"
            # Nothing was sent yet.
            with pytest.raises(PoolTimeout, match="before the first") as caught:
                await call(envelope, blob, timeout=50)
            assert caught.value.phase == "waiting"
    assert await left_on(pool) == []


async def test_wrong_arguments_are_refused_at_the_door(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """Each with what would do."""
    key = pool.key(label="kek-a")
    elsewhere = pool_on(token).key(label="kek-a")
    wrong: Any
    for wrong, says in (
        (key, "a mapping of names to keys"),
        ({}, "needs a KEK"),
        ({"a": "kek-a"}, "must be a KeyRef"),
        ({5: key}, "at most 255 bytes"),
        ({"ä" * 128: key}, "at most 255 bytes"),
        ({"a": key, "b": elsewhere}, "keys of one pool"),
    ):
        with pytest.raises(InvalidOption, match=says):
            Envelope(wrong)
    with pytest.raises(InvalidOption, match="wrap must be one of aes-kw"):
        Envelope({"a": key}, wrap="aes-gcm")  # type: ignore[arg-type]
    envelope: Any = Envelope({"a": key})
    for call, error, says in (
        (envelope.encrypt("text"), InvalidType, "data must be bytes"),
        (envelope.encrypt(b"", "context"), InvalidType, "a mapping of texts, or bytes"),
        (envelope.encrypt(b"", {"a": 1}), InvalidType, "must hold texts, not 1"),
        (envelope.decrypt("blob"), InvalidType, "blob must be bytes"),
        (envelope.decrypt(b"blob"), InvalidCiphertext, "no blob of an Envelope"),
        (envelope.rewrap(b""), InvalidCiphertext, "no blob of an Envelope"),
        (envelope.generate_data_key(nbits=12), InvalidOption, "multiple of 8"),
        (envelope.encrypt(b"", timeout=-1), InvalidOption, "timeout"),
        (Envelope({"x": pool.key("x")}).encrypt(b""), KeyNotFound, "label='x'"),
    ):
        with pytest.raises(error, match=says):
            await call
    assert await left_on(pool) == []


async def test_a_key_that_wraps_nothing_says_so(pool: TokenPool) -> None:
    """What is missing is named; it is no matter of the blob."""
    pair = await pool.generate_key(
        KeyType.AES, 256, label="none", store=True, capabilities=MechanismFlag.ENCRYPT
    )
    try:
        with pytest.raises(InvalidOption, match="WRAP"):
            await Envelope({"none": pair}).encrypt(b"data")
    finally:
        await pair.destroy()
