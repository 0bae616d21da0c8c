"""The processor that keeps PINs and template values out of a program's logs."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pkcs11 import Attribute, ObjectClass

from pkcs11_pool import pins
from pkcs11_pool.integrations.logging import HIDDEN, Redactor

if TYPE_CHECKING:
    from conftest import MakePool

PIN = "73519846"
URI = f"pkcs11:token=demo?pin-value={PIN}&module-path=/lib/so"


def redacted(**keys: Any) -> dict[str, Any]:
    """What is left of an event."""
    return dict(Redactor()(None, "info", {"event": "e", **keys}))


@pytest.mark.parametrize(
    "key",
    [
        *("pin", "so_pin", "userPin", "soPIN", "PKCS11_PIN", "new-pin", "pin_value"),
        *("password", "db.password", "passphrase", "client_secret", "puk", "SOPIN"),
    ],
)
def test_the_value_of_a_key_that_speaks_of_a_pin_is_hidden(key: str) -> None:
    """However it is spelt, and of whichever type it is."""
    assert redacted(**{key: PIN})[key] == HIDDEN
    assert redacted(**{key: int(PIN)})[key] == HIDDEN
    assert redacted(**{key: PIN.encode()})[key] == HIDDEN
    assert redacted(**{key: [PIN]})[key] == HIDDEN


@pytest.mark.parametrize("key", ["pinned", "spin", "shopping", "secretary", "token"])
def test_other_keys_are_left(key: str) -> None:
    """A log that hides too much is switched off."""
    assert redacted(**{key: PIN})[key] == PIN


def test_that_there_is_no_pin_may_be_seen() -> None:
    """It is often the very thing that one looks for."""
    assert redacted(pin=None, has_pin=True) == {
        "event": "e",
        "pin": None,
        "has_pin": True,
    }


def test_of_a_template_the_attributes_are_left() -> None:
    """By its key, by its attributes, or by the names of the standard."""
    template = {Attribute.LABEL: "secret-label", Attribute.CLASS: ObjectClass.DATA}
    assert redacted(template=template)["template"] == dict.fromkeys(template, HIDDEN)
    assert redacted(what=template)["what"] == dict.fromkeys(template, HIDDEN)
    assert redacted(public_template={"label": "x"})["public_template"] == {
        "label": HIDDEN
    }
    assert redacted(attrs=[("label", "x")])["attrs"] == HIDDEN
    assert redacted(x={"CKA_VALUE": b"k", "CKM": 1})["x"] == {
        "CKA_VALUE": HIDDEN,
        "CKM": 1,
    }


def test_the_pin_in_a_uri_is_hidden_in_any_text() -> None:
    """In the event, in values, in keys and in bytes; the rest of the URI is left."""
    event = Redactor()(None, "info", {"event": f"opening {URI!r} now", "uri": URI})
    assert event["uri"] == "pkcs11:token=demo?pin-value=***&module-path=/lib/so"
    assert event["event"] == (
        "opening 'pkcs11:token=demo?pin-value=***&module-path=/lib/so' now"
    )
    assert list(redacted(x={URI: 1})["x"]) == [event["uri"]]
    assert redacted(x=URI.encode())["x"] == event["uri"].encode()
    assert redacted(x=URI.replace("pin-value", "PIN-VALUE"))["x"].endswith(
        "PIN-VALUE=***&module-path=/lib/so"
    )


class _SecretStr:
    def get_secret_value(self) -> str:
        return PIN


def test_objects_that_hold_a_secret_are_hidden() -> None:
    """Whatever a renderer would make of them."""
    assert redacted(x=pins.Secret(PIN), y=[_SecretStr()]) == {
        "event": "e",
        "x": HIDDEN,
        "y": [HIDDEN],
    }


class _Pair(NamedTuple):
    name: str
    options: dict[str, str]


def test_what_is_nested_is_copied_and_the_programs_own_is_left() -> None:
    """A processor that changed it would change the program."""
    mine = {"options": [{"pin": PIN}], "pair": _Pair("a", {"pin": PIN})}
    hidden = redacted(mine=mine, proxy=MappingProxyType({"pin": PIN}), odd={(URI,)})
    assert PIN not in repr(hidden)
    assert mine == {"options": [{"pin": PIN}], "pair": ("a", {"pin": PIN})}


def test_what_is_nested_in_itself_ends() -> None:
    """A log call must not end the program."""
    ring: dict[str, Any] = {}
    ring["ring"] = ring
    assert HIDDEN in repr(redacted(ring=ring))


def test_words_of_ones_own() -> None:
    """Names differ from house to house."""
    event = Redactor(words=["PED"])(None, "info", {"event": "e", "pedKey": PIN})
    assert event["pedKey"] == HIDDEN


VALUES = st.recursive(
    st.sampled_from([PIN, URI, PIN.encode(), pins.Secret(PIN), _SecretStr(), 1, None]),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(max_size=5), inner)
        | st.dictionaries(st.sampled_from(list(Attribute)), inner)
        | st.dictionaries(st.binary(max_size=5), inner)
        | st.tuples(inner)
        | st.frozensets(st.sampled_from([URI, PIN]))
    ),
    max_leaves=10,
)


@given(st.sampled_from(["pin", "template", "user_pin"]), VALUES)
def test_nothing_under_such_a_key_shows_the_pin(key: str, value: Any) -> None:
    """Whatever it is, and it never raises."""
    assert PIN not in repr(redacted(**{key: value}))


@given(VALUES)
def test_no_uri_shows_its_pin(value: Any) -> None:
    """Wherever it stands."""
    assert f"pin-value={PIN}" not in repr(redacted(value=value))


def test_a_traceback_with_variables_shows_no_pin(
    capsys: pytest.CaptureFixture[str], make_pool: MakePool
) -> None:
    """Tracebacks as data hold the locals of each frame."""
    structlog.configure(
        processors=[
            structlog.processors.dict_tracebacks,
            Redactor(),
            structlog.processors.JSONRenderer(),
        ]
    )
    try:
        _opens(make_pool, PIN, URI)
    except ValueError:
        structlog.get_logger().exception("failed", uri=URI)
    out = capsys.readouterr().out
    assert PIN not in out
    frames = json.loads(out)["exception"][0]["frames"]
    assert frames[-1]["locals"]["pin"] == HIDDEN


def _opens(_make_pool: object, pin: str, uri: str) -> None:
    raise ValueError(len(pin) + len(uri))
