"""How many workers may be awake at once: few on a fast token, many on a slow one.

Pure; called under the engine's lock. A worker that comes back from its call takes
the next job without being woken. Where calls are short, the next one is back
sooner than another could be woken, and a woken one only takes the interpreter's
lock from the one at work and from the event loops: so one is enough. Where calls are
long, because they wait for a network or compute for themselves, many may be inside.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pkcs11_pool.jobs import Thread

_OURS: Final = 100e-6
"""Seconds of the interpreter that an operation costs. More workers than fit into the
time of an operation at this rate only wait for each other."""
_SHORT: Final = 0.0005
"""Seconds. Who is inside for longer than this, and than usual, counts no more."""
_WINDOW: Final = 8
"""Operations of which the shortest tells how fast the token is: the machine's load
makes some longer than they are, none shorter."""


class Awake:
    """The workers that are at work, and not inside one call for very long."""

    def __init__(self) -> None:
        self._processors = os.cpu_count() or 1
        self._least = max(2, min(4, self._processors))
        #: How many may be awake; as many as want to before anything was measured.
        self.most = 1 << 30
        #: Whether the token is so fast that one is enough.
        self.alone = False
        #: Who is, but for those who are inside one call for very long.
        self.at_work: set[Thread] = set()
        #: Woken, and not there yet: behind a busy processor that takes long, and
        #: those who are at work take the jobs meanwhile.
        self.coming = 0
        self._long = _SHORT
        # When it was last looked who is inside for long.
        self._looked = 0.0
        # The shortest of the last operations, tidying included, and what it took of a
        # processor.
        self._shortest = math.inf
        self._spent = math.inf
        self._seen = 0
        # How many of them were long.
        self._slow = 0

    def woken(self, worker: Thread, now: float) -> None:
        """A worker is woken."""
        self.coming += not worker.coming
        worker.coming = True
        self.started(worker, now)

    def came(self, worker: Thread) -> bool:
        """Whether a worker comes because it was woken."""
        came, worker.coming = worker.coming, False
        self.coming -= came
        return came

    def started(self, worker: Thread, now: float) -> None:
        """A worker takes a job."""
        worker.since = now
        self.at_work.add(worker)

    def ended(self, worker: Thread) -> None:
        """It found nothing to do, is done, or lost."""
        self.at_work.discard(worker)

    def took(self, duration: float, spent: float = math.inf) -> None:
        """So long a worker was busy, and so long on a processor where that is known."""
        self._shortest = min(self._shortest, duration)
        self._spent = min(self._spent, spent)
        self._slow += duration > _SHORT
        self._seen += 1
        if self._seen >= _WINDOW:
            self._conclude()

    def _conclude(self) -> None:
        most = int(self._shortest / _OURS)
        if self._shortest / 2 < self._spent < math.inf:
            # They compute for themselves: one more has its next call ready.
            most = min(most, self._processors + 1)
        # One long call among short ones must not keep others from starting.
        self._long = max(_SHORT, 4 * self._shortest)
        # One does as much as two, who would take half as much again of the processors
        # to hand each other the interpreter's lock: and nobody waits long behind
        # another.
        self.alone = most < self._least and self._slow <= _WINDOW // 4
        self.most = 1 if self.alone else max(self._least, most)
        self._shortest = self._spent = math.inf
        self._seen = self._slow = 0

    def is_full(self, now: float) -> bool:
        """Whether no more should be woken."""
        if self.coming >= self._least:
            return True
        if len(self.at_work) < self.most:
            return False
        if now - self._looked > self._long:
            self._looked = now
            for worker in [w for w in self.at_work if now - w.since > self._long]:
                self.at_work.discard(worker)
        return len(self.at_work) >= self.most
