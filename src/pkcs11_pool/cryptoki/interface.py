"""All that leans on python-pkcs11's private layout, and the raw calls beside it.

python-pkcs11 has no public way to initialise a module with
``CKF_OS_LOCKING_OK``, to log in on an open session, to sign without a size
query, or to take a session away from a caller who kept it. Each is done here,
through the function list that python-pkcs11 itself holds, so that there is one
C library in one state. ``tests/test_cryptoki_contract.py`` names the upstream
line that each of these relies on and fails when it moves.

The raw calls return the ``CKR_`` code instead of raising: a PIN may be an
argument, and must not stand in a frame that an exception keeps.
"""

from __future__ import annotations

import ctypes as c
import gc
import struct
import threading
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self

from pkcs11 import _pkcs11
from pkcs11 import exceptions as p11

from pkcs11_pool.cryptoki import rv as ckr
from pkcs11_pool.cryptoki.vendor import Mapper
from pkcs11_pool.errors import InvalidOption, PoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pkcs11

CKF_OS_LOCKING_OK: Final = 0x2
CKF_RW_SESSION: Final = 0x2
CKF_SERIAL_SESSION: Final = 0x4
CKU_SO: Final = 0
CKU_USER: Final = 1
CKU_CONTEXT_SPECIFIC: Final = 2
UNAVAILABLE: Final = c.c_ulong(-1).value
"""``CK_UNAVAILABLE_INFORMATION``, for lengths and counts."""

HEADER: Final = object.__basicsize__
"""Bytes before the first C field of an object; of python-pkcs11's: its list."""
COUNT: Final = 68
"""Functions in a list of version 2; a later one begins with the same."""
_VERSIONS: Final = ((2, 0), (3, 255))
"""The first field of a function list is its version; anything else is no list."""

ULong = c.c_ulong
_P = c.c_void_p
_UL = c.POINTER(c.c_ulong)

# Arguments of the functions of CK_FUNCTION_LIST that are called from here, with
# the index that pkcs11f.h gives each. Buffers are void pointers: ctypes takes
# bytes, arrays and None for them.
FUNCTIONS: Final[dict[str, tuple[int, tuple[Any, ...]]]] = {
    "C_Initialize": (0, (_P,)),
    "C_Finalize": (1, (_P,)),
    "C_GetTokenInfo": (6, (ULong, _P)),
    "C_InitToken": (9, (ULong, _P, ULong, _P)),
    "C_InitPIN": (10, (ULong, _P, ULong)),
    "C_SetPIN": (11, (ULong, _P, ULong, _P, ULong)),
    "C_OpenSession": (12, (ULong, ULong, _P, _P, _UL)),
    "C_CloseSession": (13, (ULong,)),
    "C_CloseAllSessions": (14, (ULong,)),
    "C_GetSessionInfo": (15, (ULong, _P)),
    "C_Login": (18, (ULong, ULong, _P, ULong)),
    "C_Logout": (19, (ULong,)),
    "C_CopyObject": (21, (ULong, ULong, _P, ULong, _UL)),
    "C_DestroyObject": (22, (ULong, ULong)),
    "C_GetAttributeValue": (24, (ULong, ULong, _P, ULong)),
    "C_SetAttributeValue": (25, (ULong, ULong, _P, ULong)),
    "C_FindObjectsInit": (26, (ULong, _P, ULong)),
    "C_FindObjects": (27, (ULong, _P, ULong, _UL)),
    "C_FindObjectsFinal": (28, (ULong,)),
    "C_EncryptInit": (29, (ULong, _P, ULong)),
    "C_Encrypt": (30, (ULong, _P, ULong, _P, _UL)),
    "C_EncryptUpdate": (31, (ULong, _P, ULong, _P, _UL)),
    "C_EncryptFinal": (32, (ULong, _P, _UL)),
    "C_DecryptInit": (33, (ULong, _P, ULong)),
    "C_Decrypt": (34, (ULong, _P, ULong, _P, _UL)),
    "C_DecryptUpdate": (35, (ULong, _P, ULong, _P, _UL)),
    "C_DecryptFinal": (36, (ULong, _P, _UL)),
    "C_DigestInit": (37, (ULong, _P)),
    "C_Digest": (38, (ULong, _P, ULong, _P, _UL)),
    "C_DigestUpdate": (39, (ULong, _P, ULong)),
    "C_DigestKey": (40, (ULong, ULong)),
    "C_DigestFinal": (41, (ULong, _P, _UL)),
    "C_SignInit": (42, (ULong, _P, ULong)),
    "C_Sign": (43, (ULong, _P, ULong, _P, _UL)),
    "C_SignUpdate": (44, (ULong, _P, ULong)),
    "C_SignFinal": (45, (ULong, _P, _UL)),
    "C_VerifyInit": (48, (ULong, _P, ULong)),
    "C_Verify": (49, (ULong, _P, ULong, _P, ULong)),
    "C_VerifyUpdate": (50, (ULong, _P, ULong)),
    "C_VerifyFinal": (51, (ULong, _P, ULong)),
    "C_SeedRandom": (63, (ULong, _P, ULong)),
    "C_GenerateRandom": (64, (ULong, _P, ULong)),
}


