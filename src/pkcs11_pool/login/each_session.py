"""The login of one session, on a token whose sessions do not share it.

The standard's login is the application's; some modules keep one for each session. So
that all of the pool's observe the same login, each that is opened while the user is
logged in is logged in before it is used. The PIN is under the same guard as the
actor's: one try at a time, and one that the token refused is not sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pkcs11 import exceptions as p11

from pkcs11_pool import events
from pkcs11_pool.cryptoki import interface, rv
from pkcs11_pool.cryptoki.operations import raw_login
from pkcs11_pool.errors import PinRefused
from pkcs11_pool.login.pin_guard import USER
from pkcs11_pool.state import LoginState

if TYPE_CHECKING:
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.login.actor import LoginActor

_ALREADY: Final = rv.CODES["CKR_USER_ALREADY_LOGGED_IN"]


def log_in(actor: LoginActor, session: Session) -> None:
    """``C_GetTokenInfo`` and ``C_Login``, if the user is logged in to the pool.

    Raises:
        UserNotLoggedIn: The PIN was refused, now or earlier: the login is lost.
        PKCS11Error, TokenUnavailable: The token is.
    """
    pin = actor.session_pin
    if pin is None or actor.login.state is not LoginState.USER:
        return
    guard = actor.guard
    try:
        with guard.one_try(pin):
            # It may have been changed meanwhile: see pin_change() of the faces.
            pin = actor.session_pin
            if pin is None or actor.is_pin_in_doubt:
                raise p11.UserNotLoggedIn("the PIN of all sessions is not known")
            fresh = actor.same_token()
            guard.check(USER, pin, fresh, force=False)
            code = raw_login(session.functions, session.handle, interface.CKU_USER, pin)
            if code != _ALREADY:
                guard.answered(USER, pin, code, "C_Login")
    except PinRefused as error:
        name = "the PIN that all sessions had was refused to this one"
        events.warning(events.LOGIN_FAILED, token=actor.known.label, user=USER, rv=name)
        raise p11.UserNotLoggedIn(name) from error
