"""A ``pkcs11.Session`` for a session that is open already.

python-pkcs11 makes its object only where it opens the session itself. Few operations
need one, so sessions are opened by the raw call, and the object is made when somebody
asks for it: through a function list whose ``C_OpenSession`` gives what is there.
"""

from __future__ import annotations

import ctypes as c
import threading
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.cryptoki.interface import COUNT, FUNCTIONS, HEADER, MAPPER, ULong

if TYPE_CHECKING:
    import pkcs11

    from pkcs11_pool.cryptoki.interface import FunctionList

_P = c.c_void_p
_SIZE: Final = (1 + COUNT) * c.sizeof(_P)


class OpenedList:
    """A copy of a module's function list, for its tokens.

    What is made from a token goes on pointing here, so this is never destroyed.
    """

    def __init__(self, functions: FunctionList) -> None:
        given = self._given = threading.local()

        def open_(slot: int, flags: int, *rest: Any) -> int:
            handle: int | None = getattr(given, "handle", None)
            if handle is None:
                # A caller's function opens a session of its own.
                return functions.C_OpenSession(slot, flags, *rest)
            rest[-1][0] = handle
            return 0

        index, arguments = FUNCTIONS["C_OpenSession"]
        self._open = c.CFUNCTYPE(ULong, *arguments)(open_)
        self._list = c.create_string_buffer(
            c.string_at(functions.pointer, _SIZE), _SIZE
        )
        place = _P.from_buffer(self._list, (1 + index) * c.sizeof(_P))
        place.value = c.cast(self._open, _P).value

    def session(self, token: pkcs11.Token, handle: int, *, rw: bool) -> pkcs11.Session:
        """The object of an open session. Nothing is asked of the module.

        Also of one that is over and has the number 0: that is given, and none opened.
        """
        # A token has its list where a session has it.
        _P.from_address(id(token) + HEADER).value = c.addressof(self._list)
        self._given.handle = handle
        try:
            return token.open(rw=rw, attribute_mapper=MAPPER)
        finally:
            self._given.handle = None
