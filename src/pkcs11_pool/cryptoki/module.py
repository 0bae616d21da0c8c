"""Each Cryptoki module once per process: initialised, counted, finalised.

A module has one state per process, so it is shared by all pools, however many
tokens they serve. Every ``C_Initialize`` starts a new generation: numbers of an
older one are never passed to the module again.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from pkcs11 import exceptions as p11
from pkcs11.constants import TokenFlag

from pkcs11_pool import events
from pkcs11_pool.cryptoki import interface, rv
from pkcs11_pool.cryptoki.lent import LentList
from pkcs11_pool.cryptoki.opened import OpenedList
from pkcs11_pool.errors import (
    ForkedProcess,
    ModuleError,
    ModuleInUse,
    TokenAmbiguous,
    TokenInUse,
    TokenNotFound,
    TokenUnavailable,
)
from pkcs11_pool.state import Generation, TokenInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pkcs11

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.renewal import Renewal
    from pkcs11_pool.cryptoki.session import Session

_HANGS_WITH_THREADS: Final = ("p11-kit-client",)
"""Modules that lose wake-ups when several threads are inside during an outage."""
_NOT_INITIALIZED: Final = rv.CODES["CKR_CRYPTOKI_NOT_INITIALIZED"]
_NOT_LEFT: Final = frozenset(
    rv.CODES[name]
    for name in (
        "CKR_OK",
        "CKR_CRYPTOKI_NOT_INITIALIZED",
        "CKR_DEVICE_ERROR",
        "CKR_DEVICE_REMOVED",
        "CKR_TOKEN_NOT_PRESENT",
        "CKR_FUNCTION_NOT_SUPPORTED",
    )
)
"""Answers to ``C_CloseAllSessions`` after which there is no more to be done."""
_SENSIBLE: Final = 1 << 31
"""Larger counts are ``-1``, ``-2`` and the like: no number of sessions."""

_lock = threading.Lock()
_modules: dict[str, Module] = {}
_loaded: dict[str, interface.Library] = {}
"""Also those that could not be initialised: the next try does not load them again."""


class Turn:
    """One call at a time for a whole module; no limit for one that needs none.

    Held around everything that enters the module.
    """

    def __init__(self, *, serialized: bool) -> None:
        #: Whether it lets one thread in at a time.
        self.serialized = serialized
        self._lock = threading.Lock() if serialized else None

    def __enter__(self) -> None:
        """Wait for the turn."""
        if self._lock is not None:
            self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        """Let the next one in."""
        if self._lock is not None:
            self._lock.release()

    def wait(self, timeout: float) -> bool:
        """Wait for the turn, but not for ever: a call may hang inside."""
        return self._lock is None or self._lock.acquire(timeout=timeout)


_NO_TURN: Final = Turn(serialized=False)


class Member(Protocol):
    """One pool on a module, as the others see it."""

    @property
    def is_well(self) -> bool:
        """Whether nothing is being recovered there."""

    def stand_back(self, renewal: Renewal) -> None:
        """The module is to be initialised anew: keep out of it meanwhile."""


class Module:
    """One Cryptoki module of this process. Get it by :func:`acquire`."""

    def __init__(self, path: str, library: interface.Library) -> None:
        self.path = path
        self.library = library
        #: The module's function list.
        self.functions = library.functions
        self.users = 0
        self.initialized = False
        self.generation = Generation(0)
        self.forked = False
        #: Calls given up on that are still inside: nothing is finalised then.
        self.lost_calls = 0
        self.turn = _NO_TURN
        #: The sessions of the present generation, by number.
        self.live: dict[int, Session] = {}
        #: Slots with sessions that could not be closed.
        self.leftovers: set[int] = set()
        #: For sessions in the hands of a caller's function.
        self.lent_list = LentList(library.functions, self._closes)
        #: For the ``pkcs11.Session`` of a session that is open.
        self.opened_list = OpenedList(library.functions)
        # Never destroyed: what was made through them goes on pointing there.
        self._former: list[tuple[LentList, OpenedList]] = []
        self._in_use: dict[tuple[str, bytes, str, str], str] = {}
        #: The pools on it.
        self.members: list[Member] = []
        #: Held by the one that has it initialised anew.
        self.renewing = threading.Lock()

    def take_functions(self) -> None:
        """Call through the library's present list; another may stand in front now."""
        functions = self.library.functions
        if functions is not self.functions:
            self._former.append((self.lent_list, self.opened_list))
            self.functions = functions
            self.lent_list = LentList(functions, self._closes)
            self.opened_list = OpenedList(functions)

    def _closes(self, handle: int) -> None:
        """A caller closes the session that it was given: it is not ours to close."""
        session = self.live.pop(handle, None)
        if session is not None:
            session.forget()

    def close_leftovers(self, slot_id: int) -> None:
        """``C_CloseAllSessions``, if one of ours could not be closed there before.

        Where that worked it is not called: other code may have sessions of its own.

        Raises:
            PKCS11Error: They are still open, for all that is known.
        """
        if slot_id not in self.leftovers:
            return
        code = self.functions.C_CloseAllSessions(slot_id)
        if code not in _NOT_LEFT:
            rv.check(code, "C_CloseAllSessions")
        self.leftovers.discard(slot_id)
        for session in [s for s in self.live.values() if s.slot_id == slot_id]:
            # In the hands of a call that is lost, which would close it once more.
            self.live.pop(session.handle, None)
            session.forget()

    @property
    def is_blocked(self) -> bool:
        """Whether it takes one call at a time, and a lost one is inside."""
        return self.turn.serialized and bool(self.lost_calls)

    def wait_turn(self, timeout: float) -> bool:
        """Wait for the turn, but not where none will come."""
        return self.turn.wait(0.0 if self.is_blocked else timeout)

    def set_serialized(self, *, asked: bool | None) -> None:
        """Serve one call at a time if asked to, or if the module needs it."""
        file = os.path.basename(self.path)  # noqa: PTH119  # see _load()
        known = any(name in file for name in _HANGS_WITH_THREADS)
        needed = self.library.serialized or known if asked is None else asked
        if needed and not self.turn.serialized:
            self.turn = Turn(serialized=True)

    def tokens(self) -> list[tuple[pkcs11.Token, TokenInfo]]:
        """Every token that is present, with what it says of itself."""
        found = []
        for slot in self.library.get_slots(token_present=True):
            try:
                found.append((slot.get_token(), self.info(slot.slot_id)))
            except (p11.TokenNotPresent, p11.TokenNotRecognised, p11.SlotIDInvalid):
                continue
        return found

    def info(self, slot_id: int) -> TokenInfo:
        """``C_GetTokenInfo``, asked anew: flags and counts change."""
        raw = interface.RawTokenInfo()
        code = self.functions.C_GetTokenInfo(slot_id, ctypes.byref(raw))
        rv.check(code, "C_GetTokenInfo")
        return TokenInfo(
            label=_text(raw, "label"),
            serial=_field(raw, "serial"),
            model=_text(raw, "model"),
            manufacturer=_text(raw, "manufacturer"),
            flags=TokenFlag(raw.flags),
            max_sessions=_count(raw.max_sessions),
            max_rw_sessions=_count(raw.max_rw_sessions),
            min_pin_len=raw.min_pin_len,
            max_pin_len=raw.max_pin_len,
            slot_id=slot_id,
        )

    def find(self, options: PoolOptions) -> tuple[pkcs11.Token, TokenInfo]:
        """The one token that the options name.

        Raises:
            TokenNotFound: None matches; the message lists what is there.
            TokenAmbiguous: More than one matches.
        """
        here = self.tokens()
        found = [pair for pair in here if _matches(pair[1], options)]
        if len(found) == 1:
            return found[0]
        listed = "; ".join(str(info) for _, info in here) or "no token at all"
        if found:
            listed = "; ".join(str(info) for _, info in found)
            message = (
                f"{len(found)} tokens match {options.wanted_token}: {listed}. "
                "Add token_serial= or slot_id="
            )
            raise TokenAmbiguous(message)
        message = f"no token matches {options.wanted_token}; {self.path} has {listed}"
        raise TokenNotFound(message)

    def claim(self, info: TokenInfo, name: str) -> None:
        """Make ``name`` the one pool of this process on a token.

        Raises:
            TokenInUse: Another open pool has it.
        """
        with _lock:
            if other := self._in_use.get(info.identity):
                message = (
                    f"pool {other!r} serves token {info} already: share that pool, "
                    "one serves every loop and thread of the process"
                )
                raise TokenInUse(message)
            self._in_use[info.identity] = name

    def check_unused(self, info: TokenInfo) -> None:
        """Refuse a token that an open pool serves.

        Raises:
            TokenInUse: One does.
        """
        with _lock:
            if other := self._in_use.get(info.identity):
                message = f"pool {other!r} serves token {info}: close it first"
                raise TokenInUse(message)

    def unclaim(self, info: TokenInfo) -> None:
        """The pool on this token is closed."""
        with _lock:
            self._in_use.pop(info.identity, None)


