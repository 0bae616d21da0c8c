"""The arguments of operations, checked and packed before anything is sent.

Each function gives the value as the operation takes it, or raises an error that
says what to pass instead.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from enum import Enum, IntEnum
from functools import partial
from types import NoneType
from typing import Any, Final, Literal, TypeVar

from pkcs11.constants import Attribute, MechanismFlag, ObjectClass
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.util import ec

from pkcs11_pool.config import check_flag, check_seconds
from pkcs11_pool.cryptoki import interface
from pkcs11_pool.cryptoki.vendor import member
from pkcs11_pool.errors import InvalidOption, InvalidType


class Default(Enum):
    """Stands for the pool's own value of an option."""

    DEFAULT = "default"


DEFAULT: Final = Default.DEFAULT
Timeout = float | None | Literal[Default.DEFAULT]
Data = str | bytes | bytearray | memoryview | Iterable[bytes] | AsyncIterable[bytes]
Template = Mapping[Attribute, Any]
E = TypeVar("E", bound=IntEnum)

# RFC 8410; PKCS#11 v3.1, "Edwards EC private key objects", allows these.
_EDWARDS: Final = {"ed25519": "1.3.101.112", "ed448": "1.3.101.113"}


def timeout(value: Timeout, default: float | None) -> float | None:
    """A time limit in seconds, or None."""
    if value is DEFAULT:
        return default
    check_seconds("timeout", value)
    return value


def whole(value: object) -> bytes | None:
    """The input of an operation, or None where it comes in parts."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    return None


def octets(value: object, name: str) -> bytes:
    """Bytes that are short: a signature, a wrapped key."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    message = f"{name} must be bytes, not {_kind(value)}"
    raise InvalidType(message)


def mechanism(value: object) -> Mechanism | None:
    """A mechanism, or None for the key's default one."""
    if value is None or type(value) is Mechanism:
        return value
    return needed_mechanism(value)


def needed_mechanism(value: object) -> Mechanism:
    """A mechanism, where no key has a default one."""
    return _member(Mechanism, value, "mechanism")


def _member(kind: type[E], value: object, name: str) -> E:
    """A member of an enumeration, also where a vendor's is given by its number."""
    if isinstance(value, kind):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(
            f"{name} must be a pkcs11.{kind.__name__}, not {_kind(value)}"
        )
    found = member(kind, value)
    if found is None:
        raise InvalidType(
            f"{name} {value:#x} is no pkcs11.{kind.__name__}, and a vendor's own is "
            "0x80000000 or more"
        )
    return found


def der(signature_format: object) -> bool:
    """Whether signatures are DER; False is raw."""
    if signature_format in ("raw", "der"):
        return signature_format == "der"
    message = f'signature_format must be "raw" or "der", not {signature_format!r}'
    raise InvalidOption(message)


def key_type(value: object) -> KeyType:
    """A key type."""
    return _member(KeyType, value, "key_type")


def key_length(value: object) -> int | None:
    """A key length in bits, or None where the type fixes it."""
    if value is None:
        return None
    return count(value, "key_length", "bits")


def count(value: object, name: str, unit: str) -> int:
    """A positive whole number of something."""
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{name} must be a whole number of {unit}, not {_kind(value)}"
        raise InvalidType(message)
    if value <= 0:
        message = f"{name} must be more than 0 {unit}, not {value}"
        raise InvalidOption(message)
    return value


def text(value: object, name: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str):
        message = f"{name} must be str, not {_kind(value)}"
        raise InvalidType(message)
    if not value:
        message = f"{name} must not be empty"
        raise InvalidOption(message)
    return value