class _Version(c.Structure):
    _fields_ = (("major", c.c_ubyte), ("minor", c.c_ubyte))


class InitializeArgs(c.Structure):
    """``CK_C_INITIALIZE_ARGS``."""

    _fields_ = (
        ("create_mutex", _P),
        ("destroy_mutex", _P),
        ("lock_mutex", _P),
        ("unlock_mutex", _P),
        ("flags", ULong),
        ("reserved", _P),
    )


class RawTokenInfo(c.Structure):
    """``CK_TOKEN_INFO``, with the counts and flags that python-pkcs11 leaves out."""

    _fields_ = (
        ("label", c.c_char * 32),
        ("manufacturer", c.c_char * 32),
        ("model", c.c_char * 16),
        ("serial", c.c_char * 16),
        ("flags", ULong),
        ("max_sessions", ULong),
        ("sessions", ULong),
        ("max_rw_sessions", ULong),
        ("rw_sessions", ULong),
        ("max_pin_len", ULong),
        ("min_pin_len", ULong),
        ("total_public_memory", ULong),
        ("free_public_memory", ULong),
        ("total_private_memory", ULong),
        ("free_private_memory", ULong),
        ("hardware_version", _Version),
        ("firmware_version", _Version),
        ("utc_time", c.c_char * 16),
    )


class RawSessionInfo(c.Structure):
    """``CK_SESSION_INFO``."""

    _fields_ = (
        ("slot_id", ULong),
        ("state", ULong),
        ("flags", ULong),
        ("device_error", ULong),
    )


class RawAttribute(c.Structure):
    """``CK_ATTRIBUTE``."""

    _fields_ = (("type", ULong), ("value", _P), ("length", ULong))


