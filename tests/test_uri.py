"""PKCS#11 URIs are read and written by RFC 7512, and what is wrong has a place."""

from __future__ import annotations

import os
import string
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote, unquote_to_bytes

import pkcs11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pkcs11 import Mechanism, ObjectClass

from pkcs11_pool import (
    InvalidType,
    InvalidURI,
    PinSourceError,
    Pkcs11URI,
    TokenPool,
    pins,
)
from pkcs11_pool.uri import ObjectType
from poolkit import make_ec_key

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakePool
    from pkcs11_pool.softhsm import ThrowawayToken

SECRET = "tOp/sEcret"  # noqa: S105  # that it does not show is tested

_RFC_EXAMPLES: dict[str, Any] = {
    "pkcs11:": {},
    "pkcs11:object=my-pubkey;type=public": {"object": "my-pubkey", "type": "public"},
    "pkcs11:object=my-key;type=private?pin-source=file:/etc/token": {
        "object": "my-key",
        "type": "private",
        "pin_source": "file:/etc/token",
    },
    "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20"
    "Inc.;model=1.0;object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;"
    "serial=?pin-source=file:/etc/token_pin": {
        "token": "The Software PKCS#11 Softtoken",
        "manufacturer": "Snake Oil, Inc.",
        "model": "1.0",
        "object": "my-certificate",
        "type": "cert",
        "id": bytes.fromhex("69953E5CF4BDEC91"),
        "serial": "",
        "pin_source": "file:/etc/token_pin",
    },
    "pkcs11:slot-description=Sun%20Metaslot": {"slot_description": "Sun Metaslot"},
    "pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;library-description=Soft%20Token"
    "%20Library;library-version=1.23": {
        "library_manufacturer": "Snake Oil, Inc.",
        "library_description": "Soft Token Library",
        "library_version": (1, 23),
    },
    "pkcs11:slot-id=327?module-name=snakeoil": {
        "slot_id": 327,
        "module_name": "snakeoil",
    },
    "pkcs11:token=Software%20PKCS%2311%20softtoken;manufacturer=Snake%20Oil,%20Inc.?"
    "pin-value=the-pin": {
        "token": "Software PKCS#11 softtoken",
        "manufacturer": "Snake Oil, Inc.",
        "pin_value": pins.literal("the-pin"),
    },
    "pkcs11:object=my-sign-key;type=private?pin-source=|/usr/lib/pinomatic": {
        "object": "my-sign-key",
        "type": "private",
        "pin_source": "|/usr/lib/pinomatic",
    },
    "pkcs11:token=My%20token%25%20created%20by%20Joe;library-version=3;id=%01%02%03%BA"
    "dd%CA%FE%04%05%06": {
        "token": "My token% created by Joe",
        "library_version": (3, 0),
        "id": b"\x01\x02\x03\xbadd\xca\xfe\x04\x05\x06",
    },
    "pkcs11:token=A%20name%20with%20a%20substring%20%25%3B;object=my-certificate;"
    "type=cert": {
        "token": "A name with a substring %;",
        "object": "my-certificate",
        "type": "cert",
    },
    "pkcs11:token=Name%20with%20a%20small%20A%20with%20acute:%20%C3%A1;object=my-"
    "certificate;type=cert": {
        "token": "Name with a small A with acute: \u00e1",
        "object": "my-certificate",
        "type": "cert",
    },
    "pkcs11:token=my-token;object=my-certificate;type=cert;vendor-aaa=value-a?"
    "pin-source=file:/etc/token_pin&vendor-bbb=value-b": {
        "token": "my-token",
        "object": "my-certificate",
        "type": "cert",
        "vendor_path": {"vendor-aaa": b"value-a"},
        "pin_source": "file:/etc/token_pin",
        "vendor_query": [("vendor-bbb", b"value-b")],
    },
}


@pytest.mark.parametrize("text", _RFC_EXAMPLES)
def test_the_examples_of_the_rfc(text: str) -> None:
    """RFC 7512, "Examples of PKCS #11 URIs": each says what it says there."""
    assert Pkcs11URI.parse(text) == Pkcs11URI(**_RFC_EXAMPLES[text])


_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_VENDOR_NAME = st.text(string.ascii_letters + string.digits + "-_", min_size=1).map(
    "x-{}".format
)
_URIS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            (
                "token",
                "manufacturer",
                "serial",
                "model",
                "library_manufacturer",
                "library_description",
                "object",
                "slot_description",
                "slot_manufacturer",
                "module_name",
                "module_path",
            ),
            _TEXT,
        ),
        "library_version": st.tuples(st.integers(0, 255), st.integers(0, 255)),
        "type": st.sampled_from(get_args(ObjectType)),
        "id": st.binary(),
        "slot_id": st.integers(0, 2**64 - 1),
        "pin_source": _TEXT,
        "vendor_path": st.dictionaries(_VENDOR_NAME, st.binary()),
        "vendor_query": st.lists(st.tuples(_VENDOR_NAME, st.binary())),
    },
) | st.builds(
    lambda pin, token: {"pin_value": pin, "token": token},
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    _TEXT,
)


