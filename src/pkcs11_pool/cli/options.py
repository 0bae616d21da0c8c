"""The words that commands have in common: which module, which token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pkcs11_pool import pins
from pkcs11_pool.cli.exits import CommandError
from pkcs11_pool.cli.pin_options import PinOptions, asked, by_default, taken
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

_QUOTE = (
    "; if more stood behind it: a shell cuts a URI at ';' and '&' that are not quoted "
    "(--uri 'pkcs11:…')"
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
        """The URI, empty if there is none.

        Raises:
            CommandError: It is none, or has a PIN in it.
        """
        found = Pkcs11URI() if self.uri is None else read(self.uri)
        if isinstance(found, InvalidURI):
            raise CommandError(str(found))
        if found.pin_value is not None:
            raise CommandError(
                "--uri has a pin-value, and a PIN is no word of a command, because "
                "others see it: take it out, and give pin-source or one of the words "
                "of the PIN"
            )
        return found

    def unquoted(self) -> str:
        """What to add where the URI lacks what is needed: a shell may have cut it."""
        whole = self.uri is None or ";" in self.uri or "?" in self.uri
        return "" if whole else _QUOTE

    def module_path(self) -> str:
        """The module.

        Raises:
            CommandError: None is named.
        """
        named = self.parsed().module_path
        # An empty variable is none.
        if self.module is not None and str(self.module) != ".":
            agree("module", named, "--module or PKCS11_MODULE", str(self.module))
            return str(self.module)
        if named is not None:
            return named
        there = [path for path in TYPICAL_MODULES if Path(path).is_file()]
        hint = (
            f"; on this machine: {', '.join(there)}"
            if there
            else "; `pkcs11-pool softhsm` gets one to try"
        )
        raise CommandError(
            f"which module? Give --module or set PKCS11_MODULE{hint}{self.unquoted()}"
        )


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
            agree("token", uri.token, given, self.token_label)
            options["token_label"] = self.token_label
        if self.token_serial is not None:
            options["token_serial"] = self.token_serial.encode()
        if self.slot is not None:
            options["slot_id"] = self.slot
        named = (uri.token, uri.serial, uri.slot_id)
        if len(options) == 1 and named == (None, None, None):
            raise CommandError(
                "which token? Give --token-label, --token-serial, --slot or --uri; "
                f"`pkcs11-pool tokens` shows them{self.unquoted()}"
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
        if uri.pin_source is not None:
            return None
        return by_default(lambda: asked("PIN of the user: "))

    def secret(self) -> pins.Secret:
        """The user's present PIN, also where the URI says where it is.

        Raises:
            CommandError: There is none, and no terminal to ask on.
        """
        uri = self.parsed()
        source = self.pin(uri)
        if source is None and uri.pin_source is not None:
            source = pins.from_pin_source(
                uri.pin_source, allow_command=self.allow_pin_command
            )
        return taken(source)


def agree(what: str, named: str | None, given: str, value: str) -> None:
    """Let the URI name nothing else than the other words and variables do.

    Raises:
        CommandError: It does.
    """
    if named is not None and named != value:
        raise CommandError(
            f"the URI names the {what} {named!r}, and {given} {value!r}: which? Take "
            "one of them out"
        )


def octets_id(type_: Any, words: Any) -> bytes:
    """Read the id of a key.

    Raises:
        ValueError: It is not written in hexadecimal digits.
    """
    del type_
    try:
        return bytes.fromhex(words[0].value)
    except ValueError:
        message = f"{words[0].value!r} is not hexadecimal, such as 01ff"
        raise ValueError(message) from None
