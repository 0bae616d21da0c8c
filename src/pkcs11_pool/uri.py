"""PKCS#11 URIs (RFC 7512), read and written.

Pure: a URI is text; nothing that it names is opened here. A PIN that stands in one is
out of sight from the moment that it is read, and no error shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, get_args
from urllib.parse import quote, quote_from_bytes, unquote_to_bytes

from pkcs11_pool import pins
from pkcs11_pool.errors import InvalidType, InvalidURI

if TYPE_CHECKING:
    from typing import Self, Unpack

__all__ = ["ObjectType", "Pkcs11URI"]

ObjectType = Literal["public", "private", "cert", "secret-key", "data"]

# The grammar's pk11-res-avail and what path and query have besides: these stand in a
# value as they are. All else but letters, digits and -._~ is percent-encoded.
_AVAILABLE: Final = ":[]@!$'()*+,="
_SAFE: Final = {"path": _AVAILABLE + "&", "query": _AVAILABLE + "/?|"}
_SEPARATOR: Final = {"path": ";", "query": "&"}
_VALUE: Final = {
    part: re.compile(rf"(?:[A-Za-z0-9\-._~{re.escape(safe)}]|%[0-9A-Fa-f]{{2}})*")
    for part, safe in _SAFE.items()
}
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_VERSION: Final = re.compile(r"(\d{1,3})(?:\.(\d{1,3}))?", re.ASCII)
_SLOT: Final = re.compile(r"\d{1,20}", re.ASCII)
_SLOTS: Final = 10**20
"""As many digits as are read."""
_SCHEME: Final = "pkcs11:"
_BYTE: Final = 255

# In the order of the RFC's grammar, in which they are written.
_PATH: Final = (
    "token",
    "manufacturer",
    "serial",
    "model",
    "library-manufacturer",
    "library-version",
    "library-description",
    "object",
    "type",
    "id",
    "slot-description",
    "slot-manufacturer",
    "slot-id",
)
_QUERY: Final = ("pin-source", "pin-value", "module-name", "module-path")
_KNOWN: Final = {"path": _PATH, "query": _QUERY}
_TEXTS: Final = frozenset((*_PATH, *_QUERY)) - {
    "library-version",
    "type",
    "id",
    "slot-id",
    "pin-value",
}


class Attributes(TypedDict, total=False):
    """What a URI can be made of; all of it may be missing."""

    token: str | None
    manufacturer: str | None
    serial: str | None
    model: str | None
    library_manufacturer: str | None
    library_version: tuple[int, int] | None
    library_description: str | None
    object: str | None
    type: ObjectType | None
    id: bytes | None
    slot_description: str | None
    slot_manufacturer: str | None
    slot_id: int | None
    pin_source: str | None
    pin_value: pins.Secret | str | None
    module_name: str | None
    module_path: str | None
    vendor_path: Mapping[str, bytes] | Iterable[tuple[str, bytes]]
    vendor_query: Mapping[str, bytes] | Iterable[tuple[str, bytes]]


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Pkcs11URI:
    """A PKCS#11 URI: what it names, without percent-encoding; None: not named.

    ``Pkcs11URI.parse(text)`` reads one, ``Pkcs11URI(token="x").format()`` writes one.
    Two that say the same are equal, however they were written.

    Attributes:
        token: Label of the token (``CK_TOKEN_INFO``), and its ``manufacturer``,
            ``serial`` and ``model``.
        library_manufacturer: Of the module (``CK_INFO``), and its ``library_version``
            as (major, minor) and ``library_description``.
        object: Label of an object (``CKA_LABEL``), its ``type`` (``"public"``,
            ``"private"``, ``"cert"``, ``"secret-key"`` or ``"data"``) and ``id``.
        slot_id: Number of the slot, with ``slot_description``, ``slot_manufacturer``.
        pin_source: Where the user's PIN can be had; or ``pin_value``, the PIN.
        module_path: The module's file; or ``module_name``, its name without affixes.
        vendor_path: Further attributes of the path, sorted by name, each once.
        vendor_query: Further attributes of the query, in order; they may repeat.

    Raises:
        InvalidURI: A value is one that a URI cannot hold.

    Source: RFC 7512, "PKCS #11 URI Scheme Definition".
    """

    token: str | None
    manufacturer: str | None
    serial: str | None
    model: str | None
    library_manufacturer: str | None
    library_version: tuple[int, int] | None
    library_description: str | None
    object: str | None
    type: ObjectType | None
    id: bytes | None
    slot_description: str | None
    slot_manufacturer: str | None
    slot_id: int | None
    pin_source: str | None
    pin_value: pins.Secret | None
    module_name: str | None
    module_path: str | None
    vendor_path: tuple[tuple[str, bytes], ...]
    vendor_query: tuple[tuple[str, bytes], ...]

    def __init__(self, **attributes: Unpack[Attributes]) -> None:
        # First of all: from here on no frame of ours holds the PIN as text.
        given: dict[str, Any] = attributes  # type: ignore[assignment]
        given["pin_value"] = hidden = _hide(given.get("pin_value"))
        if isinstance(hidden, pins.NoPin):
            raise InvalidURI(f"pin_value: {hidden.error}")
        unknown = set(given) - {field.name for field in fields(self)}
        if unknown:
            raise InvalidType(f"{min(unknown)!r} is no attribute of a PKCS#11 URI")
        for field in fields(self):
            value: Any = given.get(field.name)
            if field.name.startswith("vendor_"):
                value = _vendor(
                    field.name.removeprefix("vendor_"), () if value is None else value
                )
            elif value is not None:
                _check(field.name, value)
            object.__setattr__(self, field.name, value)
        if self.pin_source is not None and self.pin_value is not None:
            raise InvalidURI("a PKCS#11 URI has pin-source or pin-value, not both")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a PKCS#11 URI.

        Raises:
            InvalidURI: It is none. The message says at which character, from 1.
        """
        # In its own place: from here on no frame of ours has the URI as text.
        text = parsed = parse(text)  # type: ignore[assignment]
        if isinstance(parsed, InvalidURI):
            raise parsed
        return parsed  # type: ignore[return-value]

    def format(self, *, with_pin: bool = False) -> str:
        """Write the URI, its attributes in the order of the RFC.

        Args:
            with_pin: Write ``pin-value`` too. Such a URI is a secret.
        """
        path = [f"{name}={text}" for name, text in self._written("path")]
        query = [
            f"{name}={text}"
            for name, text in self._written("query")
            if with_pin or name != "pin-value"
        ]
        mark = "?" if query else ""
        return f"{_SCHEME}{';'.join(path)}{mark}{'&'.join(query)}"

    def _written(self, part: str) -> Iterable[tuple[str, str]]:
        for name in _KNOWN[part]:
            value = getattr(self, name.replace("-", "_"))
            if value is not None:
                yield name, _encoded(name, value, _SAFE[part])
        for name, octets in self.vendor_path if part == "path" else self.vendor_query:
            yield name, quote_from_bytes(octets, _SAFE[part])

    def __str__(self) -> str:
        """The URI without a PIN."""
        return self.format()

    def __repr__(self) -> str:
        """The URI without a PIN."""
        if not hasattr(self, "vendor_query"):
            return "<Pkcs11URI, not made>"  # in a traceback of the constructor
        return f"<Pkcs11URI {self.format()}>"


