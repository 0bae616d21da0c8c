"""All sessions died and nobody knew: a token that was reset while nothing was inside.

The number of the login's own session is anybody's then, and so are those of objects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from faultmodule import CKR
from pkcs11_pool import LoginState, OutcomeUnknown, TokenPool
from poolkit import blocking, digest, eventually, hangs, make_ec_key, settled

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef
    from pkcs11_pool.softhsm import ThrowawayToken

_DIGEST = b"d" * 32
_PUBLIC = {
    Attribute.CLASS: ObjectClass.DATA,
    Attribute.LABEL: "data",
    Attribute.TOKEN: True,
    Attribute.PRIVATE: False,
    Attribute.VALUE: b"of all",
}


async def _sign(key: KeyRef) -> bytes:
    return await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)


async def _reset(pool: TokenPool, fault: FaultModule) -> None:
    """Every session is gone, and no one is open ahead that would tell of it."""
    await settled(pool)
    await blocking(pool._engine.close_ahead)  # noqa: SLF001
    fault.lose_sessions(pool.token.slot_id)
    fault.reset_counts()


async def test_a_login_that_is_lost_with_all_sessions_costs_one_login(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No PIN is sent to the dead session, whose number may be a stranger's by then."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await _sign(key)
        await _reset(pool, fault)
        assert await _sign(key)
        assert fault.count("C_Login") == 1
        assert pool.stats().logins_failed_total == 0
        assert pool.stats().recoveries_total == 1


async def test_a_pin_that_is_asked_for_meanwhile_goes_to_no_dead_session(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The login is lost; its source takes a while, and then the sessions are gone."""
    asked: list[bool] = []

    async def source() -> str:
        if len(asked) == 1:
            fault.lose_sessions(pool.token.slot_id)
        asked.append(True)
        return token.user_pin

    async with make_pool(module=fault.path, pin=source) as pool:
        key = await make_ec_key(pool)
        fault.lose_login()
        fault.reset_counts()
        assert await _sign(key)
        assert fault.count("C_Login") == 1


async def test_a_login_asked_for_after_a_reset_finds_its_way(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Nothing was sent to the dead session, so it may be made on a new one."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await pool.logout()
        await _reset(pool, fault)
        await pool.login(token.user_pin)
        assert await _sign(key)
        assert fault.count("C_Login") == 1


@pytest.mark.parametrize("moment", [1, 2], ids=["before", "between"])
async def test_an_officer_whose_session_takes_the_place_of_a_dead_one_begins_anew(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, moment: int
) -> None:
    """His own is well, and nothing else would tell that all the numbers are dead.

    Its number may be the dead one's: that is not closed then.
    """
    if moment == 1:
        fault.reuse_numbers()
    async with make_pool(module=fault.path, pin=None) as pool:
        data = await pool.create_object(_PUBLIC)
        await data.attributes()
        await settled(pool)
        await blocking(pool._engine.close_ahead)  # noqa: SLF001
        fault.reset_counts()
        # What looks whether it is well is the first call.
        fault.strike("sessions", after=moment)
        async with pool.security_officer(token.so_pin):
            pass
        assert fault.count("C_Login") == 1
        assert await data.attributes()
        assert pool.stats().recoveries_total == 1


async def test_a_login_that_was_lost_under_a_change_is_restored_at_once(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its caller is told of the doubt, and the next operation finds the login."""
    async with make_pool(module=fault.path) as pool:
        hold = fault.on("C_GenerateKey", hang="after")

        async def told() -> None:
            with pytest.raises(OutcomeUnknown):
                await pool.generate_key(KeyType.AES, 128, label="new", store=True)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(told)
            await hangs(fault, "C_GenerateKey")
            fault.remove(hold)
            fault.lose_login()
            fault.reset_counts()
            fault.release()
        await eventually(lambda: fault.count("C_Login"))
        await eventually(lambda: pool.login_state is LoginState.USER)
        assert fault.count("C_GenerateKey") == 0
        assert len(await pool.find({Attribute.LABEL: "new"})) == 1
        assert fault.count("C_Login") == 1


async def test_a_close_on_its_way_hits_no_stranger_where_one_call_is_made_at_a_time(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """What opens the next session with its number waits until it has come back."""
    fault.reuse_numbers()
    async with make_pool(module=fault.path, serialize=True) as pool:
        await _reset(pool, fault)
        await digest(pool)
        await settled(pool)
        await blocking(pool._engine.close_ahead)  # noqa: SLF001
        hold = fault.on("C_CloseSession", hang="before")
        await digest(pool)
        await hangs(fault, "C_CloseSession")
        (late,) = [c for c in fault.calls("C_CloseSession") if c.rv is None]
        fault.lose_sessions(pool.token.slot_id)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(digest, pool)
            await eventually(lambda: pool.stats().operations_waiting)
            opened = fault.count("C_OpenSession")
            fault.remove(hold)
            await anyio.wait_all_tasks_blocked()
            assert fault.count("C_OpenSession") == opened
            fault.release()
        (found,) = [c for c in fault.calls() if c.sequence == late.sequence]
        assert found.rv == CKR.SESSION_HANDLE_INVALID