class FunctionList:
    """The functions of one module's ``CK_FUNCTION_LIST``, as ctypes callables.

    Each call releases the GIL. Function objects are made once per name.
    """

    def __init__(self, pointer: int) -> None:
        version = _Version.from_address(pointer)
        low, high = _VERSIONS
        if not low <= (version.major, version.minor) <= high:
            message = (
                "python-pkcs11 keeps its function list elsewhere than in 0.10: "
                f"found version {version.major}.{version.minor} there"
            )
            raise RuntimeError(message)
        self.pointer = pointer

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Bind a ``C_…`` function at its first use."""
        try:
            index, arguments = FUNCTIONS[name]
        except KeyError:
            raise AttributeError(name) from None
        # The version is two bytes, padded to the size of a pointer.
        slot = self.pointer + (1 + index) * c.sizeof(_P)
        address = _P.from_address(slot).value or 0
        function = c.CFUNCTYPE(ULong, *arguments)(address)
        setattr(self, name, function)
        return function


class Library(_pkcs11.lib):
    """python-pkcs11's library object, initialised for several threads.

    Upstream calls ``C_Initialize(NULL)``, which tells the module that one thread
    uses it. ``initialize`` is ``cpdef``, so overriding it here replaces that
    call. An object of this class must never be destroyed: its ``__dealloc__``
    unloads the module, under a call that may still hang in it.
    """

    def __new__(cls, so: str, _reserved: bytes | None = None) -> Self:
        """Load the file; upstream's ``__cinit__`` takes the path alone."""
        return super().__new__(cls, so)  # type: ignore[call-arg]  # not in its stub

    #: Whether a ``C_Initialize`` of ours went well, and no ``C_Finalize`` after it.
    is_initialized = False

    def __init__(self, so: str, reserved: bytes | None = None) -> None:
        #: Module parameters for the next ``C_Initialize``.
        self.reserved = reserved
        self.serialized = False
        super().__init__(so)

    @cached_property
    def functions(self) -> FunctionList:
        """The list that python-pkcs11 calls through: its first C field."""
        pointer = _P.from_address(id(self) + HEADER).value
        if not pointer:
            message = "python-pkcs11 has no function list where 0.10 keeps it"
            raise RuntimeError(message)
        return FunctionList(pointer)

    def initialize(self) -> None:
        """``C_Initialize`` with ``CKF_OS_LOCKING_OK``, or single-threaded.

        A module that answers ``CKR_CANT_LOCK`` is initialised without the flag
        and must be called by one thread at a time: ``serialized`` says so.

        Raises:
            pkcs11.PKCS11Error: The module refused.
        """
        code = self._initialize(CKF_OS_LOCKING_OK)
        self.serialized = code == ckr.CODES["CKR_CANT_LOCK"]
        if self.serialized:
            code = self._initialize(0)
        ckr.check(code, "C_Initialize")
        self.is_initialized = True

    def _initialize(self, flags: int) -> int:
        # The structure must outlive the call: addressof() of a temporary would
        # hand freed memory to the module.
        arguments = InitializeArgs(flags=flags)
        reserved = None
        if self.reserved is not None:
            reserved = c.create_string_buffer(self.reserved)
            arguments.reserved = c.cast(reserved, _P).value
        return self.functions.C_Initialize(c.byref(arguments))

    def finalize(self) -> None:
        """``C_Finalize``. Ours to call: upstream does not know that it initialised."""
        ckr.check(self.functions.C_Finalize(None), "C_Finalize")
        self.is_initialized = False


MAPPER: Final = Mapper()
"""Shared by all sessions: making one costs more than opening a session."""


# The C module's classes are not in its stub.
_native: Any = _pkcs11
_RLock: Final = type(threading.RLock())


def handle_of(session: Any) -> int:
    """The number of a session."""
    handle: int = session.handle
    return handle


def _handle_offset() -> int:
    # Session: three function list pointers, its method table, then the handle.
    return HEADER + 4 * c.sizeof(_P)


def take_handle(session: pkcs11.Session) -> int:
    """Make a ``pkcs11.Session`` harmless and return the number that it had.

    Afterwards it holds ``CK_INVALID_HANDLE``, so a caller who kept it gets an
    error and can neither use nor close a stranger's session with that number.
    """
    field = ULong.from_address(id(session) + _handle_offset())
    handle = field.value
    if handle != handle_of(session):
        message = "python-pkcs11 keeps a session's handle elsewhere than in 0.10"
        raise RuntimeError(message)
    field.value = 0
    return handle


def end_operations(session: pkcs11.Session) -> None:
    """End the searches and other operations that this thread left under way.

    Whoever keeps one, be it the traceback of an error, keeps the session's
    operation lock taken for the thread that began it: another thread that used the
    session would wait for ever. Called before the session leaves the thread.
    """
    lock: Any = next(o for o in gc.get_referents(session) if isinstance(o, _RLock))
    if not lock._is_owned():  # noqa: SLF001  # as threading.Condition asks it
        return
    # Seldom, so it may be slow. Whatever each of them says, it is over.
    for operation in gc.get_referrers(session):
        if isinstance(operation, _native.OperationContext):
            with suppress(p11.PKCS11Error):
                operation._finalize()  # noqa: SLF001


