"""Sign, verify, encrypt, decrypt, digest and random: the hot operations.

An operation gets a session that nobody else uses, and runs on a worker thread.
These go straight through the function list, without the size query that
python-pkcs11 makes; the others are in ``objects``.
"""

from __future__ import annotations

import ctypes as c
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pkcs11 import defaults
from pkcs11 import exceptions as p11
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.util import dsa, ec

from pkcs11_pool.cryptoki import families, interface, recovery, rv
from pkcs11_pool.cryptoki.keys import narrowed
from pkcs11_pool.cryptoki.using import stands, with_object
from pkcs11_pool.errors import (
    InvalidOption,
    LoginRequired,
)
from pkcs11_pool.pins import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pkcs11_pool.cryptoki.keys import Entry, HandleCache, KeySpec, Target
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.pins import Pin

    ContextLogin = Callable[[Session, Entry], None]

T = TypeVar("T")

_ROOM: Final = 64 * 1024
"""Larger than any signature (SLH-DSA has 49,856 bytes)."""
_OVERHEAD: Final = 2048
"""What an encryption adds at most: a block, a tag, an RSA modulus."""
_FEW: Final = 8
"""Random bytes that every module makes: Google Cloud KMS makes no fewer."""
_TOO_SMALL: Final = rv.CODES["CKR_BUFFER_TOO_SMALL"]
_WRONG_SIGNATURE: Final = frozenset(
    {rv.CODES["CKR_SIGNATURE_INVALID"], rv.CODES["CKR_SIGNATURE_LEN_RANGE"]}
)
_WRITTEN_BY_THE_MODULE: Final = frozenset({Mechanism.AES_GCM, Mechanism.AES_CCM})
"""Mechanisms into whose parameter some HSMs write, so it is packed for each call."""


class _Use:
    """What a key must allow, and the mechanisms that its type has for it."""

    def __init__(self, capability: Attribute, mechanisms: Mapping[Any, Any]) -> None:
        self.capability = capability
        self.mechanisms = mechanisms


_SIGN: Final = _Use(Attribute.SIGN, defaults.DEFAULT_SIGN_MECHANISMS)
_VERIFY: Final = _Use(Attribute.VERIFY, defaults.DEFAULT_SIGN_MECHANISMS)
_ENCRYPT: Final = _Use(Attribute.ENCRYPT, defaults.DEFAULT_ENCRYPT_MECHANISMS)
_DECRYPT: Final = _Use(Attribute.DECRYPT, defaults.DEFAULT_ENCRYPT_MECHANISMS)

PRIVATE_OR_SECRET: Final = (int(ObjectClass.PRIVATE_KEY), int(ObjectClass.SECRET_KEY))
PUBLIC_OR_SECRET: Final = (int(ObjectClass.PUBLIC_KEY), int(ObjectClass.SECRET_KEY))


class _Scratch(threading.local):
    """One worker's buffers, made once: making them costs as much as a call."""

    def __init__(self) -> None:
        buffer, length = c.create_string_buffer(_ROOM), c.c_ulong()
        self.address = c.addressof(buffer)
        # Together: finding each of them in its thread costs as much as using it.
        self.parts = (memoryview(buffer), self.address, length, c.byref(length))


_scratch = _Scratch()
_packed: dict[tuple[Any, ...], Any] = {}
_MOST_PACKED: Final = 256


def packed(
    key_type: Any, known: Mapping[Any, Any], mechanism: Any, param: Any
) -> tuple[object, int]:
    """A packed mechanism and its address; kept where it can be used again."""
    reusable = mechanism not in _WRITTEN_BY_THE_MODULE and (
        param is None or isinstance(param, tuple)
    )
    key = (key_type, id(known), mechanism, param)
    try:
        kept = _packed.get(key) if reusable else None
    except TypeError:
        # Something in the parameter can change.
        reusable, kept = False, None
    if kept is not None:
        pair: tuple[object, int] = kept
        return pair
    families.check(key_type, mechanism)
    packed = interface.pack_mechanism(key_type, dict(known), mechanism, param)
    pair = (packed, interface.mechanism_address(packed))
    if reusable:
        if len(_packed) >= _MOST_PACKED:
            _packed.clear()
        _packed[key] = pair
    return pair


