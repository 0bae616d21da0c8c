"""The names of the log events, and the one logger that writes them.

Flat keys, one name per step. Never a PIN, a template value or key bytes.
Nothing on the way of an operation logs above DEBUG. A program that has not
configured structlog hears nothing: its standard output is its own.
"""

from __future__ import annotations

from typing import Any

import structlog

POOL_OPENED = "pool.opened"
POOL_CLOSED = "pool.closed"
POOL_FAILED = "pool.failed"
LOGIN_STARTED = "login.started"
LOGIN_COMPLETED = "login.completed"
LOGIN_FAILED = "login.failed"
LOGIN_LOST = "login.lost"
LOGOUT_COMPLETED = "logout.completed"
SO_STARTED = "security_officer.started"
SO_COMPLETED = "security_officer.completed"
SO_FAILED = "security_officer.failed"
SESSION_REFUSED = "session.refused"
RECOVERY_STARTED = "recovery.started"
"""The token is lost (``error``). Operations wait from here on."""
RECOVERY_STEP = "recovery.step"
"""A step (``step``) is taken: ``find``, ``initialize`` or ``log_in``."""
RECOVERY_FAILED = "recovery.failed"
"""A round (``round``) was in vain (``error``); the next comes in ``retry_in`` s."""
RECOVERY_TIMED_OUT = "recovery.timed_out"
"""``recovery_timeout`` has passed: calls are refused until the token is back."""
RECOVERY_COMPLETED = "recovery.completed"
"""The token is back, in ``slot``, after ``rounds`` rounds and ``seconds`` s."""
CALL_LOST = "call.lost"
CALL_RETURNED = "call.returned"
MODULE_INITIALIZED = "module.initialized"
MODULE_FINALIZED = "module.finalized"

_log = structlog.get_logger("pkcs11_pool")


def info(event: str, **keys: Any) -> None:
    """A change of state that an operator wants to see."""
    if structlog.is_configured():
        _log.info(event, **keys)


def warning(event: str, **keys: Any) -> None:
    """Something that went wrong and that the pool deals with."""
    if structlog.is_configured():
        _log.warning(event, **keys)
