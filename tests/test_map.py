"""Many operations of one kind: in order, many under way, and never too many."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import tracemalloc
from collections import Counter
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pkcs11
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from pkcs11 import KeyType, Mechanism

from keykit import awaited, hmac_sha256, is_signature, make_secret, sha256
from pkcs11_pool import (
    InvalidOption,
    InvalidType,
    LoginRequired,
    LoginState,
    PoolClosed,
    PoolTimeout,
    SessionObjectDestroyed,
    TooManyWaiting,
    WouldBlockLoop,
    WouldDeadlock,
)
from poolkit import (
    ASYNCIO_ONLY,
    LAST_RESORT,
    Hold,
    blocking,
    by_session,
    digest,
    eventually,
    hangs,
    make_ec_key,
    settled,
    time_is_up,
)

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Callable,
        Iterable,
        Iterator,
    )

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import Results, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_HMAC = Mechanism.SHA256_HMAC


def _same(_session: object, item: int) -> int:
    return item


async def _all(results: Results[Any]) -> list[Any]:
    return [result async for result in results]


async def _into(found: list[Any], results: Results[Any]) -> None:
    async for result in results:
        found.append(result)  # noqa: PERF401  # what came before an error is kept


def _counted(count: int, taken: list[int]) -> Iterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


# -- In order, many at once -------------------------------------------------------


async def test_results_come_in_the_order_of_their_items(pool: TokenPool) -> None:
    """The first operation ends last, and its result comes first."""
    others, order = threading.Semaphore(0), []

    def work(_session: object, item: int) -> int:
        if item == 0:
            for _ in range(3):
                assert others.acquire(timeout=LAST_RESORT)
        order.append(item)
        others.release()
        return item * item

    assert await _all(pool.map(work, range(10))) == [i * i for i in range(10)]
    assert order.index(0) >= 3


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 300])
@pytest.mark.parametrize("later", [False, True])
async def test_every_item_has_its_result(
    pool: TokenPool, count: int, *, later: bool
) -> None:
    """Of an iterable and of an async iterable, below and above the window."""
    items: Any = awaited(range(count)) if later else range(count)
    results = pool.map(_same, items)
    assert await _all(results) == list(range(count))
    with pytest.raises(StopAsyncIteration):
        await anext(results)


async def test_many_signatures_are_signatures(pool: TokenPool) -> None:
    """``sign_many`` in DER and raw; ``cryptography`` takes each for its own item."""
    key = await make_ec_key(pool)
    der = await key.public_key_der()
    digests = [sha256(bytes([n])) for n in range(100)]
    how = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
    found = await _all(
        key.sign_many(digests, mechanism=Mechanism.ECDSA, signature_format="der")
    )
    assert [is_signature(der, s, d, how) for s, d in zip(found, digests, strict=True)]
    assert all(
        is_signature(der, s, d, how) for s, d in zip(found, digests, strict=True)
    )
    assert not is_signature(der, found[0], digests[1], how)
    mac = await make_secret(pool, KeyType.GENERIC_SECRET)
    texts = [f"text {n}" for n in range(50)]
    assert await _all(mac.sign_many(awaited(texts), mechanism=_HMAC)) == [
        hmac_sha256(text.encode()) for text in texts
    ]


async def test_each_operation_has_a_session_of_its_own(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """As many at once as there are sessions, and no session twice."""
    async with make_pool(module=fault.path, max_sessions=4) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        await mac.sign(b"", mechanism=_HMAC)
        await settled(pool)
        fault.clear_log()
        fault.on("C_Sign", times=4, hang="before")
        async with anyio.create_task_group() as tasks:
            results = mac.sign_many([bytes([n]) for n in range(20)], mechanism=_HMAC)
            tasks.start_soon(_all, results)
            await hangs(fault, "C_Sign", 4)
            fault.release()
        used = by_session(fault.calls())
        signed = [calls for calls in used.values() if "C_Sign" in calls]
        assert len(signed) == 20
        assert all(calls.count("C_Sign") == 1 for calls in signed)


@pytest.mark.parametrize("limit", [1, 3, None])
@pytest.mark.parametrize("later", [False, True])
async def test_items_are_taken_as_results_are(
    pool: TokenPool, limit: int | None, *, later: bool
) -> None:
    """Backpressure: never more than the window ahead of whoever takes the results."""
    taken: list[int] = []
    source: Any = _counted(10**9, taken)
    results = pool.map(_same, awaited(source) if later else source, limit=limit)
    assert taken == []
    window = limit or 2 * 8
    for number in range(50):
        assert await anext(results) == number
        assert number + 1 <= len(taken) <= number + window
        stats = pool.stats()
        assert stats.operations_running + stats.operations_waiting <= window
    await results.aclose()
    assert len(taken) <= 49 + window


async def test_memory_does_not_grow_with_the_items(pool: TokenPool) -> None:
    """The second ten thousand take no more than the first."""
    results = pool.map(_same, range(10**9))
    for _ in range(1000):
        await anext(results)
    gc.collect()
    tracemalloc.start()
    try:
        peaks = []
        for _ in range(2):
            for _ in range(3000):
                await anext(results)
            gc.collect()
            peaks.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        await results.aclose()
    assert peaks[1] - peaks[0] < 100_000


async def test_no_task_is_started(pool: TokenPool) -> None:
    """Everything happens inside ``__anext__``."""

    def living() -> int:
        if (trio := sys.modules.get("trio")) and trio.lowlevel.in_trio_run():
            count: int = trio.lowlevel.current_statistics().tasks_living
            return count
        return len(asyncio.all_tasks())

    before, seen = living(), set()
    async for _ in pool.map(_same, range(100)):
        seen.add(living())
    assert seen == {before}


async def test_a_source_that_needs_the_results(pool: TokenPool) -> None:
    """With ``limit=1`` each result is given before the next item is asked for."""
    send, receive = anyio.create_memory_object_stream[int](1)
    async with send, receive:
        send.send_nowait(0)
        found = []
        async for result in pool.map(_same, receive, limit=1):
            found.append(result)
            if result == 5:
                break
            send.send_nowait(result + 1)
        assert found == [0, 1, 2, 3, 4, 5]


async def test_what_is_there_is_given_while_items_are_slow(pool: TokenPool) -> None:
    """A result that is ready does not wait for an item that is not."""
    second, third = threading.Event(), anyio.Event()

    async def slow() -> AsyncGenerator[int, None]:
        yield 0
        second.set()
        yield 1
        third.set()
        await anyio.sleep_forever()

    def work(_session: object, item: int) -> int:
        # The first ends when the second item was taken.
        assert second.wait(LAST_RESORT)
        return item

    async with (
        aclosing(slow()) as items,
        pool.map(work, items, limit=2) as results,
    ):
        assert await anext(results) == 0
        await settled(pool)
        assert await anext(results) == 1
        assert not third.is_set()


# -- Errors -----------------------------------------------------------------------


def _odd(_session: object, item: int) -> int:
    if item % 2:
        raise ZeroDivisionError(item)
    return item


async def test_an_error_comes_in_its_place(pool: TokenPool) -> None:
    """As it is, after the results before it; then the results are over."""
    results = pool.map(_odd, [0, 2, 4, 5, 6])
    found: list[int] = []
    with pytest.raises(ZeroDivisionError, match="5"):
        await _into(found, results)
    assert found == [0, 2, 4]
    with pytest.raises(StopAsyncIteration):
        await anext(results)
    await settled(pool)


async def test_errors_are_given_where_that_is_wanted(pool: TokenPool) -> None:
    """``return_errors``: one for each item that failed, and all others."""
    found = await _all(pool.map(_odd, range(50), return_errors=True))
    assert [r for r in found if isinstance(r, int)] == list(range(0, 50, 2))
    errors = [e for e in found if isinstance(e, ZeroDivisionError)]
    assert [e.args for e in errors] == [(n,) for n in range(1, 50, 2)]
    mac = await make_secret(pool, KeyType.GENERIC_SECRET)
    signed = await _all(
        mac.sign_many([b"a", 5, "b", None], mechanism=_HMAC, return_errors=True)  # type: ignore[list-item]
    )
    assert signed[0] == hmac_sha256(b"a")
    assert isinstance(signed[1], InvalidType)
    assert signed[2] == hmac_sha256(b"b")
    assert isinstance(signed[3], InvalidType)
    with pytest.raises(InvalidType, match="int"):
        await _all(mac.sign_many([b"a", 5], mechanism=_HMAC))  # type: ignore[list-item]


class _OwnError(BaseException):
    """Something that only the caller knows."""


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("return_errors", [False, True])
async def test_an_error_of_the_items_leaves_as_itself(
    pool: TokenPool, *, later: bool, return_errors: bool
) -> None:
    """After the results of the items before it; it is no result."""
    mine = ZeroDivisionError("mine")

    def broken() -> Iterator[int]:
        yield from range(5)
        raise mine

    items: Any = awaited(broken()) if later else broken()
    results = pool.map(_same, items, return_errors=return_errors)
    found: list[Any] = []
    with pytest.raises(ZeroDivisionError) as caught:
        await _into(found, results)
    assert caught.value is mine
    assert found == list(range(5))

    def hopeless() -> Iterator[int]:
        yield 0
        raise _OwnError

    with pytest.raises(_OwnError):
        await _all(pool.map(_same, hopeless()))


async def test_the_time_limit_is_for_each_operation(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """One that hangs has its PoolTimeout in its place; the others go on."""
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        fault.on("C_Sign", nth=3, hang="before")
        found: list[Any] = []
        batch = mac.sign_many([b"x"] * 30, mechanism=_HMAC, return_errors=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_into, found, batch)
            await hangs(fault, "C_Sign")
            # Until none but that one is under way.
            while True:
                await anyio.wait_all_tasks_blocked()
                stats = pool.stats()
                if (stats.operations_running, stats.operations_waiting) == (1, 0):
                    break
            time_is_up(pool)
        late = [r for r in found if isinstance(r, PoolTimeout)]
        assert [e.phase for e in late] == ["running"]
        assert found.count(hmac_sha256(b"x")) == 29
        fault.release()
        await eventually(lambda: pool.stats().calls_stuck == 0)


async def test_a_pool_that_closes_ends_the_results(make_pool: MakePool) -> None:
    """What was under way has its result or PoolClosed, then it is PoolClosed."""
    pool = make_pool()
    await pool.open()
    results = pool.map(_same, range(10**9), limit=4)
    assert await anext(results) == 0
    await pool.close()
    with pytest.raises(PoolClosed):
        await _all(results)


# -- Breaking off -----------------------------------------------------------------


async def test_break_is_harmless(make_pool: MakePool) -> None:
    """Whoever leaves the loop, and the pool, need do nothing about it."""
    async with make_pool(max_sessions=2) as pool:
        made: list[int] = []

        def work(_session: object, item: int) -> int:
            made.append(item)
            return item

        async for result in pool.map(work, range(10**9)):
            if result == 10:
                break
        await settled(pool)
        assert set(range(11)) <= set(made)
        assert len(made) <= 11 + 4
        assert pool.stats().operations_waiting == 0
        assert await digest(pool)


async def test_aclose_takes_back_what_waits(make_pool: MakePool) -> None:
    """What is inside is finished; what is in line never happens."""
    async with make_pool(max_sessions=2) as pool:
        with Hold() as hold:
            results = pool.map(hold, range(100), limit=10)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anext, results)
                await hold.entered(2)
                with pytest.raises(RuntimeError, match="another task"):
                    await anext(results)
                with pytest.raises(RuntimeError, match="another task"):
                    await results.aclose()
                tasks.cancel_scope.cancel()
            assert pool.stats().operations_waiting == 0
            hold.let_go()
            await hold.left(2)
            await settled(pool)
            assert len(hold.calls) == 2
            kept = pool.map(_same, range(100), limit=10)
            async with kept:
                await anext(kept)
            await kept.aclose()
            assert await _all(kept) == []


async def test_cancelled_while_the_token_is_changed(make_pool: MakePool) -> None:
    """``rw``: what is inside is waited for; what waits never happens.

    Of three sessions one is always left to what changes nothing.
    """
    async with make_pool(max_sessions=3) as pool:
        with Hold() as hold:
            results = pool.map(hold, range(100), rw=True, limit=10)
            gone = anyio.Event()

            async def use() -> None:
                try:
                    await anext(results)
                finally:
                    assert hold.ended == 2
                    gone.set()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(use)
                await hold.entered(2)
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await anyio.wait_all_tasks_blocked()
                    assert not gone.is_set()
                    hold.let_go()
            assert gone.is_set()
            assert len(hold.calls) == 2


@ASYNCIO_ONLY
async def test_a_native_cancellation_waits_for_changes_too(
    make_pool: MakePool,
) -> None:
    """``Task.cancel()``, however often: the outcome of each call inside first."""
    async with make_pool(max_sessions=3) as pool:
        with Hold() as hold:
            task = asyncio.create_task(_all(pool.map(hold, range(100), rw=True)))
            await hold.entered(2)
            for _ in range(3):
                task.cancel()
                await anyio.wait_all_tasks_blocked()
                assert not task.done()
            hold.let_go()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert hold.ended == len(hold.calls) == 2


@ASYNCIO_ONLY
@pytest.mark.parametrize("how", ["aclose", "error"])
async def test_a_native_cancellation_while_it_breaks_off_is_raised(
    make_pool: MakePool, how: str
) -> None:
    """It waits for what is inside, by itself or after an error, then is cancelled."""
    async with make_pool(max_sessions=2) as pool:
        with Hold() as hold:

            def work(session: object, item: int) -> None:
                if item == 0:
                    return
                if how == "error" and item == 1:
                    raise ValueError
                hold(session, item)

            results = pool.map(work, range(3), rw=True)
            breaks_off = anyio.Event()

            async def use() -> None:
                await anext(results)
                await hold.entered()
                breaks_off.set()
                if how == "error":
                    await anext(results)
                else:
                    await results.aclose()

            task = asyncio.create_task(use())
            await breaks_off.wait()
            for _ in range(2):
                await anyio.wait_all_tasks_blocked()
                task.cancel()
            await anyio.wait_all_tasks_blocked()
            assert not task.done()
            hold.let_go()
            await asyncio.wait([task])
            assert task.cancelled()
            assert hold.ended == len(hold.calls)


async def test_cancelled_while_an_item_is_awaited(pool: TokenPool) -> None:
    """The caller goes at once, and nothing is left."""
    started = anyio.Event()

    async def never() -> AsyncIterator[int]:
        yield 1
        started.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_all, pool.map(_same, never()))
        await started.wait()
        tasks.cancel_scope.cancel()
    await settled(pool)


# -- With the rest of the pool ----------------------------------------------------


async def test_in_an_open_session_all_is_one_after_another(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``session.map`` and ``key.on(session)``: that session alone, in order."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        mac = await make_secret(session, KeyType.GENERIC_SECRET, token=False)
        order: list[int] = []

        def work(bare: Any, item: int) -> int:
            order.append(item)
            assert bare.handle == session.handle
            return item

        assert await _all(session.map(work, range(20))) == order == list(range(20))
        fault.clear_log()
        signed = await _all(mac.on(session).sign_many([b"x"] * 5, mechanism=_HMAC))
        assert signed == [hmac_sha256(b"x")] * 5
        assert set(by_session(fault.calls())) == {session.handle}
        await mac.destroy()
        with pytest.raises(SessionObjectDestroyed):
            await _all(mac.sign_many([b"x"], mechanism=_HMAC))


async def test_the_only_session_is_lent(make_pool: MakePool) -> None:
    """A map that could never start is refused; a session's object knows where to go."""
    async with make_pool(max_sessions=1) as pool, pool.session() as session:
        with pytest.raises(WouldDeadlock):
            await _all(pool.map(_same, range(3)))
        mac = await make_secret(session, KeyType.GENERIC_SECRET, token=False)
        signed = await _all(mac.sign_many([b"x"] * 5, mechanism=_HMAC))
        assert signed == [hmac_sha256(b"x")] * 5


