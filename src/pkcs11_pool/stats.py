"""What a pool tells of itself: gauges read off its structures, and counters.

Pure. A gauge is never derived from counters; a counter only grows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A snapshot of a pool, taken under its lock."""

    #: The most sessions that operations and leases may have open at present.
    sessions_max: int
    #: Sessions open now, the anchor not counted.
    sessions_open: int
    #: Sessions opened ahead, that no operation has used.
    sessions_ahead: int
    #: Sessions held by open ``PooledSession`` objects.
    sessions_leased: int
    #: Operations on a worker, until their result is posted.
    operations_running: int
    #: Operations that wait for a session.
    operations_waiting: int
    #: Calls given up on that the module still holds.
    calls_stuck: int
    #: Operations that ended, in whichever way.
    operations_total: int
    #: Operations that ended with an error of the token or of the pool.
    operations_failed: int
    #: Operations whose caller was cancelled.
    operations_cancelled: int
    #: Operations whose deadline passed.
    operations_timed_out: int
    #: Operations that found no free session when they came.
    waits_total: int
    #: Time spent waiting by those, in seconds.
    wait_seconds_total: float
    #: Time spent on workers by all operations, in seconds.
    run_seconds_total: float
    #: ``C_OpenSession`` calls that gave a session.
    sessions_opened_total: int
    #: ``C_Login`` calls that were accepted.
    logins_total: int
    #: ``C_Login`` calls that were refused.
    logins_failed_total: int
    #: Times that a lost login or token was restored.
    recoveries_total: int
    #: Calls given up on while the module held the thread.
    calls_lost: int
    #: The last error of the pool or the token, as ``Type: text``, or None.
    last_error: str | None


@dataclass(slots=True)
class Counters:
    """The counters of a pool. Written under the engine's lock only."""

    operations_total: int = 0
    operations_failed: int = 0
    operations_cancelled: int = 0
    operations_timed_out: int = 0
    waits_total: int = 0
    wait_seconds_total: float = 0.0
    run_seconds_total: float = 0.0
    sessions_opened_total: int = 0
    logins_total: int = 0
    logins_failed_total: int = 0
    recoveries_total: int = 0
    calls_lost: int = 0
    last_error: str | None = None
