"""An async session pool for PKCS#11: HSMs, smart cards and TPMs.

The public names; everything else is the library's own. Python modules of the
top floor (demo, command line) are never imported from here.

Each name is imported when it is first asked for. pytest imports this package in every
run on a machine where it is installed, for its plugin, and the command line for its
``--help``: those must not pay for python-pkcs11 and anyio.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pkcs11_pool import pins
    from pkcs11_pool.errors import (
        ForkedProcess,
        InvalidCiphertext,
        InvalidOption,
        InvalidType,
        InvalidURI,
        KeyAmbiguous,
        KeyFunctionNotPermitted,
        KeyNotExportable,
        KeyNotFound,
        LoginRequired,
        ModuleError,
        ModuleInUse,
        OutcomeUnknown,
        PinLengthInvalid,
        PinRefused,
        PinSourceError,
        PoolClosed,
        PoolError,
        PoolTimeout,
        SessionClosed,
        SessionObjectDestroyed,
        SessionObjectNeedsSession,
        StreamInterrupted,
        TokenAmbiguous,
        TokenInUse,
        TokenNotFound,
        TokenUnavailable,
        TooManyWaiting,
        WouldBlockLoop,
        WouldDeadlock,
        WrongLoop,
    )
    from pkcs11_pool.faces.administration import init_token, list_tokens
    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.faces.mapping import Results, SyncResults
    from pkcs11_pool.faces.objectref import ObjectRef
    from pkcs11_pool.faces.pool import TokenPool
    from pkcs11_pool.faces.pooled_session import PooledSession
    from pkcs11_pool.faces.security_officer import SecurityOfficer
    from pkcs11_pool.faces.streams import CryptStream, SyncStream
    from pkcs11_pool.state import (
        Access,
        LoginState,
        PoolState,
        SessionInfo,
        SessionState,
        TokenInfo,
    )
    from pkcs11_pool.stats import Histogram, PoolStats, RecentError
    from pkcs11_pool.uri import Pkcs11URI

__all__ = [
    "Access",
    "CryptStream",
    "ForkedProcess",
    "Histogram",
    "InvalidCiphertext",
    "InvalidOption",
    "InvalidType",
    "InvalidURI",
    "KeyAmbiguous",
    "KeyFunctionNotPermitted",
    "KeyNotExportable",
    "KeyNotFound",
    "KeyRef",
    "LoginRequired",
    "LoginState",
    "ModuleError",
    "ModuleInUse",
    "ObjectRef",
    "OutcomeUnknown",
    "PinLengthInvalid",
    "PinRefused",
    "PinSourceError",
    "Pkcs11URI",
    "PoolClosed",
    "PoolError",
    "PoolState",
    "PoolStats",
    "PoolTimeout",
    "PooledSession",
    "RecentError",
    "Results",
    "SecurityOfficer",
    "SessionClosed",
    "SessionInfo",
    "SessionObjectDestroyed",
    "SessionObjectNeedsSession",
    "SessionState",
    "StreamInterrupted",
    "SyncResults",
    "SyncStream",
    "TokenAmbiguous",
    "TokenInUse",
    "TokenInfo",
    "TokenNotFound",
    "TokenPool",
    "TokenUnavailable",
    "TooManyWaiting",
    "WouldBlockLoop",
    "WouldDeadlock",
    "WrongLoop",
    "init_token",
    "list_tokens",
    "pins",
]

# Where each name is; those of the imports above, and no others: a test compares.
_HOMES: Final = {
    "init_token": "pkcs11_pool.faces.administration",
    "list_tokens": "pkcs11_pool.faces.administration",
    "KeyRef": "pkcs11_pool.faces.keyref",
    "Results": "pkcs11_pool.faces.mapping",
    "SyncResults": "pkcs11_pool.faces.mapping",
    "ObjectRef": "pkcs11_pool.faces.objectref",
    "TokenPool": "pkcs11_pool.faces.pool",
    "PooledSession": "pkcs11_pool.faces.pooled_session",
    "SecurityOfficer": "pkcs11_pool.faces.security_officer",
    "CryptStream": "pkcs11_pool.faces.streams",
    "SyncStream": "pkcs11_pool.faces.streams",
    "Access": "pkcs11_pool.state",
    "LoginState": "pkcs11_pool.state",
    "PoolState": "pkcs11_pool.state",
    "SessionInfo": "pkcs11_pool.state",
    "SessionState": "pkcs11_pool.state",
    "TokenInfo": "pkcs11_pool.state",
    "Histogram": "pkcs11_pool.stats",
    "PoolStats": "pkcs11_pool.stats",
    "RecentError": "pkcs11_pool.stats",
    "Pkcs11URI": "pkcs11_pool.uri",
}
_ERRORS: Final = "pkcs11_pool.errors"


# Type checkers would take any name for one that this gives.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name, once."""
        if name not in __all__:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        if name == "pins":
            return import_module("pkcs11_pool.pins")
        value = getattr(import_module(_HOMES.get(name, _ERRORS)), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Also the names that nobody has asked for yet."""
        return sorted({*globals(), *__all__})