def read(given: object) -> Pkcs11URI | InvalidURI:
    """A URI as it is, or read from text; as :func:`parse`."""
    return given if isinstance(given, Pkcs11URI) else parse(given)


def parse(text: object) -> Pkcs11URI | InvalidURI:
    """Read a PKCS#11 URI.

    Never raises, but gives the error to raise: the frame that raises must not have
    the URI, because there may be a PIN in it.
    """
    try:
        return _parse(text)
    except InvalidURI as error:
        return InvalidURI(str(error))


def _parse(text: object) -> Pkcs11URI:
    if not isinstance(text, str):
        raise InvalidURI(f"a PKCS#11 URI is text, not {type(text).__name__}")
    if text[: len(_SCHEME)].lower() != _SCHEME:
        raise InvalidURI("a PKCS#11 URI starts with 'pkcs11:'")
    path, mark, query = text.partition("?")
    if mark and not query:
        raise InvalidURI("nothing follows '?' in the PKCS#11 URI: take it out")
    # A vendor's attribute of the path stands once, as a key; one of the query may not.
    found: dict[str, Any] = {"vendor_path": {}, "vendor_query": []}
    _take_all(found, "path", path[len(_SCHEME) :], len(_SCHEME) + 1)
    _take_all(found, "query", query, len(path) + 2)
    return Pkcs11URI(**found)


def _take_all(found: dict[str, Any], part: str, text: str, place: int) -> None:
    """Take the path or the query in; ``place`` is the number of its first character."""
    separator = _SEPARATOR[part]
    if text.endswith(separator):
        raise InvalidURI(
            f"nothing follows {separator!r} at character {place + len(text) - 1} of "
            "the PKCS#11 URI: take it out"
        )
    for piece in text.split(separator) if text else ():
        _take(found, part, piece, place)
        place += len(piece) + 1