def way(
    entry: Entry, target: object, use: _Use, mechanism: Any, param: Any
) -> tuple[object, int]:
    """The packed mechanism for a use of a key, and its address.

    Kept with the key where there is no parameter: that it may be used so is known
    then, too.

    Raises:
        KeyFunctionNotPermitted: Its attributes say no.
    """
    if param is None:
        kept = entry.ways.get((use, mechanism))
        if kept is not None:
            return kept
    entry.require(use.capability, target)
    pair = packed(entry.key_type, use.mechanisms, mechanism, param)
    if param is None and mechanism not in _WRITTEN_BY_THE_MODULE:
        entry.ways[use, mechanism] = pair
    return pair


def sign(
    session: Session,
    cache: HandleCache,
    target: Target,
    data: bytes,
    *,
    mechanism: Mechanism | None,
    param: Any,
    login: ContextLogin | None,
    der: bool,
) -> bytes:
    """``C_SignInit``, ``C_Sign``."""

    def call(entry: Entry) -> bytes:
        if entry.always_authenticate:
            check_login(entry, target, login)
        f, handle = session.functions, session.handle
        # `way` finds nothing else where there is a parameter.
        kept = entry.ways.get((_SIGN, mechanism)) if param is None else None
        if kept is None:
            kept = way(entry, target, _SIGN, mechanism, param)
        code = f.C_SignInit(handle, kept[1], entry.handle)
        if code:
            raise rv.error_of(code, "C_SignInit")
        if login is not None:
            _log_in(login, session, entry, f.C_Sign)
        raw = _output(f.C_Sign, "C_Sign", handle, data, _ROOM)
        return coder(entry.key_type).encode(raw) if der else raw

    return with_object(session, cache, target, PRIVATE_OR_SECRET, call)


class Signing:
    """Signatures of one key in one way: what is the same for each is found once.

    While nothing has changed since the last one, the key's number and the packed
    mechanism are those of then. All else goes the long way, through :func:`sign`.
    """

    def __init__(
        self, cache: HandleCache, spec: KeySpec, mechanism: Mechanism | None
    ) -> None:
        self._cache = cache
        self._spec = spec
        self._mechanism = mechanism
        # The key as it was used last, and the mechanism; none that wants its PIN.
        self._known: tuple[Entry, tuple[object, int]] | None = None

    def sign(self, data: bytes, session: Session) -> bytes:
        """``C_SignInit``, ``C_Sign``."""
        cache = self._cache
        if (known := self._known) is None or not cache.is_sure(known[0], session):
            return self._find_and_sign(data, session)
        entry, packed = known
        mark = entry.mark
        try:
            raw = _signature(session, entry, packed, data)
        except p11.PKCS11Error as error:
            if stands(session, cache, self._spec, entry, mark, error):
                raise
        else:
            if mark == cache.mark >= 0 or cache.verify(session, entry):
                return raw
        self._known = None
        cache.drop(narrowed(self._spec, PRIVATE_OR_SECRET))
        return self._find_and_sign(data, session)

    def _find_and_sign(self, data: bytes, session: Session) -> bytes:
        spec = self._spec

        def call(entry: Entry) -> bytes:
            check_login(entry, spec, None)
            packed = way(entry, spec, _SIGN, self._mechanism, None)
            raw = _signature(session, entry, packed, data)
            self._known = entry, packed
            return raw

        return with_object(session, self._cache, spec, PRIVATE_OR_SECRET, call)


