"""Under load: sessions stay within their limit, and the event loop goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from pkcs11 import Mechanism

from poolkit import eventually, make_ec_key, settled

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule

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
