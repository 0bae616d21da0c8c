"""Awaits a PIN source, for a login that many wait for: one of them is sent for it."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from pkcs11_pool import pins
from pkcs11_pool.errors import PinRefused

if TYPE_CHECKING:
    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.jobs import Job


async def fetch_pin(engine: TokenEngine, job: Job) -> None:
    """Await the PIN source that this caller was sent for, and hand in the answer."""
    source = job.errand
    if source is None:
        return
    handled = sys.exc_info()[1]
    try:
        given: Any = source()
        if inspect.isawaitable(given):
            given = await given
        # In its own place: no frame keeps what the source gave.
        given = pins.answer(given)
    except Exception as error:  # noqa: BLE001  # raised at all who wait for the login
        given = pins.failed(error, handled)
    refused = isinstance(given, PinRefused)
    try:
        engine.pin_came(job, None if refused else given, given if refused else None)
    finally:
        # Its traceback holds this frame: without this, it would hold itself.
        del given, handled
