"""The options of a pool, checked when they are given and never later.

Pure: nothing here touches a file, a module or a token.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pkcs11.constants import ObjectClass

from pkcs11_pool import pins
from pkcs11_pool.errors import InvalidOption, InvalidType, InvalidURI

if TYPE_CHECKING:
    from pkcs11_pool.pins import PinSource
    from pkcs11_pool.uri import Pkcs11URI

LABEL_BYTES = 32
"""Size of ``CK_TOKEN_INFO.label``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class PoolOptions:
    """What :class:`~pkcs11_pool.TokenPool` was told, all of it valid."""

    module: str
    token_label: str | None
    token_serial: bytes | None
    token_model: str | None
    token_manufacturer: str | None
    slot_id: int | None
    pin: PinSource
    max_sessions: int
    timeout: float | None
    max_waiting: int | None
    open_timeout: float | None
    close_timeout: float
    recovery_timeout: float
    handle_max_age: float | None
    init_reserved: bytes | None
    serialize: bool | None
    name: str | None

    def __post_init__(self) -> None:
        """Refuse what cannot work, with what to write instead."""
        _text("token_label", self.token_label)
        _text("token_model", self.token_model)
        _text("token_manufacturer", self.token_manufacturer)
        _text("name", self.name)
        _bytes("token_serial", self.token_serial)
        _count("slot_id", self.slot_id, least=0)
        if (
            self.token_label is None
            and self.token_serial is None
            and (self.slot_id is None)
        ):
            message = (
                "which token? Give token_label=, token_serial= or slot_id=; "
                "await list_tokens(module) shows what is there"
            )
            raise InvalidOption(message)
        if self.token_label is not None:
            check_label("token_label", self.token_label)
        _count("max_sessions", self.max_sessions, least=1, optional=False)
        _count("max_waiting", self.max_waiting, least=0)
        for name in ("timeout", "open_timeout", "handle_max_age"):
            check_seconds(name, getattr(self, name))
        for name in ("close_timeout", "recovery_timeout"):
            check_seconds(name, getattr(self, name), optional=False)
        if self.serialize is not None and not isinstance(self.serialize, bool):
            raise InvalidType(
                _wrong("serialize", "True, False or None", self.serialize)
            )

    @property
    def wanted_token(self) -> str:
        """The options that name the token, for messages."""
        given = {
            name: getattr(self, name)
            for name in (
                "token_label",
                "token_serial",
                "token_model",
                "token_manufacturer",
                "slot_id",
            )
            if getattr(self, name) is not None
        }
        return ", ".join(f"{name}={value!r}" for name, value in given.items())


def uri_options(
    uri: Pkcs11URI, *, with_pin: bool, allow_command: bool
) -> dict[str, Any]:
    """What a URI says of the module, the token and its PIN, as options of a pool.

    An attribute of the path that cannot be looked at matches nothing, and one of the
    query is passed over: RFC 7512, "PKCS #11 URI Matching Guidelines". Those of an
    object are a key's, not the pool's.

    Raises:
        InvalidURI: The pool cannot choose a token by one of the attributes.
    """
    blind = [name for name in _NOT_LOOKED_AT if getattr(uri, name) is not None]
    for name in (*blind, *dict(uri.vendor_path)):
        message = (
            f"the pool does not choose a token by {name.replace('_', '-')}: take it "
            "out of the PKCS#11 URI"
        )
        raise InvalidURI(message)
    given: dict[str, Any] = {
        "module": uri.module_path,
        "token_label": uri.token,
        "token_serial": None if uri.serial is None else uri.serial.encode(),
        "token_model": uri.model,
        "token_manufacturer": uri.manufacturer,
        "slot_id": uri.slot_id,
    }
    if with_pin:
        given["pin"] = uri.pin_value
        if uri.pin_source is not None:
            given["pin"] = pins.from_pin_source(
                uri.pin_source, allow_command=allow_command
            )
    return given


_NOT_LOOKED_AT = (
    "library_manufacturer",
    "library_version",
    "library_description",
    "slot_description",
    "slot_manufacturer",
)

NO_MODULE_PATH = (
    "the PKCS#11 URI has no module-path: add it, or give module=. A module-name is not "
    "looked for: where modules stand differs by system"
)


def uri_key(uri: Pkcs11URI) -> dict[str, Any]:
    """What a URI says of a key, as :meth:`~pkcs11_pool.TokenPool.key` takes it.

    Raises:
        InvalidURI: It names no object, or one that is no key.
    """
    object_class = None if uri.type is None else _CLASSES.get(uri.type)
    if uri.type is not None and object_class is None:
        message = f"type={uri.type} in the PKCS#11 URI is no key: use pool.find()"
        raise InvalidURI(message)
    if uri.object is None and uri.id is None and object_class is None:
        message = "the PKCS#11 URI names no key: add object=, id= or type="
        raise InvalidURI(message)
    return {"label": uri.object, "id": uri.id, "object_class": object_class}


_CLASSES = {
    "public": ObjectClass.PUBLIC_KEY,
    "private": ObjectClass.PRIVATE_KEY,
    "secret-key": ObjectClass.SECRET_KEY,
}


def module_path(value: str | os.PathLike[str]) -> str:
    """The path of a Cryptoki module as text."""
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidType(_wrong("module", "a path (str or os.PathLike)", value))
    path = os.fspath(value)
    if not isinstance(path, str):
        raise InvalidType(_wrong("module", "a path of text", value))
    if not path or "\0" in path:
        message = f"module must be the path of a Cryptoki module, not {path!r}"
        raise InvalidOption(message)
    return path


def reserved_bytes(value: str | bytes | None) -> bytes | None:
    """Module parameters for ``C_Initialize``, without the closing NUL."""
    if isinstance(value, str):
        return value.encode()
    if value is not None and not isinstance(value, bytes):
        raise InvalidType(_wrong("init_reserved", "str, bytes or None", value))
    return value


def check_seconds(name: str, value: object, *, optional: bool = True) -> None:
    """Refuse what is no duration in seconds."""
    if value is None and optional:
        return
    allowed = "a number of seconds" + (", or None for no limit" if optional else "")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidType(_wrong(name, allowed, value))
    if math.isnan(value) or value < 0 or (value == math.inf and not optional):
        message = f"{name} must be {allowed}, at least 0, not {value!r}"
        raise InvalidOption(message)


def check_label(name: str, value: str) -> None:
    """Refuse a token label that ``CK_TOKEN_INFO`` cannot hold."""
    size = len(value.encode())
    if size > LABEL_BYTES:
        message = f"{name} has {size} bytes of UTF-8; a token's label has at most 32"
        raise InvalidOption(message)


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InvalidType(_wrong(name, "True or False", value))


def option_names() -> tuple[str, ...]:
    """The names of all options, in the order of the constructor."""
    return tuple(field.name for field in fields(PoolOptions))


def _text(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise InvalidType(_wrong(name, "str or None", value))


def _bytes(name: str, value: object) -> None:
    if value is not None and not isinstance(value, bytes):
        raise InvalidType(_wrong(name, "bytes or None", value))


def _count(name: str, value: object, *, least: int, optional: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(_wrong(name, "a whole number", value))
    if value < least:
        message = f"{name} must be at least {least}, not {value}"
        raise InvalidOption(message)


def _wrong(name: str, allowed: str, value: Any) -> str:
    # The value itself stays out: it may be a PIN in the wrong place.
    return f"{name} must be {allowed}, not {type(value).__name__}"
