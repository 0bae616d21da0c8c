"""What an error of the token means for the pool: one table, asked once per error.

Pure: it decides, others act.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from pkcs11 import exceptions as p11

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.errors import KeyNotFound, LoginRequired, PoolError


class Fault(Enum):
    """Whose trouble an error is."""

    CALLER = "caller"
    SESSION = "session"
    SESSION_COUNT = "session_count"
    LOGIN = "login"
    HANDLE = "handle"
    TOKEN = "token"  # noqa: S105  # a Cryptoki token, no secret
    MODULE = "module"


_FAULTS: Final[dict[str, Fault]] = {
    "CKR_SESSION_COUNT": Fault.SESSION_COUNT,
    "CKR_SESSION_HANDLE_INVALID": Fault.SESSION,
    "CKR_SESSION_CLOSED": Fault.SESSION,
    "CKR_USER_NOT_LOGGED_IN": Fault.LOGIN,
    "CKR_KEY_HANDLE_INVALID": Fault.HANDLE,
    "CKR_OBJECT_HANDLE_INVALID": Fault.HANDLE,
    "CKR_WRAPPING_KEY_HANDLE_INVALID": Fault.HANDLE,
    "CKR_UNWRAPPING_KEY_HANDLE_INVALID": Fault.HANDLE,
    "CKR_DEVICE_ERROR": Fault.TOKEN,
    "CKR_DEVICE_REMOVED": Fault.TOKEN,
    "CKR_TOKEN_NOT_PRESENT": Fault.TOKEN,
    "CKR_TOKEN_NOT_RECOGNIZED": Fault.TOKEN,
    "CKR_SLOT_ID_INVALID": Fault.TOKEN,
    "CKR_CRYPTOKI_NOT_INITIALIZED": Fault.MODULE,
}
_CODES: Final = {rv.CODES[name]: fault for name, fault in _FAULTS.items()}


def classify(error: BaseException) -> Fault:
    """Whose trouble ``error`` is."""
    if isinstance(error, LoginRequired):
        return Fault.LOGIN
    if isinstance(error, (KeyNotFound, p11.NoSuchKey)):
        return Fault.HANDLE
    if isinstance(error, PoolError) or not isinstance(error, p11.PKCS11Error):
        return Fault.CALLER
    code = rv.code_of(error)
    return Fault.CALLER if code is None else _CODES.get(code, Fault.CALLER)


def hints_at_lost_login(error: BaseException) -> bool:
    """Whether a login that somebody else ended would show as this error.

    Some modules answer with a dead handle, and then with no such key.
    """
    return classify(error) in {Fault.LOGIN, Fault.HANDLE}
