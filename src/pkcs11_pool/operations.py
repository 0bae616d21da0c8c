"""What each operation does on its session: which ``C_`` functions, in which order.

An operation gets a session that nobody else uses, and runs on a worker thread.
Sign, verify, encrypt, decrypt, digest and random, the hot ones, go straight
through the function list, without the size query that python-pkcs11 makes; the
rest is python-pkcs11 on a key that is bound to the session.
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

from pkcs11_pool import cryptoki, rv
from pkcs11_pool.errors import InvalidOption, KeyNotFound, PinRefused
from pkcs11_pool.keys import KeySpec, SessionObject, narrowed
from pkcs11_pool.pins import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pkcs11_pool.keys import Entry, HandleCache, Target
    from pkcs11_pool.pins import Pin
    from pkcs11_pool.session import Session

T = TypeVar("T")

_ED25519: Final = 32
"""Bytes of an Ed25519 public key."""

_ROOM: Final = 64 * 1024
"""Larger than any signature (SLH-DSA has 49,856 bytes)."""
_OVERHEAD: Final = 2048
"""What an encryption adds at most: a block, a tag, an RSA modulus."""
_TRIES: Final = 4
_TOO_SMALL: Final = rv.CODES["CKR_BUFFER_TOO_SMALL"]
_DEAD: Final = frozenset(
    rv.CODES[name]
    for name in (
        "CKR_KEY_HANDLE_INVALID",
        "CKR_OBJECT_HANDLE_INVALID",
        "CKR_WRAPPING_KEY_HANDLE_INVALID",
        "CKR_UNWRAPPING_KEY_HANDLE_INVALID",
    )
)
_WRONG_SIGNATURE: Final = frozenset(
    {rv.CODES["CKR_SIGNATURE_INVALID"], rv.CODES["CKR_SIGNATURE_LEN_RANGE"]}
)
_WRITTEN_BY_THE_MODULE: Final = frozenset({Mechanism.AES_GCM, Mechanism.AES_CCM})
"""Mechanisms into whose parameter some HSMs write, so it is packed for each call."""

PRIVATE_OR_SECRET: Final = (int(ObjectClass.PRIVATE_KEY), int(ObjectClass.SECRET_KEY))
PUBLIC_OR_SECRET: Final = (int(ObjectClass.PUBLIC_KEY), int(ObjectClass.SECRET_KEY))


class _Scratch(threading.local):
    """One worker's buffers, made once: making them costs as much as a call."""

    def __init__(self) -> None:
        self.buffer = c.create_string_buffer(_ROOM)
        self.address = c.addressof(self.buffer)
        self.length = c.c_ulong()
        self.length_ref = c.byref(self.length)


_scratch = _Scratch()
_packed: dict[tuple[Any, ...], Any] = {}
_MOST_PACKED: Final = 256


def _mechanism(
    key_type: Any, known: Mapping[Any, Any], mechanism: Any, param: Any
) -> tuple[object, int]:
    """A packed mechanism and its address; kept where it can be used again."""
    reusable = mechanism not in _WRITTEN_BY_THE_MODULE and (
        param is None or isinstance(param, tuple)
    )
    key = (key_type, id(known), mechanism, param)
    if reusable and (kept := _packed.get(key)) is not None:
        pair: tuple[object, int] = kept
        return pair
    packed = cryptoki.pack_mechanism(key_type, dict(known), mechanism, param)
    pair = (packed, cryptoki.mechanism_address(packed))
    if reusable:
        if len(_packed) >= _MOST_PACKED:
            _packed.clear()
        _packed[key] = pair
    return pair


def with_object(
    session: Session,
    cache: HandleCache,
    target: Target,
    classes: tuple[int, ...] | None,
    call: Callable[[Entry], T],
) -> T:
    """Make a call with an object's number, and be sure it was that object's.

    A dead number is looked up once more. When objects changed during the call,
    the number is verified again before the result leaves; a result that another
    object may have made is thrown away and the call made anew.
    """
    if isinstance(target, SessionObject):
        return _with_session_object(session, target, call)
    for attempt in range(_TRIES):
        entry = cache.entry(session, target, classes)
        mark = cache.mark()
        try:
            result = call(entry)
        except p11.PKCS11Error as error:
            dead = rv.code_of(error) in _DEAD
            if not dead and (_unmoved(cache, mark) or cache.verify(session, entry)):
                raise
            if attempt == _TRIES - 1:
                raise
        else:
            if _unmoved(cache, mark) or cache.verify(session, entry):
                return result
        cache.drop(narrowed(target, classes))
    message = f"{target} changes on the token faster than it can be used"
    raise KeyNotFound(message)


