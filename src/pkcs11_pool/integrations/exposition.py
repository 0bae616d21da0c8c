"""The metrics of pools as text for Prometheus, without its library.

Source: Prometheus, "Exposition formats", the text-based format, version 0.0.4.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Final

from pkcs11_pool.integrations.metrics import METRICS, POOL, Kind, Metric, Reading
from pkcs11_pool.stats import BOUNDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def text(readings: Sequence[Reading]) -> str:
    """All metrics of these pools."""
    return "".join(
        f"{line}\n" for metric in METRICS for line in _lines(metric, readings)
    )


def bucket_bounds() -> list[str]:
    """The upper bounds of the buckets, as ``le`` has them."""
    return [repr(bound) for bound in BOUNDS] + ["+Inf"]


def _lines(metric: Metric, readings: Sequence[Reading]) -> Iterator[str]:
    name = metric.name + ("_total" if metric.kind is Kind.COUNTER else "")
    yield f"# HELP {name} {metric.help}"
    yield f"# TYPE {name} {metric.kind.value}"
    for reading in readings:
        if metric.kind is Kind.HISTOGRAM:
            yield from _buckets(metric, reading)
            continue
        for value, number in metric.values(reading).items():
            labels = {POOL: reading.name}
            if metric.label is not None:
                labels[metric.label] = value
            yield f"{name}{_labels(labels)} {float(number)!r}"


def _buckets(metric: Metric, reading: Reading) -> Iterator[str]:
    histogram = metric.histogram(reading)
    sums = accumulate(histogram.counts)
    for bound, count in zip(bucket_bounds(), sums, strict=True):
        labels = {POOL: reading.name, "le": bound}
        yield f"{metric.name}_bucket{_labels(labels)} {float(count)!r}"
    labels = {POOL: reading.name}
    yield f"{metric.name}_count{_labels(labels)} {float(histogram.count)!r}"
    yield f"{metric.name}_sum{_labels(labels)} {histogram.seconds!r}"


def _labels(labels: dict[str, str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{','.join(pairs)}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
