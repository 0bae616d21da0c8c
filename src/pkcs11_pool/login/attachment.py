"""What one pool has of its token: the module, the token, the anchor, the login state.

The *anchor* is the session that keeps the application from having none, because
closing the last one logs out. All of this is written by the login actor's thread
only; everybody reads.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from pkcs11 import exceptions as p11
from pkcs11.constants import TokenFlag

from pkcs11_pool.cryptoki import module as modules
from pkcs11_pool.cryptoki import rv
from pkcs11_pool.cryptoki.session import Session
from pkcs11_pool.errors import (
    LoginRequired,
    PoolClosed,
    TokenNotFound,
    TokenUnavailable,
)
from pkcs11_pool.login.pin_guard import PinGuard, guard_of
from pkcs11_pool.state import Epoch, Login, LoginEvent, LoginState, SessionState

if TYPE_CHECKING:
    import pkcs11

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.keys import HandleCache
    from pkcs11_pool.cryptoki.renewal import Renewal
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.pins import Pin
    from pkcs11_pool.state import TokenInfo

_CLEAR: Final = frozenset(
    rv.CODES[f"CKR_PIN_{name}"]
    for name in ("INCORRECT", "INVALID", "LEN_RANGE", "EXPIRED", "LOCKED")
)
"""What is said of a PIN, and leaves no doubt: all else may be said of a lost answer."""
_WHO: Final = {
    SessionState.RO_PUBLIC_SESSION: LoginState.PUBLIC,
    SessionState.RW_PUBLIC_SESSION: LoginState.PUBLIC,
    SessionState.RO_USER_FUNCTIONS: LoginState.USER,
    SessionState.RW_USER_FUNCTIONS: LoginState.USER,
    SessionState.RW_SO_FUNCTIONS: LoginState.SO,
}


_NOT_ASKED: Final = frozenset(
    rv.CODES[name] for name in ("CKR_SESSION_COUNT", "CKR_SESSION_READ_WRITE_SO_EXISTS")
)
"""Reasons to open no R/O session that are no oddity of the token."""


class Attachment:
    """The token of one pool, and the session that stays open on it.

    Attributes:
        login: The login state, replaced whole at each change.
        guard: What may be sent to the token as a PIN.
    """

    def __init__(
        self, options: PoolOptions, gate: Gate, cache: HandleCache, name: str | None
    ) -> None:
        self.login = Login(LoginState.PUBLIC, LoginState.PUBLIC, Epoch(1))
        self.module: modules.Module | None = None
        # The module is remembered after the end: lost calls come back to it.
        self._is_attached = False
        self.token: pkcs11.Token | None = None
        self.info: TokenInfo | None = None
        self.guard = PinGuard()
        self._options = options
        self._gate = gate
        self._cache = cache
        self._name = name
        self._anchor: Session | None = None
        #: The PIN of the present login, where each session is logged in by itself.
        self.session_pin: Pin | None = None

    def _attach(self) -> None:
        options = self._options
        self.module = modules.acquire(
            options.module, options.init_reserved, serialize=options.serialize
        )
        self._is_attached = True
        self.module.members.append(self)
        with self.module.turn:
            if not self.module.library.get_slots():
                # A client whose server was down at C_Initialize has no slots, and
                # keeps none until it is finalised.
                message = f"{options.module} has no slots"
                raise p11.TokenNotPresent(message)
            self.token, info = self.module.find(options)
            self.module.claim(info, self._name or info.label)
            self.info = info
            self.guard = guard_of((self.module.path, info.identity))
            self._anchor = self._first_session(info)
            # Read once more: what was misread would be taken for the token's own.
            self.same_token()

    def _first_session(self, info: TokenInfo) -> Session:
        """The anchor, or what is odd about a token that does not give it."""
        try:
            return self.new_session(rw=False)
        except p11.TokenNotRecognised as error:
            # Else it is waited for, as one that is down.
            if info.flags & TokenFlag.TOKEN_INITIALIZED:
                raise
            message = f"{info}: initialise it by init_token()"
            raise TokenNotFound(message) from error
        except p11.PKCS11Error as error:
            if self._options.rw_sessions_only or rv.code_of(error) in _NOT_ASKED:
                raise
            # Only those that have no R/O sessions at all open this one.
            with suppress(p11.PKCS11Error):
                self._open_session(rw=True).close()
                advice = "and opens R/W ones: set rw_sessions_only=True"
                error.args = (f"{error} for a R/O session, {advice}",)
            raise

    def _detach(self) -> None:
        module = self.module
        if module is None or not self._is_attached:
            return
        # Where one call at a time is let in and a lost one is inside, nothing more
        # is: the session stays, and so does the module.
        if module.wait_turn(self._options.close_timeout):
            if self._anchor is not None:
                if self._is_logged_in:
                    module.functions.C_Logout(self._anchor.handle)
                self._anchor.close()
                with suppress(p11.PKCS11Error):
                    module.close_leftovers(self.known.slot_id)
            module.turn.__exit__()
        self._anchor = None
        if self.info is not None:
            module.unclaim(self.info)
        module.members.remove(self)
        modules.release(module)
        self._is_attached = False
        self.info = self.token = None

    @property
    def is_shared(self) -> bool:
        """Whether the module is in use without this pool."""
        return self.module is not None and self.module.users > self._is_attached

    def new_session(self, *, rw: bool) -> Session:
        """``C_OpenSession`` on the token; whoever calls has the turn."""
        return self._open_session(rw=rw or self._options.rw_sessions_only)

    def _open_session(self, *, rw: bool) -> Session:
        if self.token is None:
            raise PoolClosed("the pool is not open")
        return Session(self.attached, self.token, rw=rw, epoch=self.login.epoch)

    def _swap_anchor(self, *, rw: bool) -> Session:
        """Replace the anchor by one of the other kind; the new one is opened first.

        The application never has no session by accident: closing the last logs out.
        """
        with self.attached.turn:
            new, old = self.new_session(rw=rw), self._anchor
            self._anchor = new
            if old is not None:
                old.close()
        return new

    def _close_anchor(self, *, rw: bool = False) -> None:
        """Close the last session of all, which logs out as well, and open the next.

        Source: PKCS#11 v3.1, "C_CloseSession".
        """
        with self.attached.turn:
            self._open_anchor.close()
            self._anchor = None
            self.attached.close_leftovers(self.known.slot_id)
            self._anchor = self.new_session(rw=rw)

    def _raw_logout(self, session: Session) -> None:
        with self.attached.turn:
            code = session.functions.C_Logout(session.handle)
            if code == rv.CODES["CKR_USER_NOT_LOGGED_IN"]:
                return
            if not came_to(session, LoginState.PUBLIC, code):
                rv.check(code, "C_Logout")

    @property
    def _is_logged_in(self) -> bool:
        """Whether there is a login that a ``C_Logout`` ends."""
        state = self.login.state
        if self._options.login_ignored:
            return state is LoginState.SO
        return state is not LoginState.PUBLIC

    def _user_out(self) -> None:
        """End the user's login on the token; nothing of the pool is inside."""
        if self.login.state is not LoginState.USER:
            return
        if self._options.login_per_session:
            # Each session ends its login with itself. C_Logout would do for one alone,
            # and some modules go on using the PIN that the session was given.
            error = LoginRequired(
                "logged out, and this token keeps the login of each session by itself: "
                "open the session anew"
            )
            with self.attached.turn:
                for session in self._gate.token_lost(error):
                    session.close()
            self._close_anchor(rw=self._open_anchor.rw)
        elif not self._options.login_ignored:
            self._raw_logout(self._open_anchor)

    def _change(self, event: LoginEvent) -> None:
        # The order matters: operations that start from here on see the new epoch,
        # and what was opened or found in the old one is not used in it.
        self.login = self.login.after(event)
        if self.login.state is not LoginState.USER:
            self.session_pin = None
        self._cache.login = self.login
        self._gate.close_ahead()

    # -- As a member of its module ------------------------------------------------

    @property
    def is_well(self) -> bool:
        """Whether nothing is being recovered here."""
        raise NotImplementedError

    def stand_back(self, renewal: Renewal) -> None:
        """Another pool has the module initialised anew: keep out meanwhile."""
        raise NotImplementedError

    # -- What everybody may ask ---------------------------------------------------

    def same_token(self) -> TokenInfo:
        """What the token tells now; no PIN is ever sent to another one."""
        known = self.known
        fresh = self.attached.info(known.slot_id)
        if fresh.identity != known.identity:
            raise TokenUnavailable(
                f"another token is in the slot: {fresh}, not {known}"
            )
        return fresh

    @property
    def attached(self) -> modules.Module:
        """The module, also after the end of the pool."""
        if self.module is None:
            raise PoolClosed("the pool is not open")
        return self.module

    @property
    def known(self) -> TokenInfo:
        """The token of the open pool, as it told last."""
        if self.info is None:
            raise PoolClosed("the pool is not open")
        return self.info

    @property
    def _open_anchor(self) -> Session:
        if self._anchor is None:
            raise PoolClosed("the pool is not open")
        return self._anchor

    @property
    def _label(self) -> str:
        return self.info.label if self.info is not None else self._options.wanted_token


def who_is_in(session: Session) -> LoginState:
    """Who is logged in, by what the token says of a session."""
    return _WHO[session.info().state]


def came_to(session: Session, who: LoginState, code: int) -> bool:
    """Whether a login or logout succeeded: by its code, or by asking.

    Its answer may be lost on the way: the token has done it all the same.
    """
    if not code or code in _CLEAR:
        return not code
    try:
        return who_is_in(session) is who
    except (p11.PKCS11Error, ValueError):
        return False
