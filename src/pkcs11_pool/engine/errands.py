"""Which caller is sent for the PIN, where its source must be awaited.

Called under the engine's lock. The engine has no event loop: so one of those who wait
for the login goes, and another when he has gone away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkcs11_pool.jobs import Job, Kind, Phase

if TYPE_CHECKING:
    from pkcs11_pool.engine.waiting import Waiting
    from pkcs11_pool.pins import Source


class Errands:
    """The errand of one engine: there is one at most."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        # A PIN source that must be awaited, and the caller who was sent for it.
        self._source: Source | None = None
        self._runner: Job | None = None

    def begin(self, source: Source) -> None:
        """Have a caller who waits for the login await this PIN source."""
        self._source = source
        self.send_one()

    def send_one(self) -> None:
        """Send somebody, if that is needed and nobody is on the way."""
        if self._source is None or self._runner is not None:
            return
        waiting = self._waiting
        requests = (job for job in waiting.requests if job.phase is Phase.RUNNING)
        for job in (*requests, *waiting.parked, *waiting.lines):
            gone = job.dropped or job.away
            wants = not gone and job.phase is not Phase.SETTLED
            if wants and not (job.stays and job.kind is Kind.LANE):
                job.errand = self._source
                self._runner = job
                job.waiter.wake()
                return

    def drop(self, job: Job) -> None:
        """The caller who was sent goes away: another takes over."""
        job.errand = None
        if self._runner is job:
            self._runner = None
            self.send_one()

    def is_done(self, job: Job) -> bool:
        """The caller is back; whether he was still the one who was sent."""
        job.errand = None
        if self._runner is not job:
            return False
        self._runner = self._source = None
        return True

    def end(self) -> Job | None:
        """The login is settled without it; whom to wake: he may be on the way still."""
        runner = self._runner
        if runner is not None:
            runner.errand = None
        self._source = self._runner = None
        return runner
