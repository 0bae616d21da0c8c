"""Sessions in somebody's hands: lent, lost, and given back.

A layer of the engine, on :class:`~pkcs11_pool.engine.dispatch.Dispatch`.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.cryptoki import operations
from pkcs11_pool.cryptoki.keys import GONE, HandleCache
from pkcs11_pool.engine.dispatch import Dispatch
from pkcs11_pool.engine.leases import Lease, Loan
from pkcs11_pool.errors import SessionObjectDestroyed
from pkcs11_pool.jobs import Job, Kind, Phase
from pkcs11_pool.state import PoolState

if TYPE_CHECKING:
    from collections.abc import Hashable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.keys import SessionObject
    from pkcs11_pool.cryptoki.module import Module
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.leases import Chain
    from pkcs11_pool.jobs import Waiter


class _Nobody:
    """Waits for nothing: the waiter of what the engine does for itself."""

    def wake(self) -> bool:
        return True


NOBODY: Final = _Nobody()


class Leasing(Dispatch):
    """Leases, chains of calls in one, and the session of the security officer."""

    def __init__(self, options: PoolOptions) -> None:
        super().__init__(options)
        self.cache = HandleCache(options.handle_max_age)
        self.cache.guards = options.login_ignored

    @property
    @abstractmethod
    def _module(self) -> Module: ...

    # -- Giving back --------------------------------------------------------------

    def _give_back(self, result: Any) -> None:
        """A result that nobody takes: a lease is a session, and must not leak."""
        if isinstance(result, Loan):
            self.end_lease(result.lease, NOBODY)

    def end_lease(self, lease: Lease, waiter: Waiter) -> Job | None:
        """Close a lease, on a worker; None if it is closed or lost already.

        Its queued jobs are refused. A running one is let finish, and so are calls
        of others that are inside with its session objects, for at most
        ``close_timeout``; the waiter waits no longer than that.
        """
        if self.home.is_forked:
            return None  # a forked child leaves its parent's sessions alone
        job = Job(
            lambda session: self._end(lease, session),
            Kind.LANE,
            waiter=waiter,
            deadline=time.monotonic() + 2 * self.options.close_timeout,
            restart=False,
            stays=True,
            lane=lease,
        )
        with self._lock:
            if lease.closing:
                return None
            lease.lose(None)
            wake = self._refuse_lane_locked(lease) + self._refuse_users_locked(lease)
            self._enqueue_locked(job)
            self._wake_for_next_locked()
        self._wake_all(wake)
        return job

    def _end(self, lease: Lease, session: Session) -> None:
        """On a worker: the session is closed, and its session objects die with it."""
        lease.owner.wait_unused(self.options.close_timeout)
        lease.owner.gone = True
        with self.cache.changing():
            session.close()
        with self._lock:
            self._room.returned(lease)

    def _refuse_lane_locked(self, lease: Lease) -> list[Job]:
        """Refuse the queued jobs of a lease that is over; who must be woken."""
        refused = []
        while lease.waiting:
            job = lease.waiting.popleft()
            if self._settle_lane_locked(job):
                refused.append(job)
        return refused

    def _settle_lane_locked(self, job: Job) -> bool:
        """A job whose lease is over is refused; its end, if it was one, has come."""
        return self._settle_locked(job, None, None if job.stays else job.lane.error())

    def _refuse_users_locked(self, lease: Lease) -> list[Job]:
        """Refuse jobs in line that use a session object of a lease that is over."""
        users = (
            job
            for job in self._waiting
            if job.target is not None and job.target.owner is lease.owner
        )
        return self._refuse_locked(users, lambda: SessionObjectDestroyed(GONE))

    # -- Chains of calls ----------------------------------------------------------

    def end_chain(
        self, lease: Lease, chain: Chain, waiter: Waiter = NOBODY
    ) -> Job | None:
        """A chain was given up: end it in the module; its session is then free."""
        if self.home.is_forked:
            return None  # a forked child leaves its parent's sessions alone

        def stop(session: Session) -> None:
            try:
                chain.stop(session)
            finally:
                chain.over = True

        job = Job(
            stop,
            Kind.LANE,
            waiter=waiter,
            deadline=time.monotonic() + 2 * self.options.close_timeout,
            restart=False,
            stays=True,
            lane=lease,
            chain=chain,
        )
        with self._lock:
            if lease.closing or chain.over or chain.given_up:
                return None
            chain.given_up = True
            self._enqueue_locked(job)
            self._wake_for_next_locked()
        return job

    def keep_alive(self, idle: float) -> None:
        """Have a call made in each session that is lent and not used just now."""
        deadline = time.monotonic() + idle
        with self._lock:
            for lane in (*self._room.leases, self._mode.so_lane):
                if lane is None or lane.busy or lane.closing:
                    continue
                going = lane.chain is not None and not lane.chain.over
                job = Job(
                    operations.touch,
                    Kind.LANE,
                    waiter=NOBODY,
                    deadline=deadline,
                    restart=False,
                    lane=lane,
                    chain=lane.chain if going else None,
                )
                job.is_operation = False
                self._enqueue_locked(job)
                self._wake_for_next_locked()

    def end_orphans(self) -> None:
        """End what nobody holds any more: leases, and chains in a lease."""
        # One thread at a time: whoever comes meanwhile must find them ended.
        with self._ending, suppress(IndexError):
            while True:
                lease, chain = self.orphans.popleft()
                if chain is None:
                    self.end_lease(lease, NOBODY)
                else:
                    self.end_chain(lease, chain)

    def watch_chain(self, job: Job) -> None:
        """Wake a job's waiter at its deadline, whatever its caller does meanwhile."""
        with self._lock:
            if self._mode.state not in (PoolState.READY, PoolState.RECOVERING):
                return  # it ends the chain itself
            job.phase = Phase.WAITING
            self._watch_locked(job)

    def unwatch_chain(self, job: Job) -> None:
        """The chain is over."""
        with self._lock:
            self._deadlines.unwatch(job)

    def interrupt(self, cause: Exception) -> None:
        """A login ends by the user's word: what needs it must not go on."""
        with self._lock:
            lanes = [*self._room.leases, self._mode.so_lane]
            for lane in lanes:
                if lane is not None and lane.chain is not None and lane.chain.private:
                    lane.chain.cause = cause

    def _take_lone_locked(self, cause: Exception) -> list[Session]:
        """The sessions of chains that have one to themselves; the chains are over."""
        lone = [lease for lease in self._room.leases if lease.lone]
        for lease in lone:
            if lease.chain is not None:
                lease.chain.cause = cause
            lease.lose(cause)
            self._wake_all(self._refuse_lane_locked(lease))
            self._room.returned(lease)
        # Nothing of theirs stays in line: it would stand in the way of the officer's.
        for job in self._waiting:
            if job.lane in lone:
                self._take_out_locked(job)
                if self._settle_lane_locked(job):
                    job.waiter.wake()
        return [lease.session for lease in lone]

    # -- Session objects, and the SO's session ------------------------------------

    def session_object(self, handle: int) -> SessionObject | None:
        """The session object with this number, whichever open session owns it."""
        with self._lock:
            owners = [lease.owner for lease in self._room.leases]
            if self._mode.so_lane is not None:
                owners.append(self._mode.so_lane.owner)
        found = (owner.objects.get(handle) for owner in owners if not owner.closed)
        return next((o for o in found if o is not None and not o.destroyed), None)

    def begin_so_lane(self, session: Session, holder: Hashable) -> Lease:
        """The session of a SO period, as a lease that only its jobs may use."""
        lease = Lease(session, holder)
        lease.counted, lease.anchor = False, True
        with self._lock:
            self._mode.so_lane = lease
        return lease

    def end_so_lane(self, lease: Lease) -> None:
        """The period ends: no more jobs on its session."""
        with self._lock:
            lease.lose(None)
            wake = self._refuse_lane_locked(lease)
        self._wake_all(wake)
