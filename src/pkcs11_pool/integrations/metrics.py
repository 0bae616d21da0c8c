"""What is exported of a pool, and under which names: one table for every exporter.

Pure data, no library of metrics: the Prometheus collector, OpenTelemetry and the
status app all read this table, and a test compares the documentation with it. No
value here names a key, and none holds the text of an error.

Source of the OpenTelemetry names: its semantic conventions for connection pools
(``db.client.connection.count``, ``max``, ``pending_requests``, ``wait_time``,
``use_time``), with ``pkcs11.pool.session`` in the place of the connection.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from pkcs11_pool.errors import ForkedProcess, PoolClosed
from pkcs11_pool.state import LoginState, PoolState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pkcs11_pool.faces.pool import TokenPool
    from pkcs11_pool.stats import Histogram, PoolStats

POOL: Final = "pool"
"""The label that every metric has: the name of the pool."""


class Kind(Enum):
    """What can be done with the numbers of a metric."""

    GAUGE = "gauge"
    """Goes up and down, and may be added up over pools."""
    COUNTER = "counter"
    """Grows only, from 0 at the making of the pool."""
    HISTOGRAM = "histogram"
    """Counters of buckets, and the sum of the times."""


@dataclass(frozen=True, slots=True)
class Reading:
    """All that a pool tells at one moment."""

    name: str
    state: PoolState
    login_state: LoginState
    token_label: str | None
    stats: PoolStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One thing that is exported.

    Attributes:
        field: The field of ``PoolStats`` that it shows, or of the pool.
        name: For Prometheus; a counter gets ``_total`` behind it.
        otel: For OpenTelemetry.
        unit: For OpenTelemetry, by UCUM.
        kind: What it is.
        help: One sentence.
        label: A label that it has besides the pool's name, or None.
        values: Its numbers, by the value of that label; ``""`` where there is none.
    """

    field: str
    name: str
    otel: str
    unit: str
    kind: Kind
    help: str
    values: Callable[[Reading], Mapping[str, float]]
    label: str | None = None

    def histogram(self, reading: Reading) -> Histogram:
        """The histogram, of a metric that is one."""
        found: Histogram = getattr(reading.stats, self.field)
        return found


def read(pools: Iterable[TokenPool]) -> list[Reading]:
    """What these pools tell now; each with a name of its own.

    A pool that was inherited by a fork has nothing to tell here, and is left out.
    """
    readings: list[Reading] = []
    names: Counter[str] = Counter()
    for pool in pools:
        with suppress(ForkedProcess):
            stats = pool.stats()
            name = pool.name
            names[name] += 1
            if names[name] > 1:
                name = f"{name}-{names[name]}"
            readings.append(
                Reading(name, pool.state, pool.login_state, _label(pool), stats)
            )
    return readings


def _label(pool: TokenPool) -> str | None:
    try:
        return pool.token.label
    except PoolClosed:
        return None


def _number(kind: Kind, row: tuple[str, str, str, str, str]) -> Metric:
    """A metric without a label of its own, from a line of a table below."""
    field, name, otel, unit, text = row
    value = attrgetter(f"stats.{field}")
    return Metric(
        field=field,
        name=f"pkcs11_pool_{name}",
        otel=f"pkcs11.pool.{otel}",
        unit=unit,
        kind=kind,
        help=text,
        values=lambda reading: {"": value(reading)},
    )


def _sessions(reading: Reading) -> Mapping[str, float]:
    stats = reading.stats
    ahead, leased = stats.sessions_ahead, stats.sessions_leased
    used = stats.sessions_open - ahead - leased
    return {"idle": ahead, "leased": leased, "used": used}


def _state(reading: Reading) -> Mapping[str, float]:
    return {state.value: float(reading.state is state) for state in PoolState}


def _login(reading: Reading) -> Mapping[str, float]:
    return {state.value: float(reading.login_state is state) for state in LoginState}


