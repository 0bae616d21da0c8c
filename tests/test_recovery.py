"""A token that goes away and comes back: who waits, what is made again, what is not."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import anyio
import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from faultmodule import CKR
from pkcs11_pool import (
    LoginRequired,
    LoginState,
    OutcomeUnknown,
    PoolClosed,
    PoolState,
    PoolTimeout,
    SessionClosed,
    SessionObjectDestroyed,
    StreamInterrupted,
    TokenUnavailable,
)
from pkcs11_pool.cryptoki import recovery
from pkcs11_pool.cryptoki.interface import pack_ulong
from pkcs11_pool.cryptoki.keys import Entry, KeySpec
from pkcs11_pool.cryptoki.using import with_object
from pkcs11_pool.login import recovering
from pkcs11_pool.state import Epoch, Generation
from poolkit import (
    LAST_RESORT,
    SLACK,
    Hold,
    blocking,
    digest,
    eventually,
    given_up,
    hangs,
    make_ec_key,
    settled,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, TokenPool

_DIGEST = b"d" * 32
_GONE = [
    CKR.DEVICE_ERROR,
    CKR.DEVICE_REMOVED,
    CKR.TOKEN_NOT_PRESENT,
    CKR.SESSION_HANDLE_INVALID,
    CKR.CRYPTOKI_NOT_INITIALIZED,
    CKR.GENERAL_ERROR,
    0x80000123,
]


async def _sign(key: KeyRef, **options: Any) -> bytes:
    return await key.sign(_DIGEST, mechanism=Mechanism.ECDSA, **options)


async def _verified(key: KeyRef, signature: bytes) -> bool:
    return await key.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)


def _who(pool: TokenPool) -> LoginState:
    return pool.login_state


async def _down(pool: TokenPool) -> None:
    """Wait until the token is known to be lost; the user was logged in."""
    await eventually(lambda: _who(pool) is LoginState.PUBLIC)
    assert pool.state is PoolState.RECOVERING


async def _back(pool: TokenPool) -> None:
    await eventually(lambda: pool.state is PoolState.READY)


class _Outage:
    """The token away for the length of a block, noticed by the pool at its begin."""

    def __init__(self, pool: TokenPool, fault: FaultModule, **how: Any) -> None:
        self._pool, self._fault, self._how = pool, fault, how
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        epoch = self._pool.login_epoch
        self._fault.go_down(**self._how)
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._notice)
        await eventually(lambda: self._pool.login_epoch > epoch)
        return self

    async def _notice(self) -> None:
        with anyio.CancelScope() as self._scope, suppress(TokenUnavailable):
            await self._pool.generate_random(8, timeout=None)

    async def __aexit__(self, *error: object) -> None:
        self._fault.come_back()
        self._scope.cancel()
        end: Any = self._tasks.__aexit__
        await end(*error)
        await _back(self._pool)


# -- Gone and back ----------------------------------------------------------------


@pytest.mark.parametrize("rv", _GONE, ids=hex)
async def test_a_token_that_is_away_is_waited_for(
    make_pool: MakePool, fault: FaultModule, rv: int
) -> None:
    """Operations that find it gone are made again when it is back; none fails."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await _sign(key)
        fault.go_down(rv)
        done = []

        async def sign() -> None:
            done.append(await _sign(key))

        async with anyio.create_task_group() as tasks:
            for _ in range(16):
                tasks.start_soon(sign)
            await _down(pool)
            assert not done
            fault.come_back()
        assert len(done) == 16
        stats = pool.stats()
        assert (stats.operations_failed, stats.recoveries_total) == (0, 1)
        assert pool.state is PoolState.READY
        assert _who(pool) is LoginState.USER