def _take(found: dict[str, Any], part: str, piece: str, place: int) -> None:
    """Take one ``name=value`` in; ``place`` is the number of its first character."""
    name, equals, value = piece.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise InvalidURI(
            f"at character {place} of the PKCS#11 URI should stand name=value, and the "
            "name has letters, digits, '-' and '_'"
        )
    if name in _KNOWN["query" if part == "path" else "path"]:
        where = "after" if part == "path" else "before"
        message = f"{name}, at character {place}, must stand {where} the '?'"
        raise InvalidURI(message)
    start = place + len(name) + 1
    good = _VALUE[part].match(value)
    if good is None or good.end() < len(value):
        _refuse(name, value, 0 if good is None else good.end(), start)
    octets = unquote_to_bytes(value)
    known = name in _KNOWN[part]
    if not known and part == "query":
        found["vendor_query"].append((name, octets))
        return
    once = found if known else found["vendor_path"]
    key = name.replace("-", "_") if known else name
    if key in once:
        raise InvalidURI(f"{name} stands twice, again at character {place}")
    once[key] = _decoded(name, octets, start) if known else octets


def _refuse(name: str, value: str, at: int, start: int) -> None:
    where = f"character {start + at} of the PKCS#11 URI, in {name}"
    if value[at] == "%":
        raise InvalidURI(
            f"{where}: after '%' stand two hexadecimal digits; '%' itself is %25"
        )
    # What stands in a PIN is not told, not even one character of it.
    write = (
        "" if name == "pin-value" else f" as {quote(value[at], '', errors='replace')}"
    )
    raise InvalidURI(f"{where}, must be percent-encoded{write}")


def _decoded(name: str, octets: bytes, start: int) -> Any:
    """The value of an attribute, as :class:`Pkcs11URI` has it."""
    if name == "id":
        return octets
    try:
        value = octets.decode()
    except UnicodeDecodeError:
        value = None
    if value is None:
        raise InvalidURI(f"{name}, from character {start}, is not UTF-8")
    if name == "slot-id":
        if not _SLOT.fullmatch(value):
            raise InvalidURI(
                f"slot-id, from character {start}, is no number: {value!r}"
            )
        return int(value)
    if name == "library-version":
        version = _VERSION.fullmatch(value)
        if version is None:
            raise InvalidURI(
                f"library-version, from character {start}, is not as in 2.40: {value!r}"
            )
        return int(version[1]), int(version[2] or 0)
    return value


def _encoded(name: str, value: Any, safe: str) -> str:
    if name == "id":
        # Whole, because it is binary: RFC 7512 recommends it.
        return "".join(f"%{octet:02X}" for octet in value)
    if name == "library-version":
        return f"{value[0]}.{value[1]}"
    if isinstance(value, pins.Secret):
        return quote_from_bytes(value.encoded(), safe)
    return quote(str(value), safe)


def _hide(value: object) -> pins.Secret | pins.NoPin | None:
    hidden = None if value is None else pins.hide(value)
    if isinstance(hidden, pins.PinPad):
        return pins.NoPin(InvalidURI("a PIN pad is no PIN"))
    return hidden


def _check(field: str, value: object) -> None:
    """Refuse what cannot be written, so that what is written can be read again."""
    name = field.replace("_", "-")
    if name in _TEXTS and not isinstance(value, str):
        raise InvalidURI(f"{field} must be str, not {type(value).__name__}")
    if isinstance(value, str) and _has_surrogates(value):
        raise InvalidURI(f"{field} cannot be written as UTF-8")
    if name == "type" and value not in get_args(ObjectType):
        raise InvalidURI(f"type is one of {', '.join(get_args(ObjectType))}")
    if name == "id" and not isinstance(value, bytes):
        raise InvalidURI(f"id must be bytes, not {type(value).__name__}")
    if name == "slot-id" and (type(value) is not int or not 0 <= value < _SLOTS):
        raise InvalidURI("slot_id must be the number of a slot")
    if name == "library-version" and not _is_version(value):
        raise InvalidURI("library_version must be (major, minor), each 0 to 255")


def _is_version(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == len(("major", "minor"))
        and all(type(n) is int and 0 <= n <= _BYTE for n in value)
    )


def _has_surrogates(value: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in value)


def _vendor(part: str, given: Any) -> tuple[tuple[str, bytes], ...]:
    try:
        given = given.items() if isinstance(given, Mapping) else given
        pairs = tuple((name, value) for name, value in given)
    except Exception as error:
        message = f"vendor_{part} must be a mapping, or pairs of a name and bytes"
        raise InvalidURI(message) from error
    for name, value in pairs:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            shown = repr(name) if type(name) is str else f"a {type(name).__name__}"
            raise InvalidURI(f"{shown} cannot be the name of an attribute")
        if name in _PATH or name in _QUERY:
            raise InvalidURI(f"{name} is no vendor's attribute")
        if not isinstance(value, bytes):
            raise InvalidURI(f"{name} must be bytes, not {type(value).__name__}")
    if part == "query":
        return pairs
    if len(dict(pairs)) < len(pairs):
        raise InvalidURI("an attribute of the path stands in it once")
    return tuple(sorted(pairs))