@given(_URIS)
@example({"vendor_path": {"b": b"&;?/", "a": b""}, "vendor_query": [("v", b"&;?/#|")]})
def test_what_is_written_is_read_again(attributes: dict[str, Any]) -> None:
    """Whatever it names, and in the characters that the grammar allows only."""
    uri = Pkcs11URI(**attributes)
    text = uri.format(with_pin=True)
    assert Pkcs11URI.parse(text) == uri
    assert Pkcs11URI.parse(text).format(with_pin=True) == text
    path, _, query = text.removeprefix("pkcs11:").partition("?")
    everywhere = string.ascii_letters + string.digits + "-._~:[]@!$'()*+,=%"
    assert set(path) <= set(everywhere + "&;_")
    assert set(query) <= set(everywhere + "/?|&_")


@given(st.text(string.ascii_letters + "=;?&%/|#:-_ \u00e9\n" + string.digits))
@example("token=%ff")
@example("slot-id=" + 5000 * "9")
@example("?pin-value=\ud800")
def test_any_other_text_is_refused_or_read(rest: str) -> None:
    """Nothing but InvalidURI is raised, and what is read is read again as the same."""
    try:
        uri = Pkcs11URI.parse(f"pkcs11:{rest}")
    except InvalidURI:
        return
    assert Pkcs11URI.parse(uri.format(with_pin=True)) == uri


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("PKCS12:", "starts with 'pkcs11:'"),
        ("pkcs11:token", "at character 8 .* name=value"),
        ("pkcs11:=x", "at character 8 .* name=value"),
        ("pkcs11:token=a;;type=public", "at character 16 .* name=value"),
        ("pkcs11:token=a;", "';' at character 15"),
        ("pkcs11:token=a?module-path=/m&", "'&' at character 30"),
        ("pkcs11:token=a?", r"nothing follows '\?'"),
        ("pkcs11:token=a b", "character 15 .* in token, .* as %20"),
        ("pkcs11:token=a/b", "character 15 .* as %2F"),
        ("pkcs11:token=\u00e9", "character 14 .* as %C3%A9"),
        ("pkcs11:token=a?module-path=/m#x", "character 30 .* as %23"),
        ("pkcs11:token=100%", "character 17 .* '%' itself is %25"),
        ("pkcs11:token=%4", "character 14 .* hexadecimal"),
        ("pkcs11:token=%FF", "token, from character 14, is not UTF-8"),
        ("pkcs11:to ken=a", "at character 8 .* name=value"),
        ("pkcs11:model=m;token=a;model=m", "model stands twice, again at character 24"),
        ("pkcs11:x-a=1;x-a=2", "x-a stands twice, again at character 14"),
        ("pkcs11:?pin-source=/a&pin-source=/b", "pin-source stands twice"),
        ("pkcs11:?pin-source=/a&pin-value=b", "pin-source or pin-value, not both"),
        ("pkcs11:slot-id=one", "slot-id, from character 16, is no number"),
        ("pkcs11:slot-id=-1", "slot-id, from character 16, is no number"),
        ("pkcs11:slot-id=\u00b2", "character 16 .* as %C2%B2"),
        ("pkcs11:slot-id=%C2%B2", "is no number"),
        ("pkcs11:library-version=1.x", "library-version, from character 24"),
        ("pkcs11:library-version=1.256", "0 to 255"),
        ("pkcs11:type=key", "public, private, cert, secret-key, data"),
        (
            "pkcs11:module-path=/m",
            "module-path, at character 8, .* after the",
        ),
        ("pkcs11:?token=a", r"token, at character 9, .* before the '\?'"),
        ("pkcs11:?pin-value=", "pin_value: a PIN is not empty"),
    ],
)
def test_what_is_wrong_has_a_place(text: str, said: str) -> None:
    """The message says at which character, and what to write there."""
    with pytest.raises(InvalidURI, match=said):
        Pkcs11URI.parse(text)


def test_attributes_of_the_query_may_repeat_if_they_are_a_vendors() -> None:
    """RFC 7512: up to the consumer; here they keep their order."""
    uri = Pkcs11URI.parse("pkcs11:?x-b=2&x-a=1&x-b=1")
    assert uri.vendor_query == (("x-b", b"2"), ("x-a", b"1"), ("x-b", b"1"))
    assert Pkcs11URI.parse("PKCS11:x-b=2;x-a=1") == Pkcs11URI.parse(
        "pkcs11:x-a=1;x-b=2"
    )


