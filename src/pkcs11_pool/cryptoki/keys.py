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
from typing import TYPE_CHECKING, Final, TypeAlias

from pkcs11 import exceptions as p11
from pkcs11.constants import Attribute, ObjectClass

from pkcs11_pool.cryptoki import interface, recovery, rv
from pkcs11_pool.cryptoki.session_objects import GONE, ObjectOwner, SessionObject
from pkcs11_pool.cryptoki.specs import DESCRIBED, IDENTITY, Entry, KeySpec, narrowed
from pkcs11_pool.errors import KeyAmbiguous, KeyNotFound, LoginRequired
from pkcs11_pool.state import Epoch, LoginState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.state import Login

# What an object is called with, from here as well: an operation names both kinds.
__all__ = [
    "GONE",
    "Entry",
    "HandleCache",
    "KeySpec",
    "ObjectOwner",
    "SessionObject",
    "Target",
    "narrowed",
]

_MOST_ENTRIES: Final = 4096
_TRIES: Final = 5
_NEVER: Final = -2
"""A mark that no present one equals."""
_PRIVATE_CLASSES: Final = frozenset({ObjectClass.PRIVATE_KEY, ObjectClass.SECRET_KEY})
_TRUE: Final = b"\x01"
_FALSE: Final = b"\x00"

Target: TypeAlias = KeySpec | SessionObject
"""What an operation is done with."""


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
        if entry is not None:
            if self.is_sure(entry, session):
                return entry
            if (entry.epoch, entry.generation) != (session.epoch, session.generation):
                entry = None
        try:
            return self._look_up(session, spec, entry)
        except p11.PKCS11Error as error:
            recovery.mark_unsent(error)
            raise

    def is_sure(self, entry: Entry, session: Session) -> bool:
        """Whether its number may be used in a session without asking the token."""
        age = self._max_age
        return (
            entry.mark == self.mark >= 0
            # The epoch is not enough: it moves when the token is lost, and a call that
            # is inside just then may find a number before the module is initialised
            # anew.
            and entry.epoch == session.epoch
            and entry.generation == session.generation
            and (age is None or time.monotonic() - entry.checked_at < age)
        )

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
            seen = session.attributes(entry.handle, IDENTITY)
        except p11.PKCS11Error as error:
            if rv.code_of(error) in rv.NO_OBJECT:
                return False
            raise
        if seen != entry.identity:
            return False
        entry.mark, entry.checked_at = mark, now
        return True

    def describe(self, session: Session, handle: int) -> Entry:
        """What the token says of one object, as an entry."""
        mark, now = self.mark, time.monotonic()
        seen = session.attributes(handle, DESCRIBED)
        entry = Entry(handle, seen, session.epoch, session.generation, mark, now)
        if entry.private:
            entry.epoch = self._login_of(entry.epoch)
        return entry

    def _login_of(self, epoch: Epoch) -> Epoch:
        """The login in which something private was seen by who began in ``epoch``.

        The token has the user in a moment before anybody hears of it.
        """
        login = self.login
        if login is None:
            return epoch
        moved = (login.state, login.epoch - epoch)
        comes, came = (LoginState.PUBLIC, 0), (LoginState.USER, 1)
        return Epoch(epoch + 1) if moved in {comes, came} else epoch

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
            entry = self._entries.pop(spec, None)
        else:
            # Kept, so that a namesake does not take its place within this login.
            entry = spec.origin.entry
        if entry is not None:
            # Whoever has it at hand asks the token, too.
            entry.mark = _NEVER

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

    def check_making(self, *, public: bool) -> None:
        """The same for an object that is to be made, unless it is to be public.

        Raises:
            LoginRequired: The user is logged out.
        """
        if not public:
            self.check_login("await pool.login(), or give Attribute.PRIVATE: False")

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


def _class(object_class: int | None) -> tuple[tuple[int, bytes], ...]:
    if object_class is None:
        return ()
    return ((int(Attribute.CLASS), interface.pack_ulong(object_class)),)


def _may_be_private(spec: KeySpec) -> bool:
    return spec.classes is None or not _PRIVATE_CLASSES.isdisjoint(spec.classes)
