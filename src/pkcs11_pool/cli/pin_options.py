"""The words that say where PINs come from: the same for each PIN, behind its name.

A PIN is never a word: other users of the machine see the words of a program.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cyclopts import Parameter

from pkcs11_pool import pins
from pkcs11_pool.cli.exits import CommandError, Exit

if TYPE_CHECKING:
    from collections.abc import Callable

    Ask = Callable[[], pins.Secret]

PIN_VARIABLE: Final = "PKCS11_PIN"

SOURCES: Final = ("env", "file", "credential", "keyring", "prompt")
"""What stands behind ``--pin-``, ``--so-pin-`` and ``--new-pin-``."""

_MISSING: Final = {"so-pin": "no PIN of the security officer", "new-pin": "no new PIN"}
# A variable that a shell can set: not a PIN that was typed in its place.
_VARIABLE: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PinOptions:
    """Where the user's PIN comes from; else PKCS11_PIN, else it is asked for.

    Attributes:
        pin_env: Variable that holds the PIN.
        pin_file: File whose first line is the PIN; nobody else may read it.
        pin_credential: Credential of the systemd service that this is.
        pin_keyring: Service and user name of the PIN in the keyring.
        pin_prompt: Ask for the PIN.
    """

    pin_env: str | None = None
    pin_file: Path | None = None
    pin_credential: str | None = None
    pin_keyring: tuple[str, str] | None = None
    pin_prompt: bool = False

    def source(self, ask: Ask | None = None) -> Any:
        """The PIN source that was named, or None.

        What is typed is asked for here, once, and not again at each login.
        """
        return _named("pin", self, ask or (lambda: asked("PIN of the user: ")))

    def later(self, otherwise: Any = None) -> Ask:
        """What gives the PIN when it is called: not asked for, and the words checked.

        Args:
            otherwise: The source where no word names one, before the variable.

        Raises:
            CommandError: They name two sources, or a variable that is none.
        """

        def ask() -> pins.Secret:
            return asked("PIN of the user: ")

        source = _named("pin", self, lambda: ask) or otherwise
        return lambda: taken(by_default(ask) if source is None else source)

    def first(self) -> pins.Secret:
        """The PIN that a user gets: asked for twice where it is typed."""

        def ask() -> pins.Secret:
            return asked_twice("First PIN of the user: ")

        source = self.source(ask)
        return taken(by_default(ask) if source is None else source)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OfficerOptions:
    """Where the PIN of the security officer comes from; else it is asked for.

    Attributes:
        so_pin_env: Variable that holds the PIN of the security officer.
        so_pin_file: File whose first line is the PIN of the security officer.
        so_pin_credential: Credential of the systemd service that this is.
        so_pin_keyring: Service and user name of that PIN in the keyring.
        so_pin_prompt: Ask for the PIN of the security officer.
    """

    so_pin_env: str | None = None
    so_pin_file: Path | None = None
    so_pin_credential: str | None = None
    so_pin_keyring: tuple[str, str] | None = None
    so_pin_prompt: bool = False

    def secret(self, *, new: bool = False) -> pins.Secret:
        """The PIN of the security officer; a new one is asked for twice.

        Raises:
            CommandError: No word names its source, and there is no terminal.
        """

        def ask() -> pins.Secret:
            if new:
                return asked_twice("New PIN of the security officer: ")
            return asked("PIN of the security officer: ")

        source = _named("so_pin", self, ask)
        return taken(_terminal("so-pin", ask) if source is None else source)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NewPinOptions:
    """Where a new PIN comes from; else it is asked for twice.

    Attributes:
        new_pin_env: Variable that holds the new PIN.
        new_pin_file: File whose first line is the new PIN.
        new_pin_credential: Credential of the systemd service that this is.
        new_pin_keyring: Service and user name of the new PIN in the keyring.
        new_pin_prompt: Ask for the new PIN.
    """

    new_pin_env: str | None = None
    new_pin_file: Path | None = None
    new_pin_credential: str | None = None
    new_pin_keyring: tuple[str, str] | None = None
    new_pin_prompt: bool = False

    def secret(self) -> pins.Secret:
        """The new PIN.

        Raises:
            CommandError: No word names its source, and there is no terminal.
        """

        def ask() -> pins.Secret:
            return asked_twice("New PIN of the user: ")

        source = _named("new_pin", self, ask)
        return taken(_terminal("new-pin", ask) if source is None else source)


def _named(which: str, words: Any, ask: Callable[[], Any]) -> Any:
    """The one source of a PIN that the words name, or None.

    The words of every PIN are the same behind its name.

    Raises:
        CommandError: They name two, or a variable that is none.
    """
    env, file, credential, ring, prompt = (
        getattr(words, f"{which}_{kind}") for kind in SOURCES
    )
    word = f"--{which.replace('_', '-')}"
    if env is not None and not _VARIABLE.fullmatch(env):
        # Not shown: it may be the PIN itself.
        raise CommandError(f"{word}-env takes the name of a variable, not the PIN")
    given = {
        "env": lambda: pins.env(env),
        "file": lambda: pins.file(file, pipe=True),
        "credential": lambda: pins.systemd_credential(credential),
        "keyring": lambda: pins.keyring(*ring),
        "prompt": ask,
    }
    values = dict(zip(SOURCES, (env, file, credential, ring, prompt), strict=True))
    named = [kind for kind, value in values.items() if value]
    if len(named) > 1:
        first, second = (f"{word}-{kind}" for kind in named[:2])
        raise CommandError(f"{first} and {second}: the PIN has one source")
    return given[named[0]]() if named else None


def refused(which: str, words: Any, reason: str) -> None:
    """Let no source of a PIN be named that is not used.

    Raises:
        CommandError: One is.
    """
    for kind in SOURCES:
        if getattr(words, f"{which}_{kind}"):
            word = f"--{which.replace('_', '-')}-{kind}"
            raise CommandError(f"{word} is of no use here: {reason}")


def taken(source: Any) -> pins.Secret:
    """The PIN of a source, now."""
    given = source if isinstance(source, pins.Secret) else source()
    return given if isinstance(given, pins.Secret) else pins.literal(given)


def _terminal(which: str, ask: Ask) -> pins.Secret:
    """A PIN that no word names the source of: it is asked for.

    Raises:
        CommandError: There is no terminal.
    """
    if not pins.can_prompt():
        message = f"{_MISSING[which]}: give one of {_words(which)}"
        raise CommandError(message, Exit.PIN)
    return ask()


def _words(which: str) -> str:
    *most, last = (f"--{which}-{kind}" for kind in SOURCES)
    return f"{', '.join(most)} or {last}"


def asked(text: str) -> pins.Secret:
    """A PIN that is typed."""
    return pins.literal(pins.prompt(text)())


def asked_twice(text: str) -> pins.Secret:
    """A new PIN that is typed, twice.

    Raises:
        CommandError: The two differ.
    """
    first, second = asked(text), asked("The same again: ")
    if first != second:
        raise CommandError("the two PINs differ; nothing was done", Exit.PIN)
    return first


def by_default(ask: Ask) -> Any:
    """The user's PIN where no word names its source: the variable, else the terminal.

    Raises:
        CommandError: There is neither.
    """
    if os.environ.get(PIN_VARIABLE):
        return pins.env(PIN_VARIABLE)
    if not pins.can_prompt():
        raise CommandError(
            f"no PIN: give one of {_words('pin')}, or set {PIN_VARIABLE}", Exit.PIN
        )
    return ask()