@pytest.mark.parametrize(
    "attributes",
    [
        {"token": b"demo"},
        {"token": "\ud800"},
        {"id": "01"},
        {"type": "key"},
        {"slot_id": "1"},
        {"slot_id": True},
        {"slot_id": -1},
        {"library_version": "1.2"},
        {"library_version": (1, 2, 3)},
        {"pin_value": 1234},
        {"pin_value": pkcs11.PROTECTED_AUTH},
        {"vendor_path": {"token": b"x"}},
        {"vendor_path": {"a b": b"x"}},
        {"vendor_path": {"x": "text"}},
        {"vendor_path": [("x", b"1"), ("x", b"2")]},
    ],
)
def test_what_a_uri_cannot_hold_is_refused(attributes: dict[str, Any]) -> None:
    """When it is made, and not when it is written."""
    with pytest.raises(InvalidURI):
        Pkcs11URI(**attributes)


def test_an_unknown_attribute_is_named() -> None:
    """As Python does for keywords."""
    with pytest.raises(InvalidType, match="label"):
        Pkcs11URI(label="x")  # type: ignore[call-arg]


def shown(error: BaseException | None) -> str:
    """All that a traceback with locals could show: frames of the library only."""
    found = []
    while error is not None:
        found += [str(error), repr(error)]
        trace = error.__traceback__
        while trace is not None:
            if "pkcs11_pool" in trace.tb_frame.f_code.co_filename:
                found.append(repr(trace.tb_frame.f_locals))
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return "\n".join(found)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Pkcs11URI.parse(f"pkcs11:slot-id=x?pin-value={SECRET}"),
        lambda: Pkcs11URI.parse(f"pkcs11:?pin-value={SECRET}#"),
        lambda: Pkcs11URI.parse(f"pkcs11:?pin-value={SECRET}%"),
        lambda: Pkcs11URI.parse(f"pkcs11:?pin-value={SECRET}%FF"),
        lambda: Pkcs11URI.parse(f"pkcs11:?pin-value={SECRET}&token=x"),
        lambda: Pkcs11URI(pin_value=SECRET, slot_id=-1),
        lambda: Pkcs11URI(pin_value=SECRET.encode(), token="x"),  # type: ignore[arg-type]  # noqa: S106
        lambda: Pkcs11URI(pin_value=SECRET + "\ud800"),
        lambda: TokenPool.from_uri(f"pkcs11:token=x;slot-id=x?pin-value={SECRET}"),
        lambda: TokenPool.from_uri(f"pkcs11:token=x?pin-value={SECRET}"),
        lambda: TokenPool.from_uri(
            f"pkcs11:token=x?module-path=/m&pin-value={SECRET}"
        ).key_from_uri(f"pkcs11:token=y;object=k?pin-value={SECRET}"),
    ],
)
def test_no_error_shows_a_pin(call: Any) -> None:
    """Neither its text nor a frame of ours."""
    with pytest.raises(InvalidURI) as caught:
        call()
    told = shown(caught.value)
    assert "InvalidURI" in told
    assert SECRET not in told
    assert SECRET.encode().hex() not in told


def test_not_even_one_character_of_a_pin_is_told() -> None:
    """Where one of another attribute would be."""
    with pytest.raises(InvalidURI, match=r"character 22 .* in pin-value") as caught:
        Pkcs11URI.parse("pkcs11:?pin-value=123#")
    assert "%23" not in str(caught.value)
    assert "#1" in str(caught.value)  # that of PKCS#11


def test_a_uri_shows_its_pin_only_when_asked_to() -> None:
    """Neither str, repr nor format does by itself."""
    uri = Pkcs11URI.parse(f"pkcs11:token=x?module-path=/m&pin-value={SECRET}")
    told = [str(uri), repr(uri), f"{uri}", uri.format(), repr(uri.pin_value)]
    assert [text for text in told if SECRET in text or quote(SECRET) in text] == []
    assert str(uri) == "pkcs11:token=x?module-path=/m"
    assert SECRET.encode() in unquote_to_bytes(uri.format(with_pin=True))


# -- A pool, and a key, from a URI ----------------------------------------------------


def uri_of(token: ThrowawayToken, *path: str, query: str = "") -> str:
    """The URI of a token, with more in its path."""
    parts = ";".join((f"token={quote(token.label)}", *path))
    return f"pkcs11:{parts}?module-path={quote(str(token.module))}{query}"


