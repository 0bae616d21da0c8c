"""A worker thread: takes jobs from its engine, one after the other.

It belongs to one engine and so to one token. A worker whose call was given up
on is *lost*: when the call returns after all, it closes its session and ends.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import exceptions as p11

from pkcs11_pool.jobs import Kind
from pkcs11_pool.leases import Lease, Loan

if TYPE_CHECKING:
    from pkcs11_pool.engine import TokenEngine
    from pkcs11_pool.jobs import Job
    from pkcs11_pool.session import Session

_LOOK_AROUND: Final = 0.3
"""Seconds after which an idle worker looks whether spare sessions should go."""


class Worker:
    """One thread of an engine.

    Attributes:
        job: What it works on. Written under the engine's lock.
        busy: It may be inside the module. Written under the engine's lock.
        counted: The kind of session that is counted for it. Written there, too.
        lost: Its call was given up on. Written under the engine's lock.
    """

    def __init__(self, engine: TokenEngine) -> None:
        self._engine = engine
        self._stopping = False
        # Locked while there is nothing to do: acquiring it is sleeping.
        self._sleep = threading.Lock()
        self._sleep.acquire()
        self.job: Job | None = None
        self.busy = False
        self.counted: bool | None = None
        self.lost = False
        self._thread = threading.Thread(
            target=self._run, name="pkcs11-pool worker", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """End its sleep. Called once for each time that it went idle."""
        self._sleep.release()

    def stop(self) -> None:
        """End the thread when it is idle."""
        self._stopping = True
        # Somebody else may have woken it just now.
        with suppress(RuntimeError):
            self._sleep.release()

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread."""
        self._thread.join(timeout)

    def _run(self) -> None:
        engine = self._engine
        while not self._stopping:
            with engine.turn():
                claimed = engine.claim(self)
                if claimed is not None:
                    self._do(*claimed)
                    if self.lost:
                        return
                    # The job and its error must not live on in an idle thread.
                    del claimed
                    continue
            while not self._sleep.acquire(timeout=_LOOK_AROUND):
                engine.look_around()

    def _do(self, job: Job, session: Session | None, victim: Session | None) -> None:
        engine = self._engine
        if victim is not None:
            victim.close()
        if session is None:
            try:
                session = engine.open_session(rw=job.rw)
            except Exception as error:  # noqa: BLE001  # raised at the caller
                self._no_session(job, error)
                return
        session.epoch = engine.actor.login.epoch
        result, failure = self._call(job, session)
        again = isinstance(failure, Exception) and engine.finished(
            job, session, failure
        )
        if not again:
            engine.deliver(self, job, result, failure)
        if self.lost:
            engine.returned(session)
            return
        self._tidy(job, session, kept=isinstance(result, Loan), again=again)

    def _no_session(self, job: Job, error: Exception) -> None:
        engine = self._engine
        failure = engine.no_session(self, job, error)
        if failure is not None:
            engine.deliver(self, job, None, failure)
        if self.lost:
            engine.returned(None)
            return
        engine.tidied(self, job, closed=False, again=failure is None)

    def _call(self, job: Job, session: Session) -> tuple[Any, BaseException | None]:
        if self.lost or (job.dropped and not job.stays):
            # Its caller went while the session was opened: nothing happened.
            return None, None
        engine = self._engine
        if job.kind is Kind.LEASE:
            lease = Lease(session, job.holder)
            return Loan(lease, engine.orphans), None
        assert job.work is not None  # noqa: S101  # only leases have none
        try:
            return job.work(session), None
        except BaseException as error:  # noqa: BLE001  # raised again at the caller
            return None, error

    def _tidy(self, job: Job, session: Session, *, kept: bool, again: bool) -> None:
        engine = self._engine
        closes = not kept and job.kind is not Kind.LANE
        if closes:
            session.close()
        ahead: Session | None = None
        if engine.tidied(self, job, closed=closes, again=again):
            with suppress(p11.PKCS11Error):
                ahead = engine.open_session(rw=False)
            engine.opened_ahead(self, ahead)
        if self.lost:
            engine.returned(ahead)