def mechanism_address(packed: object) -> int:
    """The address of the ``CK_MECHANISM`` in a ``MechanismWithParam``."""
    address = _P.from_address(id(packed) + HEADER).value
    if not address:
        message = "python-pkcs11 keeps a packed mechanism elsewhere than in 0.10"
        raise RuntimeError(message)
    return address


def pack_mechanism(
    key_type: Any, defaults: dict[Any, Any], mechanism: Any, param: Any
) -> object:
    """Pack a mechanism and its parameter as python-pkcs11 does.

    The result owns the memory: keep it until the call has returned.

    Raises:
        InvalidOption: The parameter does not fit the mechanism.
    """
    with argument_errors():
        return _native.MechanismWithParam(key_type, defaults, mechanism, param)


@contextmanager
def argument_errors() -> Iterator[None]:
    """Around a call of python-pkcs11, whose own errors are a riddle to a caller.

    Raises:
        InvalidOption: It could not pack an argument; a value was checked before, a
            mechanism's parameter was not.
    """
    try:
        yield
    except (
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        OverflowError,
        struct.error,
    ) as error:
        if isinstance(error, PoolError):
            raise
        message = (
            "python-pkcs11 cannot pass on an argument; mechanism_param= must be what "
            f"the mechanism takes ({type(error).__name__})"
        )
        raise InvalidOption(message) from error


class _Wrapper:
    """Stands in for python-pkcs11's ``ObjectHandleWrapper`` (a C class)."""

    __slots__ = ("handle", "session")

    def __init__(self, session: pkcs11.Session, handle: int) -> None:
        self.session = session
        self.handle = handle


_MIXINS: Final = (
    _native.SignMixin,
    _native.VerifyMixin,
    _native.EncryptMixin,
    _native.DecryptMixin,
    _native.WrapMixin,
    _native.UnwrapMixin,
    _native.DeriveMixin,
    _native.EncapsulateMixin,
    _native.DecapsulateMixin,
    _native.Object,
)


def _told(key: Any) -> str:
    # Upstream asks the token for the label: not where a traceback shows variables.
    return f"<{type(key).__name__} object {key.wrapper.handle}>"


_CLASSES: Final[dict[int, Any]] = {
    int(object_class): type(
        base.__name__, (base, *_MIXINS), {"__repr__": _told, "__str__": _told}
    )
    for object_class, base in _native._CLASS_MAP.items()  # noqa: SLF001
    if issubclass(base, _native.types.Key)
}


def bind_key(
    session: pkcs11.Session, handle: int, object_class: int, key_type: Any
) -> Any:
    """A python-pkcs11 key for a handle on any session, without a call.

    Upstream ties a key to the session that found it, and asks the token ten
    attributes to make it. Its operations only use ``session``, ``handle`` and
    ``key_type``, and these are known here.
    """
    cls: Any = _CLASSES[object_class]
    key = cls.__new__(cls)
    key.wrapper = _Wrapper(session, handle)
    key.__dict__["key_type"] = key_type
    return key


def pack_template(template: Sequence[tuple[int, bytes]]) -> tuple[Any, list[Any]]:
    """``CK_ATTRIBUTE[]`` of packed values, and the buffers to keep alive with it."""
    keep = [c.create_string_buffer(value, max(1, len(value))) for _, value in template]
    array = (RawAttribute * len(template))()
    for item, (kind, value), buffer in zip(array, template, keep, strict=True):
        item.type = kind
        item.value = c.addressof(buffer)
        item.length = len(value)
    return array, keep


def pack_ulong(value: int) -> bytes:
    """A ``CK_ULONG`` as attribute bytes."""
    return struct.pack("@L", value)


def unpack_ulong(packed: bytes) -> int:
    """Attribute bytes as a ``CK_ULONG``."""
    value: int = struct.unpack("@L", packed)[0]
    return value