async def test_one_uri_names_the_pool_and_the_key(token: ThrowawayToken) -> None:
    """As they stand in the configuration of other programs."""
    text = uri_of(
        token, "object=signer", "type=private", query=f"&pin-value={token.user_pin}"
    )
    async with TokenPool.from_uri(text) as pool:
        await make_ec_key(pool, "signer")
        key = pool.key_from_uri(text)
        signature = await key.sign(b"data", mechanism=Mechanism.ECDSA)
        assert key == pool.key("signer", object_class=ObjectClass.PRIVATE_KEY)
        public = pool.key_from_uri(Pkcs11URI(object="signer", type="public"))
        assert await public.verify(b"data", signature, mechanism=Mechanism.ECDSA)


async def test_a_key_is_named_by_its_id(pool: TokenPool) -> None:
    """Whatever octets it has."""
    await make_ec_key(pool, "signer", id=b"\x00\xff")
    key = pool.key_from_uri("pkcs11:id=%00%FF;type=private")
    assert await key.sign(b"data", mechanism=Mechanism.ECDSA)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pkcs11:token=other;object=k", "token_label is 'demo' here, not 'other'"),
        ("pkcs11:serial=0;object=k", "another token"),
        ("pkcs11:model=M;object=k", "another token"),
        ("pkcs11:token=demo", "names no key"),
        ("pkcs11:type=cert", "type=cert .* is no key"),
        ("pkcs11:object=k;library-version=1", "library-version: take it out"),
    ],
)
async def test_a_uri_of_another_token_names_no_key_of_this(
    pool: TokenPool, text: str, said: str
) -> None:
    """Nor does one that names no key."""
    with pytest.raises(InvalidURI, match=said):
        pool.key_from_uri(text)


@pytest.mark.parametrize(
    "part",
    [
        "library-version=2",
        "library-manufacturer=m",
        "library-description=d",
        "slot-description=d",
        "slot-manufacturer=m",
        "x-vendor=v",
    ],
)
def test_what_the_pool_cannot_look_at_is_refused(part: str) -> None:
    """RFC 7512: what is not recognised in the path matches nothing."""
    with pytest.raises(InvalidURI, match=part.partition("=")[0]):
        TokenPool.from_uri(f"pkcs11:token=demo;{part}?module-path=/m&x-other=1")


def test_a_module_by_its_name_is_not_looked_for() -> None:
    """The message says what to give instead."""
    with pytest.raises(InvalidURI, match="module-name is not looked for"):
        TokenPool.from_uri("pkcs11:token=demo?module-name=softhsm2")


async def test_pin_source_names_a_file_or_a_variable(
    token: ThrowawayToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By path, by file: in each of its forms, and by env:."""
    path = tmp_path / "the pin"
    path.write_text(token.user_pin)
    path.chmod(0o600)
    monkeypatch.setenv("URI_TEST_PIN", token.user_pin)
    name = quote(str(path))
    for where in (
        name,
        f"file:{name}",
        f"file://{name}",
        f"file://localhost{name}",
        "env:URI_TEST_PIN",
    ):
        text = uri_of(token, query=f"&pin-source={where}")
        async with TokenPool.from_uri(text) as pool:
            assert pool.token.label == token.label


async def test_pin_source_names_a_program_only_where_that_is_allowed(
    token: ThrowawayToken, make_pool: MakePool
) -> None:
    """The default runs nothing; a PIN given by name makes it moot."""
    del make_pool
    text = uri_of(token, query=f"&pin-source=|printf%20{token.user_pin}")
    with pytest.raises(InvalidURI, match="allow_pin_command=True"):
        TokenPool.from_uri(text)
    TokenPool.from_uri(text, pin=None)
    async with TokenPool.from_uri(text, allow_pin_command=True) as pool:
        assert pool.token.label == token.label


async def test_pin_source_names_no_pipe(token: ThrowawayToken, tmp_path: Path) -> None:
    """Nobody waits for one that nobody writes to: a URI comes from elsewhere."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for where in (quote(str(pipe)), f"file:{quote(str(pipe))}"):
        text = uri_of(token, query=f"&pin-source={where}")
        with pytest.raises(PinSourceError, match="is a pipe"):
            await TokenPool.from_uri(text, allow_pin_command=True).open()


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("https://example.org/pin", "not https:"),
        ("file://elsewhere/pin", "another machine, elsewhere"),
        ("file:", "names no file"),
        ("", "names no file"),
        ("env:", "not env:"),
        ("|", "no program"),
        ("|a%20'", "tell the words apart"),
    ],
)
def test_a_pin_source_that_is_none_is_refused(where: str, said: str) -> None:
    """At the door, not at the first login."""
    with pytest.raises(InvalidURI, match=said):
        TokenPool.from_uri(
            f"pkcs11:token=x?module-path=/m&pin-source={where}",
            allow_pin_command=True,
        )
