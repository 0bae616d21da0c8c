"""One Cryptoki session, and the calls on it that python-pkcs11 does not offer.

It knows its number, its generation and the login epoch in which it was opened.
It never closes twice, and never closes in another generation than its own:
numbers repeat, and a stale close would end a stranger's session.
"""

from __future__ import annotations

import ctypes as c
from ctypes import byref, c_ulong
from typing import TYPE_CHECKING, Final

from pkcs11.constants import Attribute

from pkcs11_pool.cryptoki import interface, rv
from pkcs11_pool.cryptoki.lent import bury
from pkcs11_pool.state import SessionInfo, SessionState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pkcs11

    from pkcs11_pool.cryptoki.module import Module
    from pkcs11_pool.state import Epoch

_ROOM: Final = 512
"""Bytes for an attribute at the first try; a longer one costs a second call."""
_BATCH: Final = 256
_RO: Final = interface.CKF_SERIAL_SESSION
_RW: Final = interface.CKF_SERIAL_SESSION | interface.CKF_RW_SESSION
_PARTLY: Final = {
    0,
    rv.CODES["CKR_ATTRIBUTE_SENSITIVE"],
    rv.CODES["CKR_ATTRIBUTE_TYPE_INVALID"],
    rv.CODES["CKR_BUFFER_TOO_SMALL"],
}


OVER: Final = frozenset(
    rv.CODES[name]
    for name in (
        "CKR_SESSION_HANDLE_INVALID",
        "CKR_SESSION_CLOSED",
        "CKR_CRYPTOKI_NOT_INITIALIZED",
        "CKR_DEVICE_ERROR",
        "CKR_DEVICE_REMOVED",
        "CKR_TOKEN_NOT_PRESENT",
    )
)
"""Answers to ``C_CloseSession`` after which there is no session any more."""