async def test_a_pool_that_lets_few_wait(make_pool: MakePool) -> None:
    """The window shrinks to what the pool takes; others are not pushed out for good."""
    async with make_pool(max_sessions=1, max_waiting=2) as pool:
        assert await _all(pool.map(_same, range(200), limit=50)) == list(range(200))
    async with make_pool(max_sessions=1, max_waiting=0) as pool:
        with Hold() as hold:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                with pytest.raises(TooManyWaiting):
                    await _all(pool.map(_same, range(3)))
                hold.let_go()
    async with make_pool(max_sessions=1) as pool:
        with Hold() as hold:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.run, hold)
                await hold.entered()
                found = await _all(
                    pool.map(_same, range(3), timeout=0, return_errors=True)
                )
                assert [type(e) for e in found] == [PoolTimeout] * 3
                hold.let_go()


class _Asked:
    """An async PIN source that knows how often it was awaited."""

    def __init__(self, pin: str) -> None:
        self._pin = pin
        self.times = 0

    async def __call__(self) -> str:
        self.times += 1
        await anyio.lowlevel.checkpoint()
        return self._pin


@pytest.mark.parametrize("alone", [True, False])
async def test_a_lost_login_is_restored_for_signatures(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, *, alone: bool
) -> None:
    """Whoever waits fetches the PIN: never one whose consumer is elsewhere."""
    source = _Asked(token.user_pin)
    async with make_pool(module=fault.path, pin=source, max_sessions=2) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        items = [bytes([n]) for n in range(30)]
        results = mac.sign_many(items, mechanism=_HMAC)
        found = [await anext(results)]
        await settled(pool)
        fault.lose_login()
        # Two calls start with the lost login, and wait for it; nobody waits for them.
        found += [await anext(results), await anext(results)]
        if not alone:
            other = await mac.sign(b"other", mechanism=_HMAC, timeout=LAST_RESORT)
            assert other == hmac_sha256(b"other")
        found += await _all(results)
        assert found == [hmac_sha256(item) for item in items]
        assert pool.login_state is LoginState.USER
        assert source.times >= 2


