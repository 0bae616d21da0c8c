"""Session objects: usable from everywhere, and not longer than their session."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from faultmodule import CKR
from pkcs11_pool import (
    LoginState,
    OutcomeUnknown,
    SessionObjectDestroyed,
    SessionObjectNeedsSession,
)
from poolkit import (
    LAST_RESORT,
    blocking,
    eventually,
    hangs,
    make_ec_key,
    settled,
)

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, PooledSession, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_BLOCK = b"b" * 16
_ECB = Mechanism.AES_ECB


async def _secret(session: PooledSession, *, private: bool = True) -> KeyRef:
    return await session.generate_key(
        KeyType.AES, 128, template={Attribute.PRIVATE: private}
    )


async def test_a_session_object_is_used_from_other_sessions(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """While its owner is open, in fresh sessions, two at once, on plain threads too."""
    async with make_pool(module=fault.path) as pool, pool.session() as owner:
        key = await _secret(owner)
        expected = await key.on(owner).encrypt(_BLOCK, mechanism=_ECB)
        fault.clear_log()
        fault.on("C_Encrypt", times=2, hang="before")
        results: list[bytes] = []

        async def use() -> None:
            results.append(await key.encrypt(_BLOCK, mechanism=_ECB))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(use)
            tasks.start_soon(use)
            await hangs(fault, "C_Encrypt", 2)
            fault.release()
        threads = {call.thread for call in fault.calls("C_Encrypt")}
        sessions = {call.session for call in fault.calls("C_Encrypt")}
        assert len(threads) == len(sessions) == 2
        assert owner.handle not in sessions
        results.append(await blocking(lambda: key.sync.encrypt(_BLOCK, mechanism=_ECB)))
        assert results == [expected] * 3
        assert threading.get_ident() not in threads


async def test_after_its_owner_a_session_object_is_refused_here(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Nothing at all is sent for an object that is destroyed."""
    async with make_pool(module=fault.path) as pool:
        async with pool.session() as owner:
            key = await _secret(owner)
            assert await key.encrypt(_BLOCK, mechanism=_ECB)
        await eventually(lambda: pool.stats().sessions_open == 0)
        fault.reset_counts()
        for _ in range(2):
            with pytest.raises(SessionObjectDestroyed):
                await key.encrypt(_BLOCK, mechanism=_ECB)
            with pytest.raises(SessionObjectDestroyed):
                await key.attributes()
            with pytest.raises(SessionObjectDestroyed):
                await key.destroy()
        assert fault.counts() == {}


