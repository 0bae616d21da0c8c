"""Mechanisms, key types and attributes by number: what vendors add to the standard.

python-pkcs11 takes members of its enumerations only, and knows how to pack the
attributes of the standard only. A number of the vendors' range becomes something
that it takes for a member, and its values are packed by their Python type.

Source: PKCS#11 v3.1, "Vendor defined" (``CKM_VENDOR_DEFINED`` and others).
"""

from __future__ import annotations

import struct
from datetime import date
from enum import IntEnum
from typing import Any, Final, TypeVar

from pkcs11 import attributes
from pkcs11.attributes import AttributeMapper
from pkcs11.constants import Attribute

E = TypeVar("E", bound=IntEnum)

_VENDOR: Final = 0x80000000
_MOST: Final = 1 << struct.calcsize("@L") * 8
_ULONG: Final = struct.calcsize("@L")


def member(kind: type[E], number: int) -> E | None:
    """The member of an enumeration with this number, one made for it, or None.

    None for numbers of the standard's own range that it does not have.
    """
    try:
        return kind(number)
    except ValueError:
        if not _VENDOR <= number < _MOST:
            return None
    made: E = int.__new__(kind, number)
    made._name_ = f"VENDOR_{number:#x}"
    made._value_ = number
    return made


def attribute(number: int) -> Attribute:
    """The attribute with a number that a token told; any number may be one."""
    found = member(Attribute, number)
    return found if found is not None else _unknown(number)


def _unknown(number: int) -> Attribute:
    made = int.__new__(Attribute, number)
    made._name_ = f"UNKNOWN_{number:#x}"
    made._value_ = number
    return made


def _pack(value: Any) -> bytes:
    if isinstance(value, bool):
        return bytes([value])
    if isinstance(value, int):
        return struct.pack("@L", value)
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, date):
        return value.strftime("%Y%m%d").encode()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError(value)


_OCTETS: Final = (bytes, bytearray, memoryview)
_TAKEN: Final[dict[Any, tuple[tuple[type, ...], str]]] = {
    attributes.handle_bool[0]: ((int,), "True or False"),
    attributes.handle_ulong[0]: ((int,), "a number"),
    attributes.handle_str[0]: ((str,), "str"),
    attributes.handle_date[0]: ((date,), "datetime.date"),
    attributes.handle_bytes[0]: ((*_OCTETS, list, tuple), "bytes"),
    _pack: ((*_OCTETS, int, str, date), "bytes, str, a number or a date"),
}
"""What may be given for an attribute, by what packs it; the rest are enumerations."""
_TEMPLATES: Final = range(0x40000211, 0x40000214)
"""``CKA_WRAP_TEMPLATE``, ``CKA_UNWRAP_TEMPLATE``, ``CKA_DERIVE_TEMPLATE``: their value
is made of addresses, which a module follows."""


class Mapper(AttributeMapper):
    """python-pkcs11's attributes, and all others: by the value's type, and as bytes."""

    def _handler(self, key: Attribute) -> Any:
        return self.attribute_types.get(key, (_pack, bytes))

    def wanted(self, key: Attribute, value: object) -> str | None:
        """What a value must be that is none for this attribute; None: it may be.

        python-pkcs11 makes zeros of a number where bytes belong, and a truth of any
        text where a truth belongs.
        """
        if int(key) in _TEMPLATES:
            return "left out: it holds a template, which the pool cannot pass on"
        taken, text = _TAKEN.get(self._handler(key)[0], ((int,), "a number"))
        return None if isinstance(value, taken) else text

    def unpack_attributes(self, key: Attribute, value: bytes) -> Any:
        """A value as Python has it; one that python-pkcs11 cannot read as it is.

        An empty date is None, and a class or type that no enumeration has a number.
        """
        try:
            return super().unpack_attributes(key, value)
        except (ValueError, struct.error):
            if key in (Attribute.START_DATE, Attribute.END_DATE) and not value.strip():
                return None
            return struct.unpack("@L", value)[0] if len(value) == _ULONG else value
