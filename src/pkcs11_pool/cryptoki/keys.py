"""Which number a key has just now, and whether that number can be trusted.

A number is not an identity: several modules give the number of a destroyed
object to the next one, and a stale number then signs with the wrong key and no
error. So a number is cached together with

* the generation of the module and the login epoch that it was found in, and it
  is never used outside them;
* the *mark*: it moves with everything of this process that can make the module
  hand out numbers or change objects. A number seen under an older mark is
  verified, by one ``C_GetAttributeValue``, before it is used again;
* its age: other processes can change the token too.

An operation during which the mark moved has its key verified once more before
its result leaves.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import exceptions as p11
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import KeyType

from pkcs11_pool.cryptoki import interface, recovery, rv
from pkcs11_pool.errors import (
    KeyAmbiguous,
    KeyFunctionNotPermitted,
    KeyNotFound,
    LoginRequired,
    SessionObjectDestroyed,
)
from pkcs11_pool.state import LoginState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.state import Epoch, Generation, Login

_MOST_ENTRIES: Final = 4096
_TRIES: Final = 5
_NEVER: Final = -2
"""A mark that no present one equals."""
_PRIVATE_CLASSES: Final = frozenset({ObjectClass.PRIVATE_KEY, ObjectClass.SECRET_KEY})
_TRUE: Final = b"\x01"
_FALSE: Final = b"\x00"
_NOT_FOR: Final = {
    **dict.fromkeys(
        (Attribute.SIGN, Attribute.DECRYPT, Attribute.UNWRAP, Attribute.DECAPSULATE),
        ObjectClass.PUBLIC_KEY,
    ),
    **dict.fromkeys(
        (Attribute.VERIFY, Attribute.ENCRYPT, Attribute.WRAP, Attribute.ENCAPSULATE),
        ObjectClass.PRIVATE_KEY,
    ),
}
"""The half of a key pair that has no such attribute by the standard."""

_IDENTITY: Final = (
    Attribute.CLASS,
    Attribute.KEY_TYPE,
    Attribute.ID,
    Attribute.LABEL,
    Attribute.UNIQUE_ID,
    Attribute.MODULUS,
    Attribute.EC_POINT,
    Attribute.CERTIFICATE_TYPE,
    Attribute.APPLICATION,
    Attribute.SERIAL_NUMBER,
)
"""What tells one object from another: what identifies it by the standard, and
the public value where the object has one."""

_CAPABILITIES: Final = (
    Attribute.SIGN,
    Attribute.VERIFY,
    Attribute.ENCRYPT,
    Attribute.DECRYPT,
    Attribute.WRAP,
    Attribute.UNWRAP,
    Attribute.DERIVE,
)
_DESCRIBED: Final = (
    *_IDENTITY,
    *_CAPABILITIES,
    Attribute.TOKEN,
    Attribute.PRIVATE,
    Attribute.ALWAYS_AUTHENTICATE,
)


_SHOWN: Final = (Attribute.LABEL, Attribute.ID, Attribute.KEY_TYPE)


class Origin:
    """Tells one object from its namesakes, for a reference that was made from it.

    Attributes:
        destroyed: It was destroyed through this process.
        entry: The object as it was last seen. Kept here and not in the cache: a search
            that finds thousands must not push out what is in use.
    """

    __slots__ = ("destroyed", "entry")

    def __init__(self) -> None:
        self.destroyed = False
        self.entry: Entry | None = None


@dataclass(frozen=True, slots=True)
class KeySpec:
    """How to find a token object: packed attributes, and the classes it may have.

    With an origin it stands for one object, the one that it was made from: within a
    login that is known by its number, and a namesake never takes its place.
    """

    attributes: tuple[tuple[int, bytes], ...]
    classes: tuple[int, ...] | None = None
    origin: Origin | None = None
    # The same with the classes of an operation: made once, used by each operation.
    _narrowed: dict[tuple[int, ...] | None, KeySpec] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _hash: list[int] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __hash__(self) -> int:
        """By what it says; computed once."""
        known = self._hash
        if not known:
            known.append(hash((self.attributes, self.classes, self.origin)))
        return known[0]

    @classmethod
    def of(
        cls,
        label: str | None,
        id_: bytes | None,
        object_class: ObjectClass | None,
        key_type: KeyType | None,
    ) -> KeySpec:
        """The spec of a key as a user names it."""
        given = {
            Attribute.LABEL: label,
            Attribute.ID: id_,
            Attribute.KEY_TYPE: key_type,
        }
        packed = tuple(
            (int(kind), interface.MAPPER.pack_attribute(kind, value))
            for kind, value in given.items()
            if value is not None
        )
        return cls(packed, None if object_class is None else (int(object_class),))

    def __str__(self) -> str:
        """As the user would write it."""
        parts = []
        for kind, value in self.attributes:
            if kind not in _SHOWN:
                continue
            name = Attribute(kind).name.lower()
            shown = value.hex() if name != "label" else repr(value.decode())
            if name == "key_type":
                shown = _enum_name(KeyType, value)
            parts.append(f"{name}={shown}")
        if self.classes:
            parts.append("/".join(ObjectClass(c).name.lower() for c in self.classes))
        return " ".join(parts) or "any object"


@dataclass(slots=True)
class Entry:
    """An object as it was last seen on the token."""

    handle: int
    seen: dict[int, bytes]
    epoch: Epoch
    generation: Generation
    mark: int
    checked_at: float
    object_class: int = field(init=False)
    key_type: Any = field(init=False)
    private: bool = field(init=False)
    #: Whether each use wants a login of its own (``CKA_ALWAYS_AUTHENTICATE``).
    always_authenticate: bool = field(init=False)
    #: Mechanisms packed for uses that the key allows; see ``operations.way``.
    ways: dict[tuple[Any, Any], tuple[object, int]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Unpack what every operation asks."""
        unpack = interface.MAPPER.unpack_attributes
        self.object_class = interface.unpack_ulong(self.seen[Attribute.CLASS])
        packed = self.seen.get(Attribute.KEY_TYPE)
        try:
            self.key_type = (
                None if packed is None else unpack(Attribute.KEY_TYPE, packed)
            )
        except ValueError:
            self.key_type = interface.unpack_ulong(packed or b"")
        self.private = self.seen.get(Attribute.PRIVATE) == _TRUE
        always = self.seen.get(Attribute.ALWAYS_AUTHENTICATE)
        self.always_authenticate = always == _TRUE

    @property
    def identity(self) -> dict[int, bytes]:
        """The attributes that tell this object from others."""
        return {k: v for k, v in self.seen.items() if k in _IDENTITY}

    def require(self, capability: Attribute | None, what: object) -> None:
        """Refuse an operation that the key's attributes rule out.

        Raises:
            KeyFunctionNotPermitted: The attribute is there and false, or the key is
                the other half of its pair.
        """
        if capability is None:
            return
        wrong = _NOT_FOR.get(capability)
        if wrong is not None and self.object_class == wrong:
            half = wrong.name.lower().replace("_", " ")
            raise KeyFunctionNotPermitted(
                f"key {what} is a {half}, which has no CKA_{capability.name}: use the "
                "other half of its pair"
            )
        if self.seen.get(capability, _TRUE) == _TRUE:
            return
        message = (
            f"key {what} has CKA_{capability.name} false: use another key, or make "
            "one with that capability"
        )
        raise KeyFunctionNotPermitted(message)

    def fits(self, spec: KeySpec) -> bool:
        """Whether this is an object that the spec describes, as far as it tells."""
        return (spec.classes is None or self.object_class in spec.classes) and all(
            self.seen.get(kind, value) == value for kind, value in spec.attributes
        )

    def spec(self, origin: Origin | None = None) -> KeySpec:
        """How to find this very object again."""
        kept = (
            (kind, value)
            for kind, value in self.seen.items()
            if kind in _IDENTITY and kind != Attribute.CLASS and value
        )
        return KeySpec(tuple(sorted(kept)), (self.object_class,), origin or Origin())


