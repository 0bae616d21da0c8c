"""What a caller's function holds: a session that calls through a list of ours.

python-pkcs11 calls a module through a list of functions, and a session has a pointer
to that. So a session that is lent can be watched, and one that is over can be kept
from the module altogether: whoever kept it cannot even knock.
"""

from __future__ import annotations

import ctypes as c
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.cryptoki.interface import COUNT, FUNCTIONS, HEADER, ULong

if TYPE_CHECKING:
    from collections.abc import Callable

    import pkcs11

    from pkcs11_pool.cryptoki.interface import FunctionList

_P = c.c_void_p
_SIZE: Final = (1 + COUNT) * c.sizeof(_P)
_NO_SESSION: Final = rv.CODES["CKR_SESSION_HANDLE_INVALID"]
_BY_OBJECTS: Final = ("C_GetAttributeValue", "C_SetAttributeValue")
"""What objects call by themselves: each has the pointer of its session's list."""


class LentList:
    """A copy of a module's function list, for sessions in the hands of a function.

    Its ``C_CloseSession`` tells first: a number must be known as closed before the
    module can give it to the next session. Objects that the caller keeps go on
    pointing here, so this is never destroyed, and refuses what has no session.
    """

    def __init__(self, functions: FunctionList, closes: Callable[[int], None]) -> None:
        def close(handle: int) -> int:
            closes(handle)
            return functions.C_CloseSession(handle)

        self._list = c.create_string_buffer(
            c.string_at(functions.pointer, _SIZE), _SIZE
        )
        # Callbacks: they live as long as the list that points to them.
        self._kept = [self._replace("C_CloseSession", close)]
        for name in _BY_OBJECTS:
            self._kept.append(self._replace(name, _guarded(getattr(functions, name))))

    def _replace(self, name: str, function: Callable[..., int]) -> object:
        index, arguments = FUNCTIONS[name]
        callback = c.CFUNCTYPE(ULong, *arguments)(function)
        _P.from_buffer(self._list, (1 + index) * c.sizeof(_P)).value = c.cast(
            callback, _P
        ).value
        return callback

    def watch(self, session: pkcs11.Session) -> None:
        """Let this session call through the copy."""
        _P.from_address(id(session) + HEADER).value = c.addressof(self._list)


def _guarded(function: Callable[..., int]) -> Callable[..., int]:
    def call(handle: int, *arguments: Any) -> int:
        return function(handle, *arguments) if handle else _NO_SESSION

    return call


def _no_session() -> int:
    return _NO_SESSION


# Whatever it is called with: in C that is the caller's to put away.
_refuse: Final = c.CFUNCTYPE(ULong)(_no_session)
_DEAD: Final = (_P * (1 + COUNT))(
    None, *[c.cast(_refuse, _P).value for _ in range(COUNT)]
)
"""A list whose functions all say that there is no such session, and call nobody."""


def bury(session: pkcs11.Session) -> None:
    """Let what is called on this session fail before it reaches the module."""
    # Its lists: of version 2; of 3.0 and 3.2, which may be there or not.
    lists = (_P * 3).from_address(id(session) + HEADER)
    lists[0], lists[1], lists[2] = c.addressof(_DEAD), None, None