@pytest.mark.usefixtures("never_idle")
async def test_a_destroyed_session_object_is_refused_here(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """After ``destroy`` its number is never used again."""
    async with make_pool(module=fault.path) as pool, pool.session() as owner:
        key = await _secret(owner)
        await key.destroy()
        await settled(pool)
        fault.reset_counts()
        with pytest.raises(SessionObjectDestroyed):
            await key.on(owner).encrypt(_BLOCK, mechanism=_ECB)
        assert fault.counts() == {}


@pytest.mark.parametrize("private", [True, False])
async def test_a_private_session_object_ends_with_its_login(
    make_pool: MakePool, fault: FaultModule, *, private: bool
) -> None:
    """After a logout it is refused here, also when the user is back."""
    async with make_pool(module=fault.path) as pool, pool.session() as owner:
        key = await _secret(owner, private=private)
        await pool.logout()
        if not private:
            assert await key.encrypt(_BLOCK, mechanism=_ECB)
            return
        fault.reset_counts()
        with pytest.raises(SessionObjectDestroyed):
            await key.on(owner).encrypt(_BLOCK, mechanism=_ECB)
        assert fault.counts() == {}
        await pool.login()
        with pytest.raises(SessionObjectDestroyed):
            await key.encrypt(_BLOCK, mechanism=_ECB)
        assert fault.count("C_EncryptInit") == 0


async def test_closing_the_owner_lets_calls_inside_finish(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A call with the object that is inside ends well; one in line is refused."""
    async with make_pool(module=fault.path, max_sessions=2) as pool:
        fault.on("C_Encrypt", hang="before")
        results: list[object] = []

        async def use(key: KeyRef) -> None:
            try:
                results.append(len(await key.encrypt(_BLOCK, mechanism=_ECB)))
            except SessionObjectDestroyed:
                results.append("refused")

        async with anyio.create_task_group() as tasks:
            ended, leaves = anyio.Event(), anyio.Event()

            async def block() -> None:
                async with pool.session() as owner:
                    key = await _secret(owner)
                    tasks.start_soon(use, key)
                    await hangs(fault, "C_Encrypt")
                    tasks.start_soon(use, key)
                    await anyio.wait_all_tasks_blocked()
                    assert pool.stats().operations_waiting == 1
                    leaves.set()
                ended.set()

            tasks.start_soon(block)
            await leaves.wait()
            await anyio.wait_all_tasks_blocked()
            assert not ended.is_set()
            fault.release()
        assert sorted(map(str, results)) == ["16", "refused"]
        assert fault.count("C_EncryptInit") == 1


async def test_a_private_session_object_that_is_made_while_the_user_comes_in_lives(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The token has him in, and the pool does not know it yet."""
    async with (
        make_pool(module=fault.path, pin=None) as pool,
        pool.session() as owner,
        anyio.create_task_group() as tasks,
    ):
        fault.on("C_Login", hang="after")
        tasks.start_soon(pool.login, token.user_pin)
        await hangs(fault, "C_Login")
        key = await _secret(owner)
        fault.release()
        await eventually(lambda: pool.login_state is LoginState.USER)
        sealed = await key.encrypt(_BLOCK, mechanism=_ECB)
        assert await key.decrypt(sealed, mechanism=_ECB) == _BLOCK
        await pool.logout()
        with pytest.raises(SessionObjectDestroyed):
            await key.encrypt(_BLOCK, mechanism=_ECB)


async def test_a_session_object_that_may_be_destroyed_is_told_to_be_when_it_is(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its end was not heard of; whoever asks again finds that there was one."""
    async with make_pool(module=fault.path) as pool, pool.session() as owner:
        keys = [await _secret(owner) for _ in range(3)]
        fault.on("C_DestroyObject", times=3, replace=CKR.CRYPTOKI_NOT_INITIALIZED)
        for key in keys:
            with pytest.raises(OutcomeUnknown):
                await key.destroy()
        first, second, third = keys
        uses = [
            first.encrypt(_BLOCK, mechanism=_ECB),
            second.destroy(),
            third.set_attributes({Attribute.LABEL: "gone"}),
        ]
        for use in uses:
            with pytest.raises(SessionObjectDestroyed):
                await use
        fault.clear_log()
        for key in keys:
            with pytest.raises(SessionObjectDestroyed):
                await key.attributes()
        assert not fault.calls()


async def test_a_session_object_that_is_destroyed_just_before_its_use(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its number is dead when the call comes: that is told as what it is."""
    async with make_pool(module=fault.path) as pool, pool.session() as owner:
        key = await _secret(owner)
        fault.on("C_EncryptInit", hang="before")
        caught: list[type[Exception]] = []

        async def use() -> None:
            with pytest.raises(SessionObjectDestroyed) as error:
                await key.encrypt(_BLOCK, mechanism=_ECB)
            caught.append(error.type)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(use)
            await hangs(fault, "C_EncryptInit")
            await key.on(owner).destroy()
            fault.release()
        assert caught == [SessionObjectDestroyed]


async def test_what_would_end_with_its_call_is_refused_here(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A session object in a one-shot session is not even made."""
    async with make_pool(module=fault.path) as pool:
        wrapping = await pool.generate_key(KeyType.AES, 128, label="w", store=True)
        await settled(pool)
        fault.reset_counts()
        with pytest.raises(SessionObjectNeedsSession, match=r"pool\.session\(\)"):
            await pool.generate_key(KeyType.AES, 128)
        with pytest.raises(SessionObjectNeedsSession):
            await pool.generate_keypair(KeyType.EC, curve="secp256r1")
        with pytest.raises(SessionObjectNeedsSession):
            await pool.create_object({Attribute.CLASS: ObjectClass.DATA})
        with pytest.raises(SessionObjectNeedsSession):
            await wrapping.unwrap_key(ObjectClass.SECRET_KEY, KeyType.AES, b"w" * 24)
        with pytest.raises(SessionObjectNeedsSession):
            await wrapping.derive_key(KeyType.AES, 128)
        # The template has the last word.
        with pytest.raises(SessionObjectNeedsSession):
            await pool.generate_key(
                KeyType.AES, 128, store=True, template={Attribute.TOKEN: False}
            )
        assert fault.counts() == {}


async def test_a_key_is_unwrapped_into_a_session(pool: TokenPool) -> None:
    """``key.on(session).unwrap_key`` makes an object that ends with the session."""
    wrapping = await pool.generate_key(KeyType.AES, 128, label="w", store=True)
    async with pool.session() as session:
        secret = await session.generate_key(
            KeyType.AES,
            128,
            template={Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False},
        )
        expected = await secret.encrypt(_BLOCK, mechanism=_ECB)
        wrapped = await wrapping.wrap_key(secret, mechanism=Mechanism.AES_KEY_WRAP)
        again = await wrapping.on(session).unwrap_key(
            ObjectClass.SECRET_KEY,
            KeyType.AES,
            wrapped,
            mechanism=Mechanism.AES_KEY_WRAP,
        )
        assert await again.encrypt(_BLOCK, mechanism=_ECB) == expected
    with pytest.raises(SessionObjectDestroyed):
        await again.encrypt(_BLOCK, mechanism=_ECB)


async def test_the_only_session_may_be_the_owners(make_pool: MakePool) -> None:
    """Where no other session is to be had, the object is used in its own."""
    async with make_pool(max_sessions=1) as pool, pool.session() as owner:
        key = await _secret(owner)
        assert await key.encrypt(_BLOCK, mechanism=_ECB, timeout=LAST_RESORT)


async def test_a_search_knows_whose_an_object_is(pool: TokenPool) -> None:
    """Found from anywhere, an object that the pool made ends with its owner."""
    await make_ec_key(pool, "token")
    template = {Attribute.CLASS: ObjectClass.SECRET_KEY}
    async with pool.session() as owner:
        await _secret(owner)
        (found,) = await pool.find(template)
        assert await found.encrypt(_BLOCK, mechanism=_ECB)  # type: ignore[union-attr]
    assert await pool.find(template) == []
    with pytest.raises(SessionObjectDestroyed):
        await found.encrypt(_BLOCK, mechanism=_ECB)  # type: ignore[union-attr]
