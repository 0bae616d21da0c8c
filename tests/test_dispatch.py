"""Sessions ahead and behind, who is woken for what, and the loop that goes on."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import structlog
from pkcs11 import Mechanism

from faultmodule import CKR
from pkcs11_pool import LoginState, PoolTimeout, events
from pkcs11_pool.engine.workers import Worker
from pkcs11_pool.faces import ports
from poolkit import (
    LAST_RESORT,
    Hold,
    blocking,
    digest,
    eventually,
    hangs,
    make_ec_key,
    settled,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_DIGEST = b"d" * 32
_LIMIT = 4
_CALLERS = 4 * _LIMIT
_EACH = 25


@pytest.mark.parametrize("slow_us", [0, 300])
async def test_never_more_sessions_than_allowed_and_none_when_idle(
    make_pool: MakePool, fault: FaultModule, slow_us: int
) -> None:
    """Opened ahead, used, not yet closed: all count, on fast tokens and slow ones."""
    async with make_pool(module=fault.path, max_sessions=_LIMIT) as pool:
        key = await make_ec_key(pool)
        await settled(pool)
        fault.latency_us = slow_us
        # The anchor is one more.
        fault.session_limit(_LIMIT + 1)
        before = fault.count("C_OpenSession")

        async def caller() -> None:
            for _ in range(_EACH):
                await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)

        async with anyio.create_task_group() as group:
            for _ in range(_CALLERS):
                group.start_soon(caller)
        fault.latency_us = 0
        await settled(pool)
        opened = fault.calls("C_OpenSession")[before:]
        assert len(opened) >= _CALLERS * _EACH - _LIMIT
        assert {call.rv for call in opened} == {0}
        await eventually(lambda: pool.stats().sessions_open == 0)
        assert len(fault.sessions()) == 1


@pytest.mark.parametrize(
    "function",
    [
        "C_OpenSession",
        "C_FindObjectsInit",
        "C_FindObjects",
        "C_GetAttributeValue",
        "C_SignInit",
        "C_Sign",
        "C_CloseSession",
    ],
)
async def test_the_loop_goes_on_whatever_hangs(
    make_pool: MakePool, fault: FaultModule, function: str
) -> None:
    """No call of an operation is made on the loop's thread, the first one included."""
    async with make_pool(module=fault.path, handle_max_age=0.0) as pool:
        key = await make_ec_key(pool)
        await settled(pool)
        await eventually(lambda: pool.stats().sessions_open == 0)
        fault.on(function, hang="before", every=True)
        turns = 0
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(_sign, key)
            while not fault.inside(function) or turns < 1000:
                # Taken by the loop itself: it would stand still with the call.
                await anyio.lowlevel.checkpoint()
                turns += 1
            fault.clear()
        assert turns >= 1000


async def _sign(key: object) -> None:
    await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)  # type: ignore[attr-defined]


# -- Sessions ahead and behind --------------------------------------------------------


async def _all_at_once(pool: TokenPool, callers: int) -> None:
    """Let so many operations be inside at one moment, and be tidied up after."""
    with Hold() as hold:
        async with anyio.create_task_group() as group:
            for _ in range(callers):
                group.start_soon(pool.run, hold)
            await hold.entered(callers)
            hold.let_go()
    await settled(pool)


async def _some_ahead(pool: TokenPool) -> None:
    """Bring the pool to have at least two sessions ahead."""
    await _all_at_once(pool, 4)
    while pool.stats().sessions_ahead < 2:
        await _all_at_once(pool, 4)