def acquire(path: str, reserved: bytes | None, *, serialize: bool | None) -> Module:
    """The module at ``path``, initialised; ends with :func:`release`.

    Raises:
        ModuleError: The file is missing, cannot be loaded, or is no Cryptoki module.
        ModuleInUse: Other code of this process initialised it.
        ForkedProcess: The parent process had it open when it forked.
    """
    key = os.path.realpath(path) if os.sep in path else path
    with _lock:
        module = _modules.get(key)
        if module is None:
            module = _modules[key] = Module(path, _load(path, reserved))
            _initialized(module)
        elif module.forked:
            message = (
                f"{path} was open in the parent process when it forked: use the start "
                "method spawn or forkserver, or open the pool after the fork"
            )
            raise ForkedProcess(message)
        elif not module.initialized:
            module.library.reserved = reserved
            _initialize(module.library, path)
            _initialized(module)
        module.users += 1
        module.set_serialized(asked=serialize)
        return module


def renew(module: Module) -> None:
    """``C_Finalize`` and ``C_Initialize``; whoever calls keeps all pools out.

    Raises:
        TokenUnavailable: Somebody else is inside, or a call that was given up on.
        ModuleError, PKCS11Error: The module refused.
    """
    with _lock:
        if module.lost_calls or module.users > len(module.members):
            message = f"a call that the pools do not know is inside {module.path}"
            raise TokenUnavailable(message)
        if module.initialized:
            try:
                module.library.finalize()
            except p11.PKCS11Error as error:
                if rv.code_of(error) != _NOT_INITIALIZED:
                    raise
            module.initialized = False
        _initialize(module.library, module.path)
        _initialized(module)


