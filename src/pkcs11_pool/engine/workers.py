"""A worker thread: takes jobs from its engine, one after the other.

It belongs to one engine and so to one token. A worker whose call was given up
on is *lost*: when the call returns after all, it closes its session and ends.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import exceptions as p11

from pkcs11_pool.engine.leases import Lease, Loan
from pkcs11_pool.errors import PoolError
from pkcs11_pool.jobs import Kind

if TYPE_CHECKING:
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.jobs import Job

# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_READ: Final = Kind.READ
_MEASURED: Final = 4
"""Of so many jobs it is measured how long one is on a processor."""


class Worker:
    """One thread of an engine.

    Attributes:
        job: What it works on. Written under the engine's lock.
        busy: It may be inside the module. Written under the engine's lock.
        counted: The kind of session that is counted for it. Written there, too.
        lost: Its call was given up on. Written under the engine's lock.
        since: When it took its last job, or was woken. Written there, too.
        done: When that job had its result, or was let go. Written there, too.
        coming: It was woken and is not there yet. Written there, too.
        opened: How many sessions it opened since the engine last looked.
        spent: Seconds on a processor for its last job, where that was measured.
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
        self.since = self.done = 0.0
        self.coming = False
        self.opened = 0
        self.spent: float | None = None
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
        ahead: Session | None = None
        # Held where no turn is needed: nobody else takes it.
        free = threading.RLock()
        while True:
            with engine.turn() or free:
                claimed = engine.claim(self, ahead)
                ahead = None
                if claimed is not None:
                    if claimed[0].number % _MEASURED:
                        ahead = self._do(*claimed)
                        self.spent = None
                    else:
                        began = time.thread_time()
                        ahead = self._do(*claimed)
                        self.spent = time.thread_time() - began
                    if self.lost:
                        engine.returned(ahead)
                        return
                    # The job and its error must not live on in an idle thread.
                    del claimed
                    continue
            if self.lost:
                engine.returned(None)
                return
            if self._stopping:
                return
            if not engine.look_around(self):
                self._sleep.acquire()

    def _do(
        self, job: Job, session: Session | None, victim: Session | None
    ) -> Session | None:
        """Do a job and tidy up; a session opened ahead, or what is left if lost."""
        engine = self._engine
        if session is None or victim is not None or engine.max_idle is not None:
            try:
                session = self._opened(job, session, victim)
            except Exception as error:  # noqa: BLE001  # raised at the caller
                engine.no_session(self, job, error)
                return None
        work = job.work
        result: Any = None
        failure: BaseException | None = None
        if session.epoch != (epoch := engine.actor.login.epoch):
            session.epoch = epoch
            failure = engine.not_logged_in(session)
        if failure or work is None or job.dropped or self.lost:
            result, failure = self._call(job, session, failure)
        else:
            try:
                result = work(session)
            except BaseException as error:  # noqa: BLE001  # raised again at the caller
                failure = error
        again = False
        if failure is not None and isinstance(failure, Exception):
            failure = engine.finished(job, session, failure)
            again = failure is None
        opens = not again and engine.deliver(self, job, result, failure)
        if self.lost:
            return session
        lane = job.lane
        if job.kind is not _READ and (
            isinstance(result, Loan)
            or (lane is not None and (lane.anchor or not lane.cause))
        ):
            return None
        # Behind the caller's back.
        session.close()
        return self._open_ahead() if opens and not self.lost else None

    def _opened(
        self, job: Job, session: Session | None, victim: Session | None
    ) -> Session:
        """The session for a job, opened if need be."""
        if victim is not None:
            victim.close()
        if session is not None and not self._engine.is_stale(job, session):
            return session
        return self._engine.session_for(self, job)

    def _open_ahead(self) -> Session | None:
        engine = self._engine
        with suppress(p11.PKCS11Error, PoolError):
            session = engine.open_session(self, rw=False)
            if engine.max_idle is not None:
                session.opened_at = time.monotonic()
            return session
        return None

    def _call(
        self, job: Job, session: Session, failure: BaseException | None
    ) -> tuple[Any, BaseException | None]:
        if self.lost or (job.dropped and not job.stays):
            # Its caller went while the session was opened: nothing happened.
            return None, None
        if failure is not None:
            return None, failure
        work = job.work
        if work is None:
            # Only leases have none.
            lease = Lease(session, job.holder, counts_rw=job.rw)
            lease.chain, lease.lone = job.chain, job.chain is not None
            return Loan(lease, self._engine.orphans), None
        try:
            return work(session), None
        except BaseException as error:  # noqa: BLE001  # raised again at the caller
            return None, error
