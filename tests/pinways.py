"""Each way in which a PIN comes to a pool, and each way in which its source goes wrong.

The sources stand in a file of their own: what they have in their variables must not
show either, and they are no frames of the test that looks.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import quote

from pkcs11_pool import Pkcs11URI, TokenPool, pins
from pkcs11_pool.integrations.settings import PoolSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from pinsearch import Hidden


@dataclass
class Way:
    """What a way needs to lead to a pool."""

    module: Path
    label: str
    pin: Hidden
    directory: Path
    monkeypatch: pytest.MonkeyPatch
    options: dict[str, Any]

    def pool(self, pin: Any) -> TokenPool:
        """A pool whose PIN comes from there."""
        return TokenPool(
            self.module, token_label=self.label, pin=pin, name="p", **self.options
        )

    @property
    def uri(self) -> str:
        """A URI without a PIN."""
        return f"pkcs11:token={self.label}?module-path={self.module}"

    def from_uri(self, text: str, **more: Any) -> TokenPool:
        """A pool by a URI without a PIN in it."""
        return TokenPool.from_uri(text, name="p", **self.options, **more)

    def file(self, name: str = "pin") -> Path:
        """A file with the PIN."""
        path = self.directory / name
        path.write_text(f"{self.pin.text}\n")
        path.chmod(0o600)
        return path

    def variable(self, name: str = "A_VARIABLE") -> str:
        """A variable with the PIN."""
        self.monkeypatch.setenv(name, self.pin.text)
        return name


def _keyring(way: Way) -> TokenPool:
    ring: Any = ModuleType("keyring")
    ring.get_password = lambda _service, _user: way.pin.text
    way.monkeypatch.setitem(sys.modules, "keyring", ring)
    way.monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    return way.pool(pins.keyring("hsm", "signer"))


def _prompt(way: Way) -> TokenPool:
    way.monkeypatch.setattr("pkcs11_pool.pin_sources.can_prompt", lambda: True)
    way.monkeypatch.setattr("getpass.getpass", lambda _text: way.pin.text)
    return way.pool(pins.prompt())


def _credential(way: Way) -> TokenPool:
    way.monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(way.file("hsm").parent))
    return way.pool(pins.systemd_credential("hsm"))


def _async(way: Way) -> TokenPool:
    async def ask() -> str:
        return way.pin.text

    return way.pool(ask)


@dataclass
class _Vault:
    """Its ``repr`` tells what it has, as that of a dataclass does."""

    password: str

    def get(self) -> str:
        return self.password

    async def fetch(self) -> str:
        return self.password


def _settings(way: Way) -> TokenPool:
    way.variable("PKCS11_POOL_PIN")
    way.monkeypatch.setenv("PKCS11_POOL_MODULE", str(way.module))
    way.monkeypatch.setenv("PKCS11_POOL_TOKEN_LABEL", way.label)
    return PoolSettings().pool(name="p", **way.options)


def _settings_uri(way: Way) -> TokenPool:
    way.monkeypatch.setenv(
        "PKCS11_POOL_URI", f"{way.uri}&pin-value={quote(way.pin.text, '')}"
    )
    return PoolSettings().pool(name="p", **way.options)


def _parsed(way: Way) -> TokenPool:
    uri = Pkcs11URI(
        token=way.label, module_path=str(way.module), pin_value=way.pin.text
    )
    return TokenPool.from_uri(uri, name="p", **way.options)


WAYS: Final[dict[str, Callable[[Way], TokenPool]]] = {
    "text": lambda way: way.pool(way.pin.text),
    "literal": lambda way: way.pool(pins.literal(way.pin.text)),
    "env": lambda way: way.pool(pins.env(way.variable())),
    "file": lambda way: way.pool(pins.file(way.file())),
    "systemd credential": _credential,
    "command": lambda way: way.pool(pins.command(["cat", str(way.file())])),
    "keyring": _keyring,
    "prompt": _prompt,
    "function": lambda way: way.pool(lambda: way.pin.text),
    "coroutine function": _async,
    "partial": lambda way: way.pool(functools.partial(str, way.pin.text)),
    "method": lambda way: way.pool(_Vault(way.pin.text).get),
    "coroutine method": lambda way: way.pool(_Vault(way.pin.text).fetch),
    "pin-value": lambda way: TokenPool.from_uri(
        f"{way.uri}&pin-value={quote(way.pin.text, '')}", name="p", **way.options
    ),
    "pin-source, file": lambda way: way.from_uri(f"{way.uri}&pin-source={way.file()}"),
    "pin-source, env": lambda way: way.from_uri(
        f"{way.uri}&pin-source=env:{way.variable()}"
    ),
    "pin-source, program": lambda way: way.from_uri(
        f"{way.uri}&pin-source=|cat%20{way.file()}", allow_pin_command=True
    ),
    "beside a URI": lambda way: TokenPool.from_uri(
        way.uri, pin=way.pin.text, name="p", **way.options
    ),
    "URI that was read": _parsed,
    "settings": _settings,
    "settings, URI": _settings_uri,
}
"""How a PIN comes in, by name."""


# -- Sources that go wrong, with the PIN in their own variables --------------------


def _raises(pin: Hidden) -> str:
    text = pin.text
    raise ValueError(len(text))


def _raises_in_a_chain(pin: Hidden) -> str:
    text = pin.text
    try:
        _raises(pin)
    except ValueError as error:
        raise LookupError(len(text)) from error
    return text


def _raises_a_group(pin: Hidden) -> str:
    inner = []
    try:
        _raises_in_a_chain(pin)
    except LookupError as error:
        inner.append(error)
    text = pin.text
    message = f"{len(text)} letters"
    raise ExceptionGroup(message, inner)


def _cannot_be_decoded(pin: Hidden) -> str:
    return (pin.text.encode() + b"\xff").decode()


def _is_no_json(pin: Hidden) -> str:
    text: str = json.loads(pin.text)
    return text


def _program_failed(pin: Hidden) -> str:
    done = subprocess.run(
        ["sh", "-c", "cat; exit 3"],  # noqa: S607
        input=pin.text,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def _ends_the_program(pin: Hidden) -> NoReturn:
    text = pin.text
    sys.exit(len(text))


def _source_of_ours(pin: Hidden) -> str:
    text = pin.text
    return pins.env("NO_SUCH_VARIABLE")() + text


def _gives_bytes(pin: Hidden) -> Any:
    return pin.text.encode()


def _gives_a_list(pin: Hidden) -> Any:
    return [pin.text]


def _cannot_be_encoded(pin: Hidden) -> str:
    return pin.text + "\udcff"


WRONG_SOURCES: Final[dict[str, Callable[[Hidden], Any]]] = {
    "raises": _raises,
    "raises in a chain": _raises_in_a_chain,
    "raises a group": _raises_a_group,
    "cannot be decoded": _cannot_be_decoded,
    "is no JSON": _is_no_json,
    "program failed": _program_failed,
    "ends the program": _ends_the_program,
    "source of ours": _source_of_ours,
    "gives bytes": _gives_bytes,
    "gives a list": _gives_a_list,
    "cannot be encoded": _cannot_be_encoded,
}
"""What a source does instead of giving a PIN, by name."""
