"""The jobs that wait for a session or a thread, in the order in which they came.

Pure. One line for each kind, because kinds need different things: the head of
one line must not hold up the others. Among heads that can start, the one that
came first does.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Final

from pkcs11_pool.jobs import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkcs11_pool.engine.room import SessionRoom
    from pkcs11_pool.jobs import Job

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_READ: Final = Kind.READ


class Lines:
    """The lines of one engine."""

    def __init__(self) -> None:
        self._lines: dict[Kind, deque[Job]] = {
            kind: deque() for kind in Kind if kind is not Kind.ACTOR
        }
        #: The line that nearly all jobs stand in: R/O operations.
        self.reads = self._lines[Kind.READ]
        #: How many stand in the others.
        self.others = 0
        #: How many jobs have come: the number of each is its place.
        self.number = 0

    def add(self, job: Job) -> None:
        """Put a job at the end of its line."""
        self._lines[job.kind].append(job)
        self.others += job.kind is not _READ

    def insert(self, job: Job) -> None:
        """Put a job that started in vain back where it stood.

        By number, not simply first: two may come back in either order.
        """
        line = self._lines[job.kind]
        place = next(
            (i for i, j in enumerate(line) if j.number > job.number), len(line)
        )
        line.insert(place, job)
        self.others += job.kind is not _READ

    def remove(self, job: Job) -> bool:
        """Take a job out; whether it was in."""
        try:
            self._lines[job.kind].remove(job)
        except (KeyError, ValueError):
            return False
        self.others -= job.kind is not _READ
        return True

    def first(self, can_start: Callable[[Job], bool]) -> Job | None:
        """The first job that can start. It stays in its line."""
        found: Job | None = None
        for line in self._lines.values():
            if line:
                head = line[0]
                if (found is None or head.number < found.number) and can_start(head):
                    found = head
        return found

    def pop(self, job: Job) -> None:
        """Take out the job that ``first`` gave."""
        self._lines[job.kind].popleft()
        self.others -= job.kind is not _READ

    def want_sessions(self, room: SessionRoom) -> int:
        """How many wait for a session that they may have now."""
        lines = self._lines
        wanted = len(lines[Kind.READ])
        if lines[Kind.WRITE]:
            wanted += min(room.more_writes, len(lines[Kind.WRITE]))
        if lines[Kind.LEASE]:
            wanted += min(room.more_leases, len(lines[Kind.LEASE]))
        return wanted

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self.reads) + self.others

    def __iter__(self) -> Iterator[Job]:
        """All of them, line by line."""
        return chain.from_iterable(map(tuple, self._lines.values()))
