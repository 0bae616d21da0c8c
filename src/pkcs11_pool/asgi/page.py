"""The status page as one document: its style and its script are inside.

So it needs nothing from elsewhere, works wherever it is mounted, and the policy can
name exactly this style and this script by their hashes.

Source: W3C, "Content Security Policy Level 3".
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Final


def _read(name: str) -> str:
    return files("pkcs11_pool.asgi").joinpath("static", name).read_text("utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


_STYLE: Final = _read("status.css")
_SCRIPT: Final = _read("status.js")

PAGE: Final = (
    _read("status.html").replace("/*style*/", _STYLE).replace("/*script*/", _SCRIPT)
).encode()
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_hash(_STYLE)}",
        f"script-src {_hash(_SCRIPT)}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The ``Content-Security-Policy`` of every answer."""