def slot(value: object) -> int:
    """The number of a slot."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        message = "slot_id must be the number of a slot; list_tokens() shows them"
        raise InvalidType(message)
    return value


def bits(value: object) -> int:
    """A number of bits that is whole bytes; as bytes."""
    nbits = count(value, "nbits", "bits")
    if nbits % 8:
        message = f"nbits must be a multiple of 8, not {nbits}"
        raise InvalidOption(message)
    return nbits // 8


def name(
    label: object, id_: object, object_class: object, kind: object
) -> tuple[str | None, bytes | None, ObjectClass | None, KeyType | None]:
    """What names a key."""
    if label is not None and not isinstance(label, str):
        message = f"label must be str, not {_kind(label)}"
        raise InvalidType(message)
    if id_ is not None and not isinstance(id_, bytes):
        message = f"id must be bytes, not {_kind(id_)}"
        raise InvalidType(message)
    if object_class is not None and not isinstance(object_class, ObjectClass):
        message = (
            f"object_class must be a pkcs11.ObjectClass, not {_kind(object_class)}"
        )
        raise InvalidType(message)
    checked = None if kind is None else key_type(kind)
    if label is None and id_ is None and object_class is None and checked is None:
        message = "which key? Give label=, id=, object_class= or key_type="
        raise InvalidOption(message)
    return label, id_, object_class, checked


def making(
    id_: object, label: object, store: object, capabilities: object
) -> dict[str, Any]:
    """What every new key is told, as python-pkcs11 takes it."""
    if id_ is not None and not isinstance(id_, bytes):
        raise InvalidType(f"id must be bytes, not {_kind(id_)}")
    if label is not None and not isinstance(label, str):
        raise InvalidType(f"label must be str, not {_kind(label)}")
    check_flag("store", store)
    if isinstance(capabilities, bool) or not isinstance(
        capabilities, (MechanismFlag, int, NoneType)
    ):
        raise InvalidType(
            f"capabilities must be pkcs11.MechanismFlag, not {_kind(capabilities)}"
        )
    return {"id": id_, "label": label, "store": store, "capabilities": capabilities}


def names(value: object) -> tuple[Attribute, ...] | None:
    """Attributes to read, or None for the usual ones."""
    if value is None:
        return None
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise InvalidType(f"names must be an iterable of Attribute, not {_kind(value)}")
    return tuple(_member(Attribute, item, "names") for item in value)


def template(value: object, name: str = "template") -> dict[Attribute, Any]:
    """A template, with values that can be packed."""
    if not isinstance(value, Mapping):
        message = f"{name} must be a mapping of pkcs11.Attribute, not {_kind(value)}"
        raise InvalidType(message)
    made = {}
    for key, item in value.items():
        try:
            kind = _member(Attribute, key, name)
        except InvalidType as error:
            message = f"{name} has the key {key!r}, which is no pkcs11.Attribute"
            raise InvalidType(message) from error
        pack(kind, item, name)
        made[kind] = item
    return made


def packed(value: object, name: str = "template") -> list[tuple[int, bytes]]:
    """A template as the token takes it."""
    return [(int(k), pack(k, v, name)) for k, v in template(value, name).items()]


def pack(kind: Attribute, value: Any, name: str = "template") -> bytes:
    """An attribute's value as the token takes it. Values stay out of the message."""
    try:
        packed: bytes = interface.MAPPER.pack_attribute(kind, value)
    except Exception as error:
        message = f"CKA_{kind.name} in {name} cannot be of type {_kind(value)}"
        raise InvalidType(message) from error
    return packed


def makes_token_object(*, store: bool, given: Iterable[Template | None]) -> bool:
    """Whether what is made will be a token object: the template has the last word."""
    values = [
        bool(item[Attribute.TOKEN])
        for item in given
        if item is not None and Attribute.TOKEN in item
    ]
    return all(values) if values else store


def curve(value: object, given: Template | None) -> dict[Attribute, Any]:
    """The template of a public key, with the parameters of a named curve."""
    made = template({} if given is None else given, "public_template")
    if value is None:
        return made
    if not isinstance(value, str):
        message = f'curve must be a name such as "secp256r1", not {_kind(value)}'
        raise InvalidType(message)
    try:
        params = ec.encode_named_curve_parameters(_EDWARDS.get(value.lower(), value))
    except ValueError as error:
        message = f'{value!r} is no known curve; try "secp256r1"'
        raise InvalidOption(message) from error
    made[Attribute.EC_PARAMS] = params
    return made


def function(value: object) -> Callable[..., Any]:
    """A plain function for a worker thread.

    Raises:
        InvalidType: It is not callable, or a coroutine function.
    """
    if not callable(value):
        message = f"func must be a function, not {_kind(value)}"
        raise InvalidType(message)
    inner: Any = value
    while isinstance(inner, partial):
        inner = inner.func
    for item in (inner, getattr(inner, "__call__", None)):  # noqa: B004  # asked itself
        if inspect.iscoroutinefunction(item) or inspect.isasyncgenfunction(item):
            message = (
                "func runs on a worker thread and must be a plain function, no "
                "coroutine function: await outside of it"
            )
            raise InvalidType(message)
    return value


def no_awaitable(value: Any) -> Any:
    """What a function on a worker gave, unless it is something to await."""
    if isinstance(value, Awaitable):
        close = getattr(value, "close", None)
        if close is not None:
            close()
        message = (
            f"func gave {_kind(value)}, which nobody can await on a worker thread: it "
            "must be a plain function"
        )
        raise InvalidType(message)
    return value


def _kind(value: object) -> str:
    return type(value).__name__
