"""The login actor's mailbox: messages of any thread, taken by one, one at a time."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.jobs import Job

    Message: TypeAlias = "Callable[[], Any] | Request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A message whose sender waits for an answer.

    Attributes:
        job: What the sender waits with.
        do: Does what is asked for.
        is_login: Whether the user's login is asked for. It may come between, while
            another request waits for calls inside to end: they may need it.
        sends_pin: Whether it is for a PIN that is sent. Where that was not sent, the
            request may be made again.
        ends: Whether it ends what keeps all others waiting.
        pauses: Whether it begins when nothing is inside the module, and only waits
            until then.
    """

    job: Job
    do: Callable[[], None]
    is_login: bool = False
    sends_pin: bool = False
    ends: bool = False
    pauses: bool = False


class Mailbox:
    """The messages that wait for the actor's thread.

    A message is something to call, or a request. All but :meth:`put` and :meth:`post`
    are the thread's.

    Args:
        take: Does a request when its turn has come, or puts it off.

    Attributes:
        ended: Whether nobody takes messages any more.
    """

    def __init__(self, take: Callable[[Request], None]) -> None:
        self.ended = False
        self._take = take
        self._mail: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # Held while something is posted: nothing is left in the box at the end.
        self._posting = threading.Lock()
        # What can only be done after a recovery or a period of the officer.
        self._postponed: list[Message] = []

    def put(self, message: Message) -> None:
        """Leave a message that nobody waits for. Takes no lock, holds up nobody."""
        # put() of this queue, and of no other, may be called by the collector.
        self._mail.put(message)

    def post(self, message: Message) -> bool:
        """Leave a message that is taken for certain; False: nobody takes any more."""
        with self._posting:
            if not self.ended:
                self._mail.put(message)
            return not self.ended

    def get(self, timeout: float | None) -> Message | None:
        """The next message; None: none came within so many seconds."""
        try:
            return self._mail.get(timeout=timeout)
        except queue.Empty:
            return None

    def handle(self, message: Message) -> None:
        """Its turn has come."""
        if isinstance(message, Request):
            self._take(message)
        else:
            message()

    def postpone(self, message: Message) -> None:
        """Keep a message until :meth:`repost`."""
        self._postponed.append(message)

    def repost(self) -> None:
        """What was postponed can be done now."""
        postponed, self._postponed = self._postponed, []
        for message in postponed:
            self._mail.put(message)

    def postponed_requests(self) -> list[Request]:
        """Those that wait for what will not come, when the pool closes."""
        return [message for message in self._postponed if isinstance(message, Request)]

    def end(self) -> None:
        """Nothing is posted from here on."""
        with self._posting:
            self.ended = True
