"""OpenTelemetry: what a pool counts as metrics, and its operations as spans.

``observe(pool)`` gives the gauges and counters: the pool keeps them anyway, they are
read when they are collected, and an operation costs nothing more. ``instrument()``
gives a span for each operation, batch and stream, and the histograms of waiting and
using; it puts wrappers around the pool's methods, so that without it an operation costs
nothing more either. Neither tells a key's name, a template, a PIN or the text of an
error.

Source of the names: see :mod:`pkcs11_pool.integrations.metrics`.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import time
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool import PooledSession, SecurityOfficer, TokenPool
from pkcs11_pool.engine.token_engine import TokenEngine
from pkcs11_pool.faces.keyref import KeyRef
from pkcs11_pool.faces.mapping import Results
from pkcs11_pool.faces.parameters import ParametersRef
from pkcs11_pool.faces.streams import CryptStream
from pkcs11_pool.integrations import extras, spans
from pkcs11_pool.integrations.metrics import METRICS, Kind, Metric, read
from pkcs11_pool.integrations.spans import POOL_NAME
from pkcs11_pool.jobs import Kind as JobKind
from pkcs11_pool.jobs import Phase
from pkcs11_pool.stats import BOUNDS

try:
    from opentelemetry import metrics, trace
except ModuleNotFoundError as error:
    raise extras.missing("otel", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
    from opentelemetry.trace import Tracer, TracerProvider

    from pkcs11_pool.jobs import Job

SCOPE: Final = "pkcs11_pool"
LABELS: Final = {
    "state": "pkcs11.pool.state",
    "login_state": "pkcs11.pool.login_state",
    "session_state": "pkcs11.pool.session.state",
}
"""The attributes that stand for the labels of the table."""
_ITERABLES: Final = frozenset({"map", "sign_many", "encrypt_stream", "decrypt_stream"})


class PoolObserver:
    """The gauges and counters of pools, as OpenTelemetry collects them.

    Made by :func:`observe`. Its instruments stay for the life of the meter provider.
    """

    def __init__(self, pools: Iterable[TokenPool], meter: Meter) -> None:
        self._pools = list(pools)
        for metric in METRICS:
            how = (
                metric.otel,
                [functools.partial(self._observe, metric)],
                metric.unit,
                metric.help,
            )
            if metric.kind is Kind.COUNTER:
                meter.create_observable_counter(*how)
            elif metric.kind is Kind.GAUGE:
                meter.create_observable_up_down_counter(*how)

    def add(self, pool: TokenPool) -> None:
        """Observe one more pool."""
        # A new list: a collection may be going through the old one, on its thread.
        self._pools = [*self._pools, pool]

    def remove(self, pool: TokenPool) -> None:
        """Observe a pool no longer; harmless for one that is not observed."""
        self._pools = [known for known in self._pools if known is not pool]

    def _observe(
        self, metric: Metric, _options: CallbackOptions
    ) -> Iterable[Observation]:
        for reading in read(self._pools):
            for value, number in metric.values(reading).items():
                attributes = {POOL_NAME: reading.name}
                if metric.label is not None:
                    attributes[LABELS[metric.label]] = value
                # Of the things that are counted, none comes in halves.
                yield metrics.Observation(int(number), attributes)


def observe(
    *pools: TokenPool, meter_provider: MeterProvider | None = None
) -> PoolObserver:
    """Export the gauges and counters of these pools, before or after opening.

    Args:
        *pools: Which; more may come by ``add`` of the result.
        meter_provider: None: the global one.
    """
    meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
    return PoolObserver(pools, meter)


# -- Operations -----------------------------------------------------------------------


class _Instrumentation:
    """What was wrapped, so that it can be unwrapped."""

    def __init__(self) -> None:
        self._originals: list[tuple[type, str, Any]] = []

    @property
    def is_on(self) -> bool:
        return bool(self._originals)

    def wrap(self, owner: type, name: str, wrapper: Callable[..., Any]) -> None:
        self._originals.append((owner, name, vars(owner)[name]))
        setattr(owner, name, wrapper)

    def unwrap(self) -> None:
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)


_instrumentation = _Instrumentation()


def instrument(
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Make a span of each operation, and histograms of how long they took.

    For all pools of the process; call it before pools are opened. Calling it again
    changes nothing. A span is named after the method (``pkcs11 sign``); it has the
    pool's name, the mechanism, the time spent waiting for a session, and the class and
    ``CKR_…`` of an error.

    :meth:`~TokenPool.map`, ``sign_many`` and the streams have one span each, from the
    first result asked for to the last: with the number of results and of those that
    failed, or the bytes given. One that is broken off is a cancelled one. Close it, or
    use it in ``async with``: the span of one that is only forgotten ends when the next
    one begins.

    Args:
        tracer_provider: None: the global one.
        meter_provider: None: the global one.
    """
    if _instrumentation.is_on:
        return
    tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
    for owner, name, wrapper in _wrappers(tracer):
        _instrumentation.wrap(owner, name, wrapper)
    atexit.register(spans.drain)
    _Measured(metrics.get_meter(SCOPE, meter_provider=meter_provider)).install()


