"""What makes, finds, describes and destroys objects, on its session.

Everything here may make the module hand out numbers or change objects, and says
so to the handle cache. Runs on a worker thread.
"""

from __future__ import annotations

import ctypes as c
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import exceptions as p11
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import KeyType
from pkcs11.util import ec

from pkcs11_pool.cryptoki import interface, rv, vendor
from pkcs11_pool.cryptoki.keys import KeySpec, SessionObject
from pkcs11_pool.cryptoki.operations import (
    PRIVATE_OR_SECRET,
    PUBLIC_OR_SECRET,
)
from pkcs11_pool.cryptoki.using import with_object
from pkcs11_pool.errors import InvalidOption, KeyNotFound, OutcomeUnknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pkcs11.mechanisms import Mechanism

    from pkcs11_pool.cryptoki.keys import Entry, HandleCache, Target
    from pkcs11_pool.cryptoki.session import Session

_PARAMETERS: Final = (
    Attribute.BASE,
    Attribute.PRIME,
    Attribute.SUBPRIME,
    Attribute.EC_PARAMS,
)
_PARAMETER_CLASSES: Final = (int(ObjectClass.DOMAIN_PARAMETERS),)
_ED25519: Final = 32
"""Bytes of an Ed25519 public key."""


def bound(session: Session, entry: Entry) -> Any:
    """A python-pkcs11 key on this session, without a call."""
    return interface.bind_key(
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
            with interface.argument_errors():
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
        with cache.changing(), interface.argument_errors(), _making():
            result = make(bound(session, entry))
        objects = result if isinstance(result, tuple) else (result,)
        handles = [item.handle for item in objects if not isinstance(item, bytes)]
        entries = _described(session, cache, handles)
        made.append((result, entries))
        return made[-1]

    try:
        return with_object(session, cache, target, classes, call)
    except BaseException:
        _undo(session, cache, [entry for _, entries in made for entry in entries])
        raise


def make_from_parameters(
    session: Session,
    cache: HandleCache,
    target: Target,
    *,
    make: Callable[..., Any],
) -> list[Entry]:
    """``C_GetAttributeValue`` of domain parameters, ``C_GenerateKeyPair``."""
    made: list[Entry] = []

    def call(entry: Entry) -> list[Entry]:
        _destroy_all(session, made)
        packed = session.attributes(entry.handle, [int(kind) for kind in _PARAMETERS])
        with cache.changing(), interface.argument_errors(), _making():
            pair = make(session.p11, key_type=entry.key_type, values=unpacked(packed))
        made[:] = _described(session, cache, [item.handle for item in pair])
        return made

    try:
        return with_object(session, cache, target, _PARAMETER_CLASSES, call)
    except BaseException:
        _undo(session, cache, made)
        raise


def copy(
    session: Session,
    cache: HandleCache,
    target: Target,
    template: Sequence[tuple[int, bytes]],
) -> Entry:
    """``C_CopyObject``."""
    made: list[Entry] = []

    def call(entry: Entry) -> Entry:
        _destroy_all(session, made)
        array, keep = interface.pack_template(template)
        number = c.c_ulong()
        with cache.changing():
            code = session.functions.C_CopyObject(
                session.handle, entry.handle, array, len(keep), c.byref(number)
            )
        rv.check(code, "C_CopyObject")
        made[:] = _described(session, cache, [number.value])
        return made[0]

    try:
        return with_object(session, cache, target, None, call)
    except BaseException:
        _undo(session, cache, made)
        raise


def make(
    session: Session, cache: HandleCache, call: Callable[[Any], Any]
) -> list[Entry]:
    """Generate or create objects: an entry for each one that was made."""
    with cache.changing(), interface.argument_errors(), _making():
        result = call(session.p11)
    objects = result if isinstance(result, tuple) else (result,)
    return _described(session, cache, [item.handle for item in objects])


def _described(
    session: Session, cache: HandleCache, handles: Sequence[int]
) -> list[Entry]:
    """What the token says of objects that it has just made, or changed.

    Raises:
        OutcomeUnknown: It says nothing: the call must not be made again.
    """
    try:
        return [cache.describe(session, handle) for handle in handles]
    except p11.PKCS11Error as error:
        raise _untold(error) from error


@contextmanager
def _making() -> Iterator[None]:
    """Around what python-pkcs11 makes and then looks at, in one.

    The calls that make an object do not answer with this: it is of the look.
    """
    try:
        yield
    except p11.ObjectHandleInvalid as error:
        raise _untold(error) from error


def _untold(error: p11.PKCS11Error) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"it was made, and then the token told nothing of it ({rv.text_of(error)}): "
        "look for it by its label or id before it is made again: "
        "await pool.find({Attribute.LABEL: …})"
    )


