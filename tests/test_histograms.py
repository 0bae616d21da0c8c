"""How long operations waited and ran, as ``pool.stats()`` tells it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import pkcs11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_pool import PoolTimeout
from pkcs11_pool.engine.tally import RECENT
from pkcs11_pool.stats import BOUNDS, Histogram, Times
from poolkit import Hold, digest, eventually, settled, time_limits

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

SECONDS = st.floats(min_value=0, max_value=100)


def made_of(*seconds: float) -> Histogram:
    """The histogram of these times."""
    times = Times()
    for one in seconds:
        times.add(one)
    return times.snapshot()


def test_a_time_that_equals_a_bound_is_in_its_bucket() -> None:
    """As Prometheus means ``le``."""
    for number, bound in enumerate(BOUNDS):
        assert made_of(bound).counts[number] == 1
        assert made_of(bound * 1.0001).counts[number + 1] == 1


def test_without_times_there_is_no_percentile() -> None:
    """None, not 0: nothing was fast."""
    assert made_of().percentile(99) is None


def test_what_is_above_the_last_bound_counts_as_that() -> None:
    """A percentile is never made up."""
    assert made_of(1000.0).percentile(50) == BOUNDS[-1]


@given(st.lists(SECONDS, min_size=1), st.sampled_from([1, 50, 90, 99, 100]))
def test_a_percentile_is_in_the_bucket_of_the_time_that_it_speaks_of(
    seconds: list[float], percent: int
) -> None:
    """By the definition: of the sorted times, the one at the rank, rounded up."""
    rank = -(-len(seconds) * percent // 100)
    exact = sorted(seconds)[rank - 1]
    low = max((bound for bound in BOUNDS if bound < exact), default=0.0)
    high = min((bound for bound in BOUNDS if bound >= exact), default=BOUNDS[-1])
    found = made_of(*seconds).percentile(percent)
    assert found is not None
    assert low <= found <= high


@given(st.lists(SECONDS), st.lists(SECONDS))
def test_the_difference_of_two_snapshots_is_what_came_between(
    before: list[float], after: list[float]
) -> None:
    """So a dashboard shows the last minute, not all time."""
    both = made_of(*before, *after).since(made_of(*before))
    assert both.counts == made_of(*after).counts
    assert both.seconds == pytest.approx(sum(after))


async def test_each_operation_is_in_both_histograms_once(pool: TokenPool) -> None:
    """Waiting and running apart; an operation in a session like any other."""
    before = pool.stats()
    for _ in range(3):
        await digest(pool)
    async with pool.session() as session:
        await digest(session)
    await settled(pool)
    after = pool.stats()
    assert after.run_times.since(before.run_times).count == 4
    # One more: the block waited for its session.
    assert after.wait_times.since(before.wait_times).count == 5


async def test_waiting_is_not_running(make_pool: MakePool) -> None:
    """The second waits as long as the first runs, and then runs for a moment."""
    async with make_pool(max_sessions=1) as pool:
        before = pool.stats()
        began = time.monotonic()
        async with anyio.create_task_group() as tasks:
            with Hold() as hold:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                tasks.start_soon(digest, pool)
                await anyio.wait_all_tasks_blocked()
                await anyio.sleep(0.06)
        await settled(pool)
        took = time.monotonic() - began
        after = pool.stats()
        waits = after.wait_times.since(before.wait_times)
        runs = after.run_times.since(before.run_times)
        assert waits.count == runs.count == 2
        # Neither time is in the other's sum: nothing ran at once with something else,
        # and the one did not wait when the other did.
        assert 0.06 <= waits.seconds <= took
        assert 0.06 <= runs.seconds <= took
        long = BOUNDS.index(0.05) + 1
        assert min(sum(waits.counts[long:]), sum(runs.counts[long:])) >= 1
        # The sums are those of the counters.
        assert runs.seconds == pytest.approx(
            after.run_seconds_total - before.run_seconds_total
        )


async def test_who_waited_in_vain_is_counted(make_pool: MakePool) -> None:
    """Else the longest waits would be missing from the percentiles."""
    async with make_pool(max_sessions=1) as pool, anyio.create_task_group() as tasks:
        with Hold() as hold:
            tasks.start_soon(pool.run, hold)
            await hold.entered()
            before = pool.stats().wait_times
            with pytest.raises(PoolTimeout):
                await digest(pool, timeout=0.06)
            waits = pool.stats().wait_times.since(before)
            assert waits.count == 1
            assert waits.seconds >= 0.06


async def test_a_call_that_hangs_is_counted_at_its_deadline(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Once: not again when it returns."""
    async with make_pool(module=fault.path) as pool:
        await digest(pool)
        await settled(pool)
        fault.on("C_Digest", hang="before", every=True)
        for limit in time_limits(0.06):
            before = pool.stats().run_times
            waits = pool.stats().wait_times
            with pytest.raises(PoolTimeout) as caught:
                await digest(pool, timeout=limit)
            if caught.value.phase == "running":
                break
        stats = pool.stats()
        fault.clear()
        await eventually(lambda: not pool.stats().calls_stuck)
        runs = stats.run_times.since(before)
        assert runs.count == 1
        # The deadline is for both.
        assert runs.seconds + stats.wait_times.since(waits).seconds >= 0.06
        assert pool.stats().run_times.since(before).count == 1


def fails(_session: object) -> None:
    """Fail as a token does."""
    raise pkcs11.DataInvalid("of the key named secret-label")


async def test_recent_errors_have_a_type_and_a_code_and_no_text(
    pool: TokenPool,
) -> None:
    """A text may name a key; a status page is read by many."""
    for _ in range(RECENT + 1):
        with pytest.raises(pkcs11.DataInvalid):
            await pool.run(fails)
    with Hold() as hold, pytest.raises(PoolTimeout):
        await pool.run(hold, timeout=0.05)
    await eventually(lambda: not pool.stats().calls_stuck)
    errors = pool.stats().recent_errors
    assert len(errors) == RECENT
    assert (errors[0].type, errors[0].code) == ("DataInvalid", "CKR_DATA_INVALID")
    assert (errors[-1].type, errors[-1].code) == ("PoolTimeout", None)
    assert errors[-1].at >= errors[0].at > 1_700_000_000
    assert "secret-label" not in repr(errors)
