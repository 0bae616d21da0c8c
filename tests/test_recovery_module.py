"""A module initialised anew: for all pools on it, when nobody is inside, or not."""

from __future__ import annotations

import ctypes
import random
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pkcs11
import pytest
from pkcs11 import Mechanism

from faultmodule import CKR
from pkcs11_pool import (
    LoginState,
    PoolState,
    SessionClosed,
    TokenPool,
    TokenUnavailable,
    list_tokens,
)
from pkcs11_pool.engine import lull
from pkcs11_pool.login import recovering, steps
from pkcs11_pool.login.steps import Step
from poolkit import (
    LAST_RESORT,
    blocking,
    digest,
    eventually,
    hangs,
    lost,
    make_ec_key,
    settled,
    workers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory

_DIGEST = b"d" * 32


@pytest.fixture
def other(token_directory: TokenDirectory) -> ThrowawayToken:
    """A second token of the module."""
    return token_directory.add_token("other")


@pytest.fixture
def finalised(soft_hsm: SoftHSM) -> Iterator[None]:
    """Finalise a module that was kept for a lost call: else the next pool would."""
    yield
    ctypes.CDLL(str(soft_hsm.module)).C_Finalize(None)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is well is waited for, also when the machine stands still.

    Else another round begins, and for that one the module is not broken any more.
    """
    monkeypatch.setattr(recovering, "_PATIENCE", LAST_RESORT)


async def _two(
    stack: AsyncExitStack,
    make_pool: MakePool,
    fault: FaultModule,
    other: ThrowawayToken,
    **options: Any,
) -> tuple[TokenPool, TokenPool]:
    """A pool on each of two tokens."""
    first = await stack.enter_async_context(make_pool(module=fault.path, **options))
    second = await stack.enter_async_context(
        make_pool(
            module=fault.path, token_label=other.label, pin=other.user_pin, **options
        )
    )
    return first, second


def _break(fault: FaultModule) -> None:
    """To the next who comes, the module is not initialised; to nobody else."""
    for function in ("C_OpenSession", "C_GetSessionInfo", "C_GetSlotList"):
        fault.on(function, answer=CKR.CRYPTOKI_NOT_INITIALIZED)


async def _sign(pool: TokenPool) -> bytes:
    return await pool.key(label="signer").sign(_DIGEST, mechanism=Mechanism.ECDSA)


async def _ready(*pools: TokenPool) -> None:
    await eventually(lambda: all(pool.state is PoolState.READY for pool in pools))


async def test_all_pools_on_a_module_come_back_together(
    make_pool: MakePool, fault: FaultModule, other: ThrowawayToken
) -> None:
    """Both find their tokens gone; the module is initialised anew for both."""
    async with AsyncExitStack() as stack:
        pools = await _two(stack, make_pool, fault, other)
        for pool in pools:
            await make_ec_key(pool)
        fault.go_down(stays=True)
        async with anyio.create_task_group() as tasks:
            for pool in pools:
                for _ in range(8):
                    tasks.start_soon(_sign, pool)
            await eventually(
                lambda: all(p.login_state is LoginState.PUBLIC for p in pools)
            )
            fault.come_back()
        for pool in pools:
            assert await _sign(pool)
            assert pool.login_state is LoginState.USER
            assert pool.stats().operations_failed == 0


@pytest.mark.usefixtures("patient")
async def test_a_pool_that_was_well_comes_back_by_itself(
    make_pool: MakePool, fault: FaultModule, other: ThrowawayToken
) -> None:
    """It is drained first: what runs comes to its end, and nothing fails."""
    async with AsyncExitStack() as stack:
        ill, well = await _two(stack, make_pool, fault, other)
        for pool in (ill, well):
            await make_ec_key(pool)
        fault.reset_counts()
        fault.on("C_Digest", hang="before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(digest, well)
            await hangs(fault, "C_Digest")
            _break(fault)
            tasks.start_soon(ill.generate_random, 8)
            # It stands back, and is waited for.
            await eventually(lambda: well.state is PoolState.RECOVERING)
            assert fault.count("C_Finalize") == 0
            fault.release()
        await _ready(ill, well)
        assert fault.count("C_Finalize") == fault.count("C_Initialize") == 1
        for pool in (ill, well):
            assert await _sign(pool)
            assert pool.stats().recoveries_total == 1


@pytest.mark.usefixtures("patient")
async def test_an_idle_pool_tidies_nothing_while_it_stands_back(
    make_pool: MakePool,
    fault: FaultModule,
    other: ThrowawayToken,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it opened ahead ended with the generation: its number is another's soon."""
    # It is idle when the test says so.
    monkeypatch.setattr(lull, "IDLE", 60)
    async with AsyncExitStack() as stack:
        ill, well = await _two(stack, make_pool, fault, other)
        for pool in (ill, well):
            await settled(pool)
        assert await digest(well)
        await settled(well)
        assert well.stats().sessions_ahead
        fault.on("C_Initialize", hang="before")
        _break(fault)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(digest, ill)
            await hangs(fault, "C_Initialize")
            fault.reset_counts()
            # As the timekeeper has an idle worker do it.
            engine = well._engine  # noqa: SLF001
            engine._lull.wanted, engine._lull.last_work = True, 0.0  # noqa: SLF001
            await blocking(engine.look_around, engine._staff.idle[-1])  # noqa: SLF001
            closed = fault.count("C_CloseSession")
            fault.release()
        await _ready(ill, well)
        assert closed == 0
        assert await digest(well)


@pytest.mark.usefixtures("patient")
async def test_open_sessions_of_a_pool_that_was_well_are_over(
    make_pool: MakePool, fault: FaultModule, other: ThrowawayToken
) -> None:
    """They ended with the generation, and say so."""
    async with AsyncExitStack() as stack:
        ill, well = await _two(stack, make_pool, fault, other)
        async with well.session() as session:
            _break(fault)
            assert await digest(ill)
            await _ready(ill, well)
            with pytest.raises(SessionClosed, match="initialise"):
                await digest(session)
        assert await digest(well)


async def test_one_token_of_a_module_leaves_the_other_alone(
    make_pool: MakePool, fault: FaultModule, other: ThrowawayToken
) -> None:
    """Where its sessions alone are gone, nothing is initialised anew."""
    async with AsyncExitStack() as stack:
        ill, well = await _two(stack, make_pool, fault, other)
        await make_ec_key(ill)
        async with well.session() as session:
            fault.reset_counts()
            fault.lose_sessions(ill.token.slot_id)
            assert await _sign(ill)
            assert fault.count("C_Finalize") == 0
            assert await digest(session)
        assert well.stats().recoveries_total == 0


async def test_other_code_that_finalised_the_module_is_made_up_for(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The module is ours to initialise, and operations go on."""
    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        await settled(pool)
        pool.lib.functions.C_Finalize(None)
        assert await _sign(pool)
        assert pool.login_state is LoginState.USER


async def test_a_module_that_refuses_is_tried_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """C_Initialize may fail while the server is down; it succeeds later."""
    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        fault.on("C_Initialize", times=2, answer=CKR.DEVICE_ERROR)
        await settled(pool)
        pool.lib.functions.C_Finalize(None)
        assert await _sign(pool)
        assert fault.count("C_Initialize") == 4


@pytest.mark.usefixtures("finalised")
async def test_with_a_lost_call_inside_nothing_is_finalised(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Only a new process can help, and the error says so; until the call is back."""
    async with make_pool(
        module=fault.path, recovery_timeout=0.5, close_timeout=0.3
    ) as pool:
        await make_ec_key(pool)
        fault.on("C_Digest", hang="before")
        await lost(pool, fault)
        fault.reset_counts()
        fault.go_down(stays=True)
        told = ""
        while "only a new process" not in told:
            # It is known as soon as the pool would initialise the module anew.
            with pytest.raises(TokenUnavailable) as caught:
                await _sign(pool)
            told = str(caught.value)
        fault.come_back()
        assert fault.count("C_Finalize") == 0
        fault.release()
        await _ready(pool)
        assert fault.count("C_Finalize") >= 1
        assert await _sign(pool)
        await eventually(lambda: pool.stats().calls_stuck == 0)


async def test_a_call_that_is_still_inside_is_waited_for(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """One that hangs and is not given up on: C_Finalize comes after it."""
    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        fault.on("C_Digest", hang="before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(digest, pool)
            await hangs(fault, "C_Digest")
            fault.reset_counts()
            fault.go_down(stays=True)
            tasks.start_soon(_sign, pool)
            await eventually(lambda: pool.login_state is LoginState.PUBLIC)
            fault.come_back()
            assert fault.count("C_Finalize") == 0
            fault.release()
        assert fault.count("C_Finalize") >= 1
        assert await _sign(pool)


async def test_a_module_that_takes_turns_and_hangs_is_told_of_soon(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Nothing goes in any more: callers are refused, and served when it is back."""
    async with make_pool(
        module=fault.path, serialize=True, recovery_timeout=0.2
    ) as pool:
        await make_ec_key(pool)
        fault.on("C_Digest", hang="before")
        async with pool.session() as session:
            await lost(pool, fault)
            with pytest.raises(TokenUnavailable, match="only a new process"):
                await _sign(pool)
            # Not each after the time limit of the recovery.
            with anyio.fail_after(LAST_RESORT / 2):
                for _ in range(100):
                    with pytest.raises(TokenUnavailable):
                        await _sign(pool)
            fault.release()
            await _ready(pool)
            # Nothing was lost: it only did not answer.
            assert not session.closed
            assert await digest(session)
        assert await _sign(pool)
        assert pool.stats().recoveries_total == 0


async def test_past_the_limit_of_lost_calls_the_pool_fails_fast(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Each lost call keeps a thread and a session: there is an end to that."""
    async with make_pool(module=fault.path, max_sessions=2) as pool:
        fault.on("C_Digest", every=True, hang="before")
        for calls in (1, 2, 3):
            await lost(pool, fault, calls)
        stats = pool.stats()
        assert (stats.calls_lost, stats.calls_stuck) == (3, 3)
        with pytest.raises(TokenUnavailable, match="only a new process"):
            await pool.generate_random(8)
        fault.clear()
        await eventually(lambda: pool.stats().calls_stuck == 0)
        assert await digest(pool)
        assert len(workers()) <= 3


async def test_listing_tokens_is_not_cut_off(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Who lists tokens is inside the module, though no pool knows of it."""
    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        fault.on("C_GetMechanismList", hang="before")

        async def list_them() -> None:
            # The token went while they were listed.
            with suppress(pkcs11.PKCS11Error):
                await list_tokens(fault.path)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(list_them)
            await hangs(fault, "C_GetMechanismList")
            fault.reset_counts()
            fault.go_down(stays=True)
            tasks.start_soon(_sign, pool)
            await eventually(lambda: pool.login_state is LoginState.PUBLIC)
            fault.come_back()
            assert fault.count("C_Finalize") == 0
            fault.release()
        assert await _sign(pool)


# -- The way back, as a table -----------------------------------------------------


@pytest.mark.parametrize("step", [s for s in Step if s not in steps.ENDS])
@pytest.mark.parametrize("well", [True, False])
@pytest.mark.parametrize("initialize", [True, False])
def test_every_step_leads_somewhere(
    step: Step, *, well: bool, initialize: bool
) -> None:
    """And to an end within a few, however it goes."""
    seen = [step]
    while seen[-1] not in steps.ENDS:
        may = initialize and Step.INITIALIZE not in seen
        seen.append(steps.after(seen[-1], well=well, initialize=may))
        assert len(seen) < 6
    assert (seen[-1] is Step.REST) == (not well)


def test_well_pools_are_disturbed_seldom_and_ever_more_seldom() -> None:
    """In rounds 2, 4, 8, …; a pool alone with its module does it in every round."""
    disturbed = [r for r in range(1, 40) if steps.may_initialize(r, others=True)]
    assert disturbed == [2, 4, 8, 16, 32]
    assert all(steps.may_initialize(r, others=False) for r in range(1, 40))


def test_rests_grow_up_to_a_limit_and_differ() -> None:
    """Twice as long each time, up to a second, and never in step with others."""
    one, two = (steps.Backoff(random.Random(seed)) for seed in (1, 2))  # noqa: S311
    rests = [one.rest() for _ in range(12)]
    assert rests[0] <= steps.FIRST_REST
    assert all(rest <= steps.LONGEST_REST for rest in rests)
    assert all(rest >= steps.LONGEST_REST / 2 for rest in rests[6:])
    assert rests != [two.rest() for _ in range(12)]
