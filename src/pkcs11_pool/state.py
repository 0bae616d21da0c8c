"""The states of sessions, logins and pools, and the access table, as plain data.

Pure: no threads, no event loop, no Cryptoki module. The transition functions
say what may follow what; whoever owns a state calls them and nothing else.

Source: PKCS#11 v3.1, "Session states" and "Session types".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final, NewType

from pkcs11.constants import TokenFlag

Epoch = NewType("Epoch", int)
"""Number of a login state of one token. Handles are good for one epoch."""

Generation = NewType("Generation", int)
"""Number of a ``C_Initialize`` of one module. Sessions are good for one."""


class Access(Enum):
    """What a session may do with a kind of object."""

    NONE = "none"
    READ = "read"
    READ_WRITE = "read_write"


class SessionState(IntEnum):
    """The five states of a session, with the values of the standard (``CKS_…``)."""

    RO_PUBLIC_SESSION = 0
    RO_USER_FUNCTIONS = 1
    RW_PUBLIC_SESSION = 2
    RW_USER_FUNCTIONS = 3
    RW_SO_FUNCTIONS = 4

    def access(self, *, token: bool, private: bool) -> Access:
        """What this state allows on objects of one kind.

        Args:
            token: Token objects (``CKA_TOKEN`` true) or session objects.
            private: Private objects (``CKA_PRIVATE`` true) or public ones.

        Source: PKCS#11 v3.1, "Session states", its table of access.
        """
        return _ACCESS[self, token, private]


_N, _R, _RW = Access.NONE, Access.READ, Access.READ_WRITE
_KINDS: Final = ((False, False), (False, True), (True, False), (True, True))
_ROWS: Final = {
    # Columns: session public, session private, token public, token private.
    SessionState.RO_PUBLIC_SESSION: (_RW, _N, _R, _N),
    SessionState.RO_USER_FUNCTIONS: (_RW, _RW, _R, _R),
    SessionState.RW_PUBLIC_SESSION: (_RW, _N, _RW, _N),
    SessionState.RW_USER_FUNCTIONS: (_RW, _RW, _RW, _RW),
    SessionState.RW_SO_FUNCTIONS: (_RW, _N, _RW, _N),
}
_ACCESS: Final = {
    (state, token, private): access
    for state, row in _ROWS.items()
    for (token, private), access in zip(_KINDS, row, strict=True)
}


class LoginState(Enum):
    """Who is logged in to the token, for every session of the application alike."""

    PUBLIC = "public"
    USER = "user"
    SO = "so"


class LoginEvent(Enum):
    """What changes the login state of a token."""

    USER_IN = "user_in"
    SO_IN = "so_in"
    OUT = "out"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Login:
    """The login state of a token, as its actor sees it.

    Attributes:
        state: Who is logged in.
        wanted: Who should be: ``USER`` after a login, until ``logout()``.
        epoch: Grows with every change, never repeats.
    """

    state: LoginState
    wanted: LoginState
    epoch: Epoch

    def after(self, event: LoginEvent) -> Login:
        """The login state that follows ``event``.

        A login that is lost, or handed to the SO for a while, leaves what is
        wanted as it was: that is what it goes back to.
        """
        state, wanted = {
            LoginEvent.USER_IN: (LoginState.USER, LoginState.USER),
            LoginEvent.SO_IN: (LoginState.SO, self.wanted),
            LoginEvent.OUT: (LoginState.PUBLIC, LoginState.PUBLIC),
            LoginEvent.LOST: (LoginState.PUBLIC, self.wanted),
        }[event]
        return Login(state, wanted, Epoch(self.epoch + 1))


class PoolState(Enum):
    """The life of a pool. It runs through it once."""

    NEW = "new"
    OPENING = "opening"
    READY = "ready"
    RECOVERING = "recovering"
    CLOSING = "closing"
    CLOSED = "closed"


_NEXT: Final[dict[PoolState, frozenset[PoolState]]] = {
    PoolState.NEW: frozenset({PoolState.OPENING, PoolState.CLOSED}),
    PoolState.OPENING: frozenset({PoolState.READY, PoolState.CLOSING}),
    PoolState.READY: frozenset({PoolState.RECOVERING, PoolState.CLOSING}),
    PoolState.RECOVERING: frozenset({PoolState.READY, PoolState.CLOSING}),
    PoolState.CLOSING: frozenset({PoolState.CLOSED}),
    PoolState.CLOSED: frozenset(),
}


def may_follow(state: PoolState, new: PoolState) -> bool:
    """Whether a pool in ``state`` may go to ``new``."""
    return new in _NEXT[state]


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What the token says of one session (``C_GetSessionInfo``).

    Attributes:
        state: One of the five session states.
        rw: Whether the session is read-write (``CKF_RW_SESSION``).
        device_error: The token's own code for its last error, 0 for none.
        slot_id: The slot that the session's token is in.
    """

    state: SessionState
    rw: bool
    device_error: int
    slot_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInfo:
    """What a token says of itself (``C_GetTokenInfo``).

    Attributes:
        label: Without the padding.
        serial: As bytes, without the padding.
        flags: ``CKF_…`` of the token, fresh at the time of the call.
        max_sessions: The most sessions of one application. ``None``: the token
            does not say (``CK_UNAVAILABLE_INFORMATION``, or a number that makes
            no sense). ``0``: no limit (``CK_EFFECTIVELY_INFINITE``).
        max_rw_sessions: The same for R/W sessions.
        min_pin_len: Shortest PIN in bytes.
        max_pin_len: Longest PIN in bytes.
        slot_id: The slot that the token is in now.
        mechanisms: Numbers of its mechanisms, where they were asked for.
    """

    label: str
    serial: bytes
    model: str
    manufacturer: str
    flags: TokenFlag
    max_sessions: int | None
    max_rw_sessions: int | None
    min_pin_len: int
    max_pin_len: int
    slot_id: int
    mechanisms: frozenset[int] = frozenset()

    @property
    def identity(self) -> tuple[str, bytes, str, str]:
        """What stays the same while the token lives, in whichever slot."""
        return (self.label, self.serial, self.model, self.manufacturer)

    def __str__(self) -> str:
        """For messages: the label, the serial and the slot."""
        if not self.flags & TokenFlag.TOKEN_INITIALIZED:
            # It has no name yet.
            return f"uninitialised token (slot {self.slot_id})"
        serial = self.serial.decode(errors="replace")
        return f"{self.label!r} (serial {serial}, slot {self.slot_id})"
