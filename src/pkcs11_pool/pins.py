"""PINs that do not show, and the sources that a PIN can come from.

A PIN lives in a :class:`Secret` from the moment that it is given. It is taken
out only as the argument of a raw call that cannot raise, so that no traceback
holds it in a frame. Python cannot wipe a ``str``: a literal stays in memory.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, NoReturn

from pkcs11 import PROTECTED_AUTH

from pkcs11_pool.errors import InvalidOption, InvalidType, PinSourceError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PROTECTED_AUTH", "Secret", "env", "file", "source"]

# Keyed per process: a memory dump of the book of rejected PINs alone does not
# allow to try PINs against it.
_KEY: Final = secrets.token_bytes(32)


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


def source(value: object) -> PinSource:
    """A PIN source from what the user gave.

    Raises:
        InvalidType: It is none of the kinds that can give a PIN.
        InvalidOption: It is an empty PIN.
    """
    if value is None or isinstance(value, (Secret, PinPad)):
        return value
    if value is PROTECTED_AUTH:
        return PIN_PAD
    if isinstance(value, str):
        return literal(value)
    if callable(value):
        return value
    message = (
        "pin must be a str, a callable that gives one, PROTECTED_AUTH or None, "
        f"not {type(value).__name__}"
    )
    raise InvalidType(message)


def literal(value: object) -> Secret:
    """A PIN given as text."""
    if isinstance(value, Secret):
        return value
    if not isinstance(value, str):
        message = f"a PIN is a str, not {type(value).__name__}"
        raise InvalidType(message)
    if not value:
        message = "a PIN is not empty; for a token without one, leave pin=None"
        raise InvalidOption(message)
    return Secret(value)


def given(value: object) -> Pin:
    """A PIN given to a call: text, or the PIN pad."""
    return PIN_PAD if value is PROTECTED_AUTH else literal(value)


officer = given
"""The PIN of the security officer."""


def from_uri(value: bytes | None, where: str | None) -> PinSource:
    """The PIN source of a PKCS#11 URI: ``pin-value``, or a file in ``pin-source``.

    Raises:
        InvalidOption: The source is a program, which is never run.
    """
    if value is not None:
        return Secret(value.decode())
    if where is None:
        return None
    if where.startswith("|"):
        message = "pin-source names a program, and the pool runs none: give pin="
        raise InvalidOption(message)
    return file(where.removeprefix("file://").removeprefix("file:"))


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
        return answer(asked())
    except PinSourceError:
        raise
    except Exception as error:
        message = f"the PIN source raised {type(error).__name__}"
        raise PinSourceError(message) from error


def answer(given: object) -> Pin:
    """Check what a PIN source gave, without showing it.

    Raises:
        PinSourceError: It is no PIN.
    """
    if given is PROTECTED_AUTH:
        return PIN_PAD
    if isinstance(given, (Secret, PinPad)):
        return given
    if isinstance(given, str) and given:
        return Secret(given)
    close = getattr(given, "close", None)
    if inspect.iscoroutine(given) and close is not None:
        close()
    kind = "an empty str" if isinstance(given, str) else type(given).__name__
    message = f"the PIN source must give a non-empty str, not {kind}"
    raise PinSourceError(message)


def env(name: str) -> PinCallable:
    """The PIN from an environment variable, read at each login."""

    def read() -> str:
        try:
            return os.environ[name]
        except KeyError:
            message = f"the environment variable {name} is not set"
            raise PinSourceError(message) from None

    return read


def file(path: str | Path) -> PinCallable:
    """The PIN from the first line of a file, read at each login."""

    def read() -> str:
        try:
            with open(path, encoding="utf-8") as lines:  # noqa: PTH123  # str or Path
                return lines.readline().rstrip("\r\n")
        except (OSError, UnicodeError) as error:
            message = f"cannot read a PIN from {os.fspath(path)}: {error}"
            raise PinSourceError(message) from error

    return read
