"""Who may look: the one guard that comes with the status app.

Source: RFC 7617, "The 'Basic' HTTP Authentication Scheme".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.errors import InvalidOption

if TYPE_CHECKING:
    from collections.abc import Mapping


class BasicAuth:
    """Lets in who knows a name and a password; for browsers and Prometheus alike.

    Over TLS only: the password is sent with every request.

    Args:
        user: Without a colon.
        password: Kept as a hash.

    Raises:
        InvalidOption: A value is empty or no text, or the name has a colon.
    """

    #: The value of ``WWW-Authenticate`` for who is not let in.
    challenge: Final = 'Basic realm="pkcs11-pool", charset="UTF-8"'

    def __init__(self, user: str, password: str) -> None:
        # Before anything is raised: no frame of ours shows the password.
        right = password = _hashed(user, password)  # type: ignore[assignment]
        if right is None or ":" in user:
            raise InvalidOption(
                "BasicAuth takes a user without a colon, and a password"
            )
        self._right = right

    def __call__(self, scope: Mapping[str, Any]) -> bool:
        """Whether a request has the name and the password."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, encoded = given[0].partition(b" ")
        try:
            pair = base64.b64decode(encoded.strip(), validate=True)
        except binascii.Error:
            return False
        if scheme.lower() != b"basic":
            return False
        return hmac.compare_digest(hashlib.sha256(pair).digest(), self._right)


def _hashed(user: object, password: object) -> bytes | None:
    if not isinstance(user, str) or not isinstance(password, str):
        return None
    if not user or not password:
        return None
    return hashlib.sha256(f"{user}:{password}".encode()).digest()