async def test_a_lost_login_is_an_error_of_what_must_not_repeat(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``map`` calls its function once, unless told that it may be called again."""
    async with make_pool(module=fault.path) as pool:
        calls: Counter[int] = Counter()

        def work(_session: object, item: int) -> int:
            calls[item] += 1
            if calls[item] == 1 and item == 3:
                fault.lose_login()
                raise pkcs11.UserNotLoggedIn
            return item

        found = await _all(pool.map(work, range(6), return_errors=True))
        assert isinstance(found[3], LoginRequired)
        assert calls[3] == 1
        calls.clear()
        assert await _all(pool.map(work, range(6), repeat=True)) == list(range(6))
        assert calls[3] == 2


async def test_several_maps_at_once(make_pool: MakePool) -> None:
    """From tasks and threads, on few sessions; each has its own results."""
    async with make_pool(max_sessions=3) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        items = [bytes([n]) for n in range(60)]
        expected = [hmac_sha256(item) for item in items]
        right: list[bool] = []

        async def one(number: int) -> None:
            if number % 2:
                found = await _all(mac.sign_many(awaited(items), mechanism=_HMAC))
            else:
                found = await blocking(
                    lambda: list(mac.sync.sign_many(items, mechanism=_HMAC))
                )
            right.append(found == expected)

        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(one, number)
        assert right == [True] * 8
        await settled(pool)


# -- For code that is not async ---------------------------------------------------


async def test_the_blocking_twins(pool: TokenPool) -> None:
    """On a plain thread the results are a plain iterator."""

    def work() -> None:
        assert list(pool.map_sync(_same, range(50))) == list(range(50))
        errors = list(pool.map_sync(_odd, range(3), return_errors=True))
        assert [type(e) for e in errors] == [int, ZeroDivisionError, int]
        with pool.map_sync(_same, range(10**9)) as results:
            assert next(results) == 0
        assert list(results) == []
        for number in pool.map_sync(_same, range(10**9)):
            if number == 5:
                break
        with pytest.raises(InvalidType, match="blocking call"):
            list(pool.map_sync(_same, awaited(range(3))))  # type: ignore[arg-type]

    await blocking(work)
    await settled(pool)
    with pytest.raises(WouldBlockLoop):
        next(pool.map_sync(_same, range(3)))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda pool: pool.map(5, []), "func"),
        (lambda pool: pool.map(_nothing, []), "func"),
        (lambda pool: pool.map(_same, 5), "items"),
        (lambda pool: pool.map(_same, b"bytes"), "items"),
        (lambda pool: pool.map(_same, {}), "items"),
        (lambda pool: pool.map(_same, [], limit=0), "limit"),
        (lambda pool: pool.map(_same, [], limit="2"), "limit"),
        (lambda pool: pool.map(_same, [], rw="yes"), "rw"),
        (lambda pool: pool.map(_same, [], repeat=1), "repeat"),
        (lambda pool: pool.map(_same, [], return_errors=0), "return_errors"),
        (lambda pool: pool.map(_same, [], timeout=-1), "timeout"),
        (lambda pool: pool.key("k").sign_many("text"), "items"),
        (lambda pool: pool.key("k").sign_many([], mechanism="ECDSA"), "mechanism"),
        (lambda pool: pool.key("k").sign_many([], signature_format="x"), "format"),
    ],
)
async def test_what_cannot_work_is_refused_before_the_loop(
    make_pool: MakePool, wrong: Callable[[TokenPool], object], named: str
) -> None:
    """By a pool that is not even open: nothing is taken and nothing sent."""
    with pytest.raises(InvalidOption, match=named):
        wrong(make_pool())


async def _nothing(_session: object, _item: object) -> None:
    pass


async def test_a_pool_that_is_not_open_takes_nothing(make_pool: MakePool) -> None:
    """The first result tells; of the items one was taken."""
    taken: list[int] = []
    with pytest.raises(PoolClosed):
        await _all(make_pool().map(_same, _counted(10, taken)))
    assert len(taken) <= 1


def _typed(pool: TokenPool, items: Iterable[int]) -> Results[int]:
    """What a type checker makes of it."""
    return pool.map(_same, items)


async def test_a_loop_is_abandoned_with_its_results(make_pool: MakePool) -> None:
    """What was under way comes to its end, and nobody has the results."""
    async with make_pool(max_sessions=2) as pool:
        with Hold() as hold:

            def work() -> None:
                loop = asyncio.new_event_loop()

                async def main() -> asyncio.Task[Any]:
                    task = asyncio.ensure_future(
                        _all(pool.map(hold, range(100), limit=10))
                    )
                    await hold.entered(2)
                    return task

                task = loop.run_until_complete(main())
                # asyncio's own complaint is not of interest here.
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
                loop.close()

            await blocking(work)
            gc.collect()
        await settled(pool)
        assert len(hold.calls) <= 10
        assert await digest(pool)


async def test_what_a_function_leaves_under_way_is_ended(pool: TokenPool) -> None:
    """As by ``run``: a search that is not finished holds up nobody in the session."""

    def search(session: Any, _item: int) -> object:
        # Kept by its generator, which is the result.
        found = session.get_objects()
        next(found, None)
        return found

    await make_ec_key(pool)
    async with pool.session() as session:
        kept = await _all(session.map(search, range(3)))
        assert len(kept) == 3
        assert await digest(session)
        assert await _all(session.map(_same, range(3))) == [0, 1, 2]
