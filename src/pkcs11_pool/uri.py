"""PKCS#11 URIs (RFC 7512), as far as they name a token and a module.

Pure: a URI is text; nothing that it names is opened here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from pkcs11_pool.errors import InvalidURI

_PATH: Final = frozenset(
    {
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
    }
)
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_QUERY: Final = frozenset({"pin-source", "pin-value", "module-name", "module-path"})


@dataclass(frozen=True, slots=True)
class Pkcs11URI:
    """A parsed URI: percent-decoded attributes of its path and its query."""

    path: dict[str, bytes]
    query: dict[str, bytes]

    def text(self, name: str) -> str | None:
        """An attribute as text, or None."""
        value = self.path.get(name, self.query.get(name))
        try:
            return None if value is None else value.decode()
        except UnicodeDecodeError:
            message = f"{name} in the PKCS#11 URI is not UTF-8"
            raise InvalidURI(message) from None

    def __repr__(self) -> str:
        """Names only: the query may hold a PIN."""
        return f"<Pkcs11URI {sorted(self.path)} {sorted(self.query)}>"


def parse(uri: object) -> Pkcs11URI | InvalidURI:
    """Parse a PKCS#11 URI by RFC 7512, "PKCS #11 URI Scheme ABNF".

    Never raises, but gives the error to raise: the frame that raises must not have
    the URI, because there may be a PIN in it.
    """
    try:
        return _parse(uri)
    except InvalidURI as error:
        return InvalidURI(str(error))


def _parse(uri: object) -> Pkcs11URI:
    if not isinstance(uri, str) or uri[:7].lower() != "pkcs11:":
        raise InvalidURI("a PKCS#11 URI starts with 'pkcs11:'")
    path, mark, query = uri[7:].partition("?")
    parsed = Pkcs11URI(_attributes(path, ";", _PATH), _attributes(query, "&", _QUERY))
    if mark and not query:
        raise InvalidURI("nothing follows '?' in the PKCS#11 URI")
    if "pin-source" in parsed.query and "pin-value" in parsed.query:
        raise InvalidURI("a PKCS#11 URI has pin-source or pin-value, not both")
    parsed.text("pin-value")
    return parsed


def _attributes(text: str, separator: str, known: frozenset[str]) -> dict[str, bytes]:
    if _BAD_ESCAPE.search(text):
        raise InvalidURI("'%' in a PKCS#11 URI is followed by two hexadecimal digits")
    found: dict[str, bytes] = {}
    for part in text.split(separator) if text else ():
        name, equals, value = part.partition("=")
        if not equals or not name:
            message = "each part of a PKCS#11 URI is name=value"
            raise InvalidURI(message)
        vendor = name.replace("-", "").replace("_", "").isalnum()
        if name not in known and not vendor:
            message = f"{name!r} is no attribute of a PKCS#11 URI"
            raise InvalidURI(message)
        if name in found:
            message = f"{name} stands twice in the PKCS#11 URI"
            raise InvalidURI(message)
        found[name] = unquote_to_bytes(value)
    return found
