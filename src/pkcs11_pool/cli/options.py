"""The words that commands have in common: which token, and where its PINs come from.

A PIN is never a word: other users of the machine see the words of a program.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pkcs11_pool import pins
from pkcs11_pool.cli.exits import CommandError, Exit
from pkcs11_pool.errors import InvalidURI
from pkcs11_pool.uri import Pkcs11URI, read

if TYPE_CHECKING:
    from pkcs11_pool.faces.pool import TokenPool

TYPICAL_MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so",
    "/usr/lib/aarch64-linux-gnu/opensc-pkcs11.so",
    "/usr/lib/x86_64-linux-gnu/libtpm2_pkcs11.so.1",
    "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so",
)
"""Where distributions put modules: to be named in advice, never to be loaded."""

PIN_VARIABLE = "PKCS11_PIN"

_NO_PIN = (
    "no PIN: give one of --pin-env, --pin-file, --pin-credential, --pin-keyring or "
    f"--pin-prompt, or set {PIN_VARIABLE}"
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModuleOptions:
    """Which module.

    Attributes:
        module: Cryptoki module, a .so file.
        uri: PKCS#11 URI (RFC 7512) that names the module, the token, a key.
    """

    module: Annotated[Path | None, Parameter(env_var="PKCS11_MODULE")] = None
    uri: str | None = None

    def parsed(self) -> Pkcs11URI:
        """The URI, empty if there is none."""
        found = Pkcs11URI() if self.uri is None else read(self.uri)
        if isinstance(found, InvalidURI):
            raise CommandError(str(found))
        return found

    def module_path(self) -> str:
        """The module.

        Raises:
            CommandError: None is named.
        """
        named = self.parsed().module_path
        # An empty variable is none.
        if self.module is not None and str(self.module) != ".":
            _agree("module", named, "--module or PKCS11_MODULE", str(self.module))
            return str(self.module)
        if named is not None:
            return named
        there = [path for path in TYPICAL_MODULES if Path(path).is_file()]
        hint = f"; {' and '.join(there)} is there" if there else ""
        raise CommandError(f"which module? Give --module or set PKCS11_MODULE{hint}")


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

    def source(self, text: str = "PIN of the user: ") -> Any:
        """The PIN source that was named, or None.

        What is typed is asked for here, once, and not again at each login.
        """
        return chosen(
            {
                "--pin-env": self.pin_env and pins.env(self.pin_env),
                "--pin-file": self.pin_file and pins.file(self.pin_file, pipe=True),
                "--pin-credential": self.pin_credential
                and pins.systemd_credential(self.pin_credential),
                "--pin-keyring": self.pin_keyring and pins.keyring(*self.pin_keyring),
                "--pin-prompt": asked(text) if self.pin_prompt else None,
            }
        )


def chosen(sources: dict[str, Any]) -> Any:
    """The one source that was given, or None.

    Raises:
        CommandError: There are two.
    """
    given = [name for name, source in sources.items() if source]
    if len(given) > 1:
        raise CommandError(f"{given[0]} and {given[1]}: the PIN has one source")
    return sources[given[0]] if given else None


def asked(text: str) -> pins.Secret:
    """A PIN that is typed."""
    return pins.literal(pins.prompt(text)())


def asked_twice(what: str) -> pins.Secret:
    """A new PIN that is typed, twice.

    Raises:
        CommandError: The two differ.
    """
    first, second = asked(f"New PIN of {what}: "), asked("The same again: ")
    if first != second:
        raise CommandError("the two PINs differ; nothing was done", Exit.PIN)
    return first


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TokenOptions(ModuleOptions, PinOptions):
    """Which token, and the PIN of its user.

    Attributes:
        token_label: Label of the token.
        token_serial: Serial number of the token.
        slot: Number of the slot that the token is in.
        timeout: Seconds that one operation may take.
        allow_pin_command: Run the program that the URI's pin-source names.
    """

    token_label: Annotated[
        str | None,
        Parameter(name=["--token-label", "--token"], env_var="PKCS11_TOKEN"),
    ] = None
    token_serial: str | None = None
    slot: int | None = None
    timeout: float = 30.0
    allow_pin_command: bool = False

    def pool(self, *, login: bool = True, so: bool = False) -> TokenPool:
        """An unopened pool on the token.

        Args:
            login: With the user's PIN, which is asked for if nothing names it.
            so: No user is needed: the security officer comes.

        Raises:
            CommandError: No token is named, or no PIN can be had.
        """
        from pkcs11_pool.faces.pool import TokenPool  # noqa: PLC0415  # slow

        uri = self.parsed()
        options: dict[str, Any] = {"module": self.module_path()}
        if self.token_label is not None:
            # What is signed with another token than the one that was named is lost.
            given = "--token-label or PKCS11_TOKEN"
            _agree("token", uri.token, given, self.token_label)
            options["token_label"] = self.token_label
        if self.token_serial is not None:
            options["token_serial"] = self.token_serial.encode()
        if self.slot is not None:
            options["slot_id"] = self.slot
        named = (uri.token, uri.serial, uri.slot_id)
        if len(options) == 1 and named == (None, None, None):
            raise CommandError(
                "which token? Give --token-label, --token-serial, --slot or --uri; "
                "`pkcs11-pool tokens` shows them"
            )
        if not login or so:
            options["pin"] = None
        elif (source := self.pin(uri)) is not None:
            options["pin"] = source
        return TokenPool.from_uri(
            uri,
            allow_pin_command=self.allow_pin_command,
            timeout=self.timeout,
            open_timeout=self.timeout,
            **options,
        )

    def pin(self, uri: Pkcs11URI) -> Any:
        """The user's PIN source; None: that of the URI.

        Raises:
            CommandError: There is none, and no terminal to ask on.
        """
        source = self.source()
        if source is not None:
            return source
        if uri.pin_value is not None or uri.pin_source is not None:
            return None
        return by_default("PIN of the user: ")


def _agree(what: str, named: str | None, given: str, value: str) -> None:
    """Let the URI name nothing else than the other words and variables do.

    Raises:
        CommandError: It does.
    """
    if named is not None and named != value:
        raise CommandError(
            f"the URI names the {what} {named!r}, and {given} {value!r}: which? Take "
            "one of them out"
        )


def by_default(text: str) -> Any:
    """The PIN where no word names its source: the variable, else the terminal.

    Raises:
        CommandError: There is neither.
    """
    if os.environ.get(PIN_VARIABLE):
        return pins.env(PIN_VARIABLE)
    if not pins.can_prompt():
        raise CommandError(_NO_PIN, Exit.PIN)
    return asked(text)