def uninstrument() -> None:
    """Take the wrappers away; harmless when there are none."""
    _instrumentation.unwrap()
    spans.drain()


def _wrappers(tracer: Tracer) -> list[tuple[type, str, Callable[..., Any]]]:
    """For what the pool gives to be awaited or iterated over, where it is defined."""
    leaves = (TokenPool, PooledSession, KeyRef, ParametersRef, SecurityOfficer)
    found: list[tuple[type, str, Callable[..., Any]]] = []
    for owner in {owner: None for leaf in leaves for owner in leaf.__mro__}:
        for name, member in vars(owner).items():
            if inspect.iscoroutinefunction(member) and not name.startswith("_"):
                found.append((owner, name, spans.operation(member, tracer)))
            elif name in _ITERABLES and inspect.isfunction(member):
                found.append((owner, name, spans.iterable(member, tracer)))
    for given in (Results, CryptStream):
        found.append((given, "__anext__", spans.following(given.__anext__)))
        found.append((given, "aclose", spans.closing(given.aclose)))
    return found


class _Measured:
    """Records how long each operation waited and ran, behind its caller's back."""

    def __init__(self, meter: Meter) -> None:
        named = {metric.field: metric for metric in METRICS}
        self._wait = _histogram(meter, named["wait_times"])
        self._use = _histogram(meter, named["run_times"])

    def install(self) -> None:
        """Put wrappers around the engine's methods."""
        owners = {
            name: next(owner for owner in TokenEngine.__mro__ if name in vars(owner))
            for name in ("submit", "deliver", "_expire_locked")
        }
        for name, make in {
            "submit": self._submitted,
            "deliver": self._delivered,
            "_expire_locked": self._expired,
        }.items():
            original = vars(owners[name])[name]
            wrapper = functools.wraps(original)(make(original))
            _instrumentation.wrap(owners[name], name, wrapper)

    def _submitted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def submit(engine: Any, job: Job) -> Any:
            call = spans.current.get()
            if call is not None:
                call.add(job)
            return original(engine, job)

        return submit

    def _delivered(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def deliver(engine: Any, worker: Any, job: Job, result: Any, error: Any) -> Any:
            # Of a call that was given up on, the end was recorded at its deadline.
            lost, used = worker.lost, time.monotonic() - job.since
            opens = original(engine, worker, job, result, error)
            if not lost:
                # Now that the caller has the result.
                self._record(engine, job, used)
            return opens

        return deliver

    def _expired(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def expire(engine: Any, job: Job, now: float) -> Any:
            used = now - job.since if job.phase is Phase.RUNNING else None
            expired = original(engine, job, now)
            if job.kind is not JobKind.ACTOR and job.since:
                self._record(engine, job, used)
            return expired

        return expire

    def _record(self, engine: TokenEngine, job: Job, used: float | None) -> None:
        attributes = {POOL_NAME: engine.name}
        if not job.stays:
            self._wait.record(job.wait_seconds, attributes)
        if job.is_operation and used is not None:
            self._use.record(used, attributes)


def _histogram(meter: Meter, metric: Metric) -> metrics.Histogram:
    return meter.create_histogram(
        metric.otel,
        metric.unit,
        metric.help,
        explicit_bucket_boundaries_advisory=list(BOUNDS),
    )
