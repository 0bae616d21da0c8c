"""OpenTelemetry: what a pool counts as metrics, and its operations as spans.

``observe(pool)`` gives the gauges and counters: the pool keeps them anyway, they are
read when they are collected, and an operation costs nothing more. ``instrument()``
gives a span for each awaited operation, and the histograms of waiting and using; it
puts wrappers around the pool's methods, so that without it an operation costs nothing
more either. Neither tells a key's name, a template, a PIN or the text of an error.

Source of the names: see :mod:`pkcs11_pool.integrations.metrics`.
"""

from __future__ import annotations

import functools
import inspect
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool import PooledSession, SecurityOfficer, TokenPool
from pkcs11_pool.cryptoki import rv
from pkcs11_pool.engine.token_engine import TokenEngine
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.faces.keyref import KeyRef
from pkcs11_pool.faces.parameters import ParametersRef
from pkcs11_pool.integrations import extras
from pkcs11_pool.integrations.metrics import METRICS, Kind, Metric, read
from pkcs11_pool.jobs import Kind as JobKind
from pkcs11_pool.jobs import Phase
from pkcs11_pool.stats import BOUNDS

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ModuleNotFoundError as error:
    raise extras.missing("otel", error) from error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
    from opentelemetry.trace import Tracer, TracerProvider

    from pkcs11_pool.jobs import Job

SCOPE: Final = "pkcs11_pool"
POOL_NAME: Final = "pkcs11.pool.name"
OPERATION: Final = "pkcs11.operation.name"
MECHANISM: Final = "pkcs11.mechanism"
CODE: Final = "pkcs11.rv"
CANCELLED: Final = "pkcs11.operation.cancelled"
WAIT_TIME: Final = "pkcs11.pool.session.wait_time"
ERROR_TYPE: Final = "error.type"
LABELS: Final = {
    "state": "pkcs11.pool.state",
    "login_state": "pkcs11.pool.login_state",
    "session_state": "pkcs11.pool.session.state",
}
"""The attributes that stand for the labels of the table."""


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


class _Call:
    """One awaited operation, and the jobs that it sent to the engine."""

    __slots__ = ("jobs",)

    def __init__(self) -> None:
        self.jobs: list[Job] = []


_call: ContextVar[_Call | None] = ContextVar("pkcs11_pool_call", default=None)


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
    """Make a span of each awaited operation, and histograms of how long they took.

    For all pools of the process; call it before pools are opened. Calling it again
    changes nothing. A span is named after the method (``pkcs11 sign``); it has the
    pool's name, the mechanism, the time spent waiting for a session, and the class and
    ``CKR_…`` of an error. What :meth:`~TokenPool.map`, ``sign_many`` and the streams
    do is in the histograms, and has no span: those are loops of the caller.

    Args:
        tracer_provider: None: the global one.
        meter_provider: None: the global one.
    """
    if _instrumentation.is_on:
        return
    tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
    for owner, name in _operations():
        wrapper = _traced(vars(owner)[name], tracer)
        _instrumentation.wrap(owner, name, wrapper)
    _Measured(metrics.get_meter(SCOPE, meter_provider=meter_provider)).install()


def uninstrument() -> None:
    """Take the wrappers away; harmless when there are none."""
    _instrumentation.unwrap()


def _operations() -> list[tuple[type, str]]:
    """The public coroutine functions of the pool, each where it is defined."""
    leaves = (TokenPool, PooledSession, KeyRef, ParametersRef, SecurityOfficer)
    owners = {owner: None for leaf in leaves for owner in leaf.__mro__}
    return [
        (owner, name)
        for owner in owners
        for name, member in vars(owner).items()
        if not name.startswith("_")
        and inspect.iscoroutinefunction(inspect.unwrap(member))
    ]


def _traced(
    func: Callable[..., Awaitable[Any]], tracer: Tracer
) -> Callable[..., Awaitable[Any]]:
    operation = func.__name__
    span_name = f"pkcs11 {operation}"

    @hides_pins
    @functools.wraps(func)
    async def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        attributes = {POOL_NAME: _engine_of(self).name, OPERATION: operation}
        mechanism = getattr(kwargs.get("mechanism"), "name", None)
        if mechanism is not None:
            attributes[MECHANISM] = f"CKM_{mechanism}"
        call = _Call()
        with tracer.start_as_current_span(
            span_name,
            kind=SpanKind.CLIENT,
            attributes=attributes,
            # Its text may name a key.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            token = _call.set(call)
            try:
                return await func(self, *args, **kwargs)
            except Exception as error:
                span.set_attributes(_told_by(error))
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise
            except BaseException:
                span.set_attribute(CANCELLED, value=True)
                raise
            finally:
                _call.reset(token)
                if call.jobs:
                    waited = sum(job.wait_seconds for job in call.jobs)
                    span.set_attribute(WAIT_TIME, waited)

    return traced


def _engine_of(caller: Any) -> TokenEngine:
    calls = getattr(caller, "_calls", caller)
    engine: TokenEngine = calls._engine  # noqa: SLF001  # one package
    return engine


def _told_by(error: Exception) -> dict[str, str]:
    told = {ERROR_TYPE: type(error).__name__}
    code = rv.code_of(error)
    if code is not None:
        told[CODE] = rv.name_of(code)
    return told


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
            call = _call.get()
            if call is not None:
                call.jobs.append(job)
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
