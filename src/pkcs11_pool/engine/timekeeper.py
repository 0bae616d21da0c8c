"""The deadlines of all pools: one thread per process, asleep until one is due.

Deadlines are kept here and not by a timer in each event loop, so that they hold
on every loop and thread alike, also while every worker hangs in the module.
"""

from __future__ import annotations

import math
import os
import threading
import time
from typing import Protocol


class Punctual(Protocol):
    """Something with deadlines."""

    def sweep(self, now: float) -> float:
        """Act on what is due, and say when to come again (``inf``: never)."""


class Timekeeper:
    """Calls ``sweep`` of each registered object when its time has come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[Punctual, float] = {}
        self._next = math.inf
        self._thread: threading.Thread | None = None

    def call_at(self, who: Punctual, when: float) -> None:
        """Come to ``who`` no later than ``when``."""
        with self._changed:
            if when >= self._due.get(who, math.inf):
                return
            self._due[who] = when
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="pkcs11-pool timekeeper", daemon=True
                )
                self._thread.start()
            if when < self._next:
                self._changed.notify()

    def forget(self, who: Punctual) -> None:
        """Never come to ``who`` again; the last one to go ends the thread."""
        with self._changed:
            self._due.pop(who, None)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._due:
                    self._thread = None
                    return
                self._next = min(self._due.values())
                now = time.monotonic()
                if self._next > now:
                    wait = None if self._next == math.inf else self._next - now
                    self._changed.wait(wait)
                    continue
                due = [who for who, when in self._due.items() if when <= now]
                for who in due:
                    self._due[who] = math.inf
            for who in due:
                self._come_again(who, who.sweep(now))

    def _come_again(self, who: Punctual, when: float) -> None:
        with self._changed:
            if who not in self._due:
                return
            self._due[who] = min(self._due[who], when)
            if self._due[who] == math.inf:
                # Whoever has nothing due calls again, and keeps no thread until then.
                del self._due[who]


timekeeper = Timekeeper()


def _after_fork() -> None:
    timekeeper.__init__()  # type: ignore[misc]  # the thread is the parent's


os.register_at_fork(after_in_child=_after_fork)
