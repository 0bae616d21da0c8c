"""Loops that end, loops side by side, and loops one after the other, on one pool."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import queue
import signal
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
import uvloop
from pkcs11 import KeyType, Mechanism

from pkcs11_pool import LoginState, PoolState
from pkcs11_pool.faces import ports
from poolkit import (
    LAST_RESORT,
    Hold,
    blocking,
    digest,
    make_ec_key,
    pool_threads,
    settled,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_DIGEST = b"d" * 32
_BLOCK = b"b" * 16
_ECB = Mechanism.AES_ECB
_BACKENDS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio", "backend_options": {"debug": True}},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}
_KINDS = list(_BACKENDS)


def _run(kind: str, func: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run a loop of its own on this thread, from its beginning to its end."""
    return anyio.run(func, *args, **_BACKENDS[kind])


def _in_thread(func: Callable[..., object], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=func, args=args, daemon=True)
    thread.start()
    return thread


def _joined(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(LAST_RESORT)
        assert not thread.is_alive()


@pytest.fixture(params=_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of loop."""
    found: str = request.param
    return found


def _event_descriptors() -> set[int]:
    """The numbers under which event descriptors are open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own is gone by now
            if "eventfd" in str(entry.readlink()):
                found.add(int(entry.name))
    return found


@pytest.fixture
def pool(make_pool: MakePool, fault: FaultModule) -> Iterator[TokenPool]:
    """A small pool that was opened in a loop which has ended, and is closed in another.

    Afterwards nothing may be left of it.
    """
    pool = make_pool(module=fault.path, max_sessions=2)
    _run("asyncio", pool.open)
    yield pool
    _run("trio", pool.close)
    wait_for(lambda: not pool_threads())
    assert fault.sessions() == []
    assert fault.count("C_Finalize") == 1


def _is_at_rest(pool: TokenPool) -> bool:
    stats = pool.stats()
    gauges = (
        stats.operations_running,
        stats.operations_waiting,
        stats.sessions_open,
        stats.sessions_leased,
        stats.sessions_ahead,
        stats.calls_stuck,
    )
    return not any(gauges)


def _serves_all(pool: TokenPool) -> None:
    """Loops of each kind are served, and so is a plain thread."""
    for each in _KINDS:
        assert _run(each, digest, pool)
    assert pool.run_sync(lambda session: session.generate_random(64))


# -- Loops that end ---------------------------------------------------------------


class _Work:
    """Two operations that are inside, and three that wait for a session."""

    def __init__(self, pool: TokenPool) -> None:
        self.pool = pool
        self.hold = Hold()
        self.results: list[object] = []

    def jobs(self) -> list[Callable[[], Awaitable[None]]]:
        """What a loop is to start, all at once."""
        return [partial(self._one, number) for number in range(5)]

    async def _one(self, number: int) -> None:
        self.results.append(await self.pool.run(self.hold, number))

    async def under_way(self) -> None:
        """Wait until two are inside and three wait."""
        await self.hold.entered(2)
        assert self.pool.stats().operations_waiting == 3

    def left_alone(self) -> None:
        """Their loop is gone: see that they end, and that nobody has a result."""
        self.hold.let_go()
        wait_for(lambda: _is_at_rest(self.pool))
        assert self.results == []


async def _cancelled_by_asyncio(work: _Work) -> None:
    # asyncio.run() cancels what its main coroutine leaves.
    tasks = [asyncio.ensure_future(job()) for job in work.jobs()]
    await work.under_way()
    assert len(tasks) == 5


async def _cancelled_by_trio(work: _Work) -> None:
    # So does trio.run() with its system tasks.
    for job in work.jobs():
        trio.lowlevel.spawn_system_task(job)
    await work.under_way()


def test_a_loop_ends_while_its_operations_run_and_wait(
    pool: TokenPool, kind: str
) -> None:
    """Those that wait are taken out at once; what those inside return is dropped."""
    work = _Work(pool)
    with work.hold:
        main = _cancelled_by_trio if kind == "trio" else _cancelled_by_asyncio
        _run(kind, main, work)
        stats = pool.stats()
        assert stats.operations_waiting == 0
        assert stats.operations_running == 2
        assert stats.operations_cancelled == 5
        work.left_alone()
    assert len(work.hold.calls) == 2
    _serves_all(pool)


def _abandon_asyncio(work: _Work, loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop and close it under its tasks."""
    tasks = [asyncio.ensure_future(job(), loop=loop) for job in work.jobs()]
    loop.run_until_complete(work.under_way())
    for task in tasks:
        # asyncio's own complaint, that nobody can catch, is not of interest here.
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
    loop.close()


def _abandon_trio(
    jobs: Iterable[Callable[[], Awaitable[None]]],
    under_way: Callable[[], Awaitable[None]],
) -> None:
    """Run trio as a guest of a host that stops serving it."""
    calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    ready: list[object] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)
            await under_way()
            ready.append(True)
            # Always ready to go on, or a thread of trio's would wait for ever.
            while True:
                await trio.lowlevel.checkpoint()

    trio.lowlevel.start_guest_run(
        main, run_sync_soon_threadsafe=calls.put, done_callback=ready.append
    )
    while not ready:
        calls.get(timeout=LAST_RESORT)()
    assert ready == [True]


def _abandon(kind: str, work: _Work) -> None:
    if kind == "trio":
        _abandon_trio(work.jobs(), work.under_way)
    else:
        new = uvloop.new_event_loop if kind == "uvloop" else asyncio.new_event_loop
        _abandon_asyncio(work, new())


# What trio itself says of a guest run that its host abandons.
_TRIO_COMPLAINS = (
    pytest.mark.filterwarnings("ignore:Trio guest run got abandoned:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
)
_ABANDONED = pytest.mark.parametrize(
    "kind", ["asyncio", "uvloop", pytest.param("trio", marks=_TRIO_COMPLAINS)]
)


@_ABANDONED
@pytest.mark.parametrize("collected", [False, True])
def test_a_loop_is_abandoned_with_its_operations(
    pool: TokenPool, kind: str, *, collected: bool
) -> None:
    """Nobody cancels them, and nobody will ever look at their results."""
    work = _Work(pool)
    gc.disable()
    try:
        with work.hold:
            _joined(_in_thread(_abandon, kind, work))
            if collected:
                gc.collect()
            work.left_alone()
        _serves_all(pool)
    finally:
        gc.enable()
        gc.collect()


class _Closing(asyncio.SelectorEventLoop):
    """A loop that is closed just when a worker has seen that it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.gone = threading.Event(), threading.Event()

    def is_closed(self) -> bool:
        found = super().is_closed()
        if threading.current_thread().name == "pkcs11-pool worker":
            self.asked.set()
            assert self.gone.wait(LAST_RESORT)
        return found

    def close(self) -> None:
        super().close()
        self.gone.set()


def test_a_loop_is_closed_just_when_its_result_comes(pool: TokenPool) -> None:
    """The session that nobody will take goes back, and the worker goes on."""
    loop = _Closing()

    async def ask() -> None:
        await pool.session().__aenter__()

    async def main() -> None:
        task = loop.create_task(ask())
        # asyncio's own complaint, that nobody can catch, is not of interest here.
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
        await blocking(loop.asked.wait, LAST_RESORT)

    def run() -> None:
        loop.run_until_complete(main())
        loop.close()

    _joined(_in_thread(run))
    wait_for(lambda: _is_at_rest(pool))
    _serves_all(pool)


class _Collecting(int):
    """A limit that collects garbage when it is looked at: under the engine's lock."""

    __slots__ = ()

    def __le__(self, other: object) -> bool:
        gc.collect()
        return int(self) <= other  # type: ignore[operator]


# Not trio: a guest run that it finds abandoned is cancelled by the collector itself.
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_garbage_is_collected_at_any_moment(
    make_pool: MakePool, fault: FaultModule, kind: str
) -> None:
    """Also of an abandoned loop, on a thread that is deciding about another job."""
    pool = make_pool(module=fault.path, max_sessions=2, max_waiting=_Collecting(100))
    _run("asyncio", pool.open)
    work = _Work(pool)
    gc.disable()
    try:
        with work.hold:
            _joined(_in_thread(_abandon, kind, work))
            work.left_alone()
        with Hold() as hold:
            # The third one has to wait, so the limit is looked at.
            callers = [_in_thread(pool.run_sync, hold) for _ in range(3)]
            wait_for(lambda: len(hold.calls) == 2)
            hold.let_go()
            _joined(*callers)
    finally:
        gc.enable()
    _serves_all(pool)
    _run("trio", pool.close)


@_TRIO_COMPLAINS[0]
@_TRIO_COMPLAINS[1]
def test_a_session_held_in_an_abandoned_trio_loop_is_given_back(
    pool: TokenPool, fault: FaultModule
) -> None:
    """Nobody will ever leave its block."""
    held = threading.Event()

    async def hold() -> None:
        async with pool.session():
            held.set()
            await trio.sleep_forever()

    async def until_held() -> None:
        await trio.to_thread.run_sync(held.wait, LAST_RESORT)

    _joined(_in_thread(_abandon_trio, [hold], until_held))
    # Until then the worker that brought it may have it in its hands.
    _run("asyncio", settled, pool)
    gc.collect()
    wait_for(lambda: _is_at_rest(pool))
    assert len(fault.sessions()) == 1
    _serves_all(pool)


@_ABANDONED
def test_a_period_of_the_officer_ends_with_its_abandoned_loop(
    pool: TokenPool, token: ThrowawayToken, kind: str
) -> None:
    """Nobody will ever leave the block, and everybody else waits for its end."""
    begun = threading.Event()

    async def officer() -> None:
        async with pool.security_officer(token.so_pin):
            begun.set()
            await anyio.sleep_forever()

    async def until_begun() -> None:
        with anyio.fail_after(LAST_RESORT):
            while not begun.is_set():
                await anyio.lowlevel.checkpoint()

    def abandon() -> None:
        if kind == "trio":
            _abandon_trio([officer], until_begun)
            return
        loop = uvloop.new_event_loop() if kind == "uvloop" else asyncio.new_event_loop()
        task = loop.create_task(officer())
        loop.run_until_complete(until_begun())
        # Not even the loop's own complaint of a task that was never done.
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
        loop.close()

    _joined(_in_thread(abandon))
    gc.collect()
    _serves_all(pool)
    assert pool.login_state is LoginState.USER


@pytest.mark.parametrize("way", ["asyncio", "trio", "thread"])
def test_an_interrupt_from_the_keyboard_leaves_a_good_pool(
    pool: TokenPool, way: str
) -> None:
    """The caller goes at once, out of a loop or out of a blocking call."""
    gone = threading.Event()

    def interrupt() -> None:
        wait_for(lambda: hold.calls)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        # One that comes just before the main thread falls asleep does not wake it, and
        # is heeded when something does.
        while not gone.wait(0.1):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    with Hold() as hold:
        thread = _in_thread(interrupt)
        call = partial(_run, way, pool.run) if way != "thread" else pool.run_sync
        try:
            with pytest.raises(KeyboardInterrupt):
                call(hold)
        finally:
            gone.set()
            _joined(thread)
            signal.signal(signal.SIGUSR1, before)
        assert pool.stats().operations_running == 1
        assert pool.stats().operations_cancelled == 1
        hold.let_go()
    wait_for(lambda: _is_at_rest(pool))
    _serves_all(pool)


# -- Loops one after the other ----------------------------------------------------


def test_loops_follow_one_another_on_one_thread(pool: TokenPool) -> None:
    """Each hears of its own results, though the last one was a moment ago."""
    for number in range(12):
        data = str(number).encode()
        found = _run(_KINDS[number % 3], digest, pool, data)
        assert found == hashlib.sha256(data).digest()
        assert pool.run_sync(lambda session: session.generate_random(64))


@pytest.mark.parametrize("last", _KINDS)
def test_a_pool_is_opened_in_one_loop_and_closed_in_another(
    make_pool: MakePool, fault: FaultModule, kind: str, last: str
) -> None:
    """The first has ended long before, on another thread; the login is still kept."""
    pool = make_pool(module=fault.path)
    _joined(_in_thread(_run, kind, pool.open))
    key = _run("asyncio", make_ec_key, pool)
    fault.lose_login()
    for each in _KINDS:
        assert _run(each, partial(key.sign, mechanism=Mechanism.ECDSA), _DIGEST)
    assert fault.count("C_Login") == 2
    _joined(_in_thread(_run, last, pool.close))
    assert pool.state is PoolState.CLOSED
    wait_for(lambda: not pool_threads())
    assert fault.sessions() == []
    assert fault.count("C_Finalize") == 1


def test_another_loop_closes_the_pool_over_the_calls_of_an_ended_one(
    make_pool: MakePool, fault: FaultModule, kind: str
) -> None:
    """They are let finish, and what nobody hears of holds up nobody."""
    pool = make_pool(module=fault.path, max_sessions=2)
    _run("asyncio", pool.open)
    work = _Work(pool)
    with work.hold:
        main = _cancelled_by_trio if kind == "trio" else _cancelled_by_asyncio
        _run(kind, main, work)
        closing = _in_thread(_run, kind, pool.close)
        wait_for(lambda: pool.state is PoolState.CLOSING)
        assert len(fault.sessions()) == 3
        work.hold.let_go()
        _joined(closing)
    assert work.results == []
    assert pool.stats().calls_lost == 0
    wait_for(lambda: not pool_threads())
    assert fault.sessions() == []
    assert fault.count("C_Finalize") == 1


# -- Loops side by side -----------------------------------------------------------


def test_a_loop_that_stands_still_holds_up_no_other(pool: TokenPool, kind: str) -> None:
    """Its results wait for it; other loops and threads get theirs."""
    stuck, go_on = threading.Event(), threading.Event()
    hold = Hold()
    results: list[object] = []

    async def main() -> None:
        async def call() -> None:
            results.append(await pool.run(hold, "late"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await hold.entered()
            stuck.set()
            # On the loop's own thread: the loop stands still.
            assert go_on.wait(LAST_RESORT)

    thread = _in_thread(_run, kind, main)
    assert stuck.wait(LAST_RESORT)
    hold.let_go()
    wait_for(lambda: pool.stats().operations_running == 0)
    _serves_all(pool)
    assert results == []
    go_on.set()
    _joined(thread)
    assert results == [("late",)]


def test_a_session_of_one_loop_is_used_by_another_and_by_a_thread(
    pool: TokenPool, kind: str
) -> None:
    """While its block is open, wherever that is; its calls run one at a time."""
    other = {"asyncio": "trio", "uvloop": "asyncio", "trio": "uvloop"}[kind]
    numbers: list[int] = []

    def number(session: Any) -> int:
        found: int = session.handle
        return found

    async def main() -> None:
        async with pool.session() as session:

            async def elsewhere() -> None:
                numbers.append(await session.run(number))

            key = await session.generate_key(KeyType.AES, 128)
            bound = key.on(session)
            with anyio.fail_after(LAST_RESORT):
                await blocking(_run, other, elsewhere)
                sealed = await blocking(bound.sync.encrypt, _BLOCK, mechanism=_ECB)
                assert sealed == await bound.encrypt(_BLOCK, mechanism=_ECB)
            assert numbers == [session.handle]

    _run(kind, main)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_trio_as_a_guest_of_asyncio_shares_the_pool_with_it(pool: TokenPool) -> None:
    """Two loops by turns on one thread: each call waits in the way of its own."""
    found: list[tuple[str, bytes]] = []
    open_files: list[int] = []

    async def work(name: str) -> None:
        for number in range(20):
            data = f"{name} {number}".encode()
            assert await digest(pool, data) == hashlib.sha256(data).digest()
            found.append((name, data))
            open_files.append(_open_files())

    async def host() -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        trio.lowlevel.start_guest_run(
            work,
            "guest",
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
        )
        await work("host")
        (await done).unwrap()

    _run("asyncio", host)
    assert len(found) == 40
    # Each has one way in, however often they change.
    assert max(open_files) <= open_files[20]
    # They did take turns.
    assert {name for name, _ in found[:20]} == {"host", "guest"}


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_module_that_closes_our_descriptor_holds_up_nobody(
    kind: str, make_pool: MakePool
) -> None:
    """The loop is woken in its own way from then on, and the number is left alone."""

    async def main() -> None:
        before = _event_descriptors()
        async with make_pool() as pool:
            (ours,) = _event_descriptors() - before
            await pool.run(lambda _: os.close(ours))
            # Whoever is given the number must not find our wake-ups in his file.
            reader, writer = os.pipe()
            os.dup2(writer, ours)
            os.set_blocking(reader, False)
            for _ in range(3):
                with anyio.fail_after(LAST_RESORT):
                    assert await digest(pool) == hashlib.sha256(b"data").digest()
            with pytest.raises(BlockingIOError):
                os.read(reader, 1)
        for descriptor in (reader, writer, ours):
            os.close(descriptor)

    _run(kind, main)


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_our_descriptor_has_a_number_that_no_module_had(
    kind: str, make_pool: MakePool
) -> None:
    """A module that closes one of its own twice does not close ours."""

    async def main() -> None:
        before = _event_descriptors()
        async with make_pool():
            (ours,) = _event_descriptors() - before
            assert ours >= 100

    _run(kind, main)


class _WithoutReaders(asyncio.SelectorEventLoop):
    """A loop that watches no descriptors for others.

    Attributes:
        woken: The pool's way into it, once for each time that it was woken by that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.woken: list[ports.Port] = []

    def add_reader(self, *_args: Any) -> None:  # type: ignore[override]
        raise NotImplementedError

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, **rest: Any
    ) -> Any:
        port = getattr(callback, "__self__", None)
        if isinstance(port, ports.Port):
            self.woken.append(port)
        return super().call_soon_threadsafe(callback, *args, **rest)


@pytest.mark.parametrize("lacks", ["readers", "eventfd"])
def test_many_results_wake_a_loop_without_readers_once(
    lacks: str, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is woken in its own way, and as seldom as one that has them."""
    if lacks == "eventfd":
        monkeypatch.delattr(os, "eventfd")
    before = _event_descriptors()
    loop = _WithoutReaders()
    go, entered = threading.Semaphore(0), threading.Semaphore(0)

    def inside(_session: object) -> int:
        entered.release()
        assert go.acquire(timeout=2 * LAST_RESORT)
        return 7

    async def main() -> None:
        async with make_pool() as pool:
            assert _event_descriptors() <= before
            for _ in range(2):
                calls = [asyncio.create_task(pool.run(inside)) for _ in range(8)]
                for _ in calls:
                    assert await blocking(entered.acquire, timeout=LAST_RESORT)
                loop.woken.clear()
                # On the loop's own thread: it stands still until all are there.
                for there in range(1, len(calls) + 1):
                    go.release()
                    wait_for(partial(_are_ready, loop, there))
                assert await asyncio.gather(*calls) == [7] * len(calls)
                assert len(loop.woken) == 1

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


def _are_ready(loop: _WithoutReaders, count: int) -> bool:
    return bool(loop.woken) and len(loop.woken[0].ready) == count
