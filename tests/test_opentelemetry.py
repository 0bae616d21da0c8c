"""OpenTelemetry, with its own SDK: metrics of the pool, and spans of operations."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from pkcs11 import Mechanism

from pkcs11_pool import KeyNotFound, KeyRef, PinRefused, PoolTimeout, TokenPool
from pkcs11_pool.integrations import opentelemetry as integration
from pkcs11_pool.integrations.metrics import METRICS, Kind
from pkcs11_pool.stats import BOUNDS
from poolkit import Hold, digest, eventually, make_ec_key, settled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from conftest import MakePool

WAIT, USE = "pkcs11.pool.session.wait_time", "pkcs11.pool.session.use_time"


class Telemetry:
    """An SDK of OpenTelemetry that keeps everything in memory."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))

    def instrument(self) -> None:
        """Instrument operations with it."""
        integration.instrument(tracer_provider=self.tracers, meter_provider=self.meters)

    def points(self) -> dict[str, list[Any]]:
        """The data points of each metric."""
        data = self.reader.get_metrics_data()
        found: dict[str, list[Any]] = {}
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    found[metric.name] = list(metric.data.data_points)
        return found

    def value(self, name: str, **attributes: str) -> Any:
        """The one point with these attributes, besides the pool's name."""
        (point,) = [
            point
            for point in self.points()[name]
            if attributes.items() <= dict(point.attributes).items()
        ]
        return point

    def spans(self, name: str) -> list[ReadableSpan]:
        """The spans of this name that ended."""
        return [s for s in self.exporter.get_finished_spans() if s.name == name]


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """An SDK, and nothing instrumented afterwards."""
    made = Telemetry()
    yield made
    integration.uninstrument()
    made.meters.shutdown()
    made.tracers.shutdown()


async def test_the_gauges_and_counters_are_collected(
    make_pool: MakePool, telemetry: Telemetry
) -> None:
    """All of the table but the histograms, with the pool's name."""
    async with make_pool(name="signing") as pool:
        observer = integration.observe(pool, meter_provider=telemetry.meters)
        await digest(pool)
        await settled(pool)
        points = telemetry.points()
        wanted = {m.otel for m in METRICS if m.kind is not Kind.HISTOGRAM}
        assert set(points) == wanted
        for found in points.values():
            assert {point.attributes["pkcs11.pool.name"] for point in found} == {
                "signing"
            }
        assert telemetry.value("pkcs11.pool.operation.count").value == 1
        state = {"pkcs11.pool.state": "ready"}
        assert telemetry.value("pkcs11.pool.state", **state).value == 1
        idle = {"pkcs11.pool.session.state": "idle"}
        ahead = pool.stats().sessions_ahead
        assert telemetry.value("pkcs11.pool.session.count", **idle).value == ahead
        observer.add(make_pool(name="other"))
        assert len(telemetry.points()["pkcs11.pool.session.max"]) == 2
        observer.remove(pool)
        assert len(telemetry.points()["pkcs11.pool.session.max"]) == 1


async def test_an_operation_is_a_span(pool: TokenPool, telemetry: Telemetry) -> None:
    """Under the caller's own, with what helps and nothing that names a key."""
    key = await make_ec_key(pool, label="secret-label")
    telemetry.instrument()
    with telemetry.tracers.get_tracer("test").start_as_current_span("mine"):
        await key.sign(bytes(32), mechanism=Mechanism.ECDSA)
    (span,) = telemetry.spans("pkcs11 sign")
    (mine,) = telemetry.spans("mine")
    assert span.parent is not None
    assert span.parent.span_id == mine.context.span_id
    assert span.kind is SpanKind.CLIENT
    attributes = dict(span.attributes or {})
    assert attributes.pop(WAIT) >= 0  # type: ignore[operator]
    assert attributes == {
        "pkcs11.pool.name": "demo",
        "pkcs11.operation.name": "sign",
        "pkcs11.mechanism": "CKM_ECDSA",
    }
    assert span.status.status_code is StatusCode.UNSET


