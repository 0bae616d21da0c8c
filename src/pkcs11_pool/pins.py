"""PINs that do not show, and the sources that a PIN can come from, by name.

A PIN lives in a :class:`Secret` from the moment that it is given. It is taken
out only as the argument of a raw call that cannot raise, so that no traceback
holds it in a frame. Python cannot wipe a ``str``: a literal stays in memory.
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import os
import re
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

from pkcs11 import PROTECTED_AUTH

from pkcs11_pool.errors import (
    InvalidOption,
    InvalidType,
    InvalidURI,
    PinSourceError,
)
from pkcs11_pool.pin_sources import (
    can_prompt,
    command,
    env,
    file,
    keyring,
    prompt,
    systemd_credential,
)

__all__ = [
    "PROTECTED_AUTH",
    "Secret",
    "can_prompt",
    "command",
    "env",
    "file",
    "keyring",
    "literal",
    "prompt",
    "systemd_credential",
]

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

# Keyed per process: a memory dump of the book of rejected PINs alone does not
# allow to try PINs against it.
_KEY: Final = os.urandom(32)


class Secret:
    """A PIN that shows as ``***`` wherever it is printed, logged or formatted."""

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def __repr__(self) -> str:
        """Never the PIN."""
        return "***"

    __str__ = __repr__

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled or copied to another process."""
        message = "a PIN is not pickled; give the other process its own PIN source"
        raise TypeError(message)

    def __len__(self) -> int:
        """Length in bytes of UTF-8, as ``C_Login`` counts."""
        return len(self.__value.encode())

    def encoded(self) -> bytes:
        """The PIN as the token takes it. Only for the argument of a raw call."""
        return self.__value.encode()

    def __eq__(self, other: object) -> bool:
        """Equal PINs are equal; how long it takes tells nothing."""
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self.encoded(), other.encoded())

    def __hash__(self) -> int:
        """By the keyed hash."""
        return hash(self.fingerprint())

    def fingerprint(self) -> bytes:
        """A keyed hash, equal for equal PINs in this process only."""
        return hashlib.blake2b(self.__value.encode(), key=_KEY).digest()


class PinPad:
    """The PIN is typed at the token itself (``PROTECTED_AUTH``)."""

    __slots__ = ()

    def __repr__(self) -> str:
        """As python-pkcs11 names it."""
        return "PROTECTED_AUTH"


PIN_PAD: Final = PinPad()

Pin = Secret | PinPad
PinCallable = Callable[[], "str | Awaitable[str]"]
PinSource = Pin | PinCallable | None


class NoPin:
    """What was given as a PIN and is none. Raised later, by :func:`checked`.

    The frame that raises must not have the value: it may be a PIN of a wrong type.
    """

    __slots__ = ("error",)

    def __init__(self, error: InvalidOption) -> None:
        self.error = error


