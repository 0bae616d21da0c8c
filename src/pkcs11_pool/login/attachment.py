"""A pool's hold on its token: the module, the anchor, and each change of the login.

The *anchor* is the session that keeps the application from having none, because
closing the last one logs out. On the login actor's thread only; what others may know
of it is written into :class:`~pkcs11_pool.login.standing.Standing`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from pkcs11 import exceptions as p11
from pkcs11.constants import TokenFlag

from pkcs11_pool.cryptoki import module as modules
from pkcs11_pool.cryptoki import rv
from pkcs11_pool.cryptoki.session import OVER, Session
from pkcs11_pool.errors import LoginRequired, PoolClosed, TokenNotFound
from pkcs11_pool.login.opening import surely
from pkcs11_pool.login.pin_guard import guard_of
from pkcs11_pool.state import LoginEvent, LoginState, SessionState

if TYPE_CHECKING:
    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.keys import HandleCache
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.login.standing import Standing
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
        standing: What others may know.
        anchor: The session that stays open.
        is_attached: Whether the pool is one of the module's.
    """

    def __init__(
        self,
        standing: Standing,
        options: PoolOptions,
        gate: Gate,
        cache: HandleCache,
        *,
        name: str | None,
        member: modules.Member,
    ) -> None:
        self.standing = standing
        self.anchor: Session | None = None
        self.is_attached = False
        self._options = options
        self._gate = gate
        self._cache = cache
        cache.login = standing.login
        # In the messages of other pools that want the same token.
        self._name = name
        self._member = member

    # -- Module and token ---------------------------------------------------------

    def attach(self) -> None:
        """Load the module, find the token, claim it, open the anchor."""
        options, standing = self._options, self.standing
        standing.module = module = modules.acquire(
            options.module, options.init_reserved, serialize=options.serialize
        )
        self.is_attached = True
        module.members.append(self._member)
        with module.turn:
            if not module.library.get_slots():
                # A client whose server was down at C_Initialize has no slots, and
                # keeps none until it is finalised.
                message = f"{options.module} has no slots"
                raise p11.TokenNotPresent(message)
            standing.token, info = module.find(options)
            module.claim(info, self._name or info.label)
            standing.info = info
            standing.guard = guard_of((module.path, info.identity))
            self.anchor = self._first_session(info)
            # Read once more: what was misread would be taken for the token's own.
            standing.same_token()

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

    def detach(self) -> None:
        """Log out, close the anchor, let the module go; nothing if it was not held."""
        standing = self.standing
        module = standing.module
        if module is None or not self.is_attached:
            return
        # Where one call at a time is let in and a lost one is inside, nothing more
        # is: the session stays, and so does the module.
        if module.wait_turn(self._options.close_timeout):
            if self.anchor is not None:
                if self._is_logged_in:
                    module.functions.C_Logout(self.anchor.handle)
                self.anchor.close()
                with suppress(p11.PKCS11Error):
                    module.close_leftovers(standing.known.slot_id)
            module.turn.__exit__()
        self.anchor = None
        if standing.info is not None:
            module.unclaim(standing.info)
        module.members.remove(self._member)
        modules.release(module)
        self.is_attached = False
        standing.info = standing.token = None

    @property
    def is_shared(self) -> bool:
        """Whether the module is in use without this pool."""
        module = self.standing.module
        return module is not None and module.users > self.is_attached

    @property
    def others(self) -> list[modules.Member]:
        """The other pools on the module."""
        members = self.standing.attached.members
        return [member for member in members if member is not self._member]

    # -- Sessions -----------------------------------------------------------------

    def new_session(self, *, rw: bool) -> Session:
        """``C_OpenSession`` on the token; whoever calls has the turn."""
        return self._open_session(rw=rw or self._options.rw_sessions_only)

    def _open_session(self, *, rw: bool) -> Session:
        standing = self.standing
        if standing.token is None:
            raise PoolClosed("the pool is not open")
        epoch = standing.login.epoch
        return Session(standing.attached, standing.token, rw=rw, epoch=epoch)

    @property
    def open_anchor(self) -> Session:
        """The anchor of an open pool."""
        if self.anchor is None:
            raise PoolClosed("the pool is not open")
        return self.anchor

    def swap_anchor(self, *, rw: bool) -> None:
        """Replace the anchor by one of the other kind; the new one is opened first.

        The application never has no session by accident: closing the last logs out.

        Raises:
            pkcs11.PKCS11Error: The old one had died. Nothing else tells of it: all
                numbers of objects are dead, and the new anchor is well.
        """
        with self.standing.attached.turn:
            old = self.open_anchor
            # First: it is not closed if its number may be the new one's.
            surely(old.info)
            self.anchor = self.new_session(rw=rw)
            code = old.close()
            if code in OVER:
                rv.check(code, "C_CloseSession")

    def renew_anchor(self, *, rw: bool = False) -> None:
        """Close the last session of all, which logs out as well, and open the next.

        Source: PKCS#11 v3.1, "C_CloseSession".
        """
        module = self.standing.attached
        with module.turn:
            self.open_anchor.close()
            self.anchor = None
            module.close_leftovers(self.standing.known.slot_id)
            self.anchor = self.new_session(rw=rw)

    # -- The login ----------------------------------------------------------------

    @property
    def _is_logged_in(self) -> bool:
        """Whether there is a login that a ``C_Logout`` ends."""
        state = self.standing.login.state
        if self._options.login_ignored:
            return state is LoginState.SO
        return state is not LoginState.PUBLIC

    def user_out(self) -> None:
        """End the user's login on the token; nothing of the pool is inside."""
        if self.standing.login.state is not LoginState.USER:
            return
        if self._options.login_per_session:
            # Each session ends its login with itself. C_Logout would do for one alone,
            # and some modules go on using the PIN that the session was given.
            error = LoginRequired(
                "logged out, and this token keeps the login of each session by itself: "
                "open the session anew"
            )
            with self.standing.attached.turn:
                for session in self._gate.token_lost(error):
                    session.close()
            self.renew_anchor(rw=self.open_anchor.rw)
        elif not self._options.login_ignored:
            self.log_out()

    def log_out(self) -> None:
        """``C_Logout`` of whoever is logged in."""
        session = self.open_anchor
        with self.standing.attached.turn:
            code = session.functions.C_Logout(session.handle)
            # Also where it says that nobody was in: the pool thought otherwise.
            if not came_to(session, LoginState.PUBLIC, code):
                rv.check(code, "C_Logout")

    def change(self, event: LoginEvent) -> None:
        """The login is another: a new epoch begins."""
        standing = self.standing
        # The order matters: operations that start from here on see the new epoch,
        # and what was opened or found in the old one is not used in it.
        standing.login = standing.login.after(event)
        if standing.login.state is not LoginState.USER:
            standing.session_pin = None
        self._cache.login = standing.login
        self._gate.close_ahead()


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
