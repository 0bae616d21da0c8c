"""What a recovery tells while it goes on, and a call that hangs: events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
import structlog
from pkcs11 import Mechanism

from pkcs11_pool import LoginState, PoolState, TokenUnavailable
from poolkit import digest, eventually, lost, make_ec_key

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool


def _named(log: list[Any], name: str) -> list[Any]:
    return [event for event in log if event["event"] == name]


async def test_each_step_of_a_recovery_is_an_event(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Started, each step that is taken, each round in vain, and the token's return."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        with structlog.testing.capture_logs() as log:
            fault.go_down(stays=True)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_sign, key)
                await eventually(lambda: pool.login_state is LoginState.PUBLIC)
                await eventually(lambda: _named(log, "recovery.failed"))
                fault.come_back()
            await eventually(lambda: pool.state is PoolState.READY)
    told = [event for event in log if event["event"].startswith("recovery.")]
    assert told[0]["event"] == "recovery.started"
    assert told[0]["error"]
    assert told[-1]["event"] == "recovery.completed"
    assert {"token", "slot", "rounds", "seconds"} <= told[-1].keys()
    steps = [event["step"] for event in _named(log, "recovery.step")]
    assert set(steps) == {"find", "initialize", "log_in"}
    assert steps[-1] == "log_in"
    for event in _named(log, "recovery.failed"):
        assert event["error"]
        assert 0 < event["retry_in"] <= 1
    assert {event["token"] for event in told} == {"demo"}


async def _sign(key: Any) -> bytes:
    signature: bytes = await key.sign(bytes(32), mechanism=Mechanism.ECDSA)
    return signature


async def test_that_callers_are_refused_from_now_on_is_an_event(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Once, when ``recovery_timeout`` has passed; the return is told all the same."""
    async with make_pool(module=fault.path, recovery_timeout=0.1) as pool:
        with structlog.testing.capture_logs() as log:
            fault.go_down()
            for _ in range(3):
                with pytest.raises(TokenUnavailable):
                    await digest(pool)
            fault.come_back()
            await eventually(lambda: pool.state is PoolState.READY)
        (told,) = _named(log, "recovery.timed_out")
        assert {told["token"]} == {"demo"}
        assert told["seconds"] >= 0.1
        assert len(_named(log, "recovery.completed")) == 1


async def test_a_call_that_is_given_up_on_is_an_event_and_its_return_another(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Each with how many are still inside."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", every=True, hang="before")
        with structlog.testing.capture_logs() as log:
            for calls in (1, 2):
                await lost(pool, fault, calls)
            fault.clear()
            await eventually(lambda: len(_named(log, "call.returned")) == 2)
        given_up = _named(log, "call.lost")
        assert [event["stuck"] for event in given_up] == [1, 2]
        assert {event["log_level"] for event in given_up} == {"warning"}
        back = _named(log, "call.returned")
        # Which of the two tells first is up to their threads.
        assert min(event["stuck"] for event in back) == 0
        assert {event["token"] for event in given_up + back} == {"demo"}


async def test_that_the_token_has_no_more_sessions_is_an_event(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """With the limit that was learnt."""
    async with make_pool(module=fault.path) as pool:
        with structlog.testing.capture_logs() as log:
            fault.session_limit(total=3)
            async with anyio.create_task_group() as tasks:
                for _ in range(2):
                    await tasks.start(_hold, pool)
                tasks.start_soon(digest, pool)
                await eventually(lambda: _named(log, "session.refused"))
                fault.session_limit(None)
                tasks.cancel_scope.cancel()
        told = _named(log, "session.refused")[0]
        assert (told["token"], told["sessions"]) == ("demo", 2)
        assert "CKR_SESSION_COUNT" in told["error"]


async def _hold(pool: TokenPool, *, task_status: TaskStatus[None]) -> None:
    async with pool.session():
        task_status.started()
        await anyio.sleep_forever()
