"""What is odd about a token, and which option of the pool is for that.

Seen from what the token tells. That it drops idle sessions, or throttles, is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pkcs11.constants import TokenFlag

from pkcs11_pool.cli.checks import bad, warning
from pkcs11_pool.state import SessionState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11_pool.cli.checks import Finding
    from pkcs11_pool.state import SessionInfo, TokenInfo

_PUBLIC: Final = (SessionState.RO_PUBLIC_SESSION, SessionState.RW_PUBLIC_SESSION)


def of_opening(error: Exception) -> Iterator[Finding]:
    """A pool that did not open because there are no R/O sessions."""
    if "rw_sessions_only=True" in str(error):
        yield bad(
            "the token opens R/W sessions and no R/O ones",
            "give the pool rw_sessions_only=True",
        )


def of_token(info: TokenInfo) -> Iterator[Finding]:
    """A token that asks for no login."""
    if not info.flags & TokenFlag.LOGIN_REQUIRED:
        yield warning(
            "the token says that no login is needed",
            "if that holds for private keys, give the pool login_ignored=True, no PIN",
        )


def of_session(info: SessionInfo) -> Iterator[Finding]:
    """A session opened after the login, which it has no part in."""
    if info.state in _PUBLIC:
        yield warning(
            "the user is logged in, and a session that was opened then is not",
            "if each has a login of its own, give the pool login_per_session=True",
        )
