"""A plain PIN source, asked on a thread of its own.

It may hang: in a file on a dead server, in a keyring that waits for somebody to unlock
it. The login actor must go on meanwhile: log out, take another PIN, find the token.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from pkcs11_pool import pins
from pkcs11_pool.errors import PinRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.pins import Pin, Source


class Question:
    """One call of a source, and what came of it.

    Attributes:
        pin: What it gave, out of sight; or None.
        error: Why it gave none; or None.
    """

    def __init__(
        self,
        source: Source,
        post: Callable[[partial[None]], None],
        tell: Callable[[Question], None],
    ) -> None:
        """Ask; ``tell`` is posted to the actor when the answer is there."""
        self._answered = threading.Event()
        self.pin: Pin | None = None
        self.error: PinRefused | None = None
        self._source = source
        self._told = partial(post, partial(tell, self))
        # A daemon: the end of the process waits for no source that hangs.
        name = "pkcs11-pool PIN source"
        threading.Thread(target=self._ask, name=name, daemon=True).start()

    def _ask(self) -> None:
        try:
            self.pin = pins.ask(self._source)
        except PinRefused as error:
            self.error = error
        self._answered.set()
        self._told()

    def wait(self, limit: float) -> Pin | None:
        """The PIN, if it comes within so many seconds.

        Raises:
            PinRefused: The source gave none.
        """
        if self._answered.wait(limit) and self.error is not None:
            raise self.error
        return self.pin