@pytest.mark.usefixtures("never_idle")
async def test_the_next_operation_goes_to_a_spare_worker_with_a_session(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It waits neither for the tidying behind the last one nor for a session."""
    async with make_pool(module=fault.path) as pool:
        await _some_ahead(pool)
        there = {session.number for session in fault.sessions()}
        fault.on("C_CloseSession", hang="before")
        await digest(pool)
        await hangs(fault, "C_CloseSession")
        with anyio.fail_after(LAST_RESORT):
            await digest(pool)
        last = fault.calls("C_Digest")[-2:]
        assert last[0].thread != last[1].thread
        assert {call.session for call in last} <= there
        fault.release()


@pytest.mark.usefixtures("never_idle")
async def test_there_is_a_spare_session_for_each_running_operation_and_one_more(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """When fewer run, the sessions ahead that are left over are used up.

    Whoever calls again at once finds one, while the next is opened behind him.
    """
    async with make_pool(module=fault.path, max_sessions=16) as pool:
        await _some_ahead(pool)
        for _ in range(6):
            await _all_at_once(pool, 1)
        assert pool.stats().sessions_ahead == 2
        assert len(fault.sessions()) == 3  # the anchor


@pytest.mark.parametrize("how", ["down", "count"])
@pytest.mark.usefixtures("never_idle")
async def test_sessions_ahead_that_are_given_up_do_not_count(
    make_pool: MakePool, fault: FaultModule, how: str
) -> None:
    """Neither those that went with the token nor those closed for want of room."""
    async with make_pool(module=fault.path) as pool:
        await _some_ahead(pool)
        if how == "down":
            fault.go_down()
            with pytest.raises(PoolTimeout):
                await digest(pool, timeout=0.2)
            # Not before the pool has looked: a token that is there when it does is not
            # lost, and a session that could not be closed meanwhile stays open there.
            await eventually(lambda: pool.stats().sessions_open == 0)
            fault.come_back()
        else:
            fault.on("C_OpenSession", answer=CKR.SESSION_COUNT)
            await pool.run(lambda session: session.rw, rw=True)
        assert await pool.run(lambda session: session.rw, rw=True)
        await settled(pool)
        ahead = pool.stats().sessions_ahead
        assert pool.stats().sessions_open == ahead
        await eventually(lambda: len(fault.sessions()) == 1 + ahead)


@pytest.mark.parametrize("how", ["logout", "lost", "so"])
async def test_no_session_opened_ahead_survives_a_change_of_the_login(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, how: str
) -> None:
    """Each is closed at once, or replaced when it is its turn; none is used."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await _some_ahead(pool)
        before = pool.stats().sessions_ahead
        old = {session.number for session in fault.sessions()}
        if how == "logout":
            await pool.logout()
            assert pool.stats().sessions_ahead == 0
            await pool.login()
        elif how == "so":
            async with pool.security_officer(token.so_pin):
                assert pool.stats().sessions_ahead == 0
        else:
            fault.lose_login()
            await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        assert pool.login_state is LoginState.USER
        fault.clear_log()
        for _ in range(before + 1):
            await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        assert old.isdisjoint(call.session for call in fault.calls("C_Sign"))
        await settled(pool)
        await eventually(lambda: pool.stats().sessions_open == 0)
        assert len(fault.sessions()) == 1


# -- Who is woken ---------------------------------------------------------------------


@pytest.mark.usefixtures("never_idle")
async def test_the_worker_that_went_idle_last_is_woken_first(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stack and its caches are warm; the others may sleep on."""
    async with make_pool() as pool:
        await _some_ahead(pool)
        staff = pool._engine._staff  # noqa: SLF001
        goes_idle, wake = staff.goes_idle, Worker.wake
        idle: list[Worker] = []
        woken: list[bool] = []

        def noted(worker: Any) -> None:
            idle.append(worker)
            goes_idle(worker)

        def counted(worker: Worker) -> None:
            # One that does not wake in a moment, on a slow machine, is helped by
            # another; and some sleep since before anybody noted it.
            woken.append(not idle or worker is idle[-1])
            if worker in idle:
                idle.remove(worker)
            wake(worker)

        # Both are called under the engine's lock.
        monkeypatch.setattr(staff, "goes_idle", noted)
        monkeypatch.setattr(Worker, "wake", counted)
        await _all_at_once(pool, 4)
        assert len(idle) >= 2, "there is no choice"
        woken.clear()
        while len(woken) < 12:
            await digest(pool)
            await settled(pool)
        assert all(woken)


async def test_on_a_fast_token_few_workers_do_all(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Those that come back from a call take the next job: nobody else is woken."""
    callers = 64
    async with make_pool(module=fault.path, max_sessions=callers) as pool:
        key = await make_ec_key(pool)

        async def caller() -> None:
            for _ in range(20):
                await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)

        async with anyio.create_task_group() as group:
            for _ in range(callers):
                group.start_soon(caller)
        # What came before the pool knew how fast the token is does not count.
        last = fault.calls("C_Sign")[-600:]
        busiest = sorted(
            (
                sum(call.thread == one for call in last)
                for one in {c.thread for c in last}
            ),
            reverse=True,
        )
        # All 64 would share them evenly; some are long on a machine that is busy.
        assert sum(busiest[:16]) >= 0.75 * len(last)


async def test_behind_a_slow_token_all_may_be_inside(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Also when it was fast until now: those inside for long do not count."""
    callers = 16
    async with make_pool(module=fault.path, max_sessions=callers) as pool:
        for _ in range(20):
            await digest(pool)
        await settled(pool)
        fault.on("C_Digest", hang="before", every=True)
        async with anyio.create_task_group() as group:
            for _ in range(callers + 4):
                group.start_soon(digest, pool)
            await hangs(fault, "C_Digest", callers)
            assert pool.stats().operations_waiting == 4
            fault.clear()


def _wake_ups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ports.Port, int]]:
    """The ways by which loops are woken, and how many callers are ready then."""
    woken: list[tuple[ports.Port, int]] = []

    def noted(schedule: Any) -> Any:
        def note(port: ports.Port) -> None:
            woken.append((port, len(port.ready)))
            schedule(port)

        return note

    kinds = ("_EventPort", "_TrioPort")
    for kind in (getattr(ports, name) for name in kinds):
        monkeypatch.setattr(kind, "_schedule", noted(kind._schedule))  # noqa: SLF001
    return woken


async def test_many_results_wake_the_loop_once(
    pool: TokenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it has not taken the first, those that follow need no wake-up."""
    woken = _wake_ups(monkeypatch)
    go = threading.Semaphore(0)
    entered = threading.Semaphore(0)

    def inside(_session: object) -> None:
        entered.release()
        assert go.acquire(timeout=2 * LAST_RESORT)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(pool.run, inside)
        for _ in range(8):
            assert await blocking(entered.acquire, timeout=LAST_RESORT)
        woken.clear()
        # On the loop's own thread: it stands still until all results are there. One
        # after the other: of two that come at one moment, either may wake it.
        for there in range(1, 9):
            go.release()
            wait_for(lambda there=there: woken and len(woken[0][0].ready) == there)  # type: ignore[misc]
    assert len(woken) == 1


async def _fast(pool: TokenPool) -> None:
    """Have a token taken for one that is so fast that one worker is enough."""
    await digest(pool)
    await settled(pool)
    awake = pool._engine._awake  # noqa: SLF001
    # No matter how busy the machine is.
    awake.most, awake.alone = 1, True


def _no_timekeeper(
    pool: TokenPool, monkeypatch: pytest.MonkeyPatch
) -> Callable[[float], float]:
    """Let nobody come for what was put off; what the timekeeper would have called."""
    sweep = pool._engine.sweep  # noqa: SLF001
    monkeypatch.setattr(pool._engine, "sweep", lambda _now: math.inf)  # noqa: SLF001
    return sweep


@pytest.mark.usefixtures("never_idle")
async def test_on_a_fast_token_the_caller_is_woken_when_its_worker_has_tidied(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both would want the interpreter's lock at once."""
    async with make_pool(module=fault.path, timeout=None) as pool:
        await _fast(pool)
        # As he comes when it takes long.
        _no_timekeeper(pool, monkeypatch)
        fault.on("C_CloseSession", hang="before")
        back = False

        async def caller() -> None:
            nonlocal back
            await digest(pool)
            back = True

        async with anyio.create_task_group() as group:
            group.start_soon(caller)
            await hangs(fault, "C_CloseSession")
            await anyio.wait_all_tasks_blocked()
            assert not back
            fault.release()
        assert back


@pytest.mark.usefixtures("never_idle")
@pytest.mark.parametrize(
    ("by", "together"),
    [
        ("a worker that has a result", 3),
        ("a worker that takes a job", 2),
        ("the timekeeper", 2),
    ],
)
async def test_results_that_were_held_back_wake_the_loop_when_all_are_there(
    make_pool: MakePool,
    fault: FaultModule,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    together: int,
) -> None:
    """Else it would take the first alone, while the others wait for its lock."""
    monkeypatch.setattr("pkcs11_pool.engine.held._LATE", math.inf)
    async with make_pool(module=fault.path, max_sessions=1, timeout=None) as pool:
        await _fast(pool)
        held = pool._engine._held  # noqa: SLF001
        sweep = _no_timekeeper(pool, monkeypatch)
        fault.on("C_Digest", hang="before")
        if by == "the timekeeper":
            fault.on("C_Digest", hang="before", nth=3)
        if by == "a worker that takes a job":
            monkeypatch.setattr(held, "is_late", lambda _now: len(held.waiters) == 2)
        woken = _wake_ups(monkeypatch)
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(digest, pool)
            await hangs(fault, "C_Digest")
            await eventually(lambda: pool.stats().operations_waiting == 3)
            fault.release("C_Digest")
            if by == "the timekeeper":
                await hangs(fault, "C_Digest")
                await blocking(sweep, time.monotonic())
                fault.release("C_Digest")
        assert woken[0][1] == together


@pytest.mark.usefixtures("never_idle")
async def test_results_that_were_held_back_wake_a_loop_once(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again for those held back, where the one that came last has woken it."""
    monkeypatch.setattr("pkcs11_pool.engine.held._LATE", math.inf)
    async with make_pool(module=fault.path, max_sessions=1, timeout=None) as pool:
        await _fast(pool)
        _no_timekeeper(pool, monkeypatch)
        staff = pool._engine._staff  # noqa: SLF001
        fault.on("C_Digest", hang="before")
        woken = _wake_ups(monkeypatch)
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(digest, pool)
            await hangs(fault, "C_Digest")
            await eventually(lambda: pool.stats().operations_waiting == 3)
            woken.clear()
            # On the loop's own thread: it stands still until all results are there.
            fault.release("C_Digest")
            wait_for(lambda: not pool.stats().operations_waiting and not staff.busy)
            wait_for(lambda: woken and len(woken[0][0].ready) == 4)
            # The third one woke it for the two that were held back, too.
            assert [ready for _, ready in woken] == [3]


@pytest.mark.usefixtures("never_idle")
async def test_a_result_that_is_held_back_does_not_wait_for_the_next_call(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker has taken a job that came meanwhile, and there is none after that."""
    # It is never late, and nobody comes to look: if not now, it is woken by that call.
    monkeypatch.setattr("pkcs11_pool.engine.held._LATE", math.inf)
    async with make_pool(module=fault.path, max_sessions=1, timeout=None) as pool:
        await _fast(pool)
        _no_timekeeper(pool, monkeypatch)
        back = anyio.Event()

        async def first() -> None:
            await digest(pool)
            back.set()

        async with anyio.create_task_group() as group:
            fault.on("C_CloseSession", hang="before")
            group.start_soon(first)
            await hangs(fault, "C_CloseSession")
            assert pool._engine._held.waiters  # noqa: SLF001
            fault.on("C_Digest", hang="before")
            group.start_soon(digest, pool)
            await eventually(lambda: pool.stats().operations_waiting == 1)
            fault.release("C_CloseSession")
            await hangs(fault, "C_Digest")
            with anyio.fail_after(LAST_RESORT):
                await back.wait()
            assert fault.inside("C_Digest")
            fault.clear()


def _on_a_loop(pool: TokenPool) -> None:
    anyio.run(digest, pool)


def _on_a_plain_thread(pool: TokenPool) -> None:
    pool.run_sync(lambda _session: None)


@pytest.mark.usefixtures("never_idle")
@pytest.mark.parametrize("call", [_on_a_loop, _on_a_plain_thread])
async def test_results_that_were_held_back_wake_their_callers_wherever_they_are(
    make_pool: MakePool,
    fault: FaultModule,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[TokenPool], None],
) -> None:
    """Not only where that one is whose result comes when they have waited enough."""
    monkeypatch.setattr("pkcs11_pool.engine.held._LATE", math.inf)
    async with make_pool(module=fault.path, max_sessions=1, timeout=None) as pool:
        await _fast(pool)
        _no_timekeeper(pool, monkeypatch)
        fault.on("C_Digest", hang="before")
        elsewhere = threading.Thread(target=call, args=(pool,), daemon=True)
        async with anyio.create_task_group() as group:
            group.start_soon(digest, pool)
            await hangs(fault, "C_Digest")
            elsewhere.start()
            await eventually(lambda: pool.stats().operations_waiting == 1)
            for _ in range(2):
                group.start_soon(digest, pool)
            await eventually(lambda: pool.stats().operations_waiting == 3)
            fault.release("C_Digest")
            await blocking(elsewhere.join, LAST_RESORT)
            assert not elsewhere.is_alive()


@pytest.mark.usefixtures("never_idle")
async def test_a_result_does_not_wait_for_tidying_that_hangs(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It comes a moment later, also where it waited for that."""
    # The timekeeper has nothing else to come for: no deadline, and no idle pool.
    async with make_pool(module=fault.path, timeout=None) as pool:
        await _fast(pool)
        fault.on("C_CloseSession", hang="before")
        with anyio.fail_after(LAST_RESORT):
            await digest(pool)
        await hangs(fault, "C_CloseSession")
        fault.release()


class _Touchy:
    """A logger that nobody may ask for anything."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


@pytest.mark.parametrize("configured", [False, True])
async def test_an_operation_logs_nothing(
    pool: TokenPool, monkeypatch: pytest.MonkeyPatch, *, configured: bool
) -> None:
    """So logging costs it nothing, whether it is on or off."""
    key = await make_ec_key(pool)
    await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
    with monkeypatch.context() as patch:
        patch.setattr(events, "_log", _Touchy())
        patch.setattr(structlog, "is_configured", lambda: configured)
        signature = await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        assert await key.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)
        assert await digest(pool)


async def test_a_session_that_is_being_closed_still_counts(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Those opened ahead, too, that an idle pool gives back: the token has them yet."""
    async with make_pool(module=fault.path, max_sessions=4) as pool:
        await _some_ahead(pool)
        fault.on("C_CloseSession", hang="before", every=True)
        while not pool.stats().sessions_ahead:
            # The machine stood still for a moment, and they were closed before.
            fault.clear()
            await _some_ahead(pool)
            fault.on("C_CloseSession", hang="before", every=True)
        await hangs(fault, "C_CloseSession")  # nobody had anything to do
        with anyio.move_on_after(0.2):
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(digest, pool)
        assert len(fault.sessions()) <= 4 + 1  # the anchor
        fault.clear()