def hide(value: object) -> Pin | NoPin:
    """Take a PIN out of sight. Never raises: put the result in the place of the PIN."""
    if isinstance(value, (Secret, PinPad)):
        return value
    if value is PROTECTED_AUTH:
        return PIN_PAD
    if not isinstance(value, str):
        return NoPin(InvalidType(f"a PIN is a str, not {type(value).__name__}"))
    if not value:
        return NoPin(
            InvalidOption("a PIN is not empty; for a token without one: pin=None")
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        # The codec's own error would hold the PIN.
        return NoPin(InvalidOption("a PIN is text that can be written as UTF-8"))
    return Secret(value)


def hide_source(value: object) -> PinSource | NoPin:
    """Take what may give a PIN out of sight. Never raises."""
    if value is None or (callable(value) and not isinstance(value, type)):
        return value
    hidden = hide(value)
    if isinstance(hidden, NoPin) and not isinstance(value, str):
        return NoPin(
            InvalidType(
                "pin must be a str, a callable that gives one, PROTECTED_AUTH or None, "
                f"not {type(value).__name__}"
            )
        )
    return hidden


def checked_source(hidden: PinSource | NoPin) -> PinSource:
    """A hidden PIN source.

    Raises:
        InvalidType, InvalidOption: What was given is none.
    """
    if isinstance(hidden, NoPin):
        raise hidden.error
    return hidden


def checked(hidden: Pin | NoPin) -> Pin:
    """A hidden PIN.

    Raises:
        InvalidType, InvalidOption: What was given is none.
    """
    if isinstance(hidden, NoPin):
        raise hidden.error
    return hidden


def secret(hidden: Pin | NoPin) -> Secret:
    """A hidden PIN that is text, where a PIN pad will not do.

    Raises:
        InvalidType, InvalidOption: It is none.
    """
    pin = checked(hidden)
    if isinstance(pin, PinPad):
        raise InvalidType("a PIN typed at the token cannot be set or changed here")
    return pin


def literal(value: str) -> Secret:
    """A PIN that is known now. It stays in memory for as long as the pool does.

    Raises:
        InvalidType, InvalidOption: It is no text, or empty.
    """
    # In its own place: from here on no frame of ours has the PIN as text.
    value = hide(value)  # type: ignore[assignment]
    return secret(value)  # type: ignore[arg-type]


def from_pin_source(where: str, *, allow_command: bool = False) -> PinCallable:
    """The PIN source that ``pin-source`` of a PKCS#11 URI names.

    A path or a ``file:`` URI is a file; ``env:NAME`` is a variable, which the RFC does
    not know but many wish for; after ``|`` stands a program. Source: RFC 7512,
    "PKCS #11 URI Scheme Query Attribute Semantics".

    Raises:
        InvalidURI: It names nothing of these, or a program that is not allowed.
    """
    if where.startswith("|"):
        if not allow_command:
            raise InvalidURI(
                "pin-source names a program, and none is run unless it is allowed: "
                "from_uri(…, allow_pin_command=True), or give pin="
            )
        return command(_words(where[1:]))
    scheme, colon, rest = where.partition(":")
    if scheme.lower() == "env" and colon and rest:
        return env(rest)
    if scheme.lower() == "file" and colon:
        # file:/p, file:///p and file://localhost/p are one file: RFC 8089.
        if rest.startswith("//"):
            host, slash, path = rest[2:].partition("/")
            if host not in ("", "localhost"):
                raise InvalidURI(f"pin-source names a file on another machine, {host}")
            rest = slash + path
        where = rest
    elif _SCHEME.match(where):
        raise InvalidURI(
            f"pin-source can be a file (a path or file:…), env:NAME or |program, not "
            f"{scheme}:"
        )
    if not where:
        raise InvalidURI("pin-source names no file")
    return file(where)


def _words(text: str) -> list[str]:
    import shlex  # noqa: PLC0415  # for the few who name a program

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidURI(f"pin-source: cannot tell the words apart: {error}") from None
    if not words:
        raise InvalidURI("pin-source: no program stands after '|'")
    return words


def is_async(value: PinSource) -> bool:
    """Whether the source must be awaited, as far as it shows before the call."""
    return inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(
        getattr(value, "__call__", None)  # noqa: B004  # the method itself is asked
    )


def ask(asked: PinCallable) -> Pin:
    """Call a plain PIN source, and drop what it gave.

    Raises:
        PinSourceError: It raised, or gave no PIN. The cause is attached.
    """
    try:
        given = answer(asked())
    except PinSourceError:
        raise
    except Exception as error:
        raise PinSourceError(f"the PIN source raised {type(error).__name__}") from error
    if isinstance(given, PinSourceError):
        raise given
    return given


def answer(given: object) -> Pin | PinSourceError:
    """What a PIN source gave, out of sight; or the error to raise. Never raises."""
    hidden = hide(given)
    if not isinstance(hidden, NoPin):
        return hidden
    if inspect.iscoroutine(given):
        given.close()
    kind = type(given).__name__
    if isinstance(given, str):
        kind = "text that is not UTF-8" if given else "an empty str"
    return PinSourceError(f"the PIN source must give a non-empty str, not {kind}")