def _unmoved(cache: HandleCache, mark: int) -> bool:
    return mark >= 0 and mark == cache.mark()


def _with_session_object(
    session: Session, target: SessionObject, call: Callable[[Entry], T]
) -> T:
    with target.owner.used():
        target.check(session.epoch, session.generation)
        result = call(target.entry)
        # Destroyed meanwhile: the number may have been another object's by then.
        target.check(session.epoch, session.generation)
        return result


def sign(
    session: Session,
    cache: HandleCache,
    target: Target,
    data: bytes,
    *,
    mechanism: Mechanism | None,
    param: Any,
    pin: Pin | None,
    der: bool,
) -> bytes:
    """``C_SignInit``, ``C_Sign``."""

    def call(entry: Entry) -> bytes:
        entry.require(Attribute.SIGN, target)
        f = session.functions
        kept, address = _mechanism(
            entry.key_type, defaults.DEFAULT_SIGN_MECHANISMS, mechanism, param
        )
        rv.check(f.C_SignInit(session.handle, address, entry.handle), "C_SignInit")
        if pin is not None:
            reaffirm(session, pin)
        raw = _output(f.C_Sign, "C_Sign", session.handle, data, _ROOM)
        del kept
        return _coder(entry.key_type).encode(raw) if der else raw

    return with_object(session, cache, target, PRIVATE_OR_SECRET, call)


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
        entry.require(Attribute.VERIFY, target)
        raw = _coder(entry.key_type).decode(signature) if der else signature
        if raw is None:
            return False
        f = session.functions
        kept, address = _mechanism(
            entry.key_type, defaults.DEFAULT_SIGN_MECHANISMS, mechanism, param
        )
        rv.check(f.C_VerifyInit(session.handle, address, entry.handle), "C_VerifyInit")
        code = f.C_Verify(session.handle, data, len(data), raw, len(raw))
        del kept
        if code not in _WRONG_SIGNATURE:
            rv.check(code, "C_Verify")
        return code == 0

    return with_object(session, cache, target, PUBLIC_OR_SECRET, call)


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
        entry.require(Attribute.ENCRYPT, target)
        f = session.functions
        kept, address = _mechanism(
            entry.key_type, defaults.DEFAULT_ENCRYPT_MECHANISMS, mechanism, param
        )
        code = f.C_EncryptInit(session.handle, address, entry.handle)
        rv.check(code, "C_EncryptInit")
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
    pin: Pin | None,
) -> bytes:
    """``C_DecryptInit``, ``C_Decrypt``."""

    def call(entry: Entry) -> bytes:
        entry.require(Attribute.DECRYPT, target)
        f = session.functions
        kept, address = _mechanism(
            entry.key_type, defaults.DEFAULT_ENCRYPT_MECHANISMS, mechanism, param
        )
        code = f.C_DecryptInit(session.handle, address, entry.handle)
        rv.check(code, "C_DecryptInit")
        if pin is not None:
            reaffirm(session, pin)
        room = len(data) + _OVERHEAD
        raw = _output(f.C_Decrypt, "C_Decrypt", session.handle, data, room)
        del kept
        return raw

    return with_object(session, cache, target, PRIVATE_OR_SECRET, call)


def digest(session: Session, data: bytes, mechanism: Mechanism, param: Any) -> bytes:
    """``C_DigestInit``, ``C_Digest``."""
    f = session.functions
    kept, address = _mechanism(None, {}, mechanism, param)
    rv.check(f.C_DigestInit(session.handle, address), "C_DigestInit")
    raw = _output(f.C_Digest, "C_Digest", session.handle, data, _OVERHEAD)
    del kept
    return raw


def generate_random(session: Session, count: int) -> bytes:
    """``C_GenerateRandom``, for ``count`` bytes."""
    buffer = c.create_string_buffer(count)
    code = session.functions.C_GenerateRandom(session.handle, buffer, count)
    rv.check(code, "C_GenerateRandom")
    return buffer.raw


