"""Cryptoki's return codes by name, and the python-pkcs11 exception of each.

python-pkcs11 has no class for some codes and hides them in a text. Here a
code stays a number with a name, in both directions.

Source: PKCS#11 v3.1, "Function return values", and ``pkcs11t.h``.
"""

from __future__ import annotations

import re
from typing import Final

from pkcs11 import exceptions as p11

# fmt: off
NAMES: Final[dict[int, str]] = {
    0x000: "CKR_OK", 0x001: "CKR_CANCEL", 0x002: "CKR_HOST_MEMORY",
    0x003: "CKR_SLOT_ID_INVALID", 0x005: "CKR_GENERAL_ERROR",
    0x006: "CKR_FUNCTION_FAILED", 0x007: "CKR_ARGUMENTS_BAD",
    0x008: "CKR_NO_EVENT", 0x009: "CKR_NEED_TO_CREATE_THREADS",
    0x00A: "CKR_CANT_LOCK", 0x010: "CKR_ATTRIBUTE_READ_ONLY",
    0x011: "CKR_ATTRIBUTE_SENSITIVE", 0x012: "CKR_ATTRIBUTE_TYPE_INVALID",
    0x013: "CKR_ATTRIBUTE_VALUE_INVALID", 0x01B: "CKR_ACTION_PROHIBITED",
    0x020: "CKR_DATA_INVALID", 0x021: "CKR_DATA_LEN_RANGE",
    0x030: "CKR_DEVICE_ERROR", 0x031: "CKR_DEVICE_MEMORY",
    0x032: "CKR_DEVICE_REMOVED", 0x040: "CKR_ENCRYPTED_DATA_INVALID",
    0x041: "CKR_ENCRYPTED_DATA_LEN_RANGE", 0x042: "CKR_AEAD_DECRYPT_FAILED",
    0x050: "CKR_FUNCTION_CANCELED", 0x051: "CKR_FUNCTION_NOT_PARALLEL",
    0x054: "CKR_FUNCTION_NOT_SUPPORTED", 0x060: "CKR_KEY_HANDLE_INVALID",
    0x062: "CKR_KEY_SIZE_RANGE", 0x063: "CKR_KEY_TYPE_INCONSISTENT",
    0x064: "CKR_KEY_NOT_NEEDED", 0x065: "CKR_KEY_CHANGED",
    0x066: "CKR_KEY_NEEDED", 0x067: "CKR_KEY_INDIGESTIBLE",
    0x068: "CKR_KEY_FUNCTION_NOT_PERMITTED", 0x069: "CKR_KEY_NOT_WRAPPABLE",
    0x06A: "CKR_KEY_UNEXTRACTABLE", 0x070: "CKR_MECHANISM_INVALID",
    0x071: "CKR_MECHANISM_PARAM_INVALID", 0x082: "CKR_OBJECT_HANDLE_INVALID",
    0x090: "CKR_OPERATION_ACTIVE", 0x091: "CKR_OPERATION_NOT_INITIALIZED",
    0x0A0: "CKR_PIN_INCORRECT", 0x0A1: "CKR_PIN_INVALID",
    0x0A2: "CKR_PIN_LEN_RANGE", 0x0A3: "CKR_PIN_EXPIRED",
    0x0A4: "CKR_PIN_LOCKED", 0x0B0: "CKR_SESSION_CLOSED",
    0x0B1: "CKR_SESSION_COUNT", 0x0B3: "CKR_SESSION_HANDLE_INVALID",
    0x0B4: "CKR_SESSION_PARALLEL_NOT_SUPPORTED", 0x0B5: "CKR_SESSION_READ_ONLY",
    0x0B6: "CKR_SESSION_EXISTS", 0x0B7: "CKR_SESSION_READ_ONLY_EXISTS",
    0x0B8: "CKR_SESSION_READ_WRITE_SO_EXISTS", 0x0C0: "CKR_SIGNATURE_INVALID",
    0x0C1: "CKR_SIGNATURE_LEN_RANGE", 0x0D0: "CKR_TEMPLATE_INCOMPLETE",
    0x0D1: "CKR_TEMPLATE_INCONSISTENT", 0x0E0: "CKR_TOKEN_NOT_PRESENT",
    0x0E1: "CKR_TOKEN_NOT_RECOGNIZED", 0x0E2: "CKR_TOKEN_WRITE_PROTECTED",
    0x0F0: "CKR_UNWRAPPING_KEY_HANDLE_INVALID",
    0x0F1: "CKR_UNWRAPPING_KEY_SIZE_RANGE",
    0x0F2: "CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT",
    0x100: "CKR_USER_ALREADY_LOGGED_IN", 0x101: "CKR_USER_NOT_LOGGED_IN",
    0x102: "CKR_USER_PIN_NOT_INITIALIZED", 0x103: "CKR_USER_TYPE_INVALID",
    0x104: "CKR_USER_ANOTHER_ALREADY_LOGGED_IN", 0x105: "CKR_USER_TOO_MANY_TYPES",
    0x110: "CKR_WRAPPED_KEY_INVALID", 0x112: "CKR_WRAPPED_KEY_LEN_RANGE",
    0x113: "CKR_WRAPPING_KEY_HANDLE_INVALID", 0x114: "CKR_WRAPPING_KEY_SIZE_RANGE",
    0x115: "CKR_WRAPPING_KEY_TYPE_INCONSISTENT",
    0x120: "CKR_RANDOM_SEED_NOT_SUPPORTED", 0x121: "CKR_RANDOM_NO_RNG",
    0x130: "CKR_DOMAIN_PARAMS_INVALID", 0x140: "CKR_CURVE_NOT_SUPPORTED",
    0x150: "CKR_BUFFER_TOO_SMALL", 0x160: "CKR_SAVED_STATE_INVALID",
    0x170: "CKR_INFORMATION_SENSITIVE", 0x180: "CKR_STATE_UNSAVEABLE",
    0x190: "CKR_CRYPTOKI_NOT_INITIALIZED", 0x191: "CKR_CRYPTOKI_ALREADY_INITIALIZED",
    0x1A0: "CKR_MUTEX_BAD", 0x1A1: "CKR_MUTEX_NOT_LOCKED",
    0x1B0: "CKR_NEW_PIN_MODE", 0x1B1: "CKR_NEXT_OTP",
    0x1B5: "CKR_EXCEEDED_MAX_ITERATIONS", 0x1B6: "CKR_FIPS_SELF_TEST_FAILED",
    0x1B7: "CKR_LIBRARY_LOAD_FAILED", 0x1B8: "CKR_PIN_TOO_WEAK",
    0x1B9: "CKR_PUBLIC_KEY_INVALID", 0x200: "CKR_FUNCTION_REJECTED",
    0x201: "CKR_TOKEN_RESOURCE_EXCEEDED", 0x202: "CKR_OPERATION_CANCEL_FAILED",
    0x203: "CKR_KEY_EXHAUSTED",
}
# fmt: on

