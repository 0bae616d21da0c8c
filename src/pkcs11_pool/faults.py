"""A module that misbehaves on command, for the tests of those who use the pool.

What the pool and python-pkcs11 call is a copy of the module's function list, in which
Python functions stand before the module's own. They answer for the module, or keep a
call waiting, or call the module and lose its answer. No compiler is needed.

Of the module itself only sessions can be lost: a call that is made to fail was not
made, objects stay as they were, and what the module keeps inside goes on. So a lost
token is as the pool sees it, through the answers. What needs a module that truly dies
needs one: this project's own fault module, or a server that is killed. Odd logins and
numbers are played by :mod:`pkcs11_pool.odd_tokens`.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool import config, pins
from pkcs11_pool.cryptoki import interface, rv
from pkcs11_pool.cryptoki.module import borrowed
from pkcs11_pool.errors import InvalidOption, ModuleInUse
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.odd_tokens import OddToken, PlayedLogin

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

__all__ = ["Faults", "faults_in"]

_P: Final = ctypes.c_void_p
_UL: Final = ctypes.POINTER(ctypes.c_ulong)
_N: Final = ctypes.c_ulong
_RW: Final = interface.CKF_RW_SESSION

# Those that only python-pkcs11 calls, as pkcs11f.h numbers them.
_MORE: Final[dict[str, tuple[int, tuple[Any, ...]]]] = {
    "C_GetSlotList": (4, (ctypes.c_ubyte, _P, _UL)),
    "C_CreateObject": (20, (_N, _P, _N, _UL)),
    "C_GenerateKey": (58, (_N, _P, _P, _N, _UL)),
    "C_GenerateKeyPair": (59, (_N, _P, _P, _N, _P, _N, _UL, _UL)),
    "C_WrapKey": (60, (_N, _P, _N, _N, _P, _UL)),
    "C_UnwrapKey": (61, (_N, _P, _N, _P, _N, _P, _N, _UL)),
    "C_DeriveKey": (62, (_N, _P, _N, _P, _N, _UL)),
}
# All others that a session's number is given to, which may not be the module's own.
_REST: Final[dict[str, tuple[int, tuple[Any, ...]]]] = {
    "C_GetOperationState": (16, (_N, _P, _UL)),
    "C_SetOperationState": (17, (_N, _P, _N, _N, _N)),
    "C_GetObjectSize": (23, (_N, _N, _UL)),
    "C_SignRecoverInit": (46, (_N, _P, _N)),
    "C_SignRecover": (47, (_N, _P, _N, _P, _UL)),
    "C_VerifyRecoverInit": (52, (_N, _P, _N)),
    "C_VerifyRecover": (53, (_N, _P, _N, _P, _UL)),
    "C_DigestEncryptUpdate": (54, (_N, _P, _N, _P, _UL)),
    "C_DecryptDigestUpdate": (55, (_N, _P, _N, _P, _UL)),
    "C_SignEncryptUpdate": (56, (_N, _P, _N, _P, _UL)),
    "C_DecryptVerifyUpdate": (57, (_N, _P, _N, _P, _UL)),
    "C_SeedRandom": (63, (_N, _P, _N)),
    "C_GetFunctionStatus": (65, (_N,)),
    "C_CancelFunction": (66, (_N,)),
}
FUNCTIONS: Final = interface.FUNCTIONS | _MORE | _REST
"""The functions that can be made to misbehave, with number and arguments."""

# C functions keep pointing at what stands here, so nothing of it may ever go.
_for_ever: Final[list[object]] = []


@dataclass(eq=False)
class _Rule:
    """What a function does next, so many times."""

    code: int | None = None
    after: bool = False
    seconds: float = 0.0
    hang: threading.Event | None = None
    times: int | None = 1
    skip: int = 0


class Faults:
    """The switch. Each order is for the next calls of one ``C_`` function.

    Orders for one function are carried out in the order in which they were given.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # All of it under the condition's lock.
        self._rules: dict[str, list[_Rule]] = {}
        self._calls: Counter[str] = Counter()
        self._hanging: Counter[str] = Counter()
        self._events: set[threading.Event] = set()
        # Calls that the module itself has.
        self._inside = 0
        self._no_ro_sessions = False
        self._token = OddToken()

    def fail(
        self,
        function: str,
        code: str | int = "CKR_DEVICE_ERROR",
        *,
        times: int | None = 1,
        skip: int = 0,
        after: bool = False,
    ) -> None:
        """Let calls end with a return value of PKCS#11.

        Args:
            function: Such as ``"C_Sign"``.
            code: Such as ``"CKR_DEVICE_REMOVED"``, or a vendor's number.
            times: How many calls; None: all, until :meth:`clear`.
            skip: How many calls before these go well.
            after: The call is made, and its answer lost: what it changed is changed.

        Raises:
            InvalidOption: There is no such function or code.
        """
        number = rv.CODES.get(code) if isinstance(code, str) else code
        if not isinstance(number, int) or isinstance(number, bool) or number <= 0:
            message = (
                f"{code!r} is no return value of PKCS#11, such as CKR_DEVICE_ERROR"
            )
            raise InvalidOption(message)
        self._add(function, _Rule(code=number, after=after, times=times, skip=skip))

    def delay(
        self, function: str, seconds: float, *, times: int | None = 1, skip: int = 0
    ) -> None:
        """Let calls take so many seconds more, and then go well."""
        config.check_seconds("seconds", seconds, optional=False)
        self._add(function, _Rule(seconds=seconds, times=times, skip=skip))

    def hang(self, function: str, *, times: int | None = 1, skip: int = 0) -> None:
        """Let calls stay inside the module until :meth:`release`; then they go well."""
        event = threading.Event()
        with self._changed:
            self._events.add(event)
        self._add(function, _Rule(hang=event, times=times, skip=skip))

    def no_ro_sessions(self) -> None:
        """Open no R/O session from now on, as AWS CloudHSM; until :meth:`clear`.

        What does not go with ``rw_sessions_only=True`` gets ``CKR_FUNCTION_FAILED``.
        """
        with self._changed:
            self._no_ro_sessions = True

    @hides_pins
    def login_per_session(self, user_pin: Any) -> None:
        """Give each session a login of its own, as Nitrokey NetHSM may.

        A session without one may tell of itself, log in, digest and make random
        numbers; all else is ``CKR_USER_NOT_LOGGED_IN``, but with
        ``login_per_session=True``. Before a pool opens; until the block ends.

        Args:
            user_pin: The PIN that the user of the token has.

        Raises:
            ModuleInUse: A session is open.
            InvalidOption, InvalidType: It is no PIN.
        """
        self._play(PlayedLogin.PER_SESSION, pins.secret(user_pin))

    @hides_pins
    def login_ignored(self, user_pin: Any) -> None:
        """Take whoever comes for the user, as Google Cloud KMS, until the block ends.

        Any PIN is taken, and none is needed; a logout changes nothing, and there is no
        security officer. For ``login_ignored=True``. To be said before a pool opens.

        Args:
            user_pin: The PIN that the user of the token has.

        Raises:
            ModuleInUse: A session is open.
            InvalidOption, InvalidType: It is no PIN.
        """
        self._play(PlayedLogin.IGNORED, pins.secret(user_pin))

    def reuse_numbers(self) -> None:
        """Give the number of a closed session to the next one, as opencryptoki does.

        And that of a destroyed object, or one whose session is closed, to the next
        object; until the block ends. To be said before a pool opens. The number of a
        key in the parameter of a mechanism is not the module's own then.

        Raises:
            ModuleInUse: A session is open.
        """
        with self._changed:
            self._check_none_open()
            self._token.reuses = True

    def drop_sessions(self, timeout: float = 10.0) -> None:
        """Close every session, and with them the login: truly, by the module.

        As a token that drops them when they idle (YubiHSM 2), or was reset. Waits for
        the calls inside, and lets none in meanwhile. Not on an event loop's thread.

        Raises:
            TimeoutError: A call stays inside.
            PKCS11Error: The module refused.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._inside, timeout):
                message = f"{self._inside} calls are inside the module"
                raise TimeoutError(message)
            for slot in self._token.slots:
                code = self._token.module.C_CloseAllSessions(slot)
                rv.check(code, "C_CloseAllSessions")
                self._token.lost(slot)

    def release(self) -> None:
        """Let every call that hangs go on, and those ordered to hang go well."""
        with self._changed:
            for event in self._events:
                event.set()
            self._events.clear()

    def clear(self) -> None:
        """Forget all orders, and let every call that hangs go on."""
        self.release()
        with self._changed:
            self._rules.clear()
            self._no_ro_sessions = False

    def count(self, function: str) -> int:
        """How many calls of a function were made so far.

        Raises:
            InvalidOption: It is not watched.
        """
        _check(function)
        with self._changed:
            return self._calls[function]

    def wait_until_hanging(
        self, function: str, calls: int = 1, timeout: float = 10.0
    ) -> None:
        """Block until so many calls of a function hang. Not on an event loop's thread.

        Raises:
            TimeoutError: They did not come.
        """
        _check(function)
        with self._changed:
            there = self._changed.wait_for(
                lambda: self._hanging[function] >= calls, timeout
            )
            if not there:
                message = f"{self._hanging[function]} calls of {function} hang"
                raise TimeoutError(message)

    # -- Inside -------------------------------------------------------------------

    def _play(self, login: PlayedLogin, pin: pins.Secret) -> None:
        with self._changed:
            self._check_none_open()
            self._token.play(login, pin)

    def _check_none_open(self) -> None:
        if self._token.slots:
            message = (
                "a session is open: say what the token is like before a pool opens (in "
                "a pkcs11_faults of your own, that takes the one of the plugin)"
            )
            raise ModuleInUse(message)

    def _add(self, function: str, rule: _Rule) -> None:
        _check(function)
        for name, value in (("times", rule.times), ("skip", rule.skip)):
            if value is not None and (type(value) is not int or value < 0):
                message = f"{name} must be a whole number from 0 up"
                raise InvalidOption(message)
        with self._changed:
            self._rules.setdefault(function, []).append(rule)

    def _next(self, function: str) -> _Rule | None:
        """What the present call does; None: it goes well."""
        with self._changed:
            self._calls[function] += 1
            for rule in self._rules.get(function, []):
                if rule.times == 0:
                    continue
                if rule.skip:
                    rule.skip -= 1
                    return None
                if rule.times is not None:
                    rule.times -= 1
                return rule
            return None

    def _call(self, function: str, real: Callable[..., int], arguments: Any) -> int:
        rule = self._next(function)
        if rule is None:
            return self._made(function, real, arguments)
        if rule.seconds:
            time.sleep(rule.seconds)
        if rule.hang is not None:
            self._wait(function, rule.hang)
        if rule.code is None or rule.after:
            code = self._made(function, real, arguments)
        return code if rule.code is None else rule.code

    def _made(self, function: str, real: Callable[..., int], arguments: Any) -> int:
        """A call of the module itself, which may be odd."""
        opens = function == "C_OpenSession"
        with self._changed:
            if opens and self._no_ro_sessions and not arguments[1] & _RW:
                return rv.CODES["CKR_FUNCTION_FAILED"]
            self._inside += 1
        try:
            return self._token.call(function, real, arguments)
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def _wait(self, function: str, event: threading.Event) -> None:
        with self._changed:
            self._hanging[function] += 1
            self._changed.notify_all()
        event.wait()
        with self._changed:
            self._hanging[function] -= 1
            self._changed.notify_all()


@contextmanager
def faults_in(module: str | os.PathLike[str]) -> Iterator[Faults]:
    """Put the switch in front of a module, for the length of a block.

    Open the pools inside of the block, and close them there.

    Args:
        module: Path of the Cryptoki module.

    Raises:
        ModuleInUse: A pool is open on it: it would not see the faults.
    """
    path = config.module_path(module)
    with borrowed(path, None) as found:
        if found.users > 1:
            message = (
                f"a pool is open on {path}: ask for the faults before it opens (in a "
                "fixture that opens a pool: take pkcs11_faults as an argument)"
            )
            raise ModuleInUse(message)
        library = found.library
        if library.functions.pointer in _lists:
            message = (
                f"there is a fault switch in front of {path} already: use that one"
            )
            raise ModuleInUse(message)
    faults = Faults()
    real = library.functions
    faults._token.module = real  # noqa: SLF001  # one module
    copy = _copy(real, faults)
    _set(library, interface.FunctionList(copy))
    _lists.add(copy)
    try:
        yield faults
    finally:
        faults.clear()
        _set(library, real)
        _lists.discard(copy)


_lists: Final[set[int]] = set()


def _copy(real: interface.FunctionList, faults: Faults) -> int:
    """A copy of a function list that asks first; its address."""
    size = (1 + interface.COUNT) * ctypes.sizeof(_P)
    whole = ctypes.create_string_buffer(ctypes.string_at(real.pointer, size), size)
    _for_ever.append(whole)
    for name, (index, arguments) in FUNCTIONS.items():
        kind = ctypes.CFUNCTYPE(_N, *arguments)
        slot = _P.from_buffer(whole, (1 + index) * ctypes.sizeof(_P))
        if slot.value is None:
            continue  # the module does not have it

        stands_before = kind(_before(faults, name, kind(slot.value)))
        _for_ever.append(stands_before)
        slot.value = ctypes.cast(stands_before, _P).value
    return ctypes.addressof(whole)


def _before(faults: Faults, name: str, own: Callable[..., int]) -> Callable[..., int]:
    """What stands before a function: it asks the switch."""

    def call(*given: Any) -> int:
        return faults._call(name, own, given)  # noqa: SLF001  # one module

    return call


def _set(library: interface.Library, functions: interface.FunctionList) -> None:
    """Let python-pkcs11 and the pool call through a list."""
    library.functions = functions
    field_ = _P.from_address(id(library) + interface.HEADER)
    field_.value = functions.pointer


def _check(function: str) -> None:
    if function not in FUNCTIONS:
        message = (
            f"{function!r} cannot be made to fail; these can: {', '.join(FUNCTIONS)}"
        )
        raise InvalidOption(message)