def _output(
    function: Callable[..., int], name: str, handle: int, data: bytes, room: int
) -> bytes:
    """A call with an output, without asking its size first."""
    scratch = _scratch
    length = scratch.length
    buffer: Any = scratch.address
    if room > _ROOM:
        buffer = c.create_string_buffer(room)
    length.value = max(room, _ROOM)
    code = function(handle, data, len(data), buffer, scratch.length_ref)
    if code == _TOO_SMALL:
        # The operation is still active, and the length that it needs is told.
        room = max(length.value, room * 2)
        buffer = c.create_string_buffer(room)
        length.value = room
        code = function(handle, data, len(data), buffer, scratch.length_ref)
    rv.check(code, name)
    return c.string_at(buffer, length.value)


def reaffirm(session: Session, pin: Pin) -> None:
    """The login that ``CKA_ALWAYS_AUTHENTICATE`` wants, between Init and the call."""
    code = raw_login(
        session.functions, session.handle, cryptoki.CKU_CONTEXT_SPECIFIC, pin
    )
    if code == rv.CODES["CKR_PIN_INCORRECT"]:
        message = "the token refused the PIN for this key"
        raise PinRefused(message) from rv.error_of(code, "C_Login")
    rv.check(code, "C_Login")


def raw_login(
    functions: cryptoki.FunctionList, handle: int, user: int, pin: Pin
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


def _coder(key_type: Any) -> _Coder:
    try:
        return _CODERS[key_type]
    except KeyError:
        message = 'signature_format="der" is for EC and DSA keys only'
        raise InvalidOption(message) from None


def bound(session: Session, entry: Entry) -> Any:
    """A python-pkcs11 key on this session, without a call."""
    return cryptoki.bind_key(
        session.p11, entry.handle, entry.object_class, entry.key_type
    )


def wrap_key(
    session: Session,
    cache: HandleCache,
    target: Target,
    wrapped: Target,
    *,
    mechanism: Mechanism | None,
    param: Any,
) -> bytes:
    """``C_WrapKey``, twice: for the size, and for the key."""

    def call(entry: Entry) -> bytes:
        entry.require(Attribute.WRAP, target)

        def inner(other: Entry) -> bytes:
            result: bytes = bound(session, entry).wrap_key(
                bound(session, other), mechanism=mechanism, mechanism_param=param
            )
            return result

        return with_object(session, cache, wrapped, PRIVATE_OR_SECRET, inner)

    return with_object(session, cache, target, PUBLIC_OR_SECRET, call)


def make_with_key(
    session: Session,
    cache: HandleCache,
    target: Target,
    *,
    classes: tuple[int, ...],
    capability: Attribute | None,
    make: Callable[[Any], Any],
) -> tuple[Any, list[Entry]]:
    """Unwrap, derive, encapsulate or decapsulate: a key that makes another.

    Gives what python-pkcs11 gave, and an entry for each object in it. An object
    that a wrong number made is destroyed before the call is made anew.
    """
    made: list[tuple[Any, list[Entry]]] = []

    def call(entry: Entry) -> tuple[Any, list[Entry]]:
        for _, leftover in made:
            _destroy_all(session, leftover)
        made.clear()
        entry.require(capability, target)
        with cache.changing():
            result = make(bound(session, entry))
        objects = result if isinstance(result, tuple) else (result,)
        entries = [
            cache.describe(session, item.handle)
            for item in objects
            if not isinstance(item, bytes)
        ]
        made.append((result, entries))
        return made[-1]

    return with_object(session, cache, target, classes, call)


def make(
    session: Session, cache: HandleCache, call: Callable[[Any], Any]
) -> list[Entry]:
    """Generate or create objects: an entry for each one that was made."""
    with cache.changing():
        result = call(session.p11)
    objects = result if isinstance(result, tuple) else (result,)
    return [cache.describe(session, item.handle) for item in objects]


def _destroy_all(session: Session, entries: Sequence[Entry]) -> None:
    for entry in entries:
        session.functions.C_DestroyObject(session.handle, entry.handle)


def find(
    session: Session,
    cache: HandleCache,
    template: Sequence[tuple[int, bytes]],
) -> list[Entry]:
    """``C_FindObjects…``, and one ``C_GetAttributeValue`` for each object."""
    with cache.changing():
        handles = session.find(template)
    found = []
    for handle in handles:
        try:
            found.append(cache.describe(session, handle))
        except p11.ObjectHandleInvalid:
            continue  # destroyed since the search, by somebody else
    return found


def attributes(
    session: Session,
    cache: HandleCache,
    target: Target,
    kinds: Sequence[Attribute] | None,
) -> dict[Attribute, Any]:
    """``C_GetAttributeValue``; attributes that the token does not tell are left out."""

    def call(entry: Entry) -> dict[Attribute, Any]:
        wanted = kinds if kinds is not None else tuple(map(Attribute, entry.seen))
        packed = session.attributes(entry.handle, [int(kind) for kind in wanted])
        unpack = cryptoki.MAPPER.unpack_attributes
        return {Attribute(k): unpack(Attribute(k), v) for k, v in packed.items()}

    return with_object(session, cache, target, None, call)


def destroy(session: Session, cache: HandleCache, target: Target) -> None:
    """``C_DestroyObject``, of a number that was verified just before.

    Number and object cannot part in between: calls of this process that destroy
    follow one another.
    """
    if isinstance(target, SessionObject):
        with target.owner.used(), cache.changing():
            target.check(session.epoch, session.generation)
            target.destroyed = True
            handle = target.entry.handle
            code = session.functions.C_DestroyObject(session.handle, handle)
            target.destroyed = code == 0
            rv.check(code, "C_DestroyObject")
        return
    with cache.destroying, cache.changing():
        entry = cache.entry(session, target, None)
        code = session.functions.C_DestroyObject(session.handle, entry.handle)
        cache.drop(target)
        rv.check(code, "C_DestroyObject")


def public_key_der(session: Session, cache: HandleCache, target: Target) -> bytes:
    """The SubjectPublicKeyInfo (RFC 5280) of a key, or of a private key's public half.

    ``C_GetAttributeValue``; for a private key also a search by its id or label.
    """

    def call(entry: Entry) -> dict[Attribute, Any]:
        if entry.object_class == ObjectClass.PRIVATE_KEY:
            entry = cache.entry(session, _public_half(entry), None)
        kinds = (
            Attribute.KEY_TYPE,
            Attribute.MODULUS,
            Attribute.PUBLIC_EXPONENT,
            Attribute.EC_PARAMS,
            Attribute.EC_POINT,
            Attribute.PRIME,
            Attribute.SUBPRIME,
            Attribute.BASE,
            Attribute.VALUE,
        )
        packed = session.attributes(entry.handle, [int(kind) for kind in kinds])
        unpack = cryptoki.MAPPER.unpack_attributes
        return {Attribute(k): unpack(Attribute(k), v) for k, v in packed.items()}

    classes: tuple[int, ...] = (
        int(ObjectClass.PUBLIC_KEY),
        int(ObjectClass.PRIVATE_KEY),
    )
    if isinstance(target, KeySpec) and target.classes is None:
        classes = classes[:1]
    return spki(with_object(session, cache, target, classes, call))


def _public_half(entry: Entry) -> KeySpec:
    for kind in (Attribute.ID, Attribute.LABEL):
        if value := entry.seen.get(kind):
            return KeySpec(((int(kind), value),), (int(ObjectClass.PUBLIC_KEY),))
    message = "the private key has neither id nor label to find its public key by"
    raise KeyNotFound(message)


def spki(seen: Mapping[Attribute, Any]) -> bytes:
    """Encode the public values of a key as SubjectPublicKeyInfo (RFC 5280)."""
    # Rarely used, and slow to import; python-pkcs11 itself stands on it.
    from asn1crypto import core  # noqa: PLC0415
    from asn1crypto import keys as asn1  # noqa: PLC0415

    key_type = seen.get(Attribute.KEY_TYPE)
    if key_type == KeyType.RSA:
        numbers = {
            "modulus": int.from_bytes(seen[Attribute.MODULUS], "big"),
            "public_exponent": int.from_bytes(seen[Attribute.PUBLIC_EXPONENT], "big"),
        }
        info = asn1.PublicKeyInfo.wrap(asn1.RSAPublicKey(numbers), "rsa")
        return bytes(info.dump())
    point = seen.get(Attribute.EC_POINT)
    if key_type == KeyType.EC:
        return ec.encode_ec_public_key(seen)  # type: ignore[arg-type]  # reads by [] only
    if key_type == KeyType.EC_EDWARDS and point is not None:
        raw = bytes(core.OctetString.load(point))
        algorithm = {"algorithm": "ed25519" if len(raw) == _ED25519 else "ed448"}
        info = asn1.PublicKeyInfo({"algorithm": algorithm, "public_key": raw})
        return bytes(info.dump())
    raise InvalidOption(f"a key of type {key_type!r} has no known public form")
