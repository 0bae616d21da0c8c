"""Session objects: they live as long as the session that made them, and no longer.

Source: PKCS#11 v3.1, "C_CloseSession".
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pkcs11 import exceptions as p11

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.errors import SessionObjectDestroyed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11_pool.cryptoki.specs import Entry
    from pkcs11_pool.state import Epoch, Generation


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
_DESTROYED: Final = "this session object was destroyed"


@dataclass(slots=True, eq=False)
class SessionObject:
    """A session object: it lives as long as the session that owns it.

    Attributes:
        entry: Its number, and what was seen of it.
        owner: The life of its session.
        destroyed: Whether it is not used any more.
        doomed: Whether ``C_DestroyObject`` was called, whatever came of it.
    """

    entry: Entry
    owner: ObjectOwner
    destroyed: bool = False
    doomed: bool = False

    @contextmanager
    def told_when_gone(self) -> Iterator[None]:
        """Around calls with its number, which may answer that there is no such one.

        Raises:
            SessionObjectDestroyed: It was destroyed meanwhile; or before, and nobody
                heard of it.
        """
        try:
            yield
        except p11.PKCS11Error as error:
            if not (self.doomed and rv.code_of(error) in rv.NO_OBJECT):
                raise
            self.destroyed = True
            raise SessionObjectDestroyed(_DESTROYED) from error

    def check(self, epoch: Epoch, generation: Generation) -> None:
        """Refuse a use that the standard rules out, before anything is sent.

        Raises:
            SessionObjectDestroyed: Its owner is closed, it was destroyed, or it is
                private and the login that it was made in is over.
        """
        if self.destroyed:
            raise SessionObjectDestroyed(_DESTROYED)
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
