"""Where opencryptoki's software token is, and what opens it."""

from __future__ import annotations

from pathlib import Path

from pkcs11_pool import list_tokens

SO_PIN = "87654321"
USER_PIN = "12345678"
_FOUND = sorted(Path("/usr/lib").glob("*/opencryptoki/libopencryptoki.so.0"))
MODULE = _FOUND[0] if _FOUND else Path("libopencryptoki.so")
"""The module; where there is none, a name that cannot be opened."""


async def software_slot() -> int:
    """The slot of the token that is software alone."""
    tokens = await list_tokens(MODULE)
    return next(t.slot_id for t in tokens if t.model == "IBM SoftTok")
