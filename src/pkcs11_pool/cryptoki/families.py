"""Which keys a mechanism takes, where the standard leaves no choice.

A module should answer ``CKR_KEY_TYPE_INCONSISTENT`` to any other. SoftHSM2 2.6.1 takes
an EC key for a DSA key and brings the process down, so it is never asked.

Source: PKCS#11 v3.1, "RSA", "DSA", "Elliptic curve": the tables of mechanisms.
"""

from __future__ import annotations

from typing import Any, Final

from pkcs11.mechanisms import KeyType, Mechanism

from pkcs11_pool.errors import InvalidOption


def _family(name: str) -> KeyType | None:
    words = name.split("_")
    return next((_KEYS[word] for word in words if word in _KEYS), None)


_KEYS: Final = {"RSA": KeyType.RSA, "DSA": KeyType.DSA, "ECDSA": KeyType.EC}
_TAKES: Final[dict[int, KeyType]] = {
    int(mechanism): kind
    for mechanism in Mechanism
    if (kind := _family(mechanism.name)) is not None and "ML" not in mechanism.name
}


def check(key_type: Any, mechanism: Any) -> None:
    """Refuse a mechanism that is for keys of another type.

    Args:
        key_type: Of the key; None where there is no key.
        mechanism: Named by the caller; None: the type's own.

    Raises:
        InvalidOption: It is for others. Nothing was sent.
    """
    takes = None if mechanism is None else _TAKES.get(int(mechanism))
    if takes is None or key_type is None or key_type == takes:
        return
    has = key_type.name if isinstance(key_type, KeyType) else f"{key_type:#x}"
    raise InvalidOption(
        f"CKM_{mechanism.name} is for {takes.name} keys, and this is a key of the type "
        f"{has}: give another mechanism="
    )
