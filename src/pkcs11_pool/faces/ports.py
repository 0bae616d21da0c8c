"""The way from other threads into one event loop: many results, one wake-up.

There is one for each loop. What is posted is resumed on the loop's own thread; a loop
that has ended takes nothing, and whoever posts is told so.
"""

from __future__ import annotations

import fcntl
import os
import resource
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import asyncio

_HIGH: Final = 512
"""The least number of a descriptor that modules must not close by mistake."""


class Resumed(Protocol):
    """Who waits on a loop."""

    def resume(self) -> None:
        """Go on; called on the loop."""


class Port(ABC):
    """The way from the workers into one event loop: many results, one wake-up."""

    #: What stands for the loop in its library.
    loop: Any

    def __init__(self, ended: Callable[[], bool]) -> None:
        #: Waiters to be resumed on the loop.
        self.ready: deque[Resumed] = deque()
        #: Whether the loop was woken for them.
        self.scheduled = False
        #: Whether the loop has ended.
        self.ended = ended

    def schedule(self) -> bool:
        """Wake the loop for those who are ready; False if it has ended."""
        self.scheduled = True
        try:
            self._schedule()
        except (RuntimeError, OSError):
            # trio.RunFinishedError is a RuntimeError; a run of trio's that its host
            # abandoned has no socket any more to be woken by.
            self.scheduled = False
            return False
        return True

    def ring(self) -> None:
        """Wake the loop for those who are ready, if nobody has done it yet."""
        if self.ready and not self.scheduled:
            self.schedule()

    def _drain(self) -> None:
        # Before the queue is emptied: what is posted from here on schedules anew.
        self.scheduled = False
        ready = self.ready
        while ready:
            ready.popleft().resume()

    @abstractmethod
    def _schedule(self) -> None:
        """Wake the loop."""


class _AsyncioPort(Port):
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop.is_closed)
        self.loop = loop

    def _schedule(self) -> None:
        self.loop.call_soon_threadsafe(self._drain)


class _EventPort(_AsyncioPort):
    """A descriptor of its own costs half of what ``call_soon_threadsafe`` does.

    The loop alone keeps the port, by its reader, and lets it go when it is closed.
    Whoever posts keeps it meanwhile: nobody writes to a number that belongs to
    another file by then.

    Some modules close a descriptor twice, and so one of somebody else's that was
    given its number in between: opencryptoki 3.8.1 does at its second
    ``C_Initialize``. Theirs are low numbers, so this one is a high one; and should it
    be closed all the same, the loop is woken in its own way from then on.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._descriptor = _high(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self._closed_by_others = False
        loop.add_reader(self._descriptor, self._drain)

    def _schedule(self) -> None:
        try:
            if not self._closed_by_others:
                os.eventfd_write(self._descriptor, 1)
        except OSError:
            self._closed_by_others = True
        if self._closed_by_others:
            super()._schedule()
        if self.loop.is_closed():
            # Closed meanwhile: nobody reads it any more.
            message = "the event loop is closed"
            raise RuntimeError(message)

    def _drain(self) -> None:
        # Before the base class lets others write again, or a wake-up would be lost.
        if not self._closed_by_others:
            with suppress(BlockingIOError):
                os.eventfd_read(self._descriptor)
        super()._drain()

    def __del__(self) -> None:
        """Close the descriptor."""
        # The number may be another file's by now, where others have closed it.
        if not getattr(self, "_closed_by_others", True):
            with suppress(AttributeError, OSError):
                os.close(self._descriptor)


def _high(descriptor: int) -> int:
    """The same open file under a number that no module has had before."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = _HIGH if most == resource.RLIM_INFINITY else min(_HIGH, most // 2)
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, least)
    finally:
        os.close(descriptor)


class _TrioPort(Port):
    def __init__(self, token: Any) -> None:
        super().__init__(lambda: False)
        self.loop = token

    def _schedule(self) -> None:
        self.loop.run_sync_soon(self._drain)


class _Kept:
    """Looks like a weak reference, to a port that nobody else keeps."""

    def __init__(self, port: Port | None) -> None:
        self._port = port

    def __call__(self) -> Port | None:
        return self._port


Way = Callable[[], Port | None]
"""Gives the port into a loop, or None when it went with its loop."""
NOWHERE: Final[Way] = _Kept(None)
"""The way of a thread on which no loop ran yet."""


def into_asyncio(loop: asyncio.AbstractEventLoop) -> Way:
    """The way into a loop of asyncio's, or of one that is made like it."""
    if hasattr(os, "eventfd"):
        # Not every loop has readers.
        with suppress(NotImplementedError):
            return weakref.ref(_EventPort(loop))
    return _Kept(_AsyncioPort(loop))


def into_trio(token: Any) -> Way:
    """The way into a run of trio's."""
    return _Kept(_TrioPort(token))