CODES: Final[dict[str, int]] = {name: code for code, name in NAMES.items()}
NO_OBJECT: Final = frozenset(
    CODES[f"CKR_{kind}_HANDLE_INVALID"]
    for kind in ("KEY", "OBJECT", "WRAPPING_KEY", "UNWRAPPING_KEY")
)
"""No object has this number."""

# The classes whose names do not follow from the code's name.
_IRREGULAR: Final[dict[str, str]] = {
    "CKR_USER_ANOTHER_ALREADY_LOGGED_IN": "AnotherUserAlreadyLoggedIn",
    "CKR_FUNCTION_CANCELED": "FunctionCancelled",
    "CKR_TOKEN_NOT_RECOGNIZED": "TokenNotRecognised",
    "CKR_RANDOM_NO_RNG": "RandomNoRNG",
    "CKR_SLOT_ID_INVALID": "SlotIDInvalid",
    "CKR_SESSION_READ_WRITE_SO_EXISTS": "SessionReadWriteSOExists",
}
_CLASSES: Final[dict[int, type[p11.PKCS11Error]]] = {
    code: getattr(p11, spelled)
    for code, name in NAMES.items()
    if hasattr(
        p11,
        spelled := _IRREGULAR.get(name, name.removeprefix("CKR_").title()).replace(
            "_", ""
        ),
    )
}
_CODE_OF_CLASS: Final[dict[type[p11.PKCS11Error], int]] = {
    cls: code for code, cls in _CLASSES.items()
}
# The texts that python-pkcs11 0.10 gives codes without a class
# (_pkcs11.pxd, map_rv_to_error).
_CODE_OF_TEXT: Final[dict[str, int]] = {
    "Buffer was too small": 0x150,
    "Initialisation error (already": 0x191,
    "Initialisation error (not": 0x190,
    "Parallel not supported": 0x0B4,
    "User type invalid": 0x103,
}
_UNMAPPED: Final = re.compile(r"Unmapped error code (0x[0-9a-f]+)")