def _signature(
    session: Session, entry: Entry, packed: tuple[object, int], data: bytes
) -> bytes:
    f, handle = session.functions, session.handle
    code = f.C_SignInit(handle, packed[1], entry.handle)
    if code:
        raise rv.error_of(code, "C_SignInit")
    return _output(f.C_Sign, "C_Sign", handle, data, _ROOM)


def verify(
    session: Session,
    cache: HandleCache,
    target: Target,
    data: bytes,
    signature: bytes,
    *,
    mechanism: Mechanism | None,
    param: Any,
    der: bool,
) -> bool:
    """``C_VerifyInit``, ``C_Verify``."""

    def call(entry: Entry) -> bool:
        raw = coder(entry.key_type).decode(signature) if der else signature
        if raw is None:
            return False
        f = session.functions
        kept, address = way(entry, target, _VERIFY, mechanism, param)
        code = f.C_VerifyInit(session.handle, address, entry.handle)
        if code:
            raise rv.error_of(code, "C_VerifyInit")
        code = f.C_Verify(session.handle, data, len(data), raw, len(raw))
        del kept
        return is_right(code, "C_Verify")

    return with_object(session, cache, target, PUBLIC_OR_SECRET, call)


def is_right(code: int, function: str) -> bool:
    """Whether a signature is right, by what the token answered."""
    if code not in _WRONG_SIGNATURE:
        rv.check(code, function)
    return code == 0


def encrypt(
    session: Session,
    cache: HandleCache,
    target: Target,
    data: bytes,
    *,
    mechanism: Mechanism | None,
    param: Any,
) -> bytes:
    """``C_EncryptInit``, ``C_Encrypt``."""

    def call(entry: Entry) -> bytes:
        f = session.functions
        kept, address = way(entry, target, _ENCRYPT, mechanism, param)
        code = f.C_EncryptInit(session.handle, address, entry.handle)
        if code:
            raise rv.error_of(code, "C_EncryptInit")
        room = len(data) + _OVERHEAD
        raw = _output(f.C_Encrypt, "C_Encrypt", session.handle, data, room)
        del kept
        return raw

    return with_object(session, cache, target, PUBLIC_OR_SECRET, call)


def decrypt(
    session: Session,
    cache: HandleCache,
    target: Target,
    data: bytes,
    *,
    mechanism: Mechanism | None,
    param: Any,
    login: ContextLogin | None,
) -> bytes:
    """``C_DecryptInit``, ``C_Decrypt``."""

    def call(entry: Entry) -> bytes:
        if entry.always_authenticate:
            check_login(entry, target, login)
        f = session.functions
        kept, address = way(entry, target, _DECRYPT, mechanism, param)
        code = f.C_DecryptInit(session.handle, address, entry.handle)
        if code:
            raise rv.error_of(code, "C_DecryptInit")
        if login is not None:
            _log_in(login, session, entry, f.C_Decrypt)
        room = len(data) + _OVERHEAD
        raw = _output(f.C_Decrypt, "C_Decrypt", session.handle, data, room)
        del kept
        return raw

    return with_object(session, cache, target, PRIVATE_OR_SECRET, call)


def digest(session: Session, data: bytes, mechanism: Mechanism, param: Any) -> bytes:
    """``C_DigestInit``, ``C_Digest``."""
    f = session.functions
    kept, address = packed(None, {}, mechanism, param)
    code = f.C_DigestInit(session.handle, address)
    if code:
        raise rv.error_of(code, "C_DigestInit")
    raw = _output(f.C_Digest, "C_Digest", session.handle, data, _OVERHEAD)
    del kept
    return raw


def generate_random(session: Session, count: int) -> bytes:
    """``C_GenerateRandom``, for ``count`` bytes."""
    buffer = c.create_string_buffer(count)
    code = session.functions.C_GenerateRandom(session.handle, buffer, count)
    rv.check(code, "C_GenerateRandom")
    return buffer.raw


def seed_random(session: Session, seed: bytes) -> None:
    """``C_SeedRandom``."""
    code = session.functions.C_SeedRandom(session.handle, seed, len(seed))
    rv.check(code, "C_SeedRandom")


