"""Whatever stands in a PKCS#11 URI: read and written as the same, or InvalidURI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzkit import MARK, examples, shown
from pkcs11_pool import InvalidURI, Pkcs11URI, uri

if TYPE_CHECKING:
    from collections.abc import Callable

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_PATH = ("token", "manufacturer", "serial", "model", "object", "slot-description")
_QUERY = ("module-path", "module-name", "pin-source")
_VENDOR = st.from_regex(r"x-[A-Za-z0-9_-]{1,10}", fullmatch=True)
_ESCAPES: tuple[Callable[[int], str], ...] = (
    lambda octet: f"%{octet:02x}",
    lambda octet: f"%{octet:02X}",
)


@st.composite
def _escaped(draw: st.DrawFn, text: str) -> str:
    """A value in which any character may be percent-encoded, and some must be."""
    parts = []
    for octet in text.encode():
        plain = chr(octet).isalnum() and octet < 0x80
        if plain and draw(st.booleans()):
            parts.append(chr(octet))
        else:
            parts.append(draw(st.sampled_from(_ESCAPES))(octet))
    return "".join(parts)


@st.composite
def _written(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A URI with attributes in any order, and what it says."""
    names = draw(st.lists(st.sampled_from((*_PATH, *_QUERY)), unique=True))
    says = {name: draw(_TEXT) for name in names}
    vendors = draw(st.lists(_VENDOR, unique=True, max_size=3))
    pieces: dict[bool, list[str]] = {True: [], False: []}
    for name in (*names, *vendors):
        text = says.get(name, "v")
        pieces[name in _QUERY].append(f"{name}={draw(_escaped(text))}")
    query = "&".join(pieces[True])
    return f"pkcs11:{';'.join(pieces[False])}{'?' * bool(query)}{query}", says


def test_however_it_is_encoded_it_says_the_same(request: Any) -> None:
    """In any order, with small and capital digits, between attributes of vendors."""

    @examples(request, 100)
    @given(_written())
    def check(written: tuple[str, dict[str, str]]) -> None:
        text, says = written
        parsed = Pkcs11URI.parse(text)
        for name, value in says.items():
            assert getattr(parsed, name.replace("-", "_")) == value
        assert Pkcs11URI.parse(str(parsed)) == parsed
        assert len(parsed.vendor_path) == text.count("x-")

    check()


def test_an_attribute_that_stands_twice_is_refused(request: Any) -> None:
    """Known ones anywhere, a vendor's in the path."""

    @examples(request, 100)
    @given(st.one_of(st.sampled_from((*_PATH, *_QUERY)), _VENDOR), _TEXT.map(str))
    def check(name: str, other: str) -> None:
        mark = "?" if name in _QUERY else ""
        between = "&" if name in _QUERY else ";"
        text = f"pkcs11:{mark}{name}=a{between}{name}=b"
        with pytest.raises(InvalidURI, match="twice"):
            Pkcs11URI.parse(text)
        del other

    check()


def test_any_text_is_read_or_refused(request: Any) -> None:
    """Whatever the characters: never another error, and never the PIN in it."""
    letters = st.characters() | st.sampled_from("%;&?=/:|\0\ud800é")
    pieces = st.one_of(
        st.text(letters, max_size=12),
        st.sampled_from(
            [
                "token=",
                "pin-value=",
                "slot-id=",
                "id=%",
                "type=private",
                "library-version=2.",
                ";",
                "?",
                "&",
                "%zz",
                "%00",
                "%ff",
                MARK,
            ]
        ),
    )

    @examples(request, 250)
    @given(st.lists(pieces, max_size=8).map("".join), st.booleans())
    def check(rest: str, secret: bool) -> None:  # noqa: FBT001  # drawn
        text = f"pkcs11:{rest}" + "?pin-value=" * secret + MARK * secret
        try:
            parsed = Pkcs11URI.parse(text)
        except InvalidURI as error:
            told = shown(error)
            assert not secret or "pin-value" not in told or MARK not in told
        else:
            again = Pkcs11URI.parse(parsed.format(with_pin=True))
            assert again == parsed
            if parsed.pin_value is not None:
                assert "pin-value" not in str(parsed)

    check()


def test_a_long_uri_is_read_in_one_go() -> None:
    """Of 20,000 attributes each is looked at once, not once for each other."""
    many = ";".join(f"x-{n}=v" for n in range(20_000))
    assert len(Pkcs11URI.parse(f"pkcs11:{many}").vendor_path) == 20_000
    value = "x" * 100_000
    assert Pkcs11URI.parse(f"pkcs11:token={value}").token == value
    assert isinstance(uri.parse(f"pkcs11:{many};x-7=v"), InvalidURI)
