"""Operations on data in parts: a chain of calls on one session, on worker threads.

``C_SignInit``, ``C_SignUpdate``, …, ``C_SignFinal``, and the same for the others.
Between two calls the session waits, and no thread does: whoever brings the data
slowly holds up nobody but himself.

What may change between two calls is looked at in each: the chain's own end by a
logout, the life of a session object, and the number of the key. Some modules
look the key up by its number again in the last call, when it may be another
key's: so a number is verified again before what was made with it leaves.
"""

from __future__ import annotations

import copy
import ctypes as c
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pkcs11 import defaults
from pkcs11.constants import Attribute, ObjectClass

from pkcs11_pool.cryptoki import operations, rv
from pkcs11_pool.cryptoki.keys import GONE, KeySpec, SessionObject
from pkcs11_pool.cryptoki.operations import (
    PRIVATE_OR_SECRET,
    PUBLIC_OR_SECRET,
)
from pkcs11_pool.cryptoki.using import with_object
from pkcs11_pool.engine.leases import Chain
from pkcs11_pool.errors import KeyNotFound, SessionObjectDestroyed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from pkcs11_pool.cryptoki.keys import Entry, HandleCache, Target
    from pkcs11_pool.cryptoki.operations import ContextLogin
    from pkcs11_pool.cryptoki.session import Session

T = TypeVar("T")
Piece = bytes | KeySpec | SessionObject
"""What goes to the module in one call: data, or a key that is to be digested."""

PIECE: Final = 64 * 1024
"""The most bytes that go to the module in one call."""
_ROOM: Final = PIECE + 2048
"""Bytes for the output of one call at first; a module that wants more says so."""
_SECRET: Final = (int(ObjectClass.SECRET_KEY),)
_TOO_SMALL: Final = rv.CODES["CKR_BUFFER_TOO_SMALL"]
_NO_OPERATION: Final = rv.CODES["CKR_OPERATION_NOT_INITIALIZED"]
_NOT_IN_PARTS: Final = frozenset(
    {
        _NO_OPERATION,
        rv.CODES["CKR_FUNCTION_NOT_SUPPORTED"],
        rv.CODES["CKR_MECHANISM_INVALID"],
    }
)
"""What modules answer to the first part where a mechanism takes its data whole."""


ONE_PART_ONLY: Final = object()
"""Comes out of the first step where the mechanism takes its data in one part."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of operation, by its functions and by what it wants of a key."""

    name: str
    capability: Attribute
    classes: tuple[int, ...]
    mechanisms: Mapping[Any, Any]
    gives_output: bool = False