def touch(session: Session) -> None:
    """Calls that keep a session from being dropped as idle.

    ``C_GetSessionInfo`` and ``C_GenerateRandom``: some modules answer the first by
    themselves, and only the second reaches the device. Whether it has random numbers is
    of no matter here.
    """
    session.info()
    room = c.create_string_buffer(_FEW)
    code = session.functions.C_GenerateRandom(session.handle, room, _FEW)
    if recovery.fault_of(code).is_outage:
        raise rv.error_of(code, "C_GenerateRandom")


def _output(
    function: Callable[..., int], name: str, handle: int, data: bytes, room: int
) -> bytes:
    """A call with an output, without asking its size first."""
    if room > _ROOM:
        return _large_output(function, name, handle, data, room)
    view, address, length, length_ref = _scratch.parts
    length.value = _ROOM
    code = function(handle, data, len(data), address, length_ref)
    if code == _TOO_SMALL:
        # The operation is still active, and the length that it needs is told.
        room = max(length.value, room * 2)
        return _large_output(function, name, handle, data, room)
    if code:
        raise rv.error_of(code, name)
    return view[: length.value].tobytes()


def _large_output(
    function: Callable[..., int], name: str, handle: int, data: bytes, room: int
) -> bytes:
    """The same with a buffer of its own."""
    length = c.c_ulong(room)
    buffer = c.create_string_buffer(room)
    code = function(handle, data, len(data), buffer, c.byref(length))
    if code == _TOO_SMALL:
        length.value = max(length.value, room * 2)
        buffer = c.create_string_buffer(length.value)
        code = function(handle, data, len(data), buffer, c.byref(length))
    rv.check(code, name)
    return c.string_at(buffer, length.value)


def check_login(entry: Entry, target: object, login: ContextLogin | None) -> None:
    """Refuse a use without the PIN that the key wants each time.

    Raises:
        LoginRequired: It has ``CKA_ALWAYS_AUTHENTICATE``, and there is no PIN.
    """
    if login is None and entry.always_authenticate:
        message = f"key {target} wants the PIN each time it is used: give pin="
        raise LoginRequired(message)


def _log_in(
    login: ContextLogin, session: Session, entry: Entry, whole: Callable[..., int]
) -> None:
    """The login between Init and the call; refused, it ends what Init began."""
    try:
        login(session, entry)
    except BaseException:
        length = c.c_ulong(_ROOM)
        whole(session.handle, b"", 0, _scratch.address, c.byref(length))
        raise


def raw_login(
    functions: interface.FunctionList, handle: int, user: int, pin: Pin
) -> int:
    """``C_Login``; the code. Raises nothing, so no traceback holds the PIN."""
    if not isinstance(pin, Secret):
        return functions.C_Login(handle, user, None, 0)
    return functions.C_Login(handle, user, pin.encoded(), len(pin))


class _Coder:
    """DER of the signatures that are two numbers, for one family of keys."""

    def __init__(self, encode: Any, decode: Any) -> None:
        self.encode = encode
        self._decode = decode

    def decode(self, signature: bytes) -> bytes | None:
        """The raw form, or None for what is no DER signature."""
        try:
            raw: bytes = self._decode(signature)
        except (ValueError, TypeError):
            return None
        return raw


_CODERS: Final = {
    KeyType.EC: _Coder(ec.encode_ecdsa_signature, ec.decode_ecdsa_signature),
    KeyType.DSA: _Coder(dsa.encode_dsa_signature, dsa.decode_dsa_signature),
}


def coder(key_type: Any) -> _Coder:
    """What makes DER of this key's signatures, and takes it apart.

    Raises:
        InvalidOption: Its signatures are not two numbers.
    """
    try:
        return _CODERS[key_type]
    except KeyError:
        message = 'signature_format="der" is for EC and DSA keys only'
        raise InvalidOption(message) from None
