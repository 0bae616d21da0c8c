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

__all__ = ["PROTECTED_AUTH", "Secret", "env", "file"]

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
        raise InvalidOption("pin-source names a program, and the pool runs none: pin=")
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
    kind = "an empty str" if isinstance(given, str) else type(given).__name__
    return PinSourceError(f"the PIN source must give a non-empty str, not {kind}")


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
            with open(path, "rb") as lines:  # noqa: PTH123  # str or Path
                line = _decoded(lines.readline())
        except OSError as error:
            raise PinSourceError(
                f"cannot read a PIN from {os.fspath(path)}: {error}"
            ) from error
        if line is None:
            raise PinSourceError(f"the PIN in {os.fspath(path)} is not UTF-8")
        return line

    return read


def _decoded(line: bytes) -> str | None:
    """A line as text, or None. A decoder's own error would show the line."""
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return None