SIGN: Final = Operation(
    "Sign", Attribute.SIGN, PRIVATE_OR_SECRET, defaults.DEFAULT_SIGN_MECHANISMS
)
VERIFY: Final = Operation(
    "Verify", Attribute.VERIFY, PUBLIC_OR_SECRET, defaults.DEFAULT_SIGN_MECHANISMS
)
ENCRYPT: Final = Operation(
    "Encrypt",
    Attribute.ENCRYPT,
    PUBLIC_OR_SECRET,
    defaults.DEFAULT_ENCRYPT_MECHANISMS,
    gives_output=True,
)
DECRYPT: Final = Operation(
    "Decrypt",
    Attribute.DECRYPT,
    PRIVATE_OR_SECRET,
    defaults.DEFAULT_ENCRYPT_MECHANISMS,
    gives_output=True,
)
DIGEST: Final = Operation("Digest", Attribute.CLASS, (), {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done with the data, whole or in parts."""

    operation: Operation
    cache: HandleCache
    target: Target | None
    mechanism: Any
    param: Any = None
    login: ContextLogin | None = None
    der: bool = False
    signature: bytes = b""


class MultiPart(Chain):
    """One operation on data in parts, from its Init to its Final.

    Attributes:
        key_gone: Its key's number is not the key's any more.
    """

    def __init__(self, plan: Plan, holder: Hashable) -> None:
        super().__init__(holder)
        self.key_gone = False
        self._plan = plan
        self._entry: Entry | None = None
        # The cache's mark when the key's number was sure last.
        self._mark = -1
        # An operation is active in the session, as far as we know.
        self._active = False
        # The packed mechanism: some modules read its parameter again later.
        self._kept: object = None
        self._coder: Any = None
        self._buffer: Any = None

    def step(self, session: Session, piece: Piece, *, last: bool) -> Any:
        """Give one piece to the module; what came out, or the result after the last.

        The first one begins the operation.
        """
        if not self.begun:
            # It may have failed before, for a login that was lost and is back.
            self.over = False
        try:
            self._check()
            if self.begun:
                output = self._guarded(session, lambda: self._feed(session, piece))
            else:
                output = self._begin(session, piece)
                self.begun = True
            if last:
                output = self._guarded(session, lambda: self._finish(session, output))
        except BaseException:
            self.stop(session)
            self.over = True
            raise
        if output is ONE_PART_ONLY:
            self.stop(session)
        self.over = last or output is ONE_PART_ONLY
        return output

    def stop(self, session: Session) -> None:
        """End what is active, as well as it can be done before PKCS#11 v3.0.

        The last call ends it whatever it answers; where a mechanism takes its data
        in one part, only the call for that does.
        """
        if not self._active or not session.handle:
            return
        self._active = False
        functions, handle = session.functions, session.handle
        name = self._plan.operation.name
        final = getattr(functions, f"C_{name}Final")
        whole = getattr(functions, f"C_{name}")
        if name == "Verify":
            if final(handle, b"", 0) == _NO_OPERATION:
                whole(handle, b"", 0, b"", 0)
            return
        length = c.c_ulong(_ROOM)
        buffer = self._output_buffer(_ROOM)
        if final(handle, buffer, c.byref(length)) == _NO_OPERATION:
            whole(handle, b"", 0, buffer, c.byref(length))

    def _check(self) -> None:
        if self.cause is not None:
            raise copy.copy(self.cause)

    # -- The three calls ----------------------------------------------------------

    def _begin(self, session: Session, piece: Piece) -> Any:
        plan = self._plan
        if plan.target is None:
            self._init(session, None, ())
            return self._feed(session, piece)

        def call(entry: Entry) -> Any:
            # The number was another key's: what it began ends first.
            self.stop(session)
            entry.require(plan.operation.capability, plan.target)
            self._mark = plan.cache.mark
            self._entry, self.private = entry, entry.private
            if plan.der:
                self._coder = operations.coder(entry.key_type)
            self._init(session, entry, (entry.handle,))
            return self._feed(session, piece)

        return with_object(
            session, plan.cache, plan.target, plan.operation.classes, call
        )

    def _init(
        self, session: Session, entry: Entry | None, key: tuple[int, ...]
    ) -> None:
        plan = self._plan
        if entry is not None:
            operations.check_login(entry, plan.target, plan.login)
        self._kept, address = operations.packed(
            None if entry is None else entry.key_type,
            plan.operation.mechanisms,
            plan.mechanism,
            plan.param,
        )
        name = f"C_{plan.operation.name}Init"
        rv.check(getattr(session.functions, name)(session.handle, address, *key), name)
        self._active = True
        if entry is not None and plan.login is not None:
            plan.login(session, entry)

    def _feed(self, session: Session, piece: Piece) -> Any:
        if not isinstance(piece, bytes):
            return self._feed_key(session, piece)
        if not piece:
            return b""
        operation = self._plan.operation
        name = f"C_{operation.name}Update"
        function = getattr(session.functions, name)
        if operation.gives_output:
            code, output = self._with_output(
                lambda buffer, length: function(
                    session.handle, piece, len(piece), buffer, length
                ),
                len(piece),
            )
        else:
            code, output = function(session.handle, piece, len(piece)), b""
        if code in _NOT_IN_PARTS and not self.begun:
            return ONE_PART_ONLY
        rv.check(code, name)
        return output

    def _feed_key(self, session: Session, key: Target) -> bytes:
        given = False

        def call(entry: Entry) -> bytes:
            nonlocal given
            if given:
                # It was another key's number, and its value cannot be taken back.
                raise KeyNotFound(f"{key} changed while it was digested")
            given = True
            code = session.functions.C_DigestKey(session.handle, entry.handle)
            rv.check(code, "C_DigestKey")
            return b""

        # As for what destroys: nobody in this process frees the number meanwhile.
        with self._plan.cache.destroying:
            return with_object(session, self._plan.cache, key, _SECRET, call)

    def _finish(self, session: Session, before: bytes) -> Any:
        plan = self._plan
        name = f"C_{plan.operation.name}Final"
        function = getattr(session.functions, name)
        if plan.operation is VERIFY:
            # What is no DER is no signature either: a length that fits no key.
            raw = plan.signature
            if self._coder is not None:
                raw = self._coder.decode(raw) or b""
            code = function(session.handle, raw, len(raw))
            self._active = False
            return operations.is_right(code, name)
        code, output = self._with_output(
            lambda buffer, length: function(session.handle, buffer, length), 0
        )
        self._active = False
        rv.check(code, name)
        if self._coder is not None:
            output = self._coder.encode(output)
        return before + output

    # -- What each call needs -----------------------------------------------------

    def _guarded(self, session: Session, call: Callable[[], T]) -> T:
        """Make a call with the key of the first one, and be sure it was that key."""
        plan, target = self._plan, self._plan.target
        if isinstance(target, SessionObject):
            with target.owner.used():
                target.check(session.epoch, session.generation)
                result = call()
                if target.destroyed or target.owner.gone:
                    raise SessionObjectDestroyed(GONE)
                return result
        result = call()
        mark = plan.cache.mark
        if self._entry is not None and (mark < 0 or mark != self._mark):
            if not plan.cache.verify(session, self._entry):
                self.key_gone = True
                message = f"{target} went from the token in the middle of the data"
                raise KeyNotFound(message)
            self._mark = mark
        return result

    def _with_output(
        self, call: Callable[[Any, Any], int], size: int
    ) -> tuple[int, bytes]:
        buffer = self._output_buffer(size + _ROOM - PIECE)
        length = c.c_ulong(len(buffer))
        code = call(buffer, c.byref(length))
        if code == _TOO_SMALL:
            # A module that gives nothing before the end wants room for all so far.
            buffer = self._output_buffer(max(length.value, 2 * len(buffer)))
            length.value = len(buffer)
            code = call(buffer, c.byref(length))
        return code, c.string_at(buffer, length.value) if code == 0 else b""

    def _output_buffer(self, size: int) -> Any:
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = c.create_string_buffer(max(size, _ROOM))
        return self._buffer
