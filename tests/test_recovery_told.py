"""What a recovery tells while it goes on: an event for each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
import structlog
from pkcs11 import Mechanism

from pkcs11_pool import LoginState, PoolState, TokenUnavailable
from poolkit import digest, eventually, make_ec_key

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule


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
        assert told["seconds"] >= 0.1
        assert len(_named(log, "recovery.completed")) == 1
