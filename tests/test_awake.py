"""How many workers are awake: as data, without a token and without a clock."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pkcs11_pool.engine.awake import Awake

if TYPE_CHECKING:
    from pkcs11_pool.jobs import Job

_PROCESSORS = max(2, os.cpu_count() or 1)
_WINDOW = 8
"""Calls that are measured before anything is concluded from them."""


class _Worker:
    """A worker, as far as this is concerned."""

    job: Job | None = None
    busy = False
    counted: bool | None = None
    lost = False
    since = 0.0
    done = 0.0
    spent: float | None = None
    coming = False
    opened = 0

    def wake(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def join(self, timeout: float) -> None:
        raise NotImplementedError


def _measured(duration: float, computing: float = 0.0) -> Awake:
    awake = Awake()
    for _ in range(_WINDOW):
        awake.took(duration, computing)
    return awake


def _at_work(awake: Awake, now: float) -> int:
    """How many come to work at one moment before no more should."""
    for count in range(1000):
        if awake.is_full(now):
            return count
        awake.started(_Worker(), now)
    return 1000


def test_before_anything_was_measured_all_may_be_awake() -> None:
    """The first callers must not wait for a measurement."""
    assert _at_work(Awake(), 0.0) == 1000


def test_on_a_fast_token_one_is_awake() -> None:
    """Two would only hand each other the interpreter's lock, at a price."""
    assert _at_work(_measured(80e-6), 0.0) == 1


def test_where_a_call_takes_a_little_longer_few_are_awake() -> None:
    """About as many as the machine can run."""
    assert 2 <= _at_work(_measured(250e-6), 0.0) <= 4


@pytest.mark.parametrize(("duration", "least"), [(0.001, 10), (0.005, 50), (0.1, 999)])
def test_the_longer_the_calls_the_more_are_awake(duration: float, least: int) -> None:
    """They are inside the module and want nothing."""
    assert _at_work(_measured(duration), 0.0) >= least


def test_calls_that_compute_need_no_more_workers_than_processors() -> None:
    """And one that has its next call ready; those that wait need many."""
    assert 2 <= _at_work(_measured(0.005, computing=0.0049), 0.0) <= 1 + _PROCESSORS
    assert _at_work(_measured(0.005, computing=0.0001), 0.0) >= 20


def test_what_is_not_known_to_compute_may_be_waiting() -> None:
    """Of most operations it is not measured."""
    awake = Awake()
    for _ in range(_WINDOW):
        awake.took(0.005)
    assert _at_work(awake, 0.0) >= 20


def test_some_long_calls_among_short_ones_change_nothing() -> None:
    """The shortest tells how fast the token is; the machine makes others longer."""
    awake = Awake()
    for i in range(_WINDOW):
        awake.took(80e-6 if i == 7 else 0.05)
    assert 2 <= _at_work(awake, 0.0) <= 4


def test_a_worker_inside_a_long_call_does_not_count() -> None:
    """One long call must not stop the pool."""
    awake = _measured(80e-6)
    first = _at_work(awake, 0.0)
    assert awake.is_full(0.0001)
    assert not awake.is_full(0.1)
    assert _at_work(awake, 0.1) == first


def test_a_worker_that_is_done_makes_room() -> None:
    """Also one that was inside for long, and counts only once."""
    awake = _measured(250e-6)
    workers = [_Worker() for _ in range(10)]
    for worker in workers:
        awake.started(worker, 0.0)
    for worker in workers[:-1]:
        awake.ended(worker)
        awake.ended(worker)
    assert not awake.is_full(0.0)
    awake.ended(workers[-1])
    assert _at_work(awake, 0.0) >= 2


def test_those_who_are_woken_and_not_there_yet_are_few() -> None:
    """Behind a busy processor, more wake-ups only make it busier."""
    awake = Awake()
    workers = [_Worker() for _ in range(4)]
    for worker in workers:
        awake.woken(worker, 0.0)
    assert awake.is_full(0.0)
    assert [awake.came(worker) for worker in workers] == [True] * 4
    assert not awake.came(workers[0])
    assert not awake.is_full(0.0)


def test_where_some_calls_are_long_nobody_waits_behind_one() -> None:
    """A second worker is there, however short most of them are."""
    awake = Awake()
    for i in range(_WINDOW):
        awake.took(80e-6 if i % 2 else 0.001)
    awake.started(_Worker(), 0.0)
    assert not awake.is_full(0.0)


def test_one_worker_inside_a_long_call_does_not_keep_others_from_it() -> None:
    """However fast the token was until then."""
    awake = _measured(80e-6)
    awake.started(_Worker(), 0.0)
    assert awake.is_full(0.0001)
    assert not awake.is_full(0.1)
