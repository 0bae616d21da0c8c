"""Sends a PIN of the user or of the SO to the token: here alone the actor does.

Before each try the token is compared with the pool's, and what it says of itself is
read anew.

Source: PKCS#11 v3.1, "C_Login".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pkcs11_pool import events
from pkcs11_pool.cryptoki import interface, rv
from pkcs11_pool.cryptoki.operations import raw_login
from pkcs11_pool.login.attachment import came_to
from pkcs11_pool.login.opening import surely
from pkcs11_pool.login.pin_guard import SO, USER
from pkcs11_pool.state import LoginState

if TYPE_CHECKING:
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.login.standing import Standing
    from pkcs11_pool.pins import Pin

_IN: Final = frozenset({0, rv.CODES["CKR_USER_ALREADY_LOGGED_IN"]})
_KIND: Final = {
    USER: (interface.CKU_USER, LoginState.USER),
    SO: (interface.CKU_SO, LoginState.SO),
}


class PinSender:
    """``C_Login``, under the guard of the token.

    Attributes:
        sent: Whether the last PIN left. With its answer lost it is not sent again.
    """

    def __init__(self, standing: Standing, gate: Gate) -> None:
        self._standing = standing
        self._gate = gate
        self.sent = False

    def look(self, session: Session) -> None:
        """Raise if a session may have died since it was opened, and nothing was sent.

        Its number may be anybody's by then, on any token, and no PIN goes there.
        """
        self.sent = False
        surely(session.info)

    def send(self, session: Session, who: str, pin: Pin, *, force: bool) -> None:
        """``C_GetTokenInfo`` and ``C_Login``, if this PIN may be tried.

        Whoever calls has the module's turn.

        Raises:
            PinRefused: By the token, or before it was sent.
            TokenUnavailable: Another token is in the slot.
        """
        standing = self._standing
        self.sent = False
        standing.info = fresh = surely(standing.same_token)
        standing.guard.check(who, pin, fresh, force=force)
        events.info(events.LOGIN_STARTED, token=standing.label, user=who)
        self.sent = True
        kind, wanted = _KIND[who]
        code = raw_login(session.functions, session.handle, kind, pin)
        if code in _IN or came_to(session, wanted, code):
            standing.guard.accepted(who)
            self._gate.counted(logins_total=1)
            return
        self._gate.counted(logins_failed_total=1)
        name = rv.name_of(code)
        events.warning(events.LOGIN_FAILED, token=standing.label, user=who, rv=name)
        standing.guard.answered(who, pin, code, "C_Login", standing.same_token)
