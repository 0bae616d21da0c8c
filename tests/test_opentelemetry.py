"""OpenTelemetry, with its own SDK: metrics of the pool, and spans of operations."""

from __future__ import annotations

import asyncio
import gc
import inspect
import weakref
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

from keykit import IV, PIECE, make_secret
from pkcs11_pool import (
    InvalidOption,
    KeyNotFound,
    KeyRef,
    PinRefused,
    PooledSession,
    PoolTimeout,
    Results,
    TokenPool,
)
from pkcs11_pool.faces.streams import CryptStream
from pkcs11_pool.integrations import opentelemetry as integration
from pkcs11_pool.integrations import spans
from pkcs11_pool.integrations.metrics import METRICS, Kind
from pkcs11_pool.stats import BOUNDS
from poolkit import (
    SLACK,
    Hold,
    blocking,
    digest,
    eventually,
    make_ec_key,
    settled,
    time_limits,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from conftest import MakePool

BATCH, FAILED = "pkcs11.operation.batch.size", "pkcs11.operation.batch.failed"
OUTPUT = "pkcs11.operation.output.size"
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


@pytest.mark.usefixtures("never_idle")
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
        with Hold() as hold:
            for limit in time_limits(0.06):
                with pytest.raises(PoolTimeout) as caught:
                    await pool.run(hold, timeout=limit)
                if caught.value.phase == "running":
                    break
        await eventually(lambda: not pool.stats().calls_stuck)
        await settled(pool)
        stats = pool.stats()
    for name, times in ((WAIT, stats.wait_times), (USE, stats.run_times)):
        point = telemetry.value(name)
        assert point.attributes == {"pkcs11.pool.name": "demo"}
        assert tuple(point.explicit_bounds) == BOUNDS
        assert point.count == times.count
        assert point.sum == pytest.approx(times.seconds, abs=SLACK)
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


# -- Batches and streams --------------------------------------------------------------


def told(telemetry: Telemetry, name: str) -> dict[str, Any]:
    """The attributes of the one span of this name; all of them waited somehow."""
    (span,) = telemetry.spans(f"pkcs11 {name}")
    attributes = dict(span.attributes or {})
    assert attributes.pop("pkcs11.pool.name") == "demo"
    assert attributes.pop("pkcs11.operation.name") == name
    assert attributes.pop(WAIT) >= 0  # type: ignore[operator]
    return attributes


async def test_a_batch_is_one_span_with_its_counts(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """Under the caller's own; what brings its items has spans below it."""
    telemetry.instrument()

    async def items() -> AsyncIterator[int]:
        for number in range(30):
            if number == 7:
                await digest(pool)
            yield number

    results = pool.map(lambda _session, item: item, items())
    with telemetry.tracers.get_tracer("test").start_as_current_span("mine"):
        assert [item async for item in results] == list(range(30))
    assert [item async for item in results] == []
    counts = {BATCH: 30, FAILED: 0}
    assert told(telemetry, "map") == counts
    (span,), (mine,) = telemetry.spans("pkcs11 map"), telemetry.spans("mine")
    (below,) = telemetry.spans("pkcs11 digest")
    assert span.parent is not None
    assert span.parent.span_id == mine.context.span_id
    assert below.parent is not None
    assert below.parent.span_id == span.context.span_id
    assert (span.kind, span.status.status_code) == (SpanKind.CLIENT, StatusCode.UNSET)
    assert not trace.get_current_span().is_recording()


async def test_errors_in_the_place_of_results_are_counted(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """The batch itself went well."""
    key = await make_ec_key(pool, label="secret-label")
    telemetry.instrument()
    items: list[Any] = [bytes(32), 5, bytes(32), None]
    async for _ in key.sign_many(items, mechanism=Mechanism.ECDSA, return_errors=True):
        pass
    assert told(telemetry, "sign_many") == {
        "pkcs11.mechanism": "CKM_ECDSA",
        BATCH: 4,
        FAILED: 2,
    }
    (span,) = telemetry.spans("pkcs11 sign_many")
    assert span.status.status_code is StatusCode.UNSET
    assert "secret-label" not in span.to_json()


async def test_the_error_that_ends_a_batch_is_that_of_its_span(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """Told by its class, after the results before it."""
    telemetry.instrument()

    def work(_session: Any, item: int) -> None:
        if item == 3:
            raise ValueError("secret-label")

    with pytest.raises(ValueError, match="secret-label"):
        async for _ in pool.map(work, range(9)):
            pass
    assert told(telemetry, "map") == {
        BATCH: 3,
        FAILED: 0,
        "error.type": "ValueError",
    }
    (span,) = telemetry.spans("pkcs11 map")
    assert span.status.status_code is StatusCode.ERROR
    assert "secret-label" not in span.to_json()


def or_inside(session: Any, hold: Hold | None) -> object:
    """What ``map`` does with an item: nothing, or stay inside."""
    return hold and hold(session)


def broken_off(size: int) -> dict[str, Any]:
    """What a batch tells of which so many results were taken."""
    return {BATCH: size, FAILED: 0, "pkcs11.operation.cancelled": True}


async def test_a_batch_that_is_closed_early_is_a_cancelled_one(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """At the end of its block; a reader who is refused ends nothing."""
    telemetry.instrument()
    with Hold() as hold:
        async with pool.map(or_inside, [None, hold, None]) as results:
            await anext(results)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(results.__anext__)
                await hold.entered()
                for refused in (results.__anext__, results.aclose):
                    with pytest.raises(RuntimeError, match="another task"):
                        await refused()
                assert not telemetry.spans("pkcs11 map")
                hold.let_go()
            assert not telemetry.spans("pkcs11 map")
    assert told(telemetry, "map") == broken_off(2)


async def test_a_batch_whose_reader_is_cancelled_says_so(
    make_pool: MakePool, telemetry: Telemetry
) -> None:
    """It is no error."""
    telemetry.instrument()
    async with make_pool() as pool:
        with Hold() as hold:
            results = pool.map(or_inside, [None, hold])
            await anext(results)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(results.__anext__)
                await hold.entered()
                tasks.cancel_scope.cancel()
    assert told(telemetry, "map") == broken_off(1)
    (span,) = telemetry.spans("pkcs11 map")
    assert span.status.status_code is StatusCode.UNSET


async def test_a_batch_that_is_forgotten_ends_with_the_next_span(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """Not there and then: the garbage collector must not take a lock of the SDK."""
    telemetry.instrument()
    async for _ in pool.map(or_inside, [None] * 9):
        break
    gc.collect()
    assert not telemetry.spans("pkcs11 map")
    await digest(pool)
    assert told(telemetry, "map") == broken_off(1)
    (forgotten,) = telemetry.spans("pkcs11 map")
    (after,) = telemetry.spans("pkcs11 digest")
    assert forgotten.end_time is not None
    assert after.start_time is not None
    assert forgotten.end_time <= after.start_time


async def test_a_stream_is_one_span_with_its_bytes(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """Both ways, ended with its last output; in one call as in many."""
    key = await make_secret(pool)
    telemetry.instrument()
    for parts in ([b"data"], [bytes(PIECE), bytes(PIECE), b"end"]):
        stream = key.encrypt_stream(parts, mechanism_param=IV)
        sealed = [output async for output in stream]
        given: dict[str, Any] = {OUTPUT: sum(map(len, sealed))}
        assert told(telemetry, "encrypt_stream") == given
        async with key.decrypt_stream(sealed, mechanism_param=IV) as opened:
            data = b"".join([output async for output in opened])
        assert data == b"".join(parts)
        assert told(telemetry, "decrypt_stream") == {OUTPUT: len(data)}
        telemetry.exporter.clear()
    stream = key.encrypt_stream([bytes(PIECE)] * 3, mechanism_param=IV)
    first = await anext(stream)
    await stream.aclose()
    assert told(telemetry, "encrypt_stream") == {
        OUTPUT: len(first),
        "pkcs11.operation.cancelled": True,
    }


async def test_the_blocking_twins_have_the_same_spans(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """On a worker thread."""
    key = await make_ec_key(pool)
    telemetry.instrument()
    items = [bytes(32)] * 9
    made = await blocking(
        lambda: list(key.sync.sign_many(items, mechanism=Mechanism.ECDSA))
    )
    assert len(made) == 9
    assert told(telemetry, "sign_many")[BATCH] == 9


async def test_a_span_keeps_nothing_of_the_data(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """However much there is: what was sent is let go."""
    telemetry.instrument()
    kept = []

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(PIECE)
            call = spans.current.get()
            assert call is not None
            kept.append(len(call._jobs))  # noqa: SLF001  # nobody else sees them

    await pool.digest(parts(), mechanism=Mechanism.SHA256)
    results = pool.map(lambda _session, item: len(item), parts(), limit=4)
    assert [size async for size in results] == [PIECE] * 20
    assert max(kept) <= 5


def test_what_is_thrown_away_with_its_loop_ends_its_span_later(
    make_pool: MakePool, telemetry: Telemetry
) -> None:
    """The garbage collector ends the coroutine, in whoever's context."""
    pool = make_pool()
    asyncio.run(pool.open())
    telemetry.instrument()
    with Hold() as hold:
        results = pool.map(or_inside, [hold])

        loop = asyncio.new_event_loop()
        read: Any = results.__anext__()
        tasks: list[Any] = [loop.create_task(it) for it in (pool.run(hold), read)]
        loop.run_until_complete(hold.entered(2))
        for task in tasks:
            task._log_destroy_pending = False  # noqa: SLF001  # no complaint of it
        loop.close()
        left = weakref.WeakSet(tasks)
        del tasks, task, results, read
    # A job that is inside knows who waits for it, and its worker knows the job.
    wait_for(lambda: (gc.collect(), not left)[1])
    assert not telemetry.exporter.get_finished_spans()
    integration.uninstrument()
    for name in ("pkcs11 run", "pkcs11 map"):
        (span,) = telemetry.spans(name)
        assert dict(span.attributes or {})["pkcs11.operation.cancelled"] is True
    asyncio.run(pool.close())


async def test_the_pin_of_a_batch_is_hidden(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """From a traceback that shows variables, as that of one signature is."""
    telemetry.instrument()
    key = pool.key(label="signer")
    with pytest.raises(InvalidOption) as caught:
        key.sign_many([], pin="secret-pin", limit=-1)
    frames = [f"{entry.frame.f_locals}" for entry in caught.traceback[1:]]
    assert len(frames) >= 2
    assert not [text for text in frames if "secret-pin" in text]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Results, "__anext__"),
        (Results, "aclose"),
        (CryptStream, "__anext__"),
        (CryptStream, "aclose"),
        (KeyRef, "sign_many"),
        (KeyRef, "encrypt_stream"),
        (KeyRef, "decrypt_stream"),
        (TokenPool, "map"),
        (PooledSession, "map"),
    ],
)
def test_off_leaves_batches_and_streams_alone(
    telemetry: Telemetry, owner: type, name: str
) -> None:
    """So they cost what they cost without."""
    before = inspect.getattr_static(owner, name)
    telemetry.instrument()
    assert inspect.getattr_static(owner, name) is not before
    integration.uninstrument()
    assert inspect.getattr_static(owner, name) is before


async def test_what_was_made_before_has_no_span(
    pool: TokenPool, telemetry: Telemetry
) -> None:
    """And goes on as it was."""
    results = pool.map(lambda _session, item: item, range(3))
    telemetry.instrument()
    assert [item async for item in results] == [0, 1, 2]
    await results.aclose()
    assert not telemetry.spans("pkcs11 map")


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
