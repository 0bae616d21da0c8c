"""A collector for ``prometheus_client``: the metrics of one or several pools.

The pool keeps the numbers anyway; they are read when Prometheus asks, so an
operation costs nothing more.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from pkcs11_pool.integrations import extras
from pkcs11_pool.integrations.exposition import bucket_bounds
from pkcs11_pool.integrations.metrics import METRICS, POOL, Kind, read

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise extras.missing("prometheus", error) from error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.core import Metric as Family
    from prometheus_client.registry import CollectorRegistry

    from pkcs11_pool.faces.pool import TokenPool
    from pkcs11_pool.integrations.metrics import Metric, Reading


class PoolCollector(Collector):
    """``REGISTRY.register(PoolCollector(pool))``, before or after opening.

    Pools of the same name are told apart by a number behind it: give each a ``name``.

    Args:
        *pools: What to export; more may come by :meth:`add`.
        registry: Where to register at once; None: nowhere.
    """

    def __init__(
        self, *pools: TokenPool, registry: CollectorRegistry | None = None
    ) -> None:
        self._pools = list(pools)
        if registry is not None:
            registry.register(self)

    def add(self, pool: TokenPool) -> None:
        """Export one more pool."""
        # A new list: a scrape may be going through the old one, on another thread.
        self._pools = [*self._pools, pool]

    def remove(self, pool: TokenPool) -> None:
        """Export a pool no longer; harmless for one that is not exported."""
        self._pools = [known for known in self._pools if known is not pool]

    def collect(self) -> Iterable[Family]:
        """What the pools tell now, for Prometheus."""
        readings = read(self._pools)
        return [_family(metric, readings) for metric in METRICS]


def _family(metric: Metric, readings: Iterable[Reading]) -> Family:
    if metric.kind is Kind.HISTOGRAM:
        return _histogram(metric, readings)
    make = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    labels = [POOL] if metric.label is None else [POOL, metric.label]
    family = make(metric.name, metric.help, labels=labels)
    for reading in readings:
        for value, number in metric.values(reading).items():
            named = [reading.name] if metric.label is None else [reading.name, value]
            family.add_metric(named, number)
    return family


def _histogram(metric: Metric, readings: Iterable[Reading]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(metric.name, metric.help, labels=[POOL])
    for reading in readings:
        times = metric.histogram(reading)
        sums = map(float, accumulate(times.counts))
        buckets = list(zip(bucket_bounds(), sums, strict=True))
        family.add_metric([reading.name], buckets, sum_value=times.seconds)
    return family
