"""The arguments of operations, checked and packed before anything is sent.

Each function gives the value as the operation takes it, or raises an error that
says what to pass instead.
"""

from __future__ import annotations

import inspect
from collections.abc import (
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from enum import Enum, IntEnum
from functools import partial
from types import NoneType
from typing import Any, Final, Literal, TypeVar

from pkcs11.constants import Attribute, MechanismFlag, ObjectClass
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.util import ec

from pkcs11_pool import config
from pkcs11_pool.config import check_flag
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

_SHORT: Final = 40
"""Characters of a wrong name that are shown."""
_MOST_BITS: Final = 1 << 30
"""Of random numbers in one call: they are in memory as a whole, 128 MiB then."""
# RFC 8410; PKCS#11 v3.1, "Edwards EC private key objects", allows these.
_EDWARDS: Final = {"ed25519": "1.3.101.112", "ed448": "1.3.101.113"}


def timeout(value: Timeout, default: float | None) -> float | None:
    """A time limit in seconds, or None."""
    if value is DEFAULT:
        return default
    return config.seconds("timeout", value)


def whole(value: object) -> bytes | None:
    """The input of an operation, or None where it comes in parts."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return config.encoded("data", value)
    if isinstance(value, (bytearray, memoryview)):
        return _bytes(value, "data")
    return None


def _bytes(value: bytes | bytearray | memoryview, name: str) -> bytes:
    try:
        return bytes(value)
    except ValueError as error:
        raise InvalidOption(f"{name} is a memoryview that was released") from error


def octets(value: object, name: str) -> bytes:
    """Bytes that are short: a signature, a wrapped key."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _bytes(value, name)
    message = f"{name} must be bytes, not {_kind(value)}"
    raise InvalidType(message)


def seed(value: object) -> bytes:
    """What is mixed into the token's random numbers."""
    if given := octets(value, "seed"):
        return given
    raise InvalidOption("seed is empty: give at least one byte")


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
    found = member(kind, int(value))
    if found is None:
        raise InvalidType(
            f"{name}: {config.told(value)} is no pkcs11.{kind.__name__}, and a "
            "vendor's own is 0x80000000 or more"
        )
    return found


def der(signature_format: object) -> bool:
    """Whether signatures are DER; False is raw."""
    if isinstance(signature_format, str):
        if signature_format in ("raw", "der"):
            return signature_format == "der"
        raise InvalidOption('signature_format must be "raw" or "der", no other text')
    raise InvalidType(
        f'signature_format must be "raw" or "der", not {_kind(signature_format)}'
    )


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
        message = f"{name} must be more than 0 {unit}, not {config.told(value)}"
        raise InvalidOption(message)
    if value > config.MOST_ULONG:
        message = f"{name} is more than a token can be told: {config.told(value)}"
        raise InvalidOption(message)
    return int(value)


def text(value: object, name: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str):
        message = f"{name} must be str, not {_kind(value)}"
        raise InvalidType(message)
    if not value:
        message = f"{name} must not be empty"
        raise InvalidOption(message)
    config.encoded(name, value)
    return value


def slot(value: Any) -> int:
    """The number of a slot."""
    number = isinstance(value, int) and not isinstance(value, bool)
    # A larger one would reach the module with its highest bits cut off.
    if not number or not 0 <= value <= config.MOST_ULONG:
        message = "slot_id must be the number of a slot; list_tokens() shows them"
        raise InvalidType(message)
    return int(value)


def bits(value: object) -> int:
    """A number of bits that is whole bytes; as bytes."""
    nbits = count(value, "nbits", "bits")
    if nbits % 8:
        message = f"nbits must be a multiple of 8, not {nbits}"
        raise InvalidOption(message)
    if nbits > _MOST_BITS:
        message = f"nbits must be at most {_MOST_BITS} in one call, not {nbits}"
        raise InvalidOption(message)
    return nbits // 8


def name(
    label: object, id_: object, object_class: object, kind: object
) -> tuple[str | None, bytes | None, ObjectClass | None, KeyType | None]:
    """What names a key."""
    _check_names(id_, label)
    if object_class is not None and not isinstance(object_class, ObjectClass):
        message = (
            f"object_class must be a pkcs11.ObjectClass, not {_kind(object_class)}"
        )
        raise InvalidType(message)
    checked = None if kind is None else key_type(kind)
    if label is None and id_ is None and object_class is None and checked is None:
        message = "which key? Give label=, id=, object_class= or key_type="
        raise InvalidOption(message)
    return label, id_, object_class, checked  # type: ignore[return-value]  # looked at


def _check_names(id_: object, label: object) -> None:
    if id_ is not None and not isinstance(id_, bytes):
        raise InvalidType(f"id must be bytes, not {_kind(id_)}")
    if label is not None and not isinstance(label, str):
        raise InvalidType(f"label must be str, not {_kind(label)}")
    if label is not None:
        config.encoded("label", label)


def makes_public_object(given: Sequence[Template | None]) -> bool:
    """Whether a template says that its object is not private.

    Of a pair the private half, which comes last. What a template does not say is the
    token's to choose.
    """
    last = given[-1]
    return last is not None and last.get(Attribute.PRIVATE) is False


def making(
    id_: object, label: object, store: object, capabilities: object
) -> dict[str, Any]:
    """What every new key is told, as python-pkcs11 takes it."""
    _check_names(id_, label)
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
    return tuple(_member(Attribute, item, "names") for item in _read(value, "names"))


def _read(value: Iterable[Any], name: str) -> list[Any]:
    """All items, at once: another thread may change what holds them."""
    try:
        return list(value)
    except Exception as error:
        message = f"{name} cannot be read, or was changed meanwhile: {_kind(error)}"
        raise InvalidType(message) from error


def template(value: object, name: str = "template") -> dict[Attribute, Any]:
    """A template, with values that can be packed."""
    if not isinstance(value, Mapping):
        message = f"{name} must be a mapping of pkcs11.Attribute, not {_kind(value)}"
        raise InvalidType(message)
    made = {}
    for key, item in _read(value.items(), name):
        kind = _attribute(key, name)
        pack(kind, item, name)
        made[kind] = item
    return made


def _attribute(key: object, name: str) -> Attribute:
    try:
        return _member(Attribute, key, name)
    except InvalidType as error:
        shown = (
            repr(key) if type(key) is str and len(key) < _SHORT else f"a {_kind(key)}"
        )
        message = f"{name} has the key {shown}, which is no pkcs11.Attribute"
        raise InvalidType(message) from error


def packed(value: object, name: str = "template") -> list[tuple[int, bytes]]:
    """A template as the token takes it."""
    return [(int(k), pack(k, v, name)) for k, v in template(value, name).items()]


def pack(kind: Attribute, value: Any, name: str = "template") -> bytes:
    """An attribute's value as the token takes it. Values stay out of the message."""
    wanted = interface.MAPPER.wanted(kind, value)
    if wanted is None:
        try:
            packed: bytes = interface.MAPPER.pack_attribute(kind, value)
        except Exception:  # noqa: BLE001  # it would show the value, or a part of it
            wanted = "within what the token can be told"
        else:
            return packed
    raise InvalidType(f"CKA_{kind.name} in {name} must be {wanted}, not {_kind(value)}")


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
    named = str.__str__(value)
    try:
        params = ec.encode_named_curve_parameters(_EDWARDS.get(named.lower(), named))
    except ValueError as error:
        message = f'{named[:_SHORT]!r} is no known curve; try "secp256r1"'
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
