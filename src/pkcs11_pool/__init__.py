"""An async session pool for PKCS#11: HSMs, smart cards and TPMs.

The public names; everything else is the library's own. Python modules of the
top floor (demo, command line) are never imported from here.
"""

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
)
from pkcs11_pool.faces.administration import init_token, list_tokens
from pkcs11_pool.faces.keyref import KeyRef
from pkcs11_pool.faces.mapping import Results
from pkcs11_pool.faces.objectref import ObjectRef
from pkcs11_pool.faces.pool import TokenPool
from pkcs11_pool.faces.pooled_session import PooledSession
from pkcs11_pool.faces.security_officer import SecurityOfficer
from pkcs11_pool.faces.streams import CryptStream
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
    "TokenAmbiguous",
    "TokenInUse",
    "TokenInfo",
    "TokenNotFound",
    "TokenPool",
    "TokenUnavailable",
    "TooManyWaiting",
    "WouldBlockLoop",
    "WouldDeadlock",
    "init_token",
    "list_tokens",
    "pins",
]
