"""What an error of the token means for the pool: one table, asked once per error.

Pure: it decides, others act. Every ``CKR_`` code stands in exactly one group, and
each group says what may be made again. Codes of vendors, and those that say no more
than "it failed", are not guessed: the token is asked (``Fault.UNSURE``).

Source: PKCS#11 v3.1, "Function return values".
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from pkcs11 import exceptions as p11

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.errors import (
    KeyNotFound,
    LoginRequired,
    OutcomeUnknown,
    PoolError,
    TokenUnavailable,
)


class Repeat(Enum):
    """What is made again after an error, without its caller noticing."""

    NOTHING = "nothing"
    """The error is the caller's."""
    ALL = "all"
    """Whatever was refused: the token has done nothing."""
    HARMLESS = "harmless"
    """What may happen twice: sign, verify, encrypt, decrypt, digest, find, random.
    Not with stateful keys (HSS, XMSS), and nothing that changes the token."""


class Fault(Enum):
    """Whose trouble an error is."""

    CALLER = "caller"
    SESSION = "session"
    SESSION_COUNT = "session_count"
    LOGIN = "login"
    HANDLE = "handle"
    TOKEN = "token"  # noqa: S105  # a Cryptoki token, no secret
    MODULE = "module"
    UNSURE = "unsure"

    @property
    def repeats(self) -> Repeat:
        """What is made again when it is mended."""
        return _REPEATS[self]

    @property
    def is_outage(self) -> bool:
        """Whether sessions may be lost, and it must be looked at the token."""
        return self in _OUTAGE

    @property
    def tells_of_outage(self) -> bool:
        """The same where no session is there to be asked."""
        return self in _OUTAGE or self is Fault.UNSURE


_REPEATS: Final = {
    Fault.CALLER: Repeat.NOTHING,
    # The session died while nothing was sent on it, or in the middle of something.
    Fault.SESSION: Repeat.HARMLESS,
    # No session was opened; the caller waits for one.
    Fault.SESSION_COUNT: Repeat.ALL,
    # Refused, so nothing was done; the login is restored, and the object found anew.
    Fault.LOGIN: Repeat.ALL,
    Fault.HANDLE: Repeat.ALL,
    # The answer was lost, and with it the knowledge of what was done.
    Fault.TOKEN: Repeat.HARMLESS,
    Fault.MODULE: Repeat.HARMLESS,
    # What the token answers when it is asked decides.
    Fault.UNSURE: Repeat.NOTHING,
}
_OUTAGE: Final = frozenset({Fault.SESSION, Fault.TOKEN, Fault.MODULE})

GROUPS: Final[dict[Fault, str]] = {
    Fault.SESSION_COUNT: "SESSION_COUNT",
    Fault.SESSION: "SESSION_HANDLE_INVALID SESSION_CLOSED",
    Fault.LOGIN: "USER_NOT_LOGGED_IN",
    Fault.HANDLE: """
        KEY_HANDLE_INVALID OBJECT_HANDLE_INVALID WRAPPING_KEY_HANDLE_INVALID
        UNWRAPPING_KEY_HANDLE_INVALID
    """,
    Fault.TOKEN: """
        DEVICE_ERROR DEVICE_REMOVED TOKEN_NOT_PRESENT TOKEN_NOT_RECOGNIZED
        SLOT_ID_INVALID FIPS_SELF_TEST_FAILED
    """,
    Fault.MODULE: "CRYPTOKI_NOT_INITIALIZED",
    Fault.UNSURE: "GENERAL_ERROR FUNCTION_FAILED HOST_MEMORY LIBRARY_LOAD_FAILED",
    Fault.CALLER: """
        CANCEL ARGUMENTS_BAD NO_EVENT NEED_TO_CREATE_THREADS CANT_LOCK
        ATTRIBUTE_READ_ONLY ATTRIBUTE_SENSITIVE ATTRIBUTE_TYPE_INVALID
        ATTRIBUTE_VALUE_INVALID ACTION_PROHIBITED DATA_INVALID DATA_LEN_RANGE
        DEVICE_MEMORY ENCRYPTED_DATA_INVALID ENCRYPTED_DATA_LEN_RANGE
        AEAD_DECRYPT_FAILED FUNCTION_CANCELED FUNCTION_NOT_PARALLEL
        FUNCTION_NOT_SUPPORTED KEY_SIZE_RANGE KEY_TYPE_INCONSISTENT KEY_NOT_NEEDED
        KEY_CHANGED KEY_NEEDED KEY_INDIGESTIBLE KEY_FUNCTION_NOT_PERMITTED
        KEY_NOT_WRAPPABLE KEY_UNEXTRACTABLE MECHANISM_INVALID MECHANISM_PARAM_INVALID
        OPERATION_ACTIVE OPERATION_NOT_INITIALIZED PIN_INCORRECT PIN_INVALID
        PIN_LEN_RANGE PIN_EXPIRED PIN_LOCKED SESSION_PARALLEL_NOT_SUPPORTED
        SESSION_READ_ONLY SESSION_EXISTS SESSION_READ_ONLY_EXISTS
        SESSION_READ_WRITE_SO_EXISTS SIGNATURE_INVALID SIGNATURE_LEN_RANGE
        TEMPLATE_INCOMPLETE TEMPLATE_INCONSISTENT TOKEN_WRITE_PROTECTED
        UNWRAPPING_KEY_SIZE_RANGE UNWRAPPING_KEY_TYPE_INCONSISTENT
        USER_ALREADY_LOGGED_IN USER_PIN_NOT_INITIALIZED USER_TYPE_INVALID
        USER_ANOTHER_ALREADY_LOGGED_IN USER_TOO_MANY_TYPES WRAPPED_KEY_INVALID
        WRAPPED_KEY_LEN_RANGE WRAPPING_KEY_SIZE_RANGE WRAPPING_KEY_TYPE_INCONSISTENT
        RANDOM_SEED_NOT_SUPPORTED RANDOM_NO_RNG DOMAIN_PARAMS_INVALID
        CURVE_NOT_SUPPORTED BUFFER_TOO_SMALL SAVED_STATE_INVALID INFORMATION_SENSITIVE
        STATE_UNSAVEABLE CRYPTOKI_ALREADY_INITIALIZED MUTEX_BAD MUTEX_NOT_LOCKED
        NEW_PIN_MODE NEXT_OTP EXCEEDED_MAX_ITERATIONS PIN_TOO_WEAK PUBLIC_KEY_INVALID
        FUNCTION_REJECTED TOKEN_RESOURCE_EXCEEDED OPERATION_CANCEL_FAILED KEY_EXHAUSTED
    """,
}
FAULTS: Final[dict[int, Fault]] = {
    rv.CODES[f"CKR_{name}"]: fault
    for fault, names in GROUPS.items()
    for name in names.split()
}
"""The group of every code of the standard but ``CKR_OK``."""

