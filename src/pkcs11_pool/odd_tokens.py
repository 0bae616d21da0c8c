"""Plays a token with an odd login or odd numbers, in front of one that has neither.

Knows each session that is open, and calls the module under its real number. For the
fault switch, which says what is played.
"""

from __future__ import annotations

import ctypes
import heapq
import threading
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from pkcs11.constants import Attribute

from pkcs11_pool.cryptoki import interface, rv
from pkcs11_pool.pins import Secret

if TYPE_CHECKING:
    from collections.abc import Callable

_RW: Final = interface.CKF_RW_SESSION
_SO: Final = interface.CKU_SO
_USER: Final = interface.CKU_USER
_RO_PUBLIC: Final = 0
_RW_PUBLIC: Final = 2

NO_SESSION: Final = frozenset(
    {
        "C_Initialize",
        "C_Finalize",
        "C_GetSlotList",
        "C_GetTokenInfo",
        "C_InitToken",
        "C_OpenSession",
        "C_CloseAllSessions",
    }
)
"""The functions whose first argument is no session."""
_FREE: Final = frozenset(
    {
        "C_CloseSession",
        "C_GetSessionInfo",
        "C_Login",
        "C_Logout",
        "C_InitPIN",
        "C_SetPIN",
        "C_DigestInit",
        "C_Digest",
        "C_DigestUpdate",
        "C_DigestFinal",
        "C_SeedRandom",
        "C_GenerateRandom",
    }
)
"""What a session may be used for while nobody is logged in to it."""
_KEY: Final = "CKR_KEY_HANDLE_INVALID"
_OBJECT: Final = "CKR_OBJECT_HANDLE_INVALID"
_NAMED: Final[dict[str, dict[int, str]]] = {
    "C_SetOperationState": {3: _KEY, 4: _KEY},
    "C_CopyObject": {1: _OBJECT},
    "C_DestroyObject": {1: _OBJECT},
    "C_GetObjectSize": {1: _OBJECT},
    "C_GetAttributeValue": {1: _OBJECT},
    "C_SetAttributeValue": {1: _OBJECT},
    "C_DigestKey": {1: _KEY},
    "C_EncryptInit": {2: _KEY},
    "C_DecryptInit": {2: _KEY},
    "C_SignInit": {2: _KEY},
    "C_SignRecoverInit": {2: _KEY},
    "C_VerifyInit": {2: _KEY},
    "C_VerifyRecoverInit": {2: _KEY},
    "C_WrapKey": {2: "CKR_WRAPPING_KEY_HANDLE_INVALID", 3: _KEY},
    "C_UnwrapKey": {2: "CKR_UNWRAPPING_KEY_HANDLE_INVALID"},
    "C_DeriveKey": {2: _KEY},
}
"""Which arguments name an object, and what is said of a number that none has."""
_MADE: Final = {
    "C_CreateObject": (3,),
    "C_CopyObject": (4,),
    "C_GenerateKey": (4,),
    "C_GenerateKeyPair": (6, 7),
    "C_UnwrapKey": (7,),
    "C_DeriveKey": (5,),
}
"""Which arguments point to the number of an object that was made."""


class PlayedLogin(Enum):
    """How a token deals with its user's login."""

    SHARED = "shared"
    """As the standard has it, by the module itself."""
    PER_SESSION = "per session"
    """Each session has its own."""
    IGNORED = "ignored"
    """Whoever comes is the user; there is no officer."""


@dataclass(eq=False)
class _Session:
    """One that is open: its real number, and who is logged in to it alone."""

    real: int
    slot: int
    rw: bool
    who: int | None = None


@dataclass(eq=False)
class _Object:
    """One that the application knows; ``owner``: the session that it ends with."""

    real: int
    slot: int
    owner: _Session | None