_GAUGES: Final = (
    (
        *("sessions_max", "sessions_max", "session.max", "{session}"),
        "The most sessions that may be open at present, the anchor not counted.",
    ),
    (
        *("operations_waiting", "pending_requests", "session.pending_requests"),
        *("{request}", "Operations that wait for a session."),
    ),
    (
        *("operations_running", "operations_running", "operation.active"),
        *("{operation}", "Operations on a worker, until their result is posted."),
    ),
    (
        *("calls_stuck", "calls_stuck", "call.stuck", "{call}"),
        "Calls given up on that the module still holds.",
    ),
)
_COUNTERS: Final = (
    (
        *("operations_total", "operations", "operation.count", "{operation}"),
        "Operations that ended, in whichever way.",
    ),
    (
        *("operations_failed", "operations_failed", "operation.failed"),
        *("{operation}", "Operations that ended with an error."),
    ),
    (
        *("operations_cancelled", "operations_cancelled", "operation.cancelled"),
        *("{operation}", "Operations whose caller was cancelled."),
    ),
    (
        *("operations_timed_out", "operations_timed_out", "operation.timeouts"),
        *("{operation}", "Operations whose deadline passed, waiting or running."),
    ),
    (
        *("waits_total", "waits", "session.waits", "{operation}"),
        "Operations that found no free session when they came.",
    ),
    (
        *("sessions_opened_total", "sessions_opened", "session.opened", "{session}"),
        "C_OpenSession calls that gave a session.",
    ),
    (
        *("logins_total", "logins", "login.count", "{login}"),
        "C_Login calls that were accepted.",
    ),
    (
        *("logins_failed_total", "logins_failed", "login.failed", "{login}"),
        "C_Login calls that were refused.",
    ),
    (
        *("recoveries_total", "recoveries", "recovery.count", "{recovery}"),
        "Times that a lost login or token was restored.",
    ),
    (
        *("calls_lost", "calls_lost", "call.lost", "{call}"),
        "Calls given up on while the module held the thread.",
    ),
)
_HISTOGRAMS: Final = (
    (
        *("wait_times", "wait_seconds", "session.wait_time", "s"),
        "Seconds from coming to starting, of operations and of requests for a session.",
    ),
    (
        *("run_times", "run_seconds", "session.use_time", "s"),
        "Seconds from starting to the result, or to the deadline.",
    ),
)

METRICS: Final[tuple[Metric, ...]] = (
    Metric(
        field="state",
        name="pkcs11_pool_state",
        otel="pkcs11.pool.state",
        unit="1",
        kind=Kind.GAUGE,
        help="1 for the state that the pool is in, 0 for the others.",
        values=_state,
        label="state",
    ),
    Metric(
        field="login_state",
        name="pkcs11_pool_login_state",
        otel="pkcs11.pool.login_state",
        unit="1",
        kind=Kind.GAUGE,
        help="1 for who is logged in to the token, 0 for the others.",
        values=_login,
        label="login_state",
    ),
    Metric(
        field="sessions_open",
        name="pkcs11_pool_sessions",
        otel="pkcs11.pool.session.count",
        unit="{session}",
        kind=Kind.GAUGE,
        help="Open sessions: idle (opened ahead), leased, or used by an operation.",
        values=_sessions,
        label="session_state",
    ),
    *(_number(Kind.GAUGE, row) for row in _GAUGES),
    *(_number(Kind.COUNTER, row) for row in _COUNTERS),
    *(_number(Kind.HISTOGRAM, row) for row in _HISTOGRAMS),
)

NOT_EXPORTED: Final[Mapping[str, str]] = {
    "sessions_ahead": "the sessions that are idle",
    "sessions_leased": "the sessions that are leased",
    "wait_seconds_total": "the histogram of the wait times has a sum of its own",
    "run_seconds_total": "the sum of the histogram of the run times",
    "last_error": "a text, that may name a key",
    "recent_errors": "no number",
}
"""Fields of ``PoolStats`` that are no metric of their own, and why."""
