"""How many sessions may be open: told by the user, then learnt from the token.

Pure. A token that answers ``CKR_SESSION_COUNT`` has fewer sessions for us than
we thought; others may share it, so the higher number is tried again later.
R/W sessions have a limit of their own (``ulMaxRwSessionCount``).
"""

from __future__ import annotations

FIRST_RETRY = 0.05
LAST_RETRY = 10.0


class SessionLimit:
    """The number of sessions that may be open at once, all and R/W."""

    def __init__(self, total: int, rw: int | None = None) -> None:
        self._most = (total, total if rw is None else min(rw, total))
        self.total, self.rw = self._most
        self._learnt = self.total
        self._retry_after = FIRST_RETRY
        #: Whether the token ever had fewer sessions for us than we thought.
        self.was_refused = False
        #: When the limit that was learnt is forgotten again, or None.
        self.retry_at: float | None = None

    def allows(self, *, rw: bool, open_all: int, open_rw: int) -> bool:
        """Whether one more session may be opened beside those that are open."""
        return open_all < self.total and (not rw or open_rw < self.rw)

    def refused(self, *, rw: bool, open_all: int, open_rw: int, now: float) -> None:
        """The token answered ``CKR_SESSION_COUNT`` with so many of ours open.

        What was refused lowers its limit to what is open; zero is possible when
        others hold every session. The old limit comes back at ``retry_at``.
        """
        self.was_refused = True
        if rw:
            # It may be the R/W limit alone; a R/O session will tell of the other.
            self.rw = min(self.rw, open_rw)
        else:
            self.total = min(self.total, open_all)
            self.rw = min(self.rw, self.total)
        self._learnt = open_all
        self.retry_at = now + self._retry_after
        self._retry_after = min(self._retry_after * 2, LAST_RETRY)

    def retry(self, now: float) -> bool:
        """Go back to the old limit if its time has come; whether it has."""
        if self.retry_at is None or now < self.retry_at:
            return False
        self.total, self.rw = self._most
        self.retry_at = None
        return True

    def opened(self, open_all: int) -> None:
        """A session was opened; one above what was learnt ends the back-off."""
        if open_all > self._learnt:
            self._retry_after = FIRST_RETRY