# What to do about answers whose names do not say it.
_ADVICE: Final[dict[str, str]] = {
    "CKR_SESSION_READ_ONLY": (
        "this session is read-only: use pool.session(rw=True), or run(..., rw=True)"
    ),
    "CKR_SESSION_HANDLE_INVALID": "the session is closed; make the call in an open one",
    "CKR_TEMPLATE_INCOMPLETE": (
        'something is missing; an EC key pair needs curve=, such as "secp256r1"'
    ),
    "CKR_ATTRIBUTE_VALUE_INVALID": (
        "the token does not take a value that was given; key lengths are in bits"
    ),
    "CKR_MECHANISM_INVALID": (
        "the token does not do this with this kind of key: give another mechanism=; "
        "list_tokens() tells which it has"
    ),
    "CKR_MECHANISM_PARAM_INVALID": (
        "mechanism_param= is missing or wrong; it is the IV where there is one"
    ),
    "CKR_ARGUMENTS_BAD": (
        "a parameter is missing or wrong; mechanism_param= is the IV where there is one"
    ),
    "CKR_DATA_LEN_RANGE": "the data is too long, too short or not in whole blocks",
}


def name_of(code: int) -> str:
    """``CKR_…`` for a code; vendor and unknown codes as a hexadecimal number."""
    return NAMES.get(code, f"{code:#x}")


def error_of(code: int, function: str) -> p11.PKCS11Error:
    """The exception for a code that ``function`` returned, both in its text."""
    text = f"{function} returned {name_of(code)}"
    error = _CLASSES.get(code, p11.PKCS11Error)(text)
    error.rv = code  # type: ignore[attr-defined]  # kept for code_of()
    return error


def check(code: int, function: str) -> None:
    """Raise the exception of ``code`` unless it is ``CKR_OK``."""
    if code:
        raise error_of(code, function)


def explain(error: p11.PKCS11Error) -> None:
    """Give an error of python-pkcs11 a text: most have none."""
    code = code_of(error)
    if code is None:
        return
    name = name_of(code)
    advice = _ADVICE.get(name)
    if not str(error) or _UNMAPPED.match(str(error)):
        error.rv = code  # type: ignore[attr-defined]  # its text may hold it no more
        error.args = (f"{name}: {advice}" if advice else name,)
    elif advice and advice not in str(error) and name in str(error):
        error.args = (f"{error}: {advice}",)


def text_of(error: BaseException) -> str:
    """What an error says; its code's name where it has no text."""
    code = None if str(error) else code_of(error)
    return (str(error) or type(error).__name__) if code is None else name_of(code)


def code_of(error: BaseException) -> int | None:
    """The code behind an exception of python-pkcs11, or None."""
    known = getattr(error, "rv", None)
    if isinstance(known, int):
        return known
    for cls in type(error).__mro__:
        if cls in _CODE_OF_CLASS:
            return _CODE_OF_CLASS[cls]
    text = str(error)
    if found := _UNMAPPED.match(text):
        return int(found[1], 16)
    return next(
        (c for start, c in _CODE_OF_TEXT.items() if text.startswith(start)), None
    )