async def test_a_failed_operation_tells_its_error_without_the_text(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """The text names the key."""
    telemetry.instrument()
    with pytest.raises(KeyNotFound, match="secret-label"):
        await pool.key(label="secret-label").sign(b"data")
    (span,) = telemetry.spans("pkcs11 sign")
    assert span.status.status_code is StatusCode.ERROR
    assert dict(span.attributes or {})["error.type"] == "KeyNotFound"
    assert "secret-label" not in span.to_json()


async def test_what_the_token_answered_is_told_by_its_code(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """``CKR_…``, as its documentation has it."""
    telemetry.instrument()
    await pool.logout()
    with pytest.raises(PinRefused):
        await pool.login("wrong-pin")
    (span,) = telemetry.spans("pkcs11 login")
    attributes = dict(span.attributes or {})
    assert attributes["error.type"] == "PinRefused"
    assert attributes["pkcs11.rv"] == "CKR_PIN_INCORRECT"
    assert "wrong-pin" not in span.to_json()


async def test_no_frame_of_a_span_has_the_pin(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """A traceback with the values of variables goes through it."""
    telemetry.instrument()
    await pool.logout()
    for give in (pool.login, lambda pin: pool.login(pin=pin)):
        with pytest.raises(PinRefused) as caught:
            await give("wrong-pin")
        told = [
            f"{entry.frame.f_locals}"
            for entry in caught.traceback
            if "pkcs11_pool" in str(entry.path)
        ]
        assert told
        assert not [text for text in told if "wrong-pin" in text]


async def test_a_cancelled_operation_is_no_error(
    make_pool: MakePool, telemetry: Telemetry
) -> None:
    """It says that it was cancelled."""
    telemetry.instrument()
    async with make_pool() as pool, anyio.create_task_group() as tasks:
        with Hold() as hold:
            tasks.start_soon(pool.run, hold)
            await hold.entered()
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await eventually(lambda: telemetry.spans("pkcs11 run"))
    (span,) = telemetry.spans("pkcs11 run")
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {})["pkcs11.operation.cancelled"] is True


async def test_the_histograms_say_what_the_pools_own_do(
    make_pool: MakePool, telemetry: Telemetry
) -> None:
    """One by one, in a session, by ``map``; what waited in vain and what hung."""
    telemetry.instrument()
    async with make_pool(max_sessions=1) as pool:
        await digest(pool)
        async with pool.session() as session:
            await digest(session)
        results = pool.map(lambda _session, item: item, range(5))
        assert [item async for item in results] == list(range(5))
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                with pytest.raises(PoolTimeout):
                    await digest(pool, timeout=0.06)
        with Hold() as hold, pytest.raises(PoolTimeout):
            await pool.run(hold, timeout=0.06)
        await eventually(lambda: not pool.stats().calls_stuck)
        await settled(pool)
        stats = pool.stats()
    for name, times in ((WAIT, stats.wait_times), (USE, stats.run_times)):
        point = telemetry.value(name)
        assert point.attributes == {"pkcs11.pool.name": "demo"}
        assert tuple(point.explicit_bounds) == BOUNDS
        assert point.count == times.count
        assert point.sum == pytest.approx(times.seconds, abs=0.05)
    assert telemetry.value(USE).count == 1 + 1 + 5 + 1 + 1


async def test_a_span_tells_how_long_it_waited(
    make_pool: MakePool, telemetry: Telemetry
) -> None:
    """So one sees whether the token is slow or the pool too small."""
    telemetry.instrument()
    async with make_pool(max_sessions=1) as pool, anyio.create_task_group() as tasks:
        with Hold() as hold:
            tasks.start_soon(pool.run, hold)
            await hold.entered()
            with pytest.raises(PoolTimeout):
                await digest(pool, timeout=0.06)
    (span,) = telemetry.spans("pkcs11 digest")
    waited = dict(span.attributes or {})[WAIT]
    assert isinstance(waited, float)
    assert waited >= 0.05


def test_off_means_off(telemetry: Telemetry) -> None:
    """No wrapper is left; on twice is on once."""
    before = inspect.getattr_static(KeyRef, "sign")
    telemetry.instrument()
    once = inspect.getattr_static(KeyRef, "sign")
    assert once is not before
    telemetry.instrument()
    assert inspect.getattr_static(KeyRef, "sign") is once
    assert once.__doc__ == before.__doc__
    integration.uninstrument()
    integration.uninstrument()
    assert inspect.getattr_static(KeyRef, "sign") is before


async def test_without_an_sdk_nothing_happens(pool: TokenPool) -> None:
    """The API alone gives spans that record nothing."""
    integration.instrument()
    try:
        await digest(pool)
        assert not trace.get_current_span().is_recording()
    finally:
        integration.uninstrument()
