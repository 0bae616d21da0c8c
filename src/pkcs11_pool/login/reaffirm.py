"""The login that a key with ``CKA_ALWAYS_AUTHENTICATE`` wants for each use.

The one login that a worker sends, between Init and the call, on the operation's
own session. It is under the same guard as the actor's: a PIN that the token
refused is not sent again, and none is sent to a token that is not ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkcs11.constants import Attribute, ObjectClass

from pkcs11_pool import events
from pkcs11_pool.cryptoki import interface, rv
from pkcs11_pool.cryptoki.operations import raw_login
from pkcs11_pool.login.pin_guard import CONTEXT

if TYPE_CHECKING:
    from pkcs11_pool.cryptoki.keys import Entry
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.login.actor import LoginActor
    from pkcs11_pool.pins import Pin

_FALSE = b"\x00"


class Reaffirm:
    """Logs in for one use of a key, with a PIN that the caller gave."""

    __slots__ = ("_actor", "_pin")

    def __init__(self, actor: LoginActor, pin: Pin) -> None:
        self._actor = actor
        self._pin = pin

    def __call__(self, session: Session, entry: Entry) -> None:
        """``C_GetTokenInfo`` and ``C_Login`` (``CKU_CONTEXT_SPECIFIC``).

        Nothing is sent for a key that is known to want no login.

        Raises:
            PinRefused: The token refused the PIN, now or earlier.
        """
        if entry.object_class != ObjectClass.PRIVATE_KEY:
            return  # others have no such attribute
        if entry.seen.get(Attribute.ALWAYS_AUTHENTICATE) == _FALSE:
            return
        guard = self._actor.guard
        with guard.one_try(self._pin):
            fresh = self._actor.same_token()
            guard.check(CONTEXT, self._pin, fresh, force=False)
            code = raw_login(
                session.functions,
                session.handle,
                interface.CKU_CONTEXT_SPECIFIC,
                self._pin,
            )
            if code:
                events.warning(
                    events.LOGIN_FAILED,
                    token=fresh.label,
                    user=CONTEXT,
                    rv=rv.name_of(code),
                )
            guard.answered(CONTEXT, self._pin, code, "C_Login", self._actor.same_token)
            guard.accepted(CONTEXT)
