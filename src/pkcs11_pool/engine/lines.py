"""The jobs that wait for a session or a thread, in the order in which they came.

Pure. One line for each kind, because kinds need different things: the head of
one line must not hold up the others. Among heads that can start, the one that
came first does.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

from pkcs11_pool.jobs import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkcs11_pool.engine.room import SessionRoom
    from pkcs11_pool.jobs import Job


class Lines:
    """The lines of one engine."""

    def __init__(self) -> None:
        self._lines: dict[Kind, deque[Job]] = {
            kind: deque() for kind in Kind if kind is not Kind.ACTOR
        }
        self._count = 0

    def add(self, job: Job) -> None:
        """Put a job at the end of its line."""
        self._lines[job.kind].append(job)
        self._count += 1

    def insert(self, job: Job) -> None:
        """Put a job that started in vain back where it stood.

        By number, not simply first: two may come back in either order.
        """
        line = self._lines[job.kind]
        place = next(
            (i for i, j in enumerate(line) if j.number > job.number), len(line)
        )
        line.insert(place, job)
        self._count += 1

    def remove(self, job: Job) -> bool:
        """Take a job out; whether it was in."""
        try:
            self._lines[job.kind].remove(job)
        except (KeyError, ValueError):
            return False
        self._count -= 1
        return True

    def first(self, can_start: Callable[[Job], bool]) -> Job | None:
        """The first job that can start. It stays in its line."""
        found: Job | None = None
        if not self._count:
            return None
        for line in self._lines.values():
            if line:
                head = line[0]
                if (found is None or head.number < found.number) and can_start(head):
                    found = head
        return found

    def pop(self, job: Job) -> None:
        """Take out the job that ``first`` gave."""
        self._lines[job.kind].popleft()
        self._count -= 1

    def want_sessions(self, room: SessionRoom) -> int:
        """How many wait for a session that they may have now."""
        if not self._count:
            return 0
        lines = self._lines
        wanted = len(lines[Kind.READ])
        if lines[Kind.WRITE]:
            wanted += min(room.more_writes, len(lines[Kind.WRITE]))
        if lines[Kind.LEASE]:
            wanted += min(room.more_leases, len(lines[Kind.LEASE]))
        return wanted

    def __len__(self) -> int:
        """How many jobs wait."""
        return self._count

    def __iter__(self) -> Iterator[Job]:
        """All of them, line by line."""
        return chain.from_iterable(map(tuple, self._lines.values()))
