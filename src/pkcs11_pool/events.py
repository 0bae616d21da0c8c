"""The names of the log events, and the one logger that writes them.

Flat keys, one name per step. Never a PIN, a template value or key bytes.
Nothing on the way of an operation logs above DEBUG. A program that has not
configured structlog hears nothing: its standard output is its own.
"""

from __future__ import annotations

from typing import Any

import structlog

POOL_OPENED = "pool.opened"
"""The pool is READY. Keys: ``token``."""

POOL_CLOSED = "pool.closed"
"""The pool is CLOSED. Keys: ``name``."""

POOL_FAILED = "pool.failed"
"""Closing gave up waiting for a hung module. Keys: ``name``."""

LOGIN_STARTED = "login.started"
"""``C_Login`` is about to be sent. Keys: ``token``, ``user``."""

LOGIN_COMPLETED = "login.completed"
"""All sessions are logged in. Keys: ``token``, ``epoch``."""

LOGIN_FAILED = "login.failed"
"""A PIN was refused by the token, or by the pool, that sent it to nobody.

Keys: ``token``; ``user`` and ``rv`` from the token, else ``error``.
"""

LOGIN_LOST = "login.lost"
"""Somebody else logged the pool out. Keys: ``token``, ``epoch``."""

LOGOUT_COMPLETED = "logout.completed"
"""All sessions are logged out. Keys: ``token``."""

SO_STARTED = "security_officer.started"
"""The security officer is logged in. Keys: ``token``."""

SO_COMPLETED = "security_officer.completed"
"""He is out, and what was before is restored. Keys: ``token``."""

SO_FAILED = "security_officer.failed"
"""His login, or the way back from it, failed. Keys: ``token``, ``error``."""

SESSION_REFUSED = "session.refused"
"""The token has no room for more sessions: the limit is learnt.

Keys: ``token``, ``error``; ``sessions``, ``rw_sessions``: how many there may be from
now on.
"""

OPERATION_THROTTLED = "operation.throttled"
"""The token was too busy for an operation, which is made again in a moment.

Keys: ``token``, ``error``, ``rests``: how often so far, ``retry_in``: seconds.
"""

RECOVERY_STARTED = "recovery.started"
"""The token is lost; operations wait from here on. Keys: ``token``, ``error``."""

RECOVERY_STEP = "recovery.step"
"""One step: ``find``, ``initialize`` or ``log_in``. Keys: ``token``, ``step``."""

RECOVERY_FAILED = "recovery.failed"
"""A round was in vain; the next comes in ``retry_in`` seconds.

Keys: ``token``, ``round``, ``error``, ``retry_in``.
"""

RECOVERY_TIMED_OUT = "recovery.timed_out"
"""Calls are refused until the token is back.

Keys: ``token``, ``error``, ``seconds``.
"""

RECOVERY_COMPLETED = "recovery.completed"
"""The token is back. Keys: ``token``, ``slot``, ``rounds``, ``seconds``."""

CALL_LOST = "call.lost"
"""A call was given up on inside the module.

Keys: ``token``, ``stuck``: how many are.
"""

CALL_RETURNED = "call.returned"
"""Such a call came back after all. Keys: ``token``, ``stuck``."""

MODULE_INITIALIZED = "module.initialized"
"""``C_Initialize`` went well. Keys: ``module``, ``generation``."""

MODULE_FINALIZED = "module.finalized"
"""``C_Finalize`` by the last pool. Keys: ``module``; ``error`` where it failed."""

_log = structlog.get_logger("pkcs11_pool")


def info(event: str, **keys: Any) -> None:
    """A change of state that an operator wants to see."""
    if structlog.is_configured():
        _log.info(event, **keys)


def warning(event: str, **keys: Any) -> None:
    """Something that went wrong and that the pool deals with."""
    if structlog.is_configured():
        _log.warning(event, **keys)