class ObjectOwner:
    """The life of the session that owns session objects, as they see it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        #: It takes no more uses; those that are inside may come to their end.
        self.closed = False
        #: Its session is closed, and the objects are gone.
        self.gone = False
        #: The session objects that were made through the pool, by their numbers.
        self.objects: dict[int, SessionObject] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep the owner open while a call with one of its objects is inside.

        Raises:
            SessionObjectDestroyed: The owner is closed.
        """
        with self._changed:
            if self.closed:
                raise SessionObjectDestroyed(GONE)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse every later use."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def wait_unused(self, timeout: float) -> bool:
        """Wait until no call is inside with one of the objects."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._users, timeout)


GONE: Final = (
    "the session that owned this object is closed, so the object is destroyed: make "
    "it again in an open session"
)


@dataclass(slots=True, eq=False)
class SessionObject:
    """A session object: it lives as long as the session that owns it."""

    entry: Entry
    owner: ObjectOwner
    destroyed: bool = False

    def check(self, epoch: Epoch, generation: Generation) -> None:
        """Refuse a use that the standard rules out, before anything is sent.

        Raises:
            SessionObjectDestroyed: Its owner is closed, it was destroyed, or it is
                private and the login that it was made in is over.
        """
        if self.destroyed:
            message = "this session object was destroyed"
            raise SessionObjectDestroyed(message)
        if self.owner.closed or generation != self.entry.generation:
            raise SessionObjectDestroyed(GONE)
        if self.entry.private and epoch != self.entry.epoch:
            message = (
                "this private session object ended with the login that it was made in"
            )
            raise SessionObjectDestroyed(message)

    def __str__(self) -> str:
        """For messages."""
        return f"session object {self.entry.handle}"


Target = KeySpec | SessionObject


class HandleCache:
    """The numbers of the token objects in use, of one token."""

    def __init__(self, max_age: float | None) -> None:
        self._max_age = max_age
        #: Who is logged in, as the login actor last told. Written by it alone.
        self.login: Login | None = None
        #: Whether private objects are kept from those who are not logged in: set where
        #: the token itself does not do that.
        self.guards = False
        self._entries: dict[KeySpec, Entry] = {}
        self._lock = threading.Lock()
        #: Held from looking a number up to destroying it: no other call of this
        #: process can free the number in between.
        self.destroying = threading.Lock()
        #: The present mark, or -1 while a change is under way (nothing is sure).
        self.mark = 0
        # Moves with everything that may hand out numbers or change objects.
        self._changes = 0
        # How many such calls are under way: while one is, no number is sure.
        self._changing = 0

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around every call that may hand out numbers or change objects.

        The mark moves before and after: a number verified during the call would
        otherwise carry the mark of a change that had not happened yet.
        """
        with self._lock:
            self._changing += 1
            self._changes += 1
            self.mark = -1
        try:
            yield
        finally:
            with self._lock:
                self._changing -= 1
                self._changes += 1
                self.mark = -1 if self._changing else self._changes

    def entry(
        self,
        session: Session,
        target: KeySpec,
        classes: tuple[int, ...] | None,
    ) -> Entry:
        """The object's number, sure at this moment; verified or found if need be.

        Raises:
            KeyNotFound: Nothing matches.
            KeyAmbiguous: More than one object matches.
            LoginRequired: Nothing matches, nobody is logged in, and the key may be
                private.
        """
        spec = target
        if target.classes is None:
            spec = target._narrowed.get(classes) or narrowed(target, classes)  # noqa: SLF001
        origin = spec.origin
        entry = self._entries.get(spec) if origin is None else origin.entry
        # The epoch is not enough: it moves when the token is lost, and a call that is
        # inside just then may find a number before the module is initialised anew.
        if (
            entry is not None
            and entry.epoch == session.epoch
            and entry.generation == session.generation
        ):
            age = self._max_age
            if entry.mark == self.mark >= 0 and (
                age is None or time.monotonic() - entry.checked_at < age
            ):
                return entry
        else:
            entry = None
        try:
            return self._look_up(session, spec, entry)
        except p11.PKCS11Error as error:
            recovery.mark_unsent(error)
            raise

    def _look_up(self, session: Session, spec: KeySpec, entry: Entry | None) -> Entry:
        """Verify a number that is not sure, or find the object."""
        if entry is not None:
            if self.verify(session, entry):
                return entry
            if spec.origin is not None:
                raise KeyNotFound(f"{spec} is gone from the token")
            self.drop(spec)
        if spec.origin is not None and spec.origin.destroyed:
            raise KeyNotFound(f"{spec} was destroyed")
        return self._find(session, spec)

    def verify(self, session: Session, entry: Entry) -> bool:
        """Ask the token whether the number still names the same object."""
        mark, now = self.mark, time.monotonic()
        try:
            seen = session.attributes(entry.handle, _IDENTITY)
        except p11.PKCS11Error as error:
            if rv.code_of(error) in _DEAD:
                return False
            raise
        if seen != entry.identity:
            return False
        entry.mark, entry.checked_at = mark, now
        return True

    def describe(self, session: Session, handle: int) -> Entry:
        """What the token says of one object, as an entry."""
        mark, now = self.mark, time.monotonic()
        seen = session.attributes(handle, _DESCRIBED)
        return Entry(handle, seen, session.epoch, session.generation, mark, now)

    def remember(self, spec: KeySpec, entry: Entry) -> None:
        """Keep an entry for later operations."""
        if spec.origin is not None:
            spec.origin.entry = entry
            return
        with self._lock:
            if len(self._entries) >= _MOST_ENTRIES:
                self._entries.pop(next(iter(self._entries)))
            self._entries[spec] = entry

    def drop(self, spec: KeySpec) -> None:
        """Do not trust a number any more: it is dead, or another object's."""
        if spec.origin is None:
            self._entries.pop(spec, None)
        elif spec.origin.entry is not None:
            # Kept, so that a namesake does not take its place within this login.
            spec.origin.entry.mark = _NEVER

    def clear(self) -> None:
        """Forget everything, at a change of token or module."""
        with self._lock:
            self._entries.clear()
            self._changes += 1
            self.mark = -1 if self._changing else self._changes

    def _find(self, session: Session, spec: KeySpec) -> Entry:
        for _ in range(_TRIES):
            found = self._search(session, spec)
            if not found:
                raise self._missing(session, spec)
            if len(found) > 1:
                message = (
                    f"more than one object matches {spec}: add id= or object_class="
                )
                raise KeyAmbiguous(message)
            try:
                entry = self.describe(session, found[0])
            except p11.ObjectHandleInvalid:
                continue
            # Between the search and the description the number may have gone to
            # another object.
            if entry.fits(spec):
                self.remember(spec, entry)
                return entry
        message = f"{spec} changes on the token faster than it can be looked up"
        raise KeyNotFound(message)

    def _search(self, session: Session, spec: KeySpec) -> list[int]:
        token = (int(Attribute.TOKEN), _TRUE)
        hidden = self.hidden
        # Some modules hand out numbers in a search.
        with self.changing():
            return [
                handle
                for object_class in spec.classes or (None,)
                for handle in session.find(
                    (token, *_class(object_class), *spec.attributes, *hidden), most=2
                )
            ]

    @property
    def hidden(self) -> tuple[tuple[int, bytes], ...]:
        """What to add to a search, so that it finds nothing that is not to be seen."""
        login = self.login
        if self.guards and (login is None or login.state is not LoginState.USER):
            return ((int(Attribute.PRIVATE), _FALSE),)
        return ()

    def check_login(self, advice: str) -> None:
        """Refuse what the pool cannot keep from private objects, after a logout.

        Only where the token itself keeps nobody from them: every other one refuses.

        Raises:
            LoginRequired: The user is logged out; ``advice`` is what to do.
        """
        login = self.login
        if self.guards and login is not None and login.state is LoginState.PUBLIC:
            raise LoginRequired(f"logged out, by login_ignored=True: {advice}")

    def _missing(self, session: Session, spec: KeySpec) -> KeyNotFound | LoginRequired:
        # As it was when the search began: a login since then did not help it.
        login = self.login
        visible = (
            login is not None
            and login.state is LoginState.USER
            and login.epoch == session.epoch
        )
        if not visible and _may_be_private(spec):
            return LoginRequired(
                f"{spec} is not to be seen while the user is not logged in: "
                "await pool.login(pin)"
            )
        return KeyNotFound(
            f"no object on the token matches {spec}; pool.find() lists what is there"
        )


def narrowed(spec: KeySpec, classes: tuple[int, ...] | None) -> KeySpec:
    """The spec with the classes that an operation can use, unless it names its own."""
    if spec.classes is not None:
        return spec
    made = spec._narrowed.get(classes)  # noqa: SLF001  # its own module
    if made is None:
        made = KeySpec(spec.attributes, classes, spec.origin)
        spec._narrowed[classes] = made  # noqa: SLF001
    return made


_DEAD: Final = {
    rv.CODES["CKR_OBJECT_HANDLE_INVALID"],
    rv.CODES["CKR_KEY_HANDLE_INVALID"],
}


def _class(object_class: int | None) -> tuple[tuple[int, bytes], ...]:
    if object_class is None:
        return ()
    return ((int(Attribute.CLASS), interface.pack_ulong(object_class)),)


def _may_be_private(spec: KeySpec) -> bool:
    return spec.classes is None or not _PRIVATE_CLASSES.isdisjoint(spec.classes)


def _enum_name(enum: Any, packed: bytes) -> str:
    value = interface.unpack_ulong(packed)
    try:
        return str(enum(value).name)
    except ValueError:
        return hex(value)