def _destroy_all(session: Session, entries: Sequence[Entry]) -> None:
    """Destroy what was made with a number that is not sure any more.

    Raises:
        OutcomeUnknown: It is left on the token, as far as is known. Were it made
            again, there would be two.
    """
    for entry in entries:
        code = session.functions.C_DestroyObject(session.handle, entry.handle)
        if code:
            error = rv.error_of(code, "C_DestroyObject")
            raise _untold(error) from error


def _undo(session: Session, cache: HandleCache, made: Sequence[Entry]) -> None:
    """Leave nothing of what was made with a number that was another object's.

    The caller is told of an error: to him nothing was made.
    """
    if made:
        with cache.changing():
            _destroy_all(session, made)


def find(
    session: Session,
    cache: HandleCache,
    template: Sequence[tuple[int, bytes]],
) -> list[Entry]:
    """``C_FindObjects…``, and one ``C_GetAttributeValue`` for each object."""
    with cache.changing():
        handles = session.find((*template, *cache.hidden))
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
        wanted = tuple(entry.seen) if kinds is None else kinds
        packed = session.attributes(entry.handle, [int(kind) for kind in wanted])
        return unpacked(packed)

    return with_object(session, cache, target, None, call)


def unpacked(packed: Mapping[int, bytes]) -> dict[Attribute, Any]:
    """Attributes as Python has them."""
    unpack = interface.MAPPER.unpack_attributes
    found = ((vendor.attribute(kind), value) for kind, value in packed.items())
    return {kind: unpack(kind, value) for kind, value in found}


def set_attributes(
    session: Session,
    cache: HandleCache,
    target: Target,
    template: Sequence[tuple[int, bytes]],
) -> Entry:
    """``C_SetAttributeValue``, of a number that was verified just before.

    As for :func:`destroy`, number and object cannot part in between. Gives the object
    as it is afterwards: its name may be another now.
    """
    array, keep = interface.pack_template(template)

    def change(handle: int) -> Entry:
        code = session.functions.C_SetAttributeValue(
            session.handle, handle, array, len(keep)
        )
        rv.check(code, "C_SetAttributeValue")
        return _described(session, cache, [handle])[0]

    if isinstance(target, SessionObject):
        with target.owner.used(), cache.changing():
            target.check(session.epoch, session.generation)
            with target.told_when_gone():
                target.entry = change(target.entry.handle)
            return target.entry
    with cache.destroying, cache.changing():
        changed = change(cache.entry(session, target, None).handle)
        if target.origin is None:
            # It may be another object's name now, or nobody's.
            cache.drop(target)
        else:
            cache.remember(target, changed)
        return changed


def destroy(session: Session, cache: HandleCache, target: Target) -> None:
    """``C_DestroyObject``, of a number that was verified just before.

    Number and object cannot part in between: calls of this process that destroy
    follow one another.
    """
    if isinstance(target, SessionObject):
        with target.owner.used(), cache.changing():
            target.check(session.epoch, session.generation)
            target.doomed = target.destroyed = True
            handle = target.entry.handle
            code = session.functions.C_DestroyObject(session.handle, handle)
            target.destroyed = code == 0
            with target.told_when_gone():
                rv.check(code, "C_DestroyObject")
        return
    with cache.destroying, cache.changing():
        entry = cache.entry(session, target, None)
        code = session.functions.C_DestroyObject(session.handle, entry.handle)
        cache.drop(target)
        rv.check(code, "C_DestroyObject")
        if target.origin is not None:
            target.origin.destroyed = True


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
        return unpacked(packed)

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
    if key_type == KeyType.DSA:
        names = {"p": Attribute.PRIME, "q": Attribute.SUBPRIME, "g": Attribute.BASE}
        params = {n: int.from_bytes(seen[kind], "big") for n, kind in names.items()}
        value = int.from_bytes(seen[Attribute.VALUE], "big")
        algorithm = {"algorithm": "dsa", "parameters": asn1.DSAParams(params)}
        info = asn1.PublicKeyInfo(
            {"algorithm": algorithm, "public_key": core.Integer(value)}
        )
        return bytes(info.dump())
    point = seen.get(Attribute.EC_POINT)
    if key_type == KeyType.EC:
        return ec.encode_ec_public_key(seen)  # type: ignore[arg-type]  # reads by [] only
    if key_type == KeyType.EC_EDWARDS and point is not None:
        raw = bytes(core.OctetString.load(point))
        curve = {"algorithm": "ed25519" if len(raw) == _ED25519 else "ed448"}
        info = asn1.PublicKeyInfo({"algorithm": curve, "public_key": raw})
        return bytes(info.dump())
    raise InvalidOption(f"a key of type {key_type!r} has no known public form")
