"""What is exported of pools: the table, Prometheus, the dashboard, the page."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import DataInvalid
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pkcs11_pool import PoolStats
from pkcs11_pool.integrations import exposition, status
from pkcs11_pool.integrations.metrics import METRICS, NOT_EXPORTED, Kind, read
from pkcs11_pool.integrations.prometheus import PoolCollector
from pkcs11_pool.stats import BOUNDS
from poolkit import Hold, digest, settled

if TYPE_CHECKING:
    from collections.abc import Iterable

    from conftest import MakePool
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "docs/_static/grafana/pkcs11-pool.json"
PAGE = ROOT / "docs/reference/metrics.md"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(
    params=[pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """What is read here does not depend on the loop."""
    return request.param


def samples(text: str) -> Samples:
    """What Prometheus reads in a text."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def explained(text: str) -> set[tuple[str, str, str]]:
    """The types and the words of help in a text."""
    families = text_string_to_metric_families(text)
    return {(one.name, one.type, one.documentation) for one in families}


def value(found: Samples, name: str, **labels: str) -> float:
    """One sample."""
    return found[name, tuple(sorted(labels.items()))]


def scraped(registry: CollectorRegistry) -> Samples:
    """What Prometheus gets from a registry."""
    return samples(generate_latest(registry).decode())


def test_every_number_of_a_pool_is_exported_or_said_not_to_be() -> None:
    """One that is added to ``PoolStats`` must be placed."""
    fields = {field.name for field in dataclasses.fields(PoolStats)}
    exported = {metric.field for metric in METRICS} - {"state", "login_state"}
    assert not exported & set(NOT_EXPORTED)
    assert exported | set(NOT_EXPORTED) == fields


def test_the_names_are_names() -> None:
    """As Prometheus and OpenTelemetry take them, and each once."""
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert len({metric.otel for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"pkcs11_pool_[a-z_]+(?<!_total)", metric.name)
        assert re.fullmatch(r"pkcs11\.pool(\.[a-z_]+)+", metric.otel)
        assert metric.help.endswith(".")


async def test_prometheus_reads_what_the_pool_tells(pool: TokenPool) -> None:
    """Gauges, counters and buckets."""
    registry = CollectorRegistry()
    PoolCollector(pool, registry=registry)
    for _ in range(3):
        await digest(pool)
    with pytest.raises(DataInvalid):
        await pool.run(_fails)
    await settled(pool)
    found = scraped(registry)
    name = "demo"
    assert value(found, "pkcs11_pool_operations_total", pool=name) == 4
    assert value(found, "pkcs11_pool_operations_failed_total", pool=name) == 1
    assert value(found, "pkcs11_pool_logins_total", pool=name) == 1
    assert value(found, "pkcs11_pool_sessions_max", pool=name) == 8
    assert value(found, "pkcs11_pool_state", pool=name, state="ready") == 1
    assert value(found, "pkcs11_pool_state", pool=name, state="closed") == 0
    login = "pkcs11_pool_login_state"
    assert value(found, login, pool=name, login_state="user") == 1
    assert value(found, "pkcs11_pool_run_seconds_count", pool=name) == 4
    assert value(found, "pkcs11_pool_run_seconds_bucket", pool=name, le="+Inf") == 4
    assert value(found, "pkcs11_pool_run_seconds_sum", pool=name) > 0


def _fails(_session: object) -> None:
    raise DataInvalid


async def test_sessions_are_told_apart(make_pool: MakePool) -> None:
    """Lent, at work, or opened ahead; together all that are open."""
    sessions = next(metric for metric in METRICS if metric.field == "sessions_open")
    async with make_pool() as pool, pool.session(), anyio.create_task_group() as tasks:
        with Hold() as hold:
            tasks.start_soon(pool.run, hold)
            await hold.entered()
            found = sessions.values(read([pool])[0])
        assert found == {"idle": 0, "leased": 1, "used": 1}


async def test_pools_of_one_name_are_told_apart(make_pool: MakePool) -> None:
    """Two series with the same labels would spoil the whole scrape."""
    registry = CollectorRegistry()
    one, two = make_pool(), make_pool()
    collector = PoolCollector(one, registry=registry)
    collector.add(two)
    async with one:
        found = scraped(registry)
    assert value(found, "pkcs11_pool_state", pool="demo", state="ready") == 1
    assert value(found, "pkcs11_pool_state", pool="demo-2", state="new") == 1
    collector.remove(two)
    collector.remove(two)
    assert "demo-2" not in generate_latest(registry).decode()


@pytest.mark.usefixtures("never_idle")
async def test_the_text_without_the_library_says_the_same(make_pool: MakePool) -> None:
    """The status app writes it by itself."""
    registry = CollectorRegistry()
    async with make_pool(name='odd "name" \\ of\ntwo lines') as pool:
        PoolCollector(pool, registry=registry)
        await digest(pool)
        await settled(pool)
        theirs = scraped(registry)
        text = exposition.text(read([pool]))
    assert samples(text) == theirs
    types = {
        f.name: (f.type, f.documentation) for f in text_string_to_metric_families(text)
    }
    assert types == {
        family.name: (family.type, family.documentation)
        for family in text_string_to_metric_families(generate_latest(registry).decode())
    }


async def test_a_forked_child_exports_nothing_of_its_parents_pool(
    make_pool: MakePool,
) -> None:
    """And its scrape is not spoilt: other metrics are in it."""
    registry = CollectorRegistry()
    async with make_pool() as pool:
        PoolCollector(pool, registry=registry)
        assert scraped(registry)
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=_scrape, args=(registry, sender))
        child.start()
        assert receiver.poll(10)
        assert receiver.recv() == {}
        child.join(10)
        receiver.close()
        sender.close()
        child.close()


