"""How a key encryption key wraps data keys: the ways, by name and by number.

A blob holds the number, so a number means one way for ever. Tokens do not all do all of
them, and do not tell: what fails is tried in the other ways, for the error's text.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, Literal

from pkcs11 import (
    MGF,
    Attribute,
    KeyType,
    Mechanism,
    MechanismFlag,
    ObjectClass,
    PKCS11Error,
)

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.errors import InvalidOption

if TYPE_CHECKING:
    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.faces.pooled_session import PooledSession
    from pkcs11_pool.integrations.blob import Blob
    from pkcs11_pool.integrations.time_left import TimeLeft

WrapName = Literal["aes-kw", "aes-kwp", "rsa-oaep-sha1", "rsa-oaep-sha256"]

_WRAPS: Final[dict[str, tuple[int, Mechanism, tuple[Any, ...] | None]]] = {
    "aes-kw": (1, Mechanism.AES_KEY_WRAP, None),
    "aes-kwp": (2, Mechanism.AES_KEY_WRAP_PAD, None),
    "rsa-oaep-sha1": (3, Mechanism.RSA_PKCS_OAEP, (Mechanism.SHA_1, MGF.SHA1, None)),
    "rsa-oaep-sha256": (
        4,
        Mechanism.RSA_PKCS_OAEP,
        (Mechanism.SHA256, MGF.SHA256, None),
    ),
}
_BY_NUMBER: Final = {number: (how, param) for number, how, param in _WRAPS.values()}
NUMBERS: Final = {name: number for name, (number, _, _) in _WRAPS.items()}
"""The number of each way, by its name."""
_NAMES: Final = {number: name for name, number in NUMBERS.items()}
_NOTHING: Final = MechanismFlag(0)
# What tokens say where the key or the token does not do this way of wrapping.
_NOT_SO: Final = frozenset(
    rv.CODES[name]
    for name in (
        "CKR_ARGUMENTS_BAD",
        "CKR_KEY_TYPE_INCONSISTENT",
        "CKR_MECHANISM_INVALID",
        "CKR_MECHANISM_PARAM_INVALID",
        "CKR_WRAPPING_KEY_TYPE_INCONSISTENT",
    )
)


async def wrap(
    number: int, kek: KeyRef, key: KeyRef, session: PooledSession, time_left: TimeLeft
) -> bytes:
    """Wrap a key of the session by a KEK.

    Raises:
        InvalidOption: The KEK does not wrap in this way; the text names those that do.
    """
    mechanism, param = _BY_NUMBER[number]
    try:
        return await kek.on(session).wrap_key(
            key,
            mechanism=mechanism,
            mechanism_param=param,
            timeout=time_left.now(),
        )
    except PKCS11Error as error:
        if rv.code_of(error) not in _NOT_SO:
            raise
        hint = await _other_ways(number, kek, key, session, time_left)
        raise InvalidOption(
            f"the token does not wrap by {_NAMES[number]!r} with {kek!r} "
            f"({rv.name_of(rv.code_of(error) or 0)}): give {hint}"
        ) from error


async def _other_ways(
    asked: int, kek: KeyRef, key: KeyRef, session: PooledSession, time_left: TimeLeft
) -> str:
    """What to give in the place of the way that was asked for.

    Tokens do not tell which hashes they take with OAEP: each way is tried, and
    what comes of it is dropped.
    """
    ways = []
    for name, (number, mechanism, param) in _WRAPS.items():
        if number == asked:
            continue
        with contextlib.suppress(PKCS11Error):
            await kek.on(session).wrap_key(
                key,
                mechanism=mechanism,
                mechanism_param=param,
                timeout=time_left.now(),
            )
            ways.append(f"wrap={name!r}")
    return " or ".join(ways) or "another KEK, an AES key or an RSA pair"


async def unwrap(
    kek: KeyRef,
    blob: Blob,
    session: PooledSession,
    time_left: TimeLeft,
    *,
    capabilities: MechanismFlag = _NOTHING,
    extractable: bool = False,
) -> KeyRef:
    """The data key of a blob, as an object of the session."""
    mechanism, param = _BY_NUMBER[blob.wrap]
    return await kek.on(session).unwrap_key(
        ObjectClass.SECRET_KEY,
        KeyType.AES,
        blob.wrapped,
        mechanism=mechanism,
        mechanism_param=param,
        capabilities=capabilities,
        template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: extractable},
        timeout=time_left.now(),
    )