class _Numbers:
    """Numbers from 1 up; one that was given back is the next to go."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 1

    def take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def give_back(self, number: int) -> None:
        heapq.heappush(self._free, number)


class OddToken:
    """The calls of a module, as an odd token would answer them.

    Attributes:
        reuses: Whether numbers are this class's own, given anew at once.
        login: How it deals with logins.
    """

    def __init__(self) -> None:
        self.reuses = False
        self.login = PlayedLogin.SHARED
        self._pin = Secret("")
        self._lock = threading.Lock()
        # All of it under the lock: what is open, and what is known, by number.
        self._sessions: dict[int, _Session] = {}
        self._objects: dict[int, _Object] = {}
        self._session_numbers = _Numbers()
        self._object_numbers = _Numbers()
        #: The module's own functions.
        self.module: Any = None

    def play(self, login: PlayedLogin, pin: Secret) -> None:
        """Play a login; the token itself has its user in while a session is open."""
        self.login, self._pin = login, pin

    @property
    def slots(self) -> set[int]:
        """Where sessions are open."""
        with self._lock:
            return {session.slot for session in self._sessions.values()}

    def call(self, function: str, own: Callable[..., int], given: Any) -> int:
        """Make a call of the module, or answer in its place."""
        if function == "C_OpenSession":
            return self._open(own, given)
        if function in NO_SESSION:
            code = own(*given)
            if not code and function in ("C_Finalize", "C_CloseAllSessions"):
                self.lost(given[0] if function == "C_CloseAllSessions" else None)
            return code
        number, *rest = given
        with self._lock:
            session = self._sessions.get(number)
        if session is None:
            # The module's own word, but where it would take the number for another's.
            odd = rv.CODES["CKR_SESSION_HANDLE_INVALID"]
            return odd if self.reuses else own(*given)
        each = self.login is PlayedLogin.PER_SESSION
        if each and session.who is None and function not in _FREE:
            return rv.CODES["CKR_USER_NOT_LOGGED_IN"]
        code = self._real_numbers(function, session, rest)
        if code:
            return code
        played = None if self.login is PlayedLogin.SHARED else _LOGINS.get(function)
        code = played(self, session, own, rest) if played else own(session.real, *rest)
        if not code:
            self._done(function, number, session, given)
        return code

    def lost(self, slot: int | None) -> None:
        """The sessions of a slot are closed, or all."""
        with self._lock:
            for number, session in list(self._sessions.items()):
                if slot in (None, session.slot):
                    self._end_locked(number, session)

    # -- Sessions and objects -----------------------------------------------------

    def _open(self, own: Callable[..., int], given: Any) -> int:
        slot, flags, told = given[0], given[1], given[4]
        code = own(*given)
        if code:
            return code
        real = told[0]
        with self._lock:
            session = _Session(real, slot, bool(flags & _RW))
            number = self._session_numbers.take() if self.reuses else real
            self._sessions[number] = session
        told[0] = number
        if self.login is not PlayedLogin.SHARED:
            # With its last session the token lost its login, so each brings it back;
            # while an officer is in, the token refuses.
            self._really_log_in(session)
        return 0

    def _real_numbers(self, function: str, session: _Session, rest: list[Any]) -> int:
        """Put the module's own numbers of objects in; what is wrong with one."""
        if not self.reuses:
            return 0
        with self._lock:
            for place, unknown in _NAMED.get(function, {}).items():
                if function == "C_SetOperationState" and not rest[place - 1]:
                    continue
                found = self._objects.get(rest[place - 1])
                if found is None or found.slot != session.slot:
                    return rv.CODES[unknown]
                rest[place - 1] = found.real
        return 0

    def _done(self, function: str, number: int, session: _Session, given: Any) -> None:
        """What becomes of numbers after a call that went well."""
        if function == "C_CloseSession":
            with self._lock:
                if self._sessions.get(number) is session:
                    self._end_locked(number, session)
        elif not self.reuses:
            return
        elif function == "C_DestroyObject":
            with self._lock:
                if self._objects.pop(given[1], None) is not None:
                    self._object_numbers.give_back(given[1])
        elif function == "C_FindObjects":
            found = ctypes.cast(given[1], ctypes.POINTER(ctypes.c_ulong))
            for place in range(given[3][0]):
                found[place] = self._number(session, found[place], owned=False)
        else:
            for place in _MADE.get(function, ()):
                real = given[place][0]
                owned = not self._is_on_token(session, real)
                given[place][0] = self._number(session, real, owned=owned)

    def _number(self, session: _Session, real: int, *, owned: bool) -> int:
        """The number that the application has for an object."""
        with self._lock:
            for number, known in self._objects.items():
                if (known.real, known.slot) == (real, session.slot):
                    return number
            number = self._object_numbers.take()
            self._objects[number] = _Object(
                real, session.slot, session if owned else None
            )
            return number

    def _is_on_token(self, session: _Session, real: int) -> bool:
        value = ctypes.c_ubyte()
        asked = interface.RawAttribute(int(Attribute.TOKEN), ctypes.addressof(value), 1)
        self.module.C_GetAttributeValue(session.real, real, ctypes.byref(asked), 1)
        return bool(value.value)

    def _end_locked(self, number: int, session: _Session) -> None:
        """A session is closed; with the last one every number of an object ends."""
        del self._sessions[number]
        last = all(s.slot != session.slot for s in self._sessions.values())
        for name, known in list(self._objects.items()):
            if known.owner is session or (last and known.slot == session.slot):
                del self._objects[name]
                self._object_numbers.give_back(name)
        if self.reuses:
            self._session_numbers.give_back(number)

    # -- Logins -------------------------------------------------------------------

    def _really_log_in(self, session: _Session) -> None:
        pin = self._pin
        self.module.C_Login(session.real, _USER, pin.encoded(), len(pin))

    def _log_in(self, session: _Session, own: Callable[..., int], rest: Any) -> int:
        user, pin, length = rest
        if user not in (_SO, _USER):
            return own(session.real, *rest)
        if self.login is PlayedLogin.IGNORED:
            return rv.CODES["CKR_PIN_LOCKED"] if user == _SO else 0
        with self._lock:
            others = {s.who for s in self._sessions.values()} - {user, None}
            if others:
                return rv.CODES["CKR_USER_ANOTHER_ALREADY_LOGGED_IN"]
            if session.who == user:
                return rv.CODES["CKR_USER_ALREADY_LOGGED_IN"]
        code = 0
        if user == _SO:
            self.module.C_Logout(session.real)
            code = own(session.real, *rest)
            if code:
                self._really_log_in(session)
        elif pin is None or _secret(pin, length) != self._pin:
            code = rv.CODES["CKR_PIN_INCORRECT"]
        if not code:
            session.who = user
        return code

    def _log_out(self, session: _Session, _own: Callable[..., int], _rest: Any) -> int:
        if self.login is PlayedLogin.IGNORED:
            return 0
        who, session.who = session.who, None
        if who == _SO:
            self.module.C_Logout(session.real)
            self._really_log_in(session)
        return rv.CODES["CKR_USER_NOT_LOGGED_IN"] if who is None else 0

    def _told(self, session: _Session, own: Callable[..., int], rest: Any) -> int:
        code = own(session.real, *rest)
        each = self.login is PlayedLogin.PER_SESSION
        if not code and each and session.who is None:
            info = interface.RawSessionInfo.from_address(rest[0])
            info.state = _RW_PUBLIC if session.rw else _RO_PUBLIC
        return code

    def _init_pin(self, session: _Session, own: Callable[..., int], rest: Any) -> int:
        code = own(session.real, *rest)
        if not code and rest[0] is not None:
            self._pin = _secret(*rest)
        return code

    def _set_pin(self, session: _Session, own: Callable[..., int], rest: Any) -> int:
        code = own(session.real, *rest)
        if not code and session.who != _SO and rest[2] is not None:
            self._pin = _secret(*rest[2:])
        return code


_LOGINS: Final[dict[str, Callable[..., int]]] = {
    "C_Login": OddToken._log_in,  # noqa: SLF001  # its own
    "C_Logout": OddToken._log_out,  # noqa: SLF001
    "C_GetSessionInfo": OddToken._told,  # noqa: SLF001
    "C_InitPIN": OddToken._init_pin,  # noqa: SLF001
    "C_SetPIN": OddToken._set_pin,  # noqa: SLF001
}


def _secret(pin: int, length: int) -> Secret:
    return Secret(ctypes.string_at(pin, length).decode(errors="replace"))