UNCODED: Final[dict[type[p11.PKCS11Error], Fault]] = {
    # What python-pkcs11 raises for itself, without an answer of the token.
    p11.NoSuchKey: Fault.HANDLE,
    p11.MultipleObjectsReturned: Fault.CALLER,
    p11.NoSuchToken: Fault.CALLER,
    p11.MultipleTokensReturned: Fault.CALLER,
    p11.PKCS11Error: Fault.CALLER,
}
"""The group of each exception that stands for no code."""
_STATEFUL: Final = frozenset({0x46, 0x47, 0x48})
_OF_THE_POOL: Final = {
    LoginRequired: Fault.LOGIN,
    KeyNotFound: Fault.HANDLE,
    # Another token is in its slot.
    TokenUnavailable: Fault.TOKEN,
}


def fault_of(code: int) -> Fault:
    """The group of a code. One that the standard does not have, a vendor's, is unsure.

    Source: PKCS#11 v3.1, ``CKR_VENDOR_DEFINED``.
    """
    return FAULTS.get(code, Fault.UNSURE)


def classify(error: BaseException) -> Fault:
    """Whose trouble ``error`` is."""
    for kind, fault in _OF_THE_POOL.items():
        if isinstance(error, kind):
            return fault
    if isinstance(error, OutcomeUnknown) and error.__cause__ is not None:
        return classify(error.__cause__)
    if isinstance(error, PoolError) or not isinstance(error, p11.PKCS11Error):
        return Fault.CALLER
    code = rv.code_of(error)
    if code is not None:
        return fault_of(code)
    return next(UNCODED[kind] for kind in type(error).__mro__ if kind in UNCODED)


def mark_unsent(error: p11.PKCS11Error) -> None:
    """It came while an object was looked up: what was to be done was not begun."""
    error.unsent = True  # type: ignore[attr-defined]  # asked for by is_unsent()


def is_unsent(error: BaseException) -> bool:
    """Whether a call that failed with this cannot have happened."""
    return getattr(error, "unsent", False) is True


def is_stateful(key_type: object) -> bool:
    """Whether each signature with a key of this type uses up a part of it.

    Source: PKCS#11 v3.1 and v3.2, ``CKK_HSS``, ``CKK_XMSS``, ``CKK_XMSSMT``.
    """
    return key_type in _STATEFUL


def says_busy(error: BaseException) -> bool:
    """Whether the token may have been too busy, and do it a moment later.

    AWS CloudHSM throttles with ``CKR_FUNCTION_FAILED``. The standard has the token in
    the state from before then (PKCS#11 v3.1, "Function return values"), and other
    modules mean by it that the function will always fail: so it is tried a few times.
    """
    if isinstance(error, PoolError) or getattr(error, "once", False):
        return False
    return rv.code_of(error) == rv.CODES["CKR_FUNCTION_FAILED"]


def forbid_repeat(error: BaseException) -> None:
    """What failed so is not made again, whatever the token means by the error."""
    error.once = True  # type: ignore[attr-defined]  # read by says_busy()


def hints_at_lost_login(error: BaseException) -> bool:
    """Whether a login that somebody else ended would show as this error.

    Some modules answer with a dead handle, and then with no such key.
    """
    return classify(error) in {Fault.LOGIN, Fault.HANDLE}
