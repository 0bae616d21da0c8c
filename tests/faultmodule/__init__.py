"""A Cryptoki module that misbehaves on command, and its control from Python.

The module forwards every call to a real one. Tests load it in the place of the real one
and tell it what to do: fail, hang, lose sessions, hand out a number twice. README.md
beside this file shows how.

Knows nothing of ``pkcs11_pool``: what tests the pool must not lean on it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from enum import IntEnum
from pathlib import Path
from typing import ClassVar, Final, Literal, NamedTuple

__all__ = ["CKR", "Call", "FaultError", "FaultModule", "OpenSession"]

_FUNCTIONS: Final = 68
_LOG_SIZE: Final = 4096
_TOKEN_INFOS: Final = 16
_PIN_SIZE: Final = 256
_RESERVED_SIZE: Final = 1024
_ANY_FUNCTION: Final = -1
_CKF_RW_SESSION: Final = 2
_UNLIMITED: Final = ctypes.c_ulong(-1).value
_ANY_SLOT: Final = _UNLIMITED


class CKR(IntEnum):
    """The return codes that tests ask for; any other number will do as well."""

    OK = 0x000
    HOST_MEMORY = 0x002
    SLOT_ID_INVALID = 0x003
    GENERAL_ERROR = 0x005
    FUNCTION_FAILED = 0x006
    ARGUMENTS_BAD = 0x007
    CANT_LOCK = 0x00A
    DEVICE_ERROR = 0x030
    DEVICE_MEMORY = 0x031
    DEVICE_REMOVED = 0x032
    FUNCTION_CANCELED = 0x050
    FUNCTION_NOT_SUPPORTED = 0x054
    KEY_HANDLE_INVALID = 0x060
    KEY_FUNCTION_NOT_PERMITTED = 0x068
    MECHANISM_INVALID = 0x070
    OBJECT_HANDLE_INVALID = 0x082
    OPERATION_ACTIVE = 0x090
    OPERATION_NOT_INITIALIZED = 0x091
    PIN_INCORRECT = 0x0A0
    PIN_EXPIRED = 0x0A3
    PIN_LOCKED = 0x0A4
    SESSION_CLOSED = 0x0B0
    SESSION_COUNT = 0x0B1
    SESSION_HANDLE_INVALID = 0x0B3
    SESSION_READ_ONLY = 0x0B5
    SESSION_READ_ONLY_EXISTS = 0x0B7
    SESSION_READ_WRITE_SO_EXISTS = 0x0B8
    TEMPLATE_INCONSISTENT = 0x0D1
    TOKEN_NOT_PRESENT = 0x0E0
    TOKEN_NOT_RECOGNIZED = 0x0E1
    TOKEN_WRITE_PROTECTED = 0x0E2
    UNWRAPPING_KEY_HANDLE_INVALID = 0x0F0
    USER_ALREADY_LOGGED_IN = 0x100
    USER_NOT_LOGGED_IN = 0x101
    USER_PIN_NOT_INITIALIZED = 0x102
    USER_ANOTHER_ALREADY_LOGGED_IN = 0x104
    WRAPPING_KEY_HANDLE_INVALID = 0x113
    RANDOM_SEED_NOT_SUPPORTED = 0x120
    BUFFER_TOO_SMALL = 0x150
    CRYPTOKI_NOT_INITIALIZED = 0x190
    CRYPTOKI_ALREADY_INITIALIZED = 0x191


class FaultError(RuntimeError):
    """The fault module could not do what the test asked: the test is wrong."""


class Call(NamedTuple):
    """One call in the log. Numbers are those that the application saw."""

    sequence: int
    """Grows with every call that entered."""
    function: str
    session: int | None
    object: int | None
    """The object or key that the call named last, or made."""
    rv: int | None
    """What the application was told; ``None``: the call is still inside."""
    thread: int
    """``threading.get_ident()`` of the calling thread."""
    began_ns: int
    """On the clock of ``time.monotonic_ns()``."""
    ended_ns: int | None
    slot: int | None
    """The slot of the session, where there is one."""


class OpenSession(NamedTuple):
    """A session that is open in the real module, as far as the fault module knows."""

    number: int
    slot: int
    rw: bool


class _Rule(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_int),
        ("hang", ctypes.c_int),
        ("answer", ctypes.c_int),
        ("rv", ctypes.c_ulong),
        ("first", ctypes.c_ulong),
        ("times", ctypes.c_ulong),
        ("delay_us", ctypes.c_ulong),
        ("mask", ctypes.c_ulong),
        ("value", ctypes.c_ulong),
    )


class _Record(ctypes.Structure):
    _fields_ = (
        ("sequence", ctypes.c_uint64),
        ("began_ns", ctypes.c_uint64),
        ("ended_ns", ctypes.c_uint64),
        ("session", ctypes.c_ulong),
        ("object", ctypes.c_ulong),
        ("rv", ctypes.c_ulong),
        ("thread", ctypes.c_ulong),
        ("slot", ctypes.c_ulong),
        ("function", ctypes.c_int),
    )


class _Session(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_ulong),
        ("slot", ctypes.c_ulong),
        ("rw", ctypes.c_int),
    )


class _TokenInfo(ctypes.Structure):
    _fields_ = (
        ("slot", ctypes.c_ulong),
        ("has", ctypes.c_ulong),
        ("flags_set", ctypes.c_ulong),
        ("flags_clear", ctypes.c_ulong),
        ("max_sessions", ctypes.c_ulong),
        ("session_count", ctypes.c_ulong),
        ("max_rw", ctypes.c_ulong),
        ("rw_count", ctypes.c_ulong),
        ("max_pin", ctypes.c_ulong),
        ("min_pin", ctypes.c_ulong),
        ("label", ctypes.c_ubyte * 32),
        ("manufacturer", ctypes.c_ubyte * 32),
        ("model", ctypes.c_ubyte * 16),
        ("serial", ctypes.c_ubyte * 16),
    )


class _Settings(ctypes.Structure):
    _fields_ = (
        ("latency_us", ctypes.c_ulong),
        ("limit", ctypes.c_ulong),
        ("limit_rw", ctypes.c_ulong),
        ("down", ctypes.c_ulong),
        ("idle_us", ctypes.c_ulong),
        ("signature_size", ctypes.c_ulong),
        ("cant_lock", ctypes.c_int),
        ("hide_reserved", ctypes.c_int),
        ("no_slots", ctypes.c_int),
        ("pin_pad", ctypes.c_int),
        ("infos", ctypes.c_int),
        ("down_stays", ctypes.c_int),
        ("pin_len", ctypes.c_ulong),
        ("pin", ctypes.c_ubyte * _PIN_SIZE),
        ("info", _TokenInfo * _TOKEN_INFOS),
    )


class _Status(ctypes.Structure):
    _fields_ = (
        ("counts", ctypes.c_ulong * _FUNCTIONS),
        ("inside", ctypes.c_ulong * _FUNCTIONS),
        ("hanging", ctypes.c_ulong * _FUNCTIONS),
        ("inside_all", ctypes.c_ulong),
        ("hanging_all", ctypes.c_ulong),
        ("max_inside", ctypes.c_ulong),
        ("overlaps", ctypes.c_ulong),
        ("init_flags", ctypes.c_long),
        ("init_args", ctypes.c_int),
        ("init_reserved", ctypes.c_int),
        ("reserved", ctypes.c_char * _RESERVED_SIZE),
    )


class _Strike(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("rv", ctypes.c_ulong),
        ("after", ctypes.c_ulong),
        ("times", ctypes.c_ulong),
    )


_SIZES: Final = (
    _FUNCTIONS,
    *map(ctypes.sizeof, (_Rule, _Record, _Session, _Settings, _Status, _Strike)),
)
_STRIKES: Final = (
    *("", "answer", "replace", "sessions", "login", "finalize"),
    *("hang before", "hang after"),
)

# The order is that of HAS_… in fault.h: the place is the bit.
_INFO_NUMBERS: Final = (
    "max_sessions",
    "session_count",
    "max_rw",
    "rw_count",
    "max_pin",
    "min_pin",
)
_INFO_TEXTS: Final = {"label": 32, "manufacturer": 32, "model": 16, "serial": 16}
_INFO_BITS: Final = {
    name: 1 << place for place, name in enumerate((*_INFO_NUMBERS, *_INFO_TEXTS))
}

_HANG: Final = {None: 0, "before": 1, "after": 2}
_ANSWER_REAL, _ANSWER_INSTEAD, _ANSWER_REPLACED = range(3)
_WAIT_HANGING, _WAIT_INSIDE, _WAIT_COUNT, _WAIT_INSIDE_AT_MOST = range(4)


def _rv_name(rv: int) -> str:
    try:
        return f"CKR_{CKR(rv).name}"
    except ValueError:
        return f"0x{rv:x}"


class FaultModule:
    """The control of one loaded fault module.

    All state is in the shared library: two of these on the same file are two handles
    on the same module. Every method may be called from any thread, at any time.

    Attributes:
        path: The file to load in the place of the real module.
    """

    # Settings are read, changed and written back as a whole.
    _settings_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        library: str | os.PathLike[str],
        target: str | os.PathLike[str] | None = None,
        *,
        copy_to: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load *library*, as ``build`` made it, in front of the module *target*.

        Args:
            library: The compiled fault module.
            target: The real module. Without it ``PKCS11_FAULT_TARGET`` is read when
                the application loads or initialises the module.
            copy_to: Copy the library there first. The copy has a state of its own, so
                one process can have several.

        Raises:
            FaultError: The real module cannot be loaded, or another one is in use.
            FileExistsError: *copy_to* exists; a loaded file must not be written to.
        """
        # Without a directory in it the loader would search its own places.
        self.path = Path(library).absolute()
        if copy_to is not None:
            self.path = Path(copy_to).absolute()
            if self.path.exists():
                raise FileExistsError(self.path)
            shutil.copyfile(library, self.path)
        self._lib = ctypes.CDLL(str(self.path))
        self._declare()
        if target is not None:
            error = self._lib.fault_target(os.fsencode(target))
            if error is not None:
                raise FaultError(error.decode(errors="replace"))

    def _declare(self) -> None:
        lib = self._lib
        found = tuple((ctypes.c_ulong * len(_SIZES)).in_dll(lib, "fault_sizes"))
        if found != _SIZES:
            raise FaultError(f"structures differ from fault.h: {found}, here {_SIZES}")
        ulong, size_t = ctypes.c_ulong, ctypes.c_size_t
        for name, result, arguments in (
            ("target", ctypes.c_char_p, [ctypes.c_char_p]),
            ("name", ctypes.c_char_p, [ctypes.c_int]),
            ("status", None, [ctypes.POINTER(_Status)]),
            ("reset_counts", None, []),
            ("rule_add", ulong, [ctypes.POINTER(_Rule)]),
            ("rule_remove", ctypes.c_int, [ulong]),
            ("rule_fired", ctypes.c_long, [ulong]),
            ("clear", None, []),
            ("release", None, [ctypes.c_int]),
            (
                "wait",
                ctypes.c_int,
                [ctypes.c_int, ctypes.c_int, ulong, ctypes.c_double],
            ),
            ("log", size_t, [ctypes.POINTER(_Record), size_t]),
            ("log_clear", None, []),
            ("get_settings", None, [ctypes.POINTER(_Settings)]),
            ("set_settings", None, [ctypes.POINTER(_Settings)]),
            ("reuse_numbers", ctypes.c_int, [ctypes.c_int, ctypes.c_int]),
            ("forget_objects", None, []),
            ("sessions", size_t, [ctypes.POINTER(_Session), size_t]),
            ("lose_sessions", ulong, [ulong]),
            ("lose_login", ulong, [ulong]),
            (
                "play_login",
                ctypes.c_int,
                [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ulong],
            ),
            ("pass_time", None, [ctypes.c_double]),
            ("strike", None, [ctypes.POINTER(_Strike)]),
            ("call_off", ulong, [ctypes.POINTER(ctypes.c_uint64)]),
        ):
            function = getattr(lib, f"fault_{name}")
            function.restype = result
            function.argtypes = arguments
        self._names = tuple(lib.fault_name(i).decode() for i in range(_FUNCTIONS))
        self._indexes = {name: i for i, name in enumerate(self._names)}

    def _index(self, function: str | None) -> int:
        if function is None:
            return _ANY_FUNCTION
        try:
            return self._indexes[function]
        except KeyError:
            raise FaultError(f"no function {function!r} in PKCS#11 2.40") from None

    def _status(self) -> _Status:
        status = _Status()
        self._lib.fault_status(ctypes.byref(status))
        return status

    # Counts

    @property
    def functions(self) -> tuple[str, ...]:
        """All 68 names, in the order of ``CK_FUNCTION_LIST``."""
        return self._names

    def count(self, function: str) -> int:
        """How often *function* was called since the last ``reset_counts``."""
        return int(self._status().counts[self._index(function)])

    def counts(self) -> dict[str, int]:
        """How often each function was called, without those that never were."""
        counts = self._status().counts
        return {
            name: int(count)
            for name, count in zip(self._names, counts, strict=True)
            if count
        }

    def inside(self, function: str | None = None) -> int:
        """How many calls, of *function* or at all, are inside right now."""
        status = self._status()
        if function is None:
            return int(status.inside_all)
        return int(status.inside[self._index(function)])

    def hanging(self) -> int:
        """How many calls hang now."""
        return int(self._status().hanging_all)

    @property
    def max_inside(self) -> int:
        """The most calls that were inside at once since ``reset_counts``."""
        return int(self._status().max_inside)

    @property
    def overlaps(self) -> int:
        """How many calls entered while another was inside, since ``reset_counts``.

        0 after a while of load: the caller takes turns.
        """
        return int(self._status().overlaps)

    def reset_counts(self) -> None:
        """Set the counts, ``overlaps`` and ``max_inside`` back."""
        self._lib.fault_reset_counts()

    # Rules

    def on(
        self,
        function: str,
        *,
        nth: int = 1,
        times: int = 1,
        every: bool = False,
        answer: int | None = None,
        replace: int | None = None,
        delay_us: int = 0,
        hang: Literal["before", "after"] | None = None,
        when_flags_set: int = 0,
        when_flags_clear: int = 0,
        when_user: int | None = None,
    ) -> int:
        """Set a rule for calls of *function* and return its id.

        Several rules may fire on one call: their delays add up, any of them may make
        it hang, and the first with an answer gives it.

        Args:
            function: ``"C_Sign"`` and so on.
            nth: Fire on the nth matching call from now, and on those after it as
                *times* or *every* say.
            times: Fire on so many calls.
            every: Fire on all calls from the nth on.
            answer: Answer with this code, without asking the real module.
            replace: Ask the real module, then answer with this code instead: what was
                to be done is done, and the caller does not hear of it.
            delay_us: Sleep for so many microseconds before anything else.
            hang: Hang before or after the real module is asked, until ``release``.
            when_flags_set: Match only calls with these flags: of ``C_OpenSession``
                and ``C_Initialize``.
            when_flags_clear: Match only calls without these flags.
            when_user: Match only ``C_Login`` of this user type.

        Raises:
            FaultError: There is no such function, or the words contradict each other.
        """
        if answer is not None and replace is not None:
            raise FaultError("a rule has either an answer or a replacement")
        if nth < 1 or times < 1 or (every and times != 1):
            raise FaultError("nth and times start at 1, and every has no times")
        filtered = bool(when_flags_set or when_flags_clear)
        if filtered and function not in {"C_OpenSession", "C_Initialize"}:
            raise FaultError(f"{function} has no flags to look at")
        if when_user is not None and function != "C_Login":
            raise FaultError(f"{function} has no user type to look at")
        rule = _Rule(
            function=self._index(function),
            hang=_HANG[hang],
            first=nth,
            times=0 if every else times,
            delay_us=delay_us,
            mask=when_flags_set | when_flags_clear,
            value=when_flags_set,
        )
        if when_user is not None:
            rule.mask, rule.value = _UNLIMITED, when_user
        if answer is not None:
            rule.answer, rule.rv = _ANSWER_INSTEAD, answer
        elif replace is not None:
            rule.answer, rule.rv = _ANSWER_REPLACED, replace
        added = int(self._lib.fault_rule_add(ctypes.byref(rule)))
        if not added:
            raise MemoryError
        return added

    def remove(self, rule: int) -> None:
        """Remove a rule. Calls that hang through it go on hanging until ``release``.

        Raises:
            FaultError: There is no such rule.
        """
        if not self._lib.fault_rule_remove(rule):
            raise FaultError(f"no rule {rule}")

    def fired(self, rule: int) -> int:
        """How often *rule* fired.

        Raises:
            FaultError: There is no such rule.
        """
        fired = int(self._lib.fault_rule_fired(rule))
        if fired < 0:
            raise FaultError(f"no rule {rule}")
        return fired

    def clear(self) -> None:
        """Remove all rules and release all calls that hang or are about to."""
        self._lib.fault_clear()

    def release(self, function: str | None = None) -> None:
        """Let the calls that hang now go on, all or those of *function*.

        The rules stay: a later call may hang again.
        """
        self._lib.fault_release(self._index(function))

    # Waiting, without polling

    def wait_until_hanging(
        self, function: str | None = None, n: int = 1, timeout: float = 20
    ) -> None:
        """Block until *n* calls, of *function* or at all, hang.

        Raises:
            TimeoutError: They did not in time. The text says what is inside.
        """
        self._wait(_WAIT_HANGING, function, n, timeout, f"{n} hanging")

    def wait_until_inside(
        self, function: str | None = None, n: int = 1, timeout: float = 20
    ) -> None:
        """Block until *n* calls are inside at once, hanging or not.

        Raises:
            TimeoutError: They were not in time.
        """
        self._wait(_WAIT_INSIDE, function, n, timeout, f"{n} inside")

    def wait_until_count(self, function: str, n: int, timeout: float = 20) -> None:
        """Block until *function* was called *n* times since ``reset_counts``.

        Raises:
            TimeoutError: It was not in time.
        """
        self._wait(_WAIT_COUNT, function, n, timeout, f"{n} calls")

    def wait_until_idle(self, function: str | None = None, timeout: float = 20) -> None:
        """Block until no call, of *function* or at all, is inside.

        Raises:
            TimeoutError: Some stayed.
        """
        self._wait(_WAIT_INSIDE_AT_MOST, function, 0, timeout, "none inside")

    def _wait(
        self, what: int, function: str | None, n: int, timeout: float, wanted: str
    ) -> None:
        if self._lib.fault_wait(what, self._index(function), n, timeout):
            return
        inside = (
            ", ".join(c.function for c in self.calls() if c.rv is None) or "nothing"
        )
        raise TimeoutError(
            f"{function or 'all functions'}: not {wanted} within {timeout} s;"
            f" inside: {inside}; counts: {self.counts()}"
        )

    # The module's own numbers

    def reuse_numbers(self, *, sessions: bool = True, objects: bool = True) -> None:
        """Hand out own numbers, the lowest free one first, as opencryptoki does.

        Raises:
            FaultError: A session is open: numbers are already in use.
        """
        if not self._lib.fault_reuse_numbers(sessions, objects):
            raise FaultError("numbers cannot change while a session is open")

    # Logins of its own

    def play_login(
        self,
        way: Literal["real", "kept", "per_session", "ignored"],
        user_pin: bytes = b"",
        *,
        always_user: bool = True,
    ) -> None:
        """Play the login of one token; the real one stays logged in all the time.

        Where a login is asked for, a session without one may tell of itself, log in,
        digest and make random numbers; all else is answered ``USER_NOT_LOGGED_IN``.

        Args:
            way: ``"kept"``: one login for all sessions, whose end is the end of no
                handle. ``"per_session"``: each session has its own, its PIN checked
                each time. ``"ignored"``: ``C_Login`` takes any PIN of the user, no
                function asks for it, ``CKF_LOGIN_REQUIRED`` is not there, and the SO
                is locked. ``"real"``: the real module's.
            user_pin: The user's PIN on the real token.
            always_user: Whether ``"ignored"`` says of every session that it is R/W and
                the user's; else that it is public.

        Raises:
            FaultError: A session is open.
        """
        ways = ("real", "kept", "per_session", "ignored")
        if len(user_pin) > _PIN_SIZE:
            raise FaultError(f"a PIN has at most {_PIN_SIZE} bytes here")
        if not self._lib.fault_play_login(
            ways.index(way), always_user, user_pin, len(user_pin)
        ):
            raise FaultError("the way of logging in cannot change with a session open")

    def no_ro_sessions(self, rv: int = CKR.FUNCTION_FAILED) -> int:
        """Refuse to open R/O sessions, until the rule that this gives is removed."""
        return self.on(
            "C_OpenSession", every=True, answer=rv, when_flags_clear=_CKF_RW_SESSION
        )

    def drop_idle_sessions(self, seconds: float | None) -> None:
        """Drop sessions that were not used for so long; ``None``: none.

        Looked at whenever a function is called. ``pass_time`` makes them older.
        """
        self._change(idle_us=0 if seconds is None else round(seconds * 1e6))

    def pass_time(self, seconds: float) -> None:
        """Make all open sessions idle for so many seconds more."""
        self._lib.fault_pass_time(seconds)

    def forget_objects(self) -> None:
        """Free all object numbers, as modules do that number anew at each login.

        Only with ``reuse_numbers``.
        """
        self._lib.fault_forget_objects()

    # Losing things

    def lose_sessions(self, slot: int) -> None:
        """Close all sessions on *slot* behind the application's back.

        Raises:
            FaultError: The real module refused.
        """
        self._expect_ok("C_CloseAllSessions", self._lib.fault_lose_sessions(slot))

    def lose_login(self, slot: int | None = None) -> None:
        """Log out behind the application's back, on *slot* or where a session is open.

        Raises:
            FaultError: No session is open, or the real module refused.
        """
        wanted = _ANY_SLOT if slot is None else slot
        self._expect_ok("C_Logout", self._lib.fault_lose_login(wanted))

    def strike(
        self,
        what: Literal[
            "answer",
            "replace",
            "sessions",
            "login",
            "finalize",
            "hang before",
            "hang after",
        ],
        rv: int = CKR.DEVICE_ERROR,
        *,
        after: int = 1,
        times: int = 1,
    ) -> None:
        """Let one misfortune happen between two calls, whichever they are.

        ``C_Initialize`` and ``C_Finalize`` are not counted and not hit. What is lost is
        lost when a call comes in while no other is inside, and before it is made.

        Args:
            what: Answer calls without the module, or make them and lose the answer; or
                close all sessions, log out, or finalise the module behind the back of
                whoever uses it; or let calls hang until ``clear``, before or after the
                real module is asked. With an answer a session that closes is closed in
                any case, and none is opened by a call that is hit: nobody could close
                it. Nor does ``C_…Init`` begin an operation, and its
                last call ends one.
            rv: What calls are answered that are hit.
            after: The first call that is hit, from 1.
            times: How many calls in a row are.
        """
        strike = _Strike(_STRIKES.index(what), rv, after, times)
        self._lib.fault_strike(ctypes.byref(strike))

    def call_off(self) -> tuple[int, int]:
        """No more of the last ``strike``: how many calls it hit, and which one first.

        That one by its sequence number in the log; 0: none.
        """
        first = ctypes.c_uint64()
        struck = self._lib.fault_call_off(ctypes.byref(first))
        return int(struck), first.value

    @staticmethod
    def _expect_ok(function: str, rv: int) -> None:
        if rv != CKR.OK:
            raise FaultError(f"{function} answered {_rv_name(rv)}")

    def sessions(self) -> list[OpenSession]:
        """The sessions that are open, also those whose opening the caller never saw."""
        room = 64
        while True:
            found = (_Session * room)()
            count = int(self._lib.fault_sessions(found, room))
            if count <= room:
                return [
                    OpenSession(s.number, s.slot, bool(s.rw)) for s in found[:count]
                ]
            room = count * 2

    # Initialisation

    @property
    def init_flags(self) -> int:
        """The flags of the last ``C_Initialize``; 0 also for NULL, -1: none yet."""
        return int(self._status().init_flags)

    @property
    def init_args(self) -> bool:
        """Whether the last ``C_Initialize`` had arguments at all."""
        return bool(self._status().init_args)

    @property
    def init_reserved(self) -> str | None:
        """The text of ``pReserved`` in the last ``C_Initialize``, if there was one."""
        status = self._status()
        return os.fsdecode(status.reserved) if status.init_reserved else None

    # Settings

    def _settings(self) -> _Settings:
        settings = _Settings()
        self._lib.fault_get_settings(ctypes.byref(settings))
        return settings

    def _change(self, **values: int) -> None:
        with self._settings_lock:
            settings = self._settings()
            for name, value in values.items():
                setattr(settings, name, value)
            self._lib.fault_set_settings(ctypes.byref(settings))

    @property
    def latency_us(self) -> int:
        """What every call takes longer, as behind a network."""
        return int(self._settings().latency_us)

    @latency_us.setter
    def latency_us(self, value: int) -> None:
        self._change(latency_us=value)

    @property
    def cant_lock(self) -> bool:
        """Whether ``CKF_OS_LOCKING_OK`` is answered with ``CKR_CANT_LOCK``.

        The real module is told to lock all the same: a caller that then forgets to
        take turns shows in ``overlaps``, not as a crash.
        """
        return bool(self._settings().cant_lock)

    @cant_lock.setter
    def cant_lock(self, value: bool) -> None:
        self._change(cant_lock=value)

    @property
    def hide_reserved(self) -> bool:
        """Whether ``pReserved`` is kept from the real module; SoftHSM2 refuses it."""
        return bool(self._settings().hide_reserved)

    @hide_reserved.setter
    def hide_reserved(self, value: bool) -> None:
        self._change(hide_reserved=value)

    @property
    def no_slots(self) -> bool:
        """Whether ``C_GetSlotList`` finds nothing, as with its server down."""
        return bool(self._settings().no_slots)

    @no_slots.setter
    def no_slots(self, value: bool) -> None:
        self._change(no_slots=value)

    def go_down(self, rv: int = CKR.DEVICE_ERROR, *, stays: bool = False) -> None:
        """Answer *rv* to every call but ``C_Initialize`` and ``C_Finalize``.

        Until ``come_back``; with *stays* until it is initialised anew after that, as a
        client whose server went away.
        """
        self._change(down=rv, down_stays=stays)

    def come_back(self) -> None:
        """The token, or its server, is there again."""
        self._change(down=0)

    @property
    def pin_pad(self) -> bytes | None:
        """The PIN typed on a pad: ``C_Login`` with a NULL PIN is sent this one."""
        settings = self._settings()
        return bytes(settings.pin[: settings.pin_len]) if settings.pin_pad else None

    @pin_pad.setter
    def pin_pad(self, value: bytes | None) -> None:
        typed = value or b""
        if len(typed) > _PIN_SIZE:
            raise FaultError(f"a PIN has at most {_PIN_SIZE} bytes here")
        with self._settings_lock:
            settings = self._settings()
            settings.pin_pad = value is not None
            settings.pin_len = len(typed)
            settings.pin[: len(typed)] = typed
            self._lib.fault_set_settings(ctypes.byref(settings))

    @property
    def signature_size(self) -> int:
        """How many bytes ``C_Sign`` gives, more than the real ones; 0: those."""
        return int(self._settings().signature_size)

    @signature_size.setter
    def signature_size(self, value: int) -> None:
        self._change(signature_size=value)

    def session_limit(self, total: int | None = None, rw: int | None = None) -> None:
        """Answer ``CKR_SESSION_COUNT`` to what would open more; ``None``: no limit."""
        self._change(
            limit=_UNLIMITED if total is None else total,
            limit_rw=_UNLIMITED if rw is None else rw,
        )

    def token_info(
        self,
        slot: int | None = None,
        *,
        max_sessions: int | None = None,
        session_count: int | None = None,
        max_rw: int | None = None,
        rw_count: int | None = None,
        max_pin: int | None = None,
        min_pin: int | None = None,
        label: str | None = None,
        manufacturer: str | None = None,
        model: str | None = None,
        serial: str | None = None,
        flags_set: int = 0,
        flags_clear: int = 0,
    ) -> None:
        """Change what ``C_GetTokenInfo`` answers, for *slot* or for every slot.

        What an earlier call said about the same *slot* is forgotten, so a call without
        further arguments gives the real answer back. A slot's own word goes over that
        for every slot.

        Raises:
            FaultError: A text is too long for its field, or too many slots have words.
        """
        numbers = (max_sessions, session_count, max_rw, rw_count, max_pin, min_pin)
        texts = (label, manufacturer, model, serial)
        entry = _TokenInfo(
            slot=_ANY_SLOT if slot is None else slot,
            flags_set=flags_set,
            flags_clear=flags_clear,
        )
        for name, number in zip(_INFO_NUMBERS, numbers, strict=True):
            if number is not None:
                # ctypes wraps -1 and -2 to what the standard means by them.
                setattr(entry, name, number)
                entry.has |= _INFO_BITS[name]
        for (name, size), text in zip(_INFO_TEXTS.items(), texts, strict=True):
            if text is not None:
                padded = text.encode().ljust(size)
                if len(padded) > size:
                    raise FaultError(f"{name} has at most {size} bytes")
                getattr(entry, name)[:] = padded
                entry.has |= _INFO_BITS[name]
        with self._settings_lock:
            settings = self._settings()
            kept = [
                _TokenInfo.from_buffer_copy(info)
                for info in settings.info[: settings.infos]
                if info.slot != entry.slot
            ]
            if entry.has or flags_set or flags_clear:
                kept.append(entry)
            if len(kept) > _TOKEN_INFOS:
                raise FaultError(f"at most {_TOKEN_INFOS} slots can be changed")
            # The last word wins in C.
            kept.sort(key=lambda info: info.slot != _ANY_SLOT)
            settings.infos = len(kept)
            settings.info[: len(kept)] = kept
            self._lib.fault_set_settings(ctypes.byref(settings))

    # The log

    def calls(self, function: str | None = None, *, after: int = 0) -> list[Call]:
        """The last 4096 calls, of *function* or all, in the order they entered.

        Args:
            function: Only calls of this one.
            after: Only calls with a greater sequence number.
        """
        self._index(function)
        found = (_Record * _LOG_SIZE)()
        count = int(self._lib.fault_log(found, _LOG_SIZE))
        # Sequence numbers have no gaps.
        newest = found[count - 1].sequence if count else 0
        first = max(0, count - max(0, newest - after))
        calls = (
            Call(
                sequence=r.sequence,
                function=self._names[r.function],
                session=r.session or None,
                object=r.object or None,
                rv=r.rv if r.ended_ns else None,
                thread=r.thread,
                began_ns=r.began_ns,
                ended_ns=r.ended_ns or None,
                slot=None if r.slot == _ANY_SLOT else r.slot,
            )
            for r in found[first:count]
        )
        return [call for call in calls if function in (None, call.function)]

    def clear_log(self) -> None:
        """Forget the calls so far."""
        self._lib.fault_log_clear()

    def reset(self) -> None:
        """Behave again: no rule, nothing hangs, no setting, counts and log empty.

        Open sessions, the way of numbering and that of logging in stay.
        """
        self.clear()
        with self._settings_lock:
            settings = _Settings(limit=_UNLIMITED, limit_rw=_UNLIMITED)
            self._lib.fault_set_settings(ctypes.byref(settings))
        self.reset_counts()
        self.clear_log()
