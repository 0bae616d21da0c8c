"""Which sessions are open: in use, opened ahead, or lent.

Decides and counts; opens and closes nothing. Called under the engine's lock.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from pkcs11_pool.jobs import Job, Kind

if TYPE_CHECKING:
    from collections.abc import Hashable

    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.leases import Lease
    from pkcs11_pool.engine.limits import SessionLimit

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_LEASE: Final = Kind.LEASE


class SessionRoom:
    """The sessions of one engine: open, opened ahead, lent.

    A session is counted from before it is opened until after it is closed.
    """

    def __init__(self, limit: SessionLimit) -> None:
        self.limit = limit
        self.open_all = 0
        self.open_rw = 0
        #: R/O sessions that no operation has used; the oldest goes first.
        self.ahead: deque[Session] = deque()
        self.leases: set[Lease] = set()
        #: Leases that are being opened.
        self.leasing = 0

    @property
    def most_leases(self) -> int:
        """One session always stays for operations, unless there is only one."""
        return max(1, self.limit.total - 1)

    @property
    def more_leases(self) -> int:
        """How many more leases may be opened."""
        return max(0, self.most_leases - len(self.leases) - self.leasing)

    @property
    def more_writes(self) -> int:
        """How many more operations that change the token may start.

        Making a key may take seconds: such operations never take all sessions, so that
        a flood of them leaves a quarter, and at least one, to those that are short.
        """
        total = self.limit.total
        most = max(1, total - max(1, total // 4))
        leased = sum(lease.counts_rw and lease.counted for lease in self.leases)
        return max(0, most - (self.open_rw - leased))

    @property
    def lent_out(self) -> int:
        """How many leases are in the hands of callers: who may want to keep them."""
        return sum(not lease.lone for lease in self.leases)

    def is_held_by(self, holder: Hashable) -> bool:
        """Whether this task or thread has a lease, and may want to keep it."""
        return any(
            lease.holder == holder and not lease.lone and not lease.closing
            for lease in self.leases
        )

    @property
    def free(self) -> int:
        """How many operations could start now."""
        return self.limit.total - self.open_all + len(self.ahead)

    def allows(self, job: Job) -> bool:
        """Whether there is a session for this job, or may be one."""
        if job.kind is _LEASE and not self.more_leases:
            return False
        if self.ahead and not job.rw:
            return True
        if job.kind is Kind.WRITE and not self.more_writes:
            return False
        # A session opened ahead makes room rather than let anybody wait for it.
        open_all = self.open_all - bool(self.ahead)
        return self.limit.allows(rw=job.rw, open_all=open_all, open_rw=self.open_rw)

    def reserve(self, job: Job) -> tuple[Session | None, Session | None]:
        """Take a session for a job that ``allows`` let in.

        A session opened ahead; or None: open one, that is counted now; and one to
        close before, where room had to be made.
        """
        self.leasing += job.kind is _LEASE
        if self.ahead and not job.rw:
            return self.ahead.popleft(), None
        victim = None
        if self.open_all >= self.limit.total:
            victim = self.ahead.popleft()
            self.open_all -= 1
        self.open_all += 1
        self.open_rw += job.rw
        return None, victim

    def closed(self, *, rw: bool) -> None:
        """A session that was counted is closed, or was not opened after all."""
        self.open_all -= 1
        self.open_rw -= rw

    def lent(self, lease: Lease) -> None:
        """A lease is open."""
        self.leasing -= 1
        self.leases.add(lease)

    def returned(self, lease: Lease) -> None:
        """A lease is over: its session is closed, or lost."""
        self.leases.discard(lease)
        if lease.counted:
            lease.counted = False
            self.closed(rw=lease.counts_rw)

    def take_ahead(self, *, counted: bool = False) -> list[Session]:
        """All sessions opened ahead, to be closed; not counted any more.

        Args:
            counted: They still count, each until it is :meth:`closed`: the token has
                it until then.
        """
        taken = list(self.ahead)
        self.ahead.clear()
        if not counted:
            self.open_all -= len(taken)
        return taken