async def test_an_error_of_a_token_that_was_away_is_not_the_callers(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Looked at when the token is back, it tells nothing: it is made again."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        fault.on("C_Sign", hang="before", answer=CKR.GENERAL_ERROR)
        async with anyio.create_task_group() as tasks:
            signed: list[bytes] = []

            async def sign() -> None:
                signed.append(await _sign(key))

            tasks.start_soon(sign)
            await hangs(fault, "C_Sign")
            async with _Outage(pool, fault):
                pass
            fault.release()
        assert len(signed) == 1


async def test_a_module_that_stays_broken_is_initialised_anew(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """As a client whose server went away: its generation is a new one."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        fault.reset_counts()
        fault.go_down(stays=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_sign, key)
            await _down(pool)
            fault.come_back()
        assert fault.count("C_Finalize") == fault.count("C_Initialize") >= 1
        assert await _sign(key)


async def test_a_token_that_answers_again_is_not_initialised_anew(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its sessions are gone, and new ones are enough."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        fault.reset_counts()
        fault.lose_sessions(pool.token.slot_id)
        assert await _sign(key)
        assert fault.count("C_Initialize") == 0
        assert pool.stats().recoveries_total == 1


async def _all_ahead_closed(pool: TokenPool, least: int) -> set[int]:
    """Close every session ahead behind the pool's back, and no other; their numbers."""
    # A worker may be opening one yet.
    await settled(pool)
    while pool.stats().sessions_ahead < least:
        with Hold() as hold:
            async with anyio.create_task_group() as tasks:
                for _ in range(2 * least):
                    tasks.start_soon(pool.run, hold)
                await hold.entered(2 * least)
                hold.let_go()
        await settled(pool)
    ahead = list(pool._engine._room.ahead)  # noqa: SLF001
    for session in ahead:
        assert session.functions.C_CloseSession(session.handle) == CKR.OK
    return {session.handle for session in ahead}


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("operation", ["digest", "sign"])
@pytest.mark.usefixtures("never_idle")
async def test_sessions_that_died_ahead_are_replaced_unseen(
    make_pool: MakePool, fault: FaultModule, operation: str, least: int
) -> None:
    """Nobody hears of it, no other is lost, and no dead number is tried twice."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        key = await make_ec_key(pool)
        # From here on it is known: what comes is one call of one function.
        assert await _verified(key, await _sign(key))
        dead = await _all_ahead_closed(pool, least)
        assert len(dead) >= least
        alive = {one.number for one in fault.sessions()}
        fault.clear_log()
        if operation == "sign":
            assert await _verified(key, await _sign(key))
        else:
            assert await digest(pool) == hashlib.sha256(b"data").digest()
        await settled(pool)
        tried = [
            call.session
            for call in fault.calls()
            if call.session in dead and call.function != "C_CloseSession"
        ]
        assert tried, "no dead session was met: this shows nothing"
        assert len(tried) == len(set(tried))
        # None is left for the next one, and none was closed that was well.
        ahead = {one.handle for one in pool._engine._room.ahead}  # noqa: SLF001
        assert ahead.isdisjoint(dead)
        assert alive <= {one.number for one in fault.sessions()}
        assert not session.closed
        assert await digest(session)
        stats = pool.stats()
        assert (stats.operations_failed, stats.recoveries_total) == (0, 0)
        assert pool.state is PoolState.READY


async def test_a_false_alarm_costs_nobody_anything(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """One error of a token that is well: the operation is made again, that is all."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        epoch = pool.login_epoch
        fault.on("C_Digest", answer=CKR.DEVICE_ERROR)
        assert await digest(pool)
        assert not session.closed
        assert pool.login_epoch == epoch
        assert pool.stats().recoveries_total == 0


async def test_an_operation_that_breaks_the_token_is_not_repeated_for_ever(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """After three tries its caller gets what the token answered."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", every=True, answer=CKR.DEVICE_ERROR)
        with pytest.raises(pkcs11.DeviceError):
            await digest(pool)
        assert fault.count("C_Digest") == 3
        assert await pool.generate_random(8)


async def test_a_vague_error_of_a_token_that_is_well_is_the_callers(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The session is asked once, and answers; nothing is made again."""
    async with make_pool(module=fault.path) as pool:
        fault.reset_counts()
        fault.on("C_Digest", answer=CKR.GENERAL_ERROR)
        with pytest.raises(pkcs11.GeneralError):
            await digest(pool)
        assert fault.count("C_Digest") == 1
        assert fault.count("C_GetSessionInfo") == 1


async def test_the_token_is_in_another_slot(
    make_pool: MakePool, fault: FaultModule, token_directory: Any
) -> None:
    """It is known by its label and serial, and found wherever it is."""
    other = token_directory.add_token("other")
    async with make_pool(token_label=other.label, pin=other.user_pin) as pool:
        await make_ec_key(pool)
        there = pool.token
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        mine = pool.token
        # The two change places: what the pool opened says it is the other one.
        fault.token_info(mine.slot_id, label="other", serial=there.serial.decode())
        fault.token_info(there.slot_id, label="demo", serial=mine.serial.decode())
        fault.reset_counts()
        fault.lose_sessions(mine.slot_id)
        assert await _sign(key)
        assert pool.token.slot_id == there.slot_id
        assert _who(pool) is LoginState.USER
        assert [c.rv for c in fault.calls("C_Login")][-1:] == [CKR.OK]


async def test_another_token_in_its_place_is_named_and_gets_no_pin(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The message says what stands there; its own comes back, and all goes on."""
    async with make_pool(module=fault.path, recovery_timeout=0.2) as pool:
        key = await make_ec_key(pool)
        fault.reset_counts()
        fault.token_info(pool.token.slot_id, label="stranger")
        fault.lose_sessions(pool.token.slot_id)
        refused = await _told_of_a_stranger(lambda: _sign(key))
        assert isinstance(refused.__cause__, TokenUnavailable)
        assert fault.count("C_Login") == 0
        fault.token_info(pool.token.slot_id)
        await _back(pool)
        assert await _sign(key)


async def _told_of_a_stranger(call: Callable[[], Any]) -> TokenUnavailable:
    """Make a call until its refusal says what stands there.

    On a machine that stands still the time may be over before the pool has looked.
    """
    with anyio.fail_after(LAST_RESORT):
        while True:
            with pytest.raises(TokenUnavailable) as caught:
                await call()
            if "stranger" in str(caught.value):
                return caught.value


@pytest.mark.parametrize("use", ["verify", "digest", "session", "destroy"])
async def test_a_token_swapped_during_a_rest_is_sent_nothing(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    """Not even what needs no login: a key of the same number would be a stranger's."""
    uses: dict[str, Callable[[Any, Any], Any]] = {
        "verify": lambda _, key: key.verify(_DIGEST, bytes(64)),
        "digest": lambda pool, _: digest(pool),
        "session": lambda pool, _: _enters(pool.session()),
        "destroy": lambda _, key: key.destroy(),
    }
    async with make_pool(module=fault.path, recovery_timeout=0.2) as pool:
        public, _ = await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", store=True
        )
        await public.verify(_DIGEST, bytes(64), mechanism=Mechanism.ECDSA)
        await _rested(pool, monkeypatch)
        fault.token_info(pool.token.slot_id, label="stranger")
        fault.reset_counts()
        await _told_of_a_stranger(lambda: uses[use](pool, public))
        sent = {name for name, count in fault.counts().items() if count}
        assert sent <= _LOOKED
        fault.token_info(pool.token.slot_id)
        await _back(pool)
        assert not await public.verify(_DIGEST, bytes(64), mechanism=Mechanism.ECDSA)


_LOOKED = {
    "C_OpenSession",
    "C_CloseSession",
    "C_GetSessionInfo",
    "C_GetTokenInfo",
    "C_GetSlotInfo",
    "C_GetSlotList",
    "C_Finalize",
    "C_Initialize",
    "C_GetInfo",
}


async def _enters(block: Any) -> None:
    async with block:
        pass


async def _rested(pool: TokenPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a long rest: all sessions but the login's are closed."""
    await eventually(lambda: pool.stats().sessions_open == 0)
    monkeypatch.setattr("pkcs11_pool.engine.work.REST", 0.0)


async def test_after_a_rest_the_token_is_asked_once(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not again while there is work."""
    async with make_pool(module=fault.path) as pool:
        await _rested(pool, monkeypatch)
        fault.reset_counts()
        await digest(pool)
        assert fault.count("C_GetTokenInfo") == 1
        monkeypatch.undo()
        for _ in range(20):
            await digest(pool)
        assert fault.count("C_GetTokenInfo") == 1


# -- Who waits, and how long ------------------------------------------------------


async def test_callers_wait_no_longer_than_recovery_timeout(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Then TokenUnavailable, at once for newcomers too, until it is back."""
    async with make_pool(module=fault.path, recovery_timeout=0.3) as pool:
        key = await make_ec_key(pool)
        async with _Outage(pool, fault):
            with anyio.fail_after(0.9 + SLACK):
                with pytest.raises(TokenUnavailable, match="DEVICE_ERROR") as caught:
                    await _sign(key, timeout=None)
                assert isinstance(caught.value.__cause__, pkcs11.DeviceError)
                for call in (pool.login, pool.logout, lambda: _sign(key)):
                    with pytest.raises(TokenUnavailable):
                        await call()
                with pytest.raises(TokenUnavailable):
                    async with pool.session():
                        pass
            assert pool.state is PoolState.RECOVERING
            waited = pool.stats().operations_waiting
            assert waited == 0
        assert await _sign(key)


@pytest.mark.parametrize("what", ["operation", "change", "login"])
async def test_who_comes_back_when_all_others_have_been_refused_is_refused(
    make_pool: MakePool, fault: FaultModule, what: str
) -> None:
    """A call was inside all the time: it does not wait for the token on its own."""
    inside, call = _INSIDE[what]
    async with make_pool(module=fault.path) as pool:
        await pool.logout()
        fault.on(inside, hang="before", answer=CKR.DEVICE_ERROR)
        told = anyio.Event()

        async def comes_back() -> None:
            with pytest.raises(TokenUnavailable):
                await call(pool)
            told.set()

        async def is_refused() -> None:
            with pytest.raises(TokenUnavailable):
                await pool.generate_random(8)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(comes_back)
            await hangs(fault, inside)
            fault.go_down()
            tasks.start_soon(is_refused)
            await eventually(lambda: pool.state is PoolState.RECOVERING)
            pool._engine.outage_due(time.monotonic() + 1000)  # noqa: SLF001
            fault.release()
            with anyio.move_on_after(LAST_RESORT / 2):
                await told.wait()
            away = told.is_set()
            fault.come_back()
        assert away
        await _back(pool)


_INSIDE: dict[str, tuple[str, Callable[[TokenPool], Any]]] = {
    "operation": ("C_Digest", digest),
    # Nothing was sent for it yet.
    "change": (
        "C_OpenSession",
        lambda pool: pool.create_object(
            {Attribute.CLASS: ObjectClass.DATA, Attribute.TOKEN: True}
        ),
    ),
    "login": ("C_GetTokenInfo", lambda pool: pool.login()),
}


async def test_a_deadline_holds_in_an_outage(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It is PoolTimeout, nothing was sent, and the text says what was waited for."""
    async with make_pool(module=fault.path) as pool, _Outage(pool, fault):
        with pytest.raises(PoolTimeout, match="token was down") as caught:
            await digest(pool, timeout=0.1)
        assert caught.value.phase == "waiting"
        with pytest.raises(PoolTimeout):
            await digest(pool, timeout=0)


async def test_a_login_asked_for_in_an_outage_waits_for_the_token(
    make_pool: MakePool, fault: FaultModule, token: Any
) -> None:
    """As operations do; and a logout too."""
    async with make_pool(module=fault.path, pin=None) as pool:
        async with anyio.create_task_group() as tasks, _Outage(pool, fault):
            tasks.start_soon(pool.login, token.user_pin)
            await anyio.wait_all_tasks_blocked()
        assert _who(pool) is LoginState.USER
        async with anyio.create_task_group() as tasks, _Outage(pool, fault):
            tasks.start_soon(pool.logout)
            await anyio.wait_all_tasks_blocked()
        assert _who(pool) is LoginState.PUBLIC


async def _awaited(pin: str) -> str:
    await anyio.lowlevel.checkpoint()
    return pin


@pytest.mark.parametrize("source", ["given", "its own", "called", "awaited"])
async def test_a_login_that_first_meets_an_outage_waits_for_the_token(
    make_pool: MakePool, fault: FaultModule, token: Any, source: str
) -> None:
    """Nobody knew that the token was away: it is no error of whoever logs in."""
    pins: dict[str, Any] = {
        "called": lambda: token.user_pin,
        "awaited": partial(_awaited, token.user_pin),
    }
    async with make_pool(module=fault.path, pin=pins.get(source, "1234")) as pool:
        await pool.logout()
        fault.go_down()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.login, "1234" if source == "given" else None)
            await eventually(lambda: pool.state is PoolState.RECOVERING)
            fault.come_back()
        assert _who(pool) is LoginState.USER


async def test_a_login_waits_no_longer_than_recovery_timeout(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """As operations do: then TokenUnavailable, and the next one at once."""
    async with make_pool(module=fault.path, recovery_timeout=0.2) as pool:
        await pool.logout()
        fault.go_down()
        for _ in range(2):
            with anyio.fail_after(LAST_RESORT), pytest.raises(TokenUnavailable):
                await pool.login()
        fault.come_back()
        await _back(pool)
        await pool.login()


async def test_a_login_whose_answer_is_lost_is_not_made_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The PIN may be a wrong one: one try for each time that somebody says so."""
    async with make_pool(module=fault.path) as pool:
        await pool.logout()
        fault.reset_counts()
        fault.on("C_Login", answer=CKR.DEVICE_ERROR)
        with pytest.raises(pkcs11.DeviceError):
            await pool.login()
        assert fault.count("C_Login") == 1
        await pool.login()


async def test_a_login_is_put_off_three_times_at_most(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A token that is well each time it is looked at keeps nobody for ever."""
    async with make_pool(module=fault.path) as pool:
        await pool.logout()
        for nth in (1, 3, 5, 7):
            fault.on("C_GetTokenInfo", nth=nth, answer=CKR.DEVICE_ERROR)
        fault.reset_counts()
        with pytest.raises(pkcs11.DeviceError):
            await pool.login()
        assert fault.count("C_Login") == 0


async def test_who_was_logged_out_stays_out(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The token is restored, and the user's word with it: no PIN is sent."""
    async with make_pool(module=fault.path) as pool:
        await pool.logout()
        fault.reset_counts()
        async with _Outage(pool, fault, stays=True):
            pass
        assert _who(pool) is LoginState.PUBLIC
        assert fault.count("C_Login") == 0


async def test_a_pin_refused_on_the_way_back_is_not_tried_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The token is back, logged out; those who need the login hear of the PIN."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        fault.reset_counts()
        fault.on("C_Login", answer=CKR.PIN_INCORRECT)
        async with _Outage(pool, fault, stays=True):
            pass
        assert _who(pool) is LoginState.PUBLIC
        with pytest.raises(pkcs11.PinIncorrect):
            await _sign(key)
        assert fault.count("C_Login") == 1
        await pool.login(force=True)
        assert await _sign(key)


async def test_an_async_pin_source_is_awaited_after_an_outage(
    make_pool: MakePool, fault: FaultModule, token: Any
) -> None:
    """By the first operation that needs the login."""

    async def source() -> str:
        await anyio.lowlevel.checkpoint()
        pin: str = token.user_pin
        return pin

    async with make_pool(module=fault.path, pin=source) as pool:
        key = await make_ec_key(pool)
        async with _Outage(pool, fault, stays=True):
            pass
        assert await _sign(key)
        assert _who(pool) is LoginState.USER


async def test_closing_in_an_outage_ends_at_once(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Those who wait are told PoolClosed, and the pool's threads end."""
    pool = make_pool(module=fault.path)
    await pool.open()
    async with anyio.create_task_group() as tasks:
        fault.go_down(stays=True)

        async def waits() -> None:
            with pytest.raises(PoolClosed):
                await digest(pool)

        tasks.start_soon(waits)
        await _down(pool)
        with anyio.fail_after(LAST_RESORT):
            await pool.close()
    assert pool.state is PoolState.CLOSED


# -- What is made again, and what is not ------------------------------------------


@pytest.mark.parametrize("how", ["answer", "replace"])
async def test_a_call_that_changes_the_token_is_not_repeated(
    make_pool: MakePool, fault: FaultModule, how: str
) -> None:
    """Done or not, nobody knows: OutcomeUnknown says where to look."""
    async with make_pool(module=fault.path) as pool:
        fault.reset_counts()
        outcome: dict[str, Any] = {how: CKR.DEVICE_REMOVED}
        fault.on("C_GenerateKey", **outcome)
        with pytest.raises(OutcomeUnknown, match="label='new'") as caught:
            await pool.generate_key(KeyType.AES, 128, label="new", store=True)
        assert isinstance(caught.value.__cause__, pkcs11.DeviceRemoved)
        assert fault.count("C_GenerateKey") == 1
        found = await pool.find({Attribute.LABEL: "new"})
        assert len(found) == (how == "replace")


async def test_destroying_is_not_repeated(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The second time it might be somebody else's object."""
    async with make_pool(module=fault.path) as pool:
        key = await pool.generate_key(KeyType.AES, 128, label="old", store=True)
        fault.on("C_DestroyObject", replace=CKR.DEVICE_ERROR)
        with pytest.raises(OutcomeUnknown):
            await key.destroy()
        assert fault.count("C_DestroyObject") == 1


_NAMED: dict[str, Any] = {"label": "new", "id": b"\x07", "store": True}
_FIND = "await pool.find({Attribute.LABEL: 'new', Attribute.ID: b'\\x07'})"
_CUT_OFF: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "generate_key": (
        "C_GenerateKey",
        lambda p, _: p.generate_key(KeyType.AES, 128, **_NAMED),
        ("generate_key(label='new', id=b'\\x07') on token 'demo' (serial ", _FIND),
    ),
    "generate_keypair": (
        "C_GenerateKeyPair",
        lambda p, _: p.generate_keypair(
            KeyType.EC,
            curve="secp256r1",
            store=True,
            label="other",
            private_template={Attribute.LABEL: "new", Attribute.ID: b"\x07"},
        ),
        ("generate_keypair(label='new', id=b'\\x07')", _FIND),
    ),
    "create_object": (
        "C_CreateObject",
        lambda p, _: p.create_object(
            {
                Attribute.CLASS: ObjectClass.DATA,
                Attribute.TOKEN: True,
                Attribute.LABEL: "new",
                Attribute.VALUE: b"tOpsEcret",
            }
        ),
        ("create_object(label='new')", "await pool.find({Attribute.LABEL: 'new'})"),
    ),
    "without a name": (
        "C_GenerateKey",
        lambda p, _: p.generate_key(KeyType.AES, 128, store=True),
        ("generate_key() on token 'demo'", "await pool.find()", "neither label nor id"),
    ),
    "copy": (
        "C_CopyObject",
        lambda _, k: k.copy({Attribute.LABEL: "new", Attribute.ID: b"\x07"}),
        ("copy(label='new', id=b'\\x07')", _FIND),
    ),
    # Whether it can be done does not matter: its answer is lost.
    "unwrap_key": (
        "C_UnwrapKey",
        lambda _, k: k.unwrap_key(
            ObjectClass.SECRET_KEY, KeyType.AES, b"tOpsEcretWrapped", **_NAMED
        ),
        ("unwrap_key(label='new', id=b'\\x07')", _FIND),
    ),
    "derive_key": (
        "C_DeriveKey",
        lambda _, k: k.derive_key(
            KeyType.AES,
            128,
            mechanism=Mechanism.AES_ECB_ENCRYPT_DATA,
            mechanism_param=b"tOpsEcretDerived",
            **_NAMED,
        ),
        ("derive_key(label='new', id=b'\\x07')", _FIND),
    ),
    "set_attributes": (
        "C_SetAttributeValue",
        lambda _, k: k.set_attributes({Attribute.LABEL: "new"}),
        ("set_attributes of label='old'", "{Attribute.LABEL: 'old'}", "its new one"),
    ),
    "destroy": (
        "C_DestroyObject",
        lambda _, k: k.destroy(),
        ("destroy of label='old'", "still there", "{Attribute.LABEL: 'old'}"),
    ),
    "run": (
        "C_DestroyObject",
        lambda p, _: p.run(_destroys_all, rw=True),
        ("run(_destroys_all) on token 'demo'", "what the function makes"),
    ),
}


def _destroys_all(session: Any) -> None:
    for item in session.get_objects():
        item.destroy()


@pytest.mark.parametrize("name", _CUT_OFF)
async def test_a_call_with_an_unknown_outcome_says_where_to_look(
    make_pool: MakePool, fault: FaultModule, name: str
) -> None:
    """Which call, on which token, and what to look for; and never a value."""
    function, call, told = _CUT_OFF[name]
    async with make_pool(module=fault.path) as pool:
        key = await pool.generate_key(
            KeyType.AES, 128, label="old", store=True, template={Attribute.DERIVE: True}
        )
        fault.reset_counts()
        fault.on(function, replace=CKR.DEVICE_REMOVED)
        with pytest.raises(OutcomeUnknown) as caught:
            await call(pool, key)
        text = str(caught.value)
        assert [part for part in told if part not in text] == []
        assert "CKR_DEVICE_REMOVED" in text
        assert "tOpsEcret" not in text
        assert fault.count(function) == 1


async def test_a_call_that_changes_the_token_and_hangs_says_where_to_look(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """At its deadline nobody knows either whether it happened."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_GenerateKey", hang="after")
        error = await given_up(
            pool,
            lambda: pool.generate_key(KeyType.AES, 128, **_NAMED),
            hangs(fault, "C_GenerateKey"),
        )
        assert "generate_key(label='new', id=b'\\x07')" in str(error)
        assert _FIND in str(error)
        fault.release()
        await eventually(lambda: not pool.stats().calls_stuck)


async def test_what_changes_the_token_and_was_not_sent_is_made(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No session could be opened for it, so it waits and is made once."""
    async with make_pool(module=fault.path) as pool:
        fault.reset_counts()
        fault.go_down()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(make_ec_key, pool)
            await _down(pool)
            fault.come_back()
        assert fault.count("C_GenerateKeyPair") == 1


@pytest.mark.parametrize(("rw", "error"), [(False, "DeviceError"), (True, "Outcome")])
async def test_a_run_is_repeated_only_when_asked(
    make_pool: MakePool, fault: FaultModule, error: str, *, rw: bool
) -> None:
    """Its function may do anything; R/W, its outcome is unknown."""

    def use(session: pkcs11.Session) -> bytes:
        return session.digest(b"data", mechanism=Mechanism.SHA256)

    async with make_pool(module=fault.path) as pool:
        fault.reset_counts()
        fault.on("C_Digest", answer=CKR.DEVICE_ERROR)
        with pytest.raises((pkcs11.DeviceError, OutcomeUnknown)) as caught:
            await pool.run(use, rw=rw)
        assert error in type(caught.value).__name__
        assert fault.count("C_DigestInit") == 1
        fault.on("C_Digest", answer=CKR.DEVICE_ERROR)
        assert await pool.run(use, rw=rw, repeat=True)
        assert fault.count("C_DigestInit") == 3


async def test_data_in_parts_begins_anew_where_it_can_be_read_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The caller of a digest of a list does not notice the outage."""
    parts = [b"p" * 70_000] * 3
    async with make_pool(module=fault.path) as pool:
        expected = await pool.digest(parts, mechanism=Mechanism.SHA256)
        fault.on("C_DigestUpdate", nth=3, hang="before", answer=CKR.DEVICE_ERROR)
        results: list[bytes] = []

        async def again() -> None:
            results.append(await pool.digest(parts, mechanism=Mechanism.SHA256))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(again)
            await hangs(fault, "C_DigestUpdate")
            fault.go_down(stays=True)
            fault.release()
            await _down(pool)
            fault.come_back()
        assert results == [expected]


async def test_data_that_comes_once_is_interrupted_with_the_cause(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """An iterator cannot be read again: its caller is told at once, and begins anew."""
    parts = [b"p" * 70_000] * 3
    async with make_pool(module=fault.path) as pool:
        expected = await pool.digest(parts, mechanism=Mechanism.SHA256)
        before = fault.count("C_DigestInit")
        fault.on("C_DigestUpdate", nth=3, hang="before", answer=CKR.DEVICE_ERROR)
        told = anyio.Event()

        async def once() -> None:
            with pytest.raises(StreamInterrupted, match="begin again") as caught:
                await pool.digest(iter(parts), mechanism=Mechanism.SHA256)
            assert isinstance(caught.value.__cause__, pkcs11.DeviceError)
            told.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(once)
            await hangs(fault, "C_DigestUpdate")
            fault.go_down(stays=True)
            fault.release()
            with anyio.fail_after(LAST_RESORT):
                await told.wait()  # the token is still away
            await _down(pool)
            fault.come_back()
        await _back(pool)
        assert fault.count("C_DigestInit") == before + 1
        assert await pool.digest(iter(parts), mechanism=Mechanism.SHA256) == expected


async def test_data_that_is_still_coming_is_interrupted_with_the_cause(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No call was inside when the token went; the next part is not sent."""
    async with make_pool(module=fault.path) as pool:
        dry, more = anyio.Event(), anyio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield b"p" * 200_000
            dry.set()
            await more.wait()
            yield b"p" * 200_000

        async def once() -> None:
            with pytest.raises(StreamInterrupted, match="token was lost") as caught:
                await pool.digest(slowly(), mechanism=Mechanism.SHA256)
            assert isinstance(caught.value.__cause__, pkcs11.DeviceError)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(once)
            await dry.wait()
            async with _Outage(pool, fault, stays=True):
                sent = fault.count("C_DigestUpdate")
                more.set()
        assert fault.count("C_DigestUpdate") == sent


# -- What was open ----------------------------------------------------------------


async def test_open_sessions_are_over_with_the_cause(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """And their session objects are destroyed; the blocks end well."""
    async with make_pool(module=fault.path) as pool:
        async with pool.session(rw=True) as session:
            secret = await session.generate_key(KeyType.AES, 128)
            async with _Outage(pool, fault, stays=True):
                assert session.closed
                with pytest.raises(SessionClosed, match="DEVICE_ERROR") as caught:
                    await digest(session)
                assert isinstance(caught.value.__cause__, pkcs11.DeviceError)
            with pytest.raises(SessionClosed):
                await digest(session)
            with pytest.raises(SessionObjectDestroyed):
                await secret.encrypt(b"b" * 16, mechanism=Mechanism.AES_ECB)
        assert pool.stats().sessions_leased == 0
        await settled(pool)
        assert len(fault.sessions()) == 1 + pool.stats().sessions_ahead


async def test_jobs_in_the_line_of_a_lost_session_are_told(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Those that wait behind the call that found it lost, too."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        fault.on("C_Digest", hang="before", answer=CKR.DEVICE_ERROR)
        errors: list[Exception] = []

        async def call() -> None:
            try:
                await digest(session)
            except SessionClosed as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(call)
            await hangs(fault, "C_Digest")
            fault.go_down()
            fault.release()
            await eventually(lambda: len(errors) == 3)
            fault.come_back()
        await _back(pool)


async def test_a_job_is_told_of_a_session_that_is_lost_behind_its_back(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session is given up before it can be made again: it waits for nobody."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        is_unsent = recovery.is_unsent

        def when_it_is_lost(error: BaseException) -> bool:
            wait_for(lambda: session.closed)
            return is_unsent(error)

        # Asked by the worker between its doubt and the way back into the line.
        monkeypatch.setattr(recovery, "is_unsent", when_it_is_lost)
        fault.go_down()
        with pytest.raises(SessionClosed):
            await digest(session, timeout=LAST_RESORT)
        fault.come_back()
        await _back(pool)


async def test_a_lost_session_whose_call_is_inside_is_closed_when_it_is_back(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Not under the call, and not never."""
    async with make_pool(module=fault.path) as pool:
        async with pool.session() as session:
            number = session.handle
            async with anyio.create_task_group() as tasks:
                fault.on("C_Digest", hang="before")

                tasks.start_soon(digest, session)
                await hangs(fault, "C_Digest")
                async with _Outage(pool, fault):
                    assert session.closed
                closed = [c.session for c in fault.calls("C_CloseSession")]
                assert number not in closed
                fault.release()
        await eventually(lambda: number not in {s.number for s in fault.sessions()})


async def test_an_officers_period_ends_with_the_token(
    make_pool: MakePool, fault: FaultModule, token: Any
) -> None:
    """Its session is over, its block ends, and the user is logged in again."""
    async with make_pool(module=fault.path) as pool:
        async with pool.security_officer(token.so_pin) as so:
            fault.go_down()
            with pytest.raises((SessionClosed, pkcs11.PKCS11Error)):
                await so.session.generate_random(8)
            await eventually(lambda: pool.login_state is LoginState.PUBLIC)
        # The block ends although the token is still away.
        assert pool.state is PoolState.RECOVERING
        fault.come_back()
        await _back(pool)
        assert _who(pool) is LoginState.USER
        key = await make_ec_key(pool)
        assert await _sign(key)


async def test_the_officer_waits_while_his_session_is_looked_at(
    make_pool: MakePool, fault: FaultModule, token: Any
) -> None:
    """It is the login's own: no second call enters it beside the actor's."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_GenerateRandom", answer=CKR.DEVICE_ERROR)
        async with (
            pool.security_officer(token.so_pin) as so,
            anyio.create_task_group() as tasks,
        ):
            fault.on("C_GetSessionInfo", hang="before")
            tasks.start_soon(so.session.generate_random, 64)
            await hangs(fault, "C_GetSessionInfo")
            try:
                await eventually(lambda: pool.stats().operations_waiting == 1)
            finally:
                fault.release()
        assert fault.count("C_GenerateRandom") == 2
        assert pool.stats().operations_failed == 0


async def test_what_cannot_be_taken_back_is_not_made_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The login was lost right after a copy was made: nobody can destroy it just then.

    It is as unknown as any other outcome, and not made for a second time.
    """
    async with make_pool(module=fault.path) as pool:
        key = await pool.generate_key(KeyType.AES, 128, label="original", store=True)
        fault.on("C_CopyObject", hang="after")
        async with anyio.create_task_group() as tasks:

            async def copy() -> None:
                with pytest.raises(OutcomeUnknown):
                    await key.copy({Attribute.LABEL: "copy"})

            tasks.start_soon(copy)
            await hangs(fault, "C_CopyObject")
            # Then the pool looks at the copy, and at the original once more.
            fault.on("C_GetAttributeValue", hang="after")
            fault.release("C_CopyObject")
            await hangs(fault, "C_GetAttributeValue")
            fault.lose_login()
            fault.release()
        # Who uses the original next finds the login lost, and it is restored.
        assert await key.attributes()
        assert len(await pool.find({Attribute.LABEL: "copy"})) == 1


async def test_what_was_made_in_a_session_that_was_lost_is_told_so(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """That the session is over says nothing of the key, which is on the token."""
    async with (
        make_pool(module=fault.path) as pool,
        pool.session(rw=True) as session,
    ):
        # Made, and looked at by python-pkcs11; then the pool looks, and it is lost.
        code = CKR.SESSION_HANDLE_INVALID
        fault.on("C_GetAttributeValue", nth=3, answer=code)
        with pytest.raises(OutcomeUnknown):
            await session.generate_key(KeyType.AES, 128, label="made", store=True)
        fault.clear()
        with pytest.raises(SessionClosed):
            await digest(session)
        assert len(await pool.find({Attribute.LABEL: "made"})) == 1


async def test_the_officers_session_is_closed_by_the_login_alone(
    make_pool: MakePool, fault: FaultModule, token: Any
) -> None:
    """Where it seems lost it is looked at, and no worker closes it meanwhile."""
    async with make_pool(module=fault.path) as pool:
        async with (
            pool.security_officer(token.so_pin) as so,
            anyio.create_task_group() as tasks,
        ):
            fault.on("C_GenerateRandom", answer=CKR.SESSION_CLOSED)
            fault.on("C_GetSessionInfo", hang="before")
            fault.reset_counts()

            async def told() -> None:
                with pytest.raises(SessionClosed):
                    await so.session.generate_random(64)

            tasks.start_soon(told)
            await hangs(fault, "C_GetSessionInfo")
            try:
                # Workers close behind their callers.
                quiet = pool._engine.wait_quiet  # noqa: SLF001  # tidying has no mark
                assert await blocking(quiet, time.monotonic() + LAST_RESORT)
                assert fault.count("C_CloseSession") == 0
            finally:
                fault.release()
        assert pool.login_state is LoginState.USER
        assert pool.stats().recoveries_total == 0


async def test_keys_are_found_anew_after_an_outage(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Numbers start again, and no number of before is used."""
    fault.reuse_numbers()
    async with make_pool(module=fault.path) as pool:
        first = await make_ec_key(pool, "first")
        second = await make_ec_key(pool, "second")
        ders = [await key.public_key_der() for key in (first, second)]
        found = await pool.find({Attribute.CLASS: ObjectClass.PRIVATE_KEY})
        assert len(found) == 2
        async with _Outage(pool, fault, stays=True):
            pass
        assert [await key.public_key_der() for key in (second, first)] == ders[::-1]
        assert await first.verify(
            _DIGEST, await _sign(first), mechanism=Mechanism.ECDSA
        )


class _FoundKey:
    """Stands in for the handle cache: no token here has a key that is used up."""

    def __init__(self, key_type: int) -> None:
        packed: dict[int, bytes] = {
            Attribute.CLASS: pack_ulong(ObjectClass.PRIVATE_KEY),
            Attribute.KEY_TYPE: pack_ulong(key_type),
        }
        self._entry = Entry(1, packed, Epoch(1), Generation(1), 0, 0.0)

    def entry(self, *_arguments: object) -> Entry:
        return self._entry

    def mark(self) -> int:
        return 0


@pytest.mark.parametrize("key_type", [0x46, 0x47, 0x48], ids=["HSS", "XMSS", "XMSSMT"])
def test_a_signature_that_uses_up_its_key_is_not_repeated(key_type: int) -> None:
    """Lost with the token, it may have been made: OutcomeUnknown."""
    calls = 0

    def sign(_entry: Entry) -> bytes:
        nonlocal calls
        calls += 1
        raise pkcs11.DeviceError

    cache: Any = _FoundKey(key_type)
    spec = KeySpec.of("signer", None, None, None)
    session: Any = None
    with pytest.raises(OutcomeUnknown, match="used up"):
        with_object(session, cache, spec, None, sign)
    assert calls == 1


async def test_a_login_that_fails_with_a_token_that_is_known_to_be_lost(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its callers wait for the token as the others do; the login comes with it."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await settled(pool)
        fault.lose_login()
        fault.on("C_Login", hang="before", answer=CKR.SESSION_HANDLE_INVALID)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_sign, key)
            await hangs(fault, "C_Login")
            fault.on("C_DigestInit", answer=CKR.SESSION_HANDLE_INVALID)
            tasks.start_soon(digest, pool)
            await eventually(lambda: pool.state is PoolState.RECOVERING)
            fault.release()
        assert pool.login_state is LoginState.USER


@pytest.mark.parametrize("function", ["C_FindObjectsInit", "C_GetAttributeValue"])
@pytest.mark.parametrize("rv", _GONE[:5], ids=hex)
async def test_what_was_lost_before_the_change_was_sent_is_made_again(
    make_pool: MakePool, fault: FaultModule, function: str, rv: int
) -> None:
    """While its object was looked up nothing had happened: nobody need ask what did."""
    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        key = pool.key(label="signer", object_class=ObjectClass.PRIVATE_KEY)
        fault.on(function, answer=rv)
        fault.reset_counts()
        await key.destroy()
        assert fault.count("C_DestroyObject") == 1
        assert pool.stats().operations_failed == 0


@pytest.mark.parametrize("what", ["create", "generate", "pair", "copy", "unwrap"])
async def test_what_was_made_is_not_made_again_when_the_login_is_lost_just_then(
    make_pool: MakePool, fault: FaultModule, what: str
) -> None:
    """It is there, and only what it looks like was not told: one object and no two."""
    async with make_pool(module=fault.path) as pool:
        key = await pool.generate_key(
            KeyType.AES, 128, label="first", store=True, template=_OPEN
        )
        wrapped = await key.wrap_key(key, mechanism=Mechanism.AES_KEY_WRAP)
        named: dict[Any, Any] = {Attribute.LABEL: "new", Attribute.TOKEN: True}
        calls: dict[str, Any] = {
            "create": lambda: pool.create_object(_VALUE | named),
            "generate": lambda: pool.generate_key(
                KeyType.AES, 128, label="new", store=True
            ),
            "pair": lambda: make_ec_key(pool, "new"),
            "copy": lambda: key.copy(named),
            "unwrap": lambda: key.unwrap_key(
                ObjectClass.SECRET_KEY,
                KeyType.AES,
                wrapped,
                label="new",
                store=True,
                mechanism=Mechanism.AES_KEY_WRAP,
            ),
        }
        made = _MAKERS[what]
        hold = fault.on(made, hang="after")
        fault.reset_counts()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_told_of_doubt, calls[what])
            await hangs(fault, made)
            fault.remove(hold)
            fault.lose_login()
            fault.release()
        assert fault.count(made) == 1
        await key.attributes()  # finds the login lost, and it is restored
        assert len(await pool.find({Attribute.LABEL: "new"})) == 1 + (what == "pair")


_OPEN = {Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False}
_VALUE = {
    Attribute.CLASS: ObjectClass.SECRET_KEY,
    Attribute.KEY_TYPE: KeyType.AES,
    Attribute.VALUE: b"v" * 16,
    Attribute.PRIVATE: True,
}
_MAKERS = {
    "create": "C_CreateObject",
    "generate": "C_GenerateKey",
    "pair": "C_GenerateKeyPair",
    "copy": "C_CopyObject",
    "unwrap": "C_UnwrapKey",
}


async def _told_of_doubt(call: Any) -> None:
    with pytest.raises(OutcomeUnknown, match="was made"):
        await call()


async def test_a_search_that_could_not_be_ended_does_not_spoil_its_session(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It is ended once more, or the next one in the same session ends it first."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        fault.on("C_FindObjectsFinal", answer=CKR.DEVICE_MEMORY)
        assert await session.find() == []
        assert await digest(session)
        fault.on("C_FindObjectsFinal", times=2, answer=CKR.DEVICE_MEMORY)
        assert await session.find() == []
        assert await session.find() == []


async def test_what_is_closed_with_all_others_is_not_closed_under_a_call(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`C_CloseAllSessions`, for what could not be closed, waits for who is inside."""
    monkeypatch.setattr(recovering, "_PATIENCE", LAST_RESORT)
    async with make_pool(module=fault.path) as pool, anyio.create_task_group() as tasks:
        key = await make_ec_key(pool)
        await settled(pool)
        fault.on("C_Sign", hang="before")
        tasks.start_soon(_sign, key)
        await hangs(fault, "C_Sign")
        fault.on("C_CloseSession", every=True, answer=CKR.GENERAL_ERROR)
        fault.reset_counts()
        fault.on("C_GetSessionInfo", answer=CKR.DEVICE_ERROR)
        fault.on("C_DigestInit", answer=CKR.DEVICE_ERROR)
        tasks.start_soon(digest, pool)
        # The one with the login, the last that is closed before.
        await eventually(lambda: fault.count("C_CloseSession") >= _CLOSED)
        fault.release()
    (sign,) = fault.calls("C_Sign")
    (all_closed, *_) = fault.calls("C_CloseAllSessions")
    assert sign.ended_ns is not None
    assert all_closed.began_ns > sign.ended_ns


_CLOSED = 2


@pytest.mark.usefixtures("never_idle")
async def test_what_could_not_be_closed_with_all_others_is_closed_later(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No login begins while sessions may be open that nobody knows of."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_CloseSession", times=2, answer=CKR.GENERAL_ERROR)
        fault.on("C_CloseAllSessions", answer=CKR.GENERAL_ERROR)
        fault.on("C_GetSessionInfo", answer=CKR.DEVICE_ERROR)
        fault.on("C_DigestInit", answer=CKR.DEVICE_ERROR)
        assert await digest(pool)
        await settled(pool)
        assert fault.count("C_CloseAllSessions")
        assert len(fault.sessions()) == 1 + pool.stats().sessions_open


async def test_no_pin_is_sent_because_a_session_is_refused_with_the_login_as_reason(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """`C_OpenSession` needs none, and the user is in: he would be logged in twice."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_OpenSession", answer=CKR.USER_NOT_LOGGED_IN)
        fault.reset_counts()
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(_may_lack_login, pool)
        assert await digest(pool)
        assert fault.count("C_Login") == 0


async def _may_lack_login(pool: TokenPool) -> None:
    with suppress(LoginRequired):
        await digest(pool)