def release(module: Module) -> None:
    """Give the module back; the last one to do so finalises it.

    While a lost call is inside, nothing is finalised: the module stays
    initialised, and the next pool takes it over.
    """
    with _lock:
        module.users -= 1
        if module.users or module.lost_calls:
            return
        module.turn = _NO_TURN
        module.initialized = False
        try:
            module.library.finalize()
        except p11.PKCS11Error as error:
            # It stays ours, or the next pool would take it for a stranger's.
            module.initialized = rv.code_of(error) != _NOT_INITIALIZED
            events.warning(
                events.MODULE_FINALIZED, module=module.path, error=str(error)
            )
        else:
            events.info(events.MODULE_FINALIZED, module=module.path)


@contextmanager
def borrowed(path: str, reserved: bytes | None) -> Iterator[Module]:
    """The module for the length of a block."""
    module = acquire(path, reserved, serialize=None)
    try:
        with module.turn:
            yield module
    finally:
        release(module)


def _load(path: str, reserved: bytes | None) -> interface.Library:
    # Without pathlib: nothing else that the package imports needs it.
    if os.sep in path and not os.path.isfile(path):  # noqa: PTH113
        there = os.path.isdir(path)  # noqa: PTH112
        what = "is a directory" if there else "does not exist"
        message = f"{path} {what}: give the path of a Cryptoki module, a .so file"
        raise ModuleError(message)
    library = _loaded.get(path)
    if library is None:
        library = _loaded[path] = _load_file(path)
    try:
        _initialize(library, path, lambda: library.__init__(path, reserved))  # type: ignore[misc]
    except ModuleError:
        if library.is_initialized:
            # What was asked next failed: nobody else would end what was begun.
            with suppress(p11.PKCS11Error):
                library.finalize()
        raise
    return library


