"""What a status page and ``pkcs11-pool top`` show of a pool, as plain data.

Flat names, those of ``PoolStats``, so that JSON of it needs no explanation. Nothing
here names a key or holds a template, a PIN or the text of an error.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.integrations.metrics import Reading, read
from pkcs11_pool.stats import BOUNDS, Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pkcs11_pool.faces.pool import TokenPool

SCHEMA: Final = 1
"""Grows when a name goes or changes its meaning; not when one is added."""
PERCENTILES: Final = (50, 90, 99)
_APART: Final = frozenset({"wait_times", "run_times", "recent_errors", "last_error"})


def report(pools: Iterable[TokenPool]) -> dict[str, Any]:
    """What these pools tell now.

    ``schema``; ``at``, in seconds since 1970; ``bounds``, the upper bounds of the
    buckets in seconds (see :class:`~pkcs11_pool.stats.Histogram`); and ``pools``, a
    list. Each of these has the numbers of ``PoolStats`` under their names, and
    ``name``, ``state``, ``login_state``, ``token_label`` (None: not open);
    ``wait_buckets`` and ``run_buckets``, as many as there are bounds and one more;
    ``wait_p50`` … ``run_p99`` in seconds, since the making of the pool (None: nothing
    yet); ``recent_errors``, the newest last, each with ``at``, ``type`` and ``code``.
    """
    return {
        "schema": SCHEMA,
        "at": time.time(),
        "bounds": list(BOUNDS),
        "pools": [_status(reading) for reading in read(pools)],
    }


def _status(reading: Reading) -> dict[str, Any]:
    stats = reading.stats
    numbers = {
        field.name: getattr(stats, field.name)
        for field in dataclasses.fields(stats)
        if field.name not in _APART
    }
    return {
        "name": reading.name,
        "state": reading.state.value,
        "login_state": reading.login_state.value,
        "token_label": reading.token_label,
        **numbers,
        **_times("wait", stats.wait_times),
        **_times("run", stats.run_times),
        "recent_errors": [dataclasses.asdict(error) for error in stats.recent_errors],
    }


def _times(name: str, times: Histogram) -> dict[str, Any]:
    found: dict[str, Any] = {f"{name}_buckets": list(times.counts)}
    for percent in PERCENTILES:
        found[f"{name}_p{percent}"] = times.percentile(percent)
    return found