class Session:
    """A session of this process with one token.

    Attributes:
        handle: Its number.
        rw: Whether it is read-write.
        epoch: The login epoch in which it was opened.
        lent: Whether a caller's function has had it.
        opened_at: When, on the monotonic clock; set for some that are opened ahead.
    """

    lent = False
    _p11: pkcs11.Session | None = None
    opened_at = 0.0

    def __init__(
        self, module: Module, token: pkcs11.Token, *, rw: bool, epoch: Epoch
    ) -> None:
        """``C_OpenSession``, without a login: all sessions share the actor's."""
        self.module = module
        self.functions = functions = module.functions
        number = c_ulong()
        code = functions.C_OpenSession(
            token.slot.slot_id, _RW if rw else _RO, None, None, byref(number)
        )
        if code:
            raise rv.error_of(code, "C_OpenSession")
        self.generation = module.generation
        self.handle = handle = number.value
        self._token = token
        # The number is new, so whoever had it before was closed behind our back, by
        # the token. It must not close this one, too.
        live = module.live
        if handle in live:
            live[handle].forget()
        live[handle] = self
        self.rw = rw
        self.epoch = epoch

    @property
    def p11(self) -> pkcs11.Session:
        """The ``pkcs11.Session``; made when it is needed, which is seldom."""
        if self._p11 is None:
            opened = self.module.opened_list
            self._p11 = opened.session(self._token, self.handle, rw=self.rw)
        return self._p11

    @property
    def slot_id(self) -> int:
        """The slot that it is on."""
        slot_id: int = self._token.slot.slot_id
        return slot_id

    def lend(self) -> pkcs11.Session:
        """The ``pkcs11.Session``, for a caller's function, which may close it."""
        self.module.lent_list.watch(self.p11)
        self.lent = True
        return self.p11

    def disarm(self) -> None:
        """Make the ``pkcs11.Session`` harmless, and all that was made with it.

        The session itself stays open, for its worker to close.
        """
        if self._p11 is not None:
            interface.take_handle(self._p11)
            bury(self._p11)

    def close(self) -> int:
        """``C_CloseSession``; the code that it returned, 0 if it was closed before.

        The number is taken out of the ``pkcs11.Session`` first, so that a caller
        who kept it cannot reach the session that gets the number next.
        """
        if self._p11 is None:
            handle, self.handle = self.handle, 0
        else:
            handle = self.forget()
        module = self.module
        if not handle or self.generation != module.generation:
            return 0
        module.live.pop(handle, None)
        code = self.functions.C_CloseSession(handle)
        if code and code not in OVER:
            # Not closed twice, for its number may be another's by then: see the module.
            module.leftovers.add(self.slot_id)
        return code

    def forget(self) -> int:
        """Make this session harmless without closing it; its number so far."""
        handle, self.handle = self.handle, 0
        if handle and self._p11 is not None:
            interface.take_handle(self._p11)
            if self.lent:
                bury(self._p11)
        return handle

    def info(self) -> SessionInfo:
        """``C_GetSessionInfo``: what the token says, nothing guessed."""
        raw = interface.RawSessionInfo()
        code = self.functions.C_GetSessionInfo(self.handle, c.byref(raw))
        rv.check(code, "C_GetSessionInfo")
        return SessionInfo(
            state=SessionState(raw.state),
            rw=bool(raw.flags & interface.CKF_RW_SESSION),
            device_error=raw.device_error,
            slot_id=raw.slot_id,
        )

    def attributes(self, handle: int, kinds: Sequence[int]) -> dict[int, bytes]:
        """Packed attributes of an object; those that it does not tell are left out.

        One ``C_GetAttributeValue``, and a second where a value is long; on NSS more.
        """
        found, long = self._attributes(handle, [(kind, _ROOM) for kind in kinds])
        if long:
            # CK_UNAVAILABLE_INFORMATION stands for "too small" as well as for
            # "not told": ask the sizes of what is missing.
            sizes = self._sizes(handle, long)
            if sizes:
                more, _ = self._attributes(handle, sizes)
                found.update(more)
        if len(kinds) > 1 and Attribute.CLASS in kinds and Attribute.CLASS not in found:
            # Each object has a class. NSS keeps back every number when one of the
            # attributes is not there: ask for what is missing one by one.
            for kind in kinds:
                if kind not in found:
                    found.update(self.attributes(handle, [kind]))
        return found

    def _attributes(
        self, handle: int, wanted: list[tuple[int, int]]
    ) -> tuple[dict[int, bytes], list[int]]:
        array = (interface.RawAttribute * len(wanted))()
        room = c.create_string_buffer(sum(size for _, size in wanted) or 1)
        base = c.addressof(room)
        for item, (kind, size) in zip(array, wanted, strict=True):
            item.type, item.value, item.length = kind, base, size
            base += size
        code = self.functions.C_GetAttributeValue(
            self.handle, handle, array, len(wanted)
        )
        if code not in _PARTLY:
            rv.check(code, "C_GetAttributeValue")
        found, missing = {}, []
        for item in array:
            if item.length == interface.UNAVAILABLE:
                missing.append(item.type)
            else:
                found[item.type] = c.string_at(item.value, item.length)
        too_small = code == rv.CODES["CKR_BUFFER_TOO_SMALL"]
        return found, missing if too_small else []

    def _sizes(self, handle: int, kinds: Sequence[int]) -> list[tuple[int, int]]:
        array = (interface.RawAttribute * len(kinds))()
        for item, kind in zip(array, kinds, strict=True):
            item.type, item.value, item.length = kind, None, 0
        code = self.functions.C_GetAttributeValue(
            self.handle, handle, array, len(kinds)
        )
        if code not in _PARTLY:
            rv.check(code, "C_GetAttributeValue")
        return [
            (item.type, item.length)
            for item in array
            if item.length != interface.UNAVAILABLE
        ]

    def find(
        self, template: Sequence[tuple[int, bytes]], most: int | None = None
    ) -> list[int]:
        """Handles of the objects that match packed attributes.

        ``C_FindObjectsInit``, ``C_FindObjects``, ``C_FindObjectsFinal``. The
        search is ended whatever happens in it.
        """
        functions, handle = self.functions, self.handle
        array, keep = interface.pack_template(template)
        code = functions.C_FindObjectsInit(handle, array, len(keep))
        if code == rv.CODES["CKR_OPERATION_ACTIVE"]:
            # A search before this one could not be ended.
            functions.C_FindObjectsFinal(handle)
            code = functions.C_FindObjectsInit(handle, array, len(keep))
        rv.check(code, "C_FindObjectsInit")
        room = min(_BATCH, most or _BATCH)
        batch, count = (c.c_ulong * room)(), c.c_ulong()
        found: list[int] = []
        try:
            while most is None or len(found) < most:
                code = functions.C_FindObjects(handle, batch, room, c.byref(count))
                rv.check(code, "C_FindObjects")
                if not count.value:
                    break
                found += batch[: count.value]
        finally:
            if functions.C_FindObjectsFinal(handle):
                # One that goes on keeps others out, on some tokens of any kind.
                functions.C_FindObjectsFinal(handle)
        return found if most is None else found[:most]

    def __repr__(self) -> str:
        """The number and the kind, for logs."""
        if not hasattr(self, "rw"):
            return "<Session, not open>"  # in a traceback of the constructor
        kind = "R/W" if self.rw else "R/O"
        return f"<Session {self.handle} {kind}>"