def _load_file(path: str) -> interface.Library:
    try:
        library = interface.Library.__new__(interface.Library, path)
    except p11.PKCS11Error as error:
        reason = str(error).partition(": ")[2].removeprefix(f"{path}: ")
        if not reason or "C_GetFunctionList" in reason:
            reason = "it has no C_GetFunctionList, so it is no Cryptoki module"
        message = f"{path} cannot be loaded: {reason}"
        raise ModuleError(message) from error
    # Once more than Python knows: not even the end of the interpreter destroys it.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(library))
    return library


def _initialize(library: interface.Library, path: str, how: Any = None) -> None:
    try:
        (how or library.initialize)()
    except p11.PKCS11Error as error:
        if rv.code_of(error) == rv.CODES["CKR_CRYPTOKI_ALREADY_INITIALIZED"]:
            message = (
                f"{path} is initialised already by other code in this process: open "
                "the pool first and give pool.lib to that code, or finalise it there"
            )
            raise ModuleInUse(message) from error
        message = (
            f"{path} cannot be initialised: {rv.text_of(error)}. Has it the "
            "configuration that it needs (SoftHSM2: SOFTHSM2_CONF)? "
            "`pkcs11-pool doctor` looks for the cause"
        )
        raise ModuleError(message) from error


def _initialized(module: Module) -> None:
    module.generation = Generation(module.generation + 1)
    # Numbers start again, and callers may still have those of before.
    for session in module.live.values():
        session.forget()
    module.live.clear()
    module.leftovers.clear()
    module.take_functions()
    module.initialized = True
    events.info(
        events.MODULE_INITIALIZED, module=module.path, generation=module.generation
    )


def _matches(info: TokenInfo, options: PoolOptions) -> bool:
    return (
        options.token_label in (None, info.label)
        and options.token_serial in (None, info.serial)
        and options.token_model in (None, info.model)
        and options.token_manufacturer in (None, info.manufacturer)
        and options.slot_id in (None, info.slot_id)
    )


def _field(raw: interface.RawTokenInfo, name: str) -> bytes:
    # The fields are padded with blanks and not closed by NUL, so ctypes' own
    # reading of a char array, which stops at NUL, is not enough.
    field = getattr(interface.RawTokenInfo, name)
    packed = bytes(raw)[field.offset : field.offset + field.size]
    return packed.rstrip(b"\0").rstrip()


def _text(raw: interface.RawTokenInfo, name: str) -> str:
    return _field(raw, name).decode(errors="replace")


def _count(value: int) -> int | None:
    return value if value < _SENSIBLE else None


def _after_fork() -> None:
    global _lock  # noqa: PLW0603  # a lock held by another thread at the fork stays so
    _lock = threading.Lock()
    for module in _modules.values():
        # Also where no pool is open any more: what could not be finalised is the
        # parent's all the same.
        module.forked |= bool(module.users) or module.initialized


os.register_at_fork(after_in_child=_after_fork)
