"""All sessions died and nobody knew: a token that was reset while nothing was inside.

The number of the login's own session is anybody's then, and so are those of objects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from faultmodule import CKR
from pkcs11_pool import KeyNotFound, LoginState, OutcomeUnknown, TokenPool
from poolkit import blocking, digest, eventually, hangs, make_ec_key, settled

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef
    from pkcs11_pool.softhsm import ThrowawayToken

_DIGEST = b"d" * 32


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


async def test_what_was_found_before_a_reset_is_found_again_without_a_login(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No login was lost that would tell: the actor's own session does."""
    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        await pool.logout()
        (public,) = await pool.find({Attribute.CLASS: ObjectClass.PUBLIC_KEY})
        assert await public.attributes([Attribute.LABEL])
        await _reset(pool, fault)
        assert await public.attributes([Attribute.LABEL])
        assert pool.login_state is LoginState.PUBLIC
        assert pool.stats().recoveries_total == 1
        assert fault.count("C_Login") == 0


@pytest.mark.parametrize("way", ["ignored", "per_session"])
async def test_so_it_is_where_a_session_tells_nothing_of_the_others(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, way: Any
) -> None:
    """Its login is always there, or its own."""
    fault.play_login(way, token.user_pin.encode())
    options: dict[str, Any] = {"login_per_session": True}
    if way == "ignored":
        options = {"login_ignored": True, "pin": None}
    async with make_pool(module=fault.path, **options) as pool:
        key = await pool.generate_key(KeyType.AES, 128, label="k", store=True)
        await key.attributes([Attribute.LABEL])
        await _reset(pool, fault)
        assert await key.attributes([Attribute.LABEL])
        assert pool.stats().recoveries_total == 1


async def test_who_began_before_a_reset_was_known_is_served_as_well(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its number is of that time, and all is well again when it finds that out."""
    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        await pool.logout()
        (public,) = await pool.find({Attribute.CLASS: ObjectClass.PUBLIC_KEY})
        await _reset(pool, fault)
        with pool._engine.cache.changing():  # noqa: SLF001
            pass  # a number that was sure is looked at anew
        rule = fault.on("C_GetAttributeValue", hang="before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(public.attributes, [Attribute.LABEL])
            await hangs(fault, "C_GetAttributeValue")
            fault.remove(rule)
            await public.attributes([Attribute.LABEL])
            assert pool.stats().recoveries_total == 1
            fault.release()
        assert pool.stats().operations_failed == 0
        assert pool.stats().recoveries_total == 1


@pytest.mark.parametrize("answer", [None, CKR.DEVICE_MEMORY, CKR.GENERAL_ERROR])
async def test_a_key_that_is_not_there_costs_one_look_and_no_alarm(
    make_pool: MakePool, fault: FaultModule, answer: int | None
) -> None:
    """Nobody is held up by those who look for what is not on the token."""
    async with make_pool(module=fault.path, pin=None) as pool:
        fault.reset_counts()
        if answer is not None:
            fault.on("C_GetSessionInfo", answer=answer)
        key = pool.key(label="nobody", object_class=ObjectClass.PUBLIC_KEY)
        with pytest.raises(KeyNotFound):
            await key.verify(_DIGEST, bytes(64), mechanism=Mechanism.ECDSA)
        assert fault.count("C_GetSessionInfo") == 1
        assert pool.stats().recoveries_total == 0


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