def _scrape(registry: CollectorRegistry, sender: Any) -> None:
    sender.send(scraped(registry))


async def test_the_report_has_the_flat_names_of_the_statistics(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """``pkcs11-pool top`` and the status page are built on these."""
    async with make_pool(name="signing") as pool:
        await digest(pool)
        with pytest.raises(DataInvalid):
            await pool.run(_fails)
        await settled(pool)
        told = json.loads(json.dumps(status.report([pool])))
    assert told["schema"] == 1
    assert told["bounds"] == list(BOUNDS)
    (one,) = told["pools"]
    assert one["name"] == "signing"
    assert one["token_label"] == token.label
    assert (one["state"], one["login_state"]) == ("ready", "user")
    assert one["operations_total"] == 2
    assert len(one["run_buckets"]) == len(BOUNDS) + 1
    assert sum(one["run_buckets"]) == 2
    assert 0 < one["run_p50"] <= one["run_p99"]
    (error,) = one["recent_errors"]
    assert error["type"] == "DataInvalid"
    assert error["code"] == "CKR_DATA_INVALID"
    assert "last_error" not in one


def test_the_report_of_a_pool_that_is_not_open(make_pool: MakePool) -> None:
    """None where there is nothing to tell, never a made-up 0."""
    (one,) = status.report([make_pool()])["pools"]
    assert (one["state"], one["token_label"]) == ("new", None)
    assert one["run_p99"] is None


def queries() -> Iterable[str]:
    """What the dashboard asks Prometheus for."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def test_the_dashboard_asks_for_nothing_that_is_not_exported() -> None:
    """A panel without data is found in the worst moment."""
    exported = set()
    for metric in METRICS:
        if metric.kind is Kind.HISTOGRAM:
            exported |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
        elif metric.kind is Kind.COUNTER:
            exported.add(f"{metric.name}_total")
        else:
            exported.add(metric.name)
    asked = {name for query in queries() for name in re.findall(r"pkcs11_\w+", query)}
    assert asked <= exported
    # And it leaves out little of what there is.
    assert len(asked) > len(METRICS) // 2


def test_the_dashboard_filters_by_labels_that_exist() -> None:
    """One that is misspelt matches nothing."""
    known = {"pool", "le"} | {m.label for m in METRICS if m.label is not None}
    for query in queries():
        for selector in re.findall(r"\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)\s*[=!]~?", selector)) <= known
        for by in re.findall(r"by \(([^)]*)\)", query):
            assert {name.strip() for name in by.split(",")} <= known


def test_the_page_has_the_table_of_the_code() -> None:
    """The page is for people, ``METRICS`` for programs."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `pk")]
    assert rows == [row(metric) for metric in METRICS]


def row(metric: Any) -> str:
    """A metric in the table of the page."""
    total = "_total" if metric.kind is Kind.COUNTER else ""
    label = f"`{metric.label}`" if metric.label else ""
    cells = (
        f"`{metric.name}{total}`",
        f"`{metric.otel}`",
        metric.kind.value,
        metric.unit,
        label,
        metric.help,
    )
    return f"| {' | '.join(cells)} |"
