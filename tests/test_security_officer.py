"""A period of the security officer: the token to himself, and everything back after it.

Nothing here sleeps: callers are held by events, calls inside the fault module.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pkcs11
import pytest
import structlog
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass, TokenFlag

from faultmodule import CKR
from pkcs11_pool import (
    LoginState,
    PinLengthInvalid,
    PinRefused,
    PinSourceError,
    PoolClosed,
    PoolState,
    PoolTimeout,
    SessionClosed,
    SessionState,
    TokenUnavailable,
    WouldDeadlock,
    events,
)
from pkcs11_pool.engine.mode import Pause
from poolkit import (
    Hold,
    paused,
    settled,
    time_is_up,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, PooledSession, SecurityOfficer, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_WRONG = "99999999"
_NEW = "new-pin"
_DIGEST = hashlib.sha256(b"message").digest()
_CKU_SO, _CKU_USER = 0, 1
_LAST_RESORT = 20
"""Seconds after which a test that would hang fails instead."""


async def _make_signer(pool: TokenPool) -> KeyRef:
    await pool.generate_keypair(
        KeyType.EC, curve="secp256r1", label="signer", store=True
    )
    return pool.key(label="signer")


async def _sign(key: KeyRef, **options: Any) -> bytes:
    return await key.sign(
        _DIGEST, mechanism=Mechanism.ECDSA, signature_format="der", **options
    )


def _is_signature(public_der: bytes, signature: bytes) -> bool:
    public = load_der_public_key(public_der)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    try:
        public.verify(signature, _DIGEST, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    except InvalidSignature:
        return False
    return True


async def _works(key: KeyRef) -> bool:
    """Whether the pool signs with the key: the user is logged in, and it is seen."""
    return _is_signature(
        await key.public_key_der(), await _sign(key, timeout=_LAST_RESORT)
    )


def _handle_of(session: pkcs11.Session) -> int:
    handle: int = session.handle  # type: ignore[attr-defined]
    return handle


def _who(pool: TokenPool) -> LoginState:
    """Who is logged in now; a type checker would take the property for fixed."""
    return pool.login_state


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments)


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event; a test that would hang fails instead."""
    with anyio.fail_after(_LAST_RESORT):
        while not condition():
            await anyio.lowlevel.checkpoint()


class _Holder:
    """A task that holds a PooledSession until it is told to go."""

    def __init__(self, pool: TokenPool, *, rw: bool = False) -> None:
        self._pool = pool
        self._rw = rw
        self.has = anyio.Event()
        self.go = anyio.Event()
        self.session: PooledSession | None = None

    async def __call__(self) -> None:
        async with self._pool.session(rw=self._rw) as session:
            self.session = session
            self.has.set()
            await self.go.wait()


class _Officer:
    """A task in a period of the security officer until it is told to go."""

    def __init__(self, pool: TokenPool, pin: str, **options: Any) -> None:
        self._pool = pool
        self._pin = pin
        self._options = options
        self.inside = anyio.Event()
        self.go = anyio.Event()
        self.ended = anyio.Event()
        self.scope = anyio.CancelScope()
        self.error: Exception | None = None

    async def __call__(self) -> None:
        try:
            with self.scope:
                block = self._pool.security_officer(self._pin, **self._options)
                async with block:
                    self.inside.set()
                    await self.go.wait()
        except Exception as error:  # noqa: BLE001  # the test looks at it
            self.error = error
        finally:
            self.ended.set()


# -- Inside -----------------------------------------------------------------------


async def test_inside_the_officer_is_logged_in(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """The pool is in the state SO, and so.session is R/W in RW_SO_FUNCTIONS."""
    async with pool.security_officer(token.so_pin) as so:
        assert _who(pool) is LoginState.SO
        assert so.session.rw is True
        info = await so.session.info()
        assert info.state is SessionState.RW_SO_FUNCTIONS
        assert info.rw is True
    assert _who(pool) is LoginState.USER


async def test_the_officers_session_does_what_a_session_does(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """It makes and destroys a public token object, and runs a function."""
    template = {
        Attribute.CLASS: ObjectClass.DATA,
        Attribute.TOKEN: True,
        Attribute.PRIVATE: False,
        Attribute.LABEL: "notice",
        Attribute.VALUE: b"by the officer",
    }
    async with pool.security_officer(token.so_pin) as so:
        made = await so.session.create_object(template)
        handle = await so.session.run(_handle_of)
        assert handle == so.session.handle
    (found,) = await pool.find({Attribute.LABEL: "notice"})
    seen = await found.attributes([Attribute.VALUE])
    assert seen == {Attribute.VALUE: b"by the officer"}
    await made.destroy()
    assert await pool.find({Attribute.LABEL: "notice"}) == []


async def test_the_officers_session_ends_with_the_period(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """Kept beyond it, it is SessionClosed."""
    async with pool.security_officer(token.so_pin) as so:
        pass
    with pytest.raises(SessionClosed):
        await so.session.info()
    with pytest.raises(SessionClosed):
        await so.init_pin(_NEW)


async def test_init_pin_becomes_the_pools_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The login is restored with it, also when it is lost later; the old is dead."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        async with pool.security_officer(token.so_pin) as so:
            await so.init_pin(_NEW)
        assert _who(pool) is LoginState.USER
        assert await _works(key)
        fault.lose_login()
        assert await _works(key)
        await pool.logout()
        with pytest.raises(PinRefused):
            await pool.login(token.user_pin)
    async with make_pool(module=fault.path, pin=_NEW) as pool:
        assert _who(pool) is LoginState.USER


async def test_init_pin_replaces_a_callable(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """The pool's PIN is the one that was set, whatever its source would say."""
    async with make_pool(pin=lambda: token.user_pin) as pool:
        async with pool.security_officer(token.so_pin) as so:
            await so.init_pin(_NEW)
        assert _who(pool) is LoginState.USER


async def test_init_pin_refuses_a_pin_of_a_wrong_length(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Nothing is sent, and the user's PIN is the old one."""
    async with make_pool(module=fault.path) as pool:
        async with pool.security_officer(token.so_pin) as so:
            with pytest.raises(PinLengthInvalid):
                await so.init_pin("123")
            assert fault.count("C_InitPIN") == 0
        assert _who(pool) is LoginState.USER


async def test_init_pin_that_is_cancelled_waits_and_keeps_the_new_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The token has the new PIN then, so the login is restored with it."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        fault.on("C_InitPIN", hang="before")
        async with (
            pool.security_officer(token.so_pin) as so,
            anyio.create_task_group() as group,
        ):
            group.start_soon(so.init_pin, _NEW)
            await _in_thread(fault.wait_until_hanging, "C_InitPIN")
            group.cancel_scope.cancel()
            fault.clear()
        assert _who(pool) is LoginState.USER
        assert await _works(key)


async def test_the_officer_changes_his_own_pin(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """The next period wants the new one; the user's PIN is untouched."""
    async with pool.security_officer(token.so_pin) as so:
        await so.set_pin(token.so_pin, "new-so-pin")
    assert _who(pool) is LoginState.USER
    with pytest.raises(PinRefused):
        async with pool.security_officer(token.so_pin):
            pass
    async with pool.security_officer("new-so-pin"):
        assert _who(pool) is LoginState.SO


async def test_the_officers_wrong_old_pin_is_refused(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """It is PinRefused, is not sent again, and nothing has changed."""
    async with make_pool(module=fault.path) as pool:
        async with pool.security_officer(token.so_pin) as so:
            for _ in range(2):
                with pytest.raises(PinRefused):
                    await so.set_pin(_WRONG, "new-so-pin")
            assert fault.count("C_SetPIN") == 1
            with pytest.raises(PinLengthInvalid):
                await so.set_pin(token.so_pin, "123")
            assert fault.count("C_SetPIN") == 1
        async with pool.security_officer(token.so_pin):
            assert _who(pool) is LoginState.SO


async def test_what_the_officer_learns_of_wrong_pins_is_not_the_users(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """A PIN that was refused as the SO's may still be the user's."""
    async with make_pool(module=fault.path, pin=None) as pool:
        with pytest.raises(PinRefused):
            async with pool.security_officer(token.user_pin):
                pass
        await pool.login(token.user_pin)
        assert _who(pool) is LoginState.USER


# -- The login before and after ---------------------------------------------------


async def test_the_login_is_restored_afterwards(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The user is logged in again, once, and keys from before still sign."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        users = fault.on("C_Login", delay_us=1, every=True, when_user=_CKU_USER)
        officers = fault.on("C_Login", delay_us=1, every=True, when_user=_CKU_SO)
        async with pool.security_officer(token.so_pin):
            pass
        assert _who(pool) is LoginState.USER
        assert await _works(key)
        assert (fault.fired(users), fault.fired(officers)) == (1, 1)
        async with pool.session() as session:
            info = await session.info()
        assert info.state is SessionState.RO_USER_FUNCTIONS


async def test_a_public_pool_stays_public(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Whoever was logged out before is logged out after, PIN or not."""
    async with make_pool(module=fault.path) as pool:
        await pool.logout()
        users = fault.on("C_Login", delay_us=1, every=True, when_user=_CKU_USER)
        async with pool.security_officer(token.so_pin):
            assert _who(pool) is LoginState.SO
        assert _who(pool) is LoginState.PUBLIC
        assert fault.fired(users) == 0
        async with pool.session() as session:
            info = await session.info()
        assert info.state is SessionState.RO_PUBLIC_SESSION


async def test_init_pin_of_a_public_pool_does_not_log_in(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """The PIN is the pool's for the next login(), and no more."""
    async with make_pool(pin=None) as pool:
        async with pool.security_officer(token.so_pin) as so:
            await so.init_pin(_NEW)
        assert _who(pool) is LoginState.PUBLIC
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_a_wrong_so_pin_is_refused_and_all_is_as_before(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The login found before is restored, and the wrong PIN is not sent again."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        officers = fault.on("C_Login", delay_us=1, every=True, when_user=_CKU_SO)
        for _ in range(2):
            with pytest.raises(PinRefused):
                async with pool.security_officer(_WRONG):
                    pytest.fail("the block was entered")
            assert fault.fired(officers) == 1
            assert _who(pool) is LoginState.USER
            assert pool.state is PoolState.READY
            assert await _works(key)
        async with pool.security_officer(token.so_pin):
            pass
        assert _who(pool) is LoginState.USER


async def test_a_wrong_so_pin_leaves_a_public_pool_public(
    make_pool: MakePool,
) -> None:
    """There is no login to restore, so none is made."""
    async with make_pool() as pool:
        await pool.logout()
        with pytest.raises(PinRefused):
            async with pool.security_officer(_WRONG):
                pass
        assert _who(pool) is LoginState.PUBLIC
        assert len(await pool.generate_random(64)) == 8


async def _give(pin: str) -> str:
    await anyio.lowlevel.checkpoint()
    return pin


async def test_an_async_source_restores_the_login_after_a_wrong_so_pin(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """The caller who must await the PIN may hear of the refusal first."""

    async def source() -> str:
        return await _give(token.user_pin)

    async with make_pool(pin=source) as pool:
        key = await _make_signer(pool)

        async def hold_the_loop() -> None:
            # The loop stands still until the actor is done with the failed entry.
            for _ in range(2_000):
                if pool.stats().last_error is not None:
                    return
                threading.Event().wait(0.001)

        officer = _Officer(pool, _WRONG)
        async with anyio.create_task_group() as group:
            group.start_soon(officer)
            group.start_soon(hold_the_loop)
        assert isinstance(officer.error, PinRefused)
        assert await _works(key)
        # The key may be used a moment before the pool takes the login down.
        await _until(lambda: _who(pool) is LoginState.USER)


async def test_an_async_source_restores_the_login_after_a_period(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """The task that leaves the block awaits the user's PIN."""
    tasks = []

    async def source() -> str:
        tasks.append(anyio.get_current_task().id)
        return await _give(token.user_pin)

    async with make_pool(pin=source) as pool:
        key = await _make_signer(pool)
        async with pool.security_officer(token.so_pin):
            assert len(tasks) == 1
        assert tasks == [anyio.get_current_task().id] * 2
        assert _who(pool) is LoginState.USER
        assert await _works(key)


async def test_an_async_source_that_fails_after_a_period_raises_on_exit(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """The exit raises PinSourceError; the pool is public and open."""
    asked = 0

    async def source() -> str:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise OSError("vault is down")
        return await _give(token.user_pin)

    async with make_pool(pin=source) as pool:
        with pytest.raises(PinSourceError):
            async with pool.security_officer(token.so_pin):
                pass
        assert _who(pool) is LoginState.PUBLIC
        assert pool.state is PoolState.READY
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_an_exit_cancelled_while_it_awaits_the_pin_ends(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """The one who must await the user's PIN goes: the period is over all the same."""
    asked = 0
    waits, gate = anyio.Event(), anyio.Event()

    async def source() -> str:
        nonlocal asked
        asked += 1
        if asked == 2:
            waits.set()
            await gate.wait()
        return token.user_pin

    async with make_pool(pin=source) as pool:
        key = await _make_signer(pool)
        officer = _Officer(pool, token.so_pin)
        async with anyio.create_task_group() as group:
            group.start_soon(officer)
            officer.go.set()
            await waits.wait()
            officer.scope.cancel()
            with anyio.move_on_after(_LAST_RESORT / 2) as late:
                await officer.ended.wait()
            gate.set()
            if late.cancelled_caught:
                await pool.login(token.user_pin)  # lets the test come to its end
        assert not late.cancelled_caught
        assert await _works(key)


async def test_a_restore_that_fails_raises_on_exit(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The pool is PUBLIC then, not closed, and a good login mends it."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        with pytest.raises(PinRefused):
            async with pool.security_officer(token.so_pin):
                fault.on("C_Login", answer=CKR.PIN_INCORRECT, when_user=_CKU_USER)
        assert _who(pool) is LoginState.PUBLIC
        assert pool.state is PoolState.READY
        assert len(await pool.generate_random(64)) == 8
        await pool.login(force=True)
        assert await _works(key)


async def test_a_restore_that_the_token_fails_raises_what_the_token_said(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """An error that is not about the PIN leaves as the error that it is."""
    async with make_pool(module=fault.path) as pool:
        with pytest.raises(pkcs11.exceptions.FunctionFailed):
            async with pool.security_officer(token.so_pin):
                fault.on("C_Login", answer=CKR.FUNCTION_FAILED, when_user=_CKU_USER)
        assert _who(pool) is LoginState.PUBLIC
        assert pool.state is PoolState.READY
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_the_error_of_the_block_leaves_as_itself(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """The very object that was raised, in no group; and the login is restored."""
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with pool.security_officer(token.so_pin):
            raise error
    assert caught.value is error
    assert _who(pool) is LoginState.USER


async def test_the_error_of_the_block_wins_over_a_failed_restore(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Both happen: the caller's own error leaves, and the log has the other."""
    error = KeyError("mine")

    def fail() -> None:
        fault.on("C_Login", answer=CKR.PIN_INCORRECT, when_user=_CKU_USER)
        raise error

    async with make_pool(module=fault.path) as pool:
        with (
            structlog.testing.capture_logs() as log,
            pytest.raises(KeyError) as caught,
        ):
            async with pool.security_officer(token.so_pin):
                fail()
        assert caught.value is error
        (told,) = [
            line
            for line in log
            if line["event"] == events.SO_FAILED and line["error"] == "PinRefused"
        ]
        assert told["token"] == token.label
        assert _who(pool) is LoginState.PUBLIC
        assert pool.state is PoolState.READY


# -- The order of calls -----------------------------------------------------------


async def test_a_rw_session_comes_first_and_the_ro_sessions_go_after_it(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """R/W opened, R/O closed, user out, SO in; and the same way back."""
    async with make_pool(module=fault.path) as pool:
        (anchor,) = fault.sessions()
        assert not anchor.rw
        fault.clear_log()
        async with pool.security_officer(token.so_pin):
            (own,) = fault.sessions()
            assert own.rw
        (after,) = fault.sessions()
        assert not after.rw
        interesting = {"C_OpenSession", "C_CloseSession", "C_Login", "C_Logout"}
        calls = [
            (call.function, call.session)
            for call in fault.calls()
            if call.function in interesting
        ]
        assert calls == [
            ("C_OpenSession", own.number),
            ("C_CloseSession", anchor.number),
            ("C_Logout", own.number),
            ("C_Login", own.number),
            ("C_Logout", own.number),
            ("C_OpenSession", after.number),
            ("C_CloseSession", own.number),
            ("C_Login", after.number),
        ]


@pytest.mark.usefixtures("never_idle")
async def test_the_application_never_has_no_session(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """From opening to closing at least one is open, or the module would log us out."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        await settled(pool)
        fault.clear_log()
        number = len(fault.sessions())
        for _ in range(3):
            async with pool.security_officer(token.so_pin):
                pass
            await _sign(key)
        with pytest.raises(PinRefused):
            async with pool.security_officer(_WRONG):
                pass
        numbers = []
        for call in sorted(fault.calls(), key=lambda c: c.ended_ns or 0):
            if call.rv == CKR.OK and call.function == "C_OpenSession":
                number += 1
            if call.rv == CKR.OK and call.function == "C_CloseSession":
                number -= 1
            numbers.append(number)
        assert len(numbers) > 20
        assert min(numbers) == 1


async def test_no_ro_session_is_open_when_the_officer_logs_in(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Sessions opened ahead are closed as well: the token would refuse the SO."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(_sign, key)
        fault.on("C_Login", hang="before", when_user=_CKU_SO)
        officer = _Officer(pool, token.so_pin)
        async with anyio.create_task_group() as group:
            group.start_soon(officer)
            await _in_thread(fault.wait_until_hanging, "C_Login")
            assert [session.rw for session in fault.sessions()] == [True]
            fault.clear()
            officer.go.set()
        assert officer.error is None


# -- Waiting for others -----------------------------------------------------------


async def test_under_load_not_one_operation_fails(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """64 tasks sign while periods come and go; every signature is checked."""
    key = await _make_signer(pool)
    public_der = await key.public_key_der()
    signatures: list[bytes] = []
    periods = 0
    busy = True

    async def sign() -> None:
        while busy:
            signatures.append(await _sign(key))

    async with anyio.create_task_group() as group:
        for _ in range(64):
            group.start_soon(sign)
        for _ in range(8):
            async with pool.security_officer(token.so_pin) as so:
                assert (await so.session.info()).state is SessionState.RW_SO_FUNCTIONS
                before = len(signatures)
            periods += 1
            await _until(lambda before=before: len(signatures) >= before + 64)  # type: ignore[misc]
        busy = False
    assert periods == 8
    assert len(signatures) >= 8 * 64
    assert all(_is_signature(public_der, signature) for signature in signatures)
    assert pool.stats().operations_failed == 0


async def test_no_operation_runs_during_a_period(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Callers wait in line and are served, in time, when the officer is gone."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        public_der = await key.public_key_der()
        signatures = []

        async def sign() -> None:
            signatures.append(await _sign(key))

        async def lease() -> None:
            async with pool.session() as session:
                assert (await session.info()).state is SessionState.RO_USER_FUNCTIONS
                signatures.append(await _sign(key.on(session)))

        async with (
            anyio.create_task_group() as group,
            pool.security_officer(token.so_pin),
        ):
            fault.reset_counts()
            for _ in range(20):
                group.start_soon(sign)
            group.start_soon(lease)
            await _until(lambda: pool.stats().operations_waiting == 21)
            assert fault.counts() == {}
            assert signatures == []
        assert len(signatures) == 21
        assert all(_is_signature(public_der, signature) for signature in signatures)


async def test_operations_wait_for_the_officer_inside_their_deadlines(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """An operation, a lease and a change time out as waiting; timeout=0 is at once."""
    phases = []

    async def late(call: Callable[[], Any]) -> None:
        with pytest.raises(PoolTimeout) as caught:
            await call()
        phases.append(caught.value.phase)

    async def lease() -> None:
        async with pool.session(timeout=0.05):
            pass

    async with (
        pool.security_officer(token.so_pin),
        anyio.create_task_group() as group,
    ):
        group.start_soon(late, lambda: pool.generate_random(8, timeout=0.05))
        group.start_soon(late, lambda: pool.generate_random(8, timeout=0))
        group.start_soon(late, lambda: pool.key(label="x").destroy(timeout=0.05))
        group.start_soon(late, lease)
    assert phases == ["waiting"] * 4
    assert _who(pool) is LoginState.USER


async def test_a_login_waits_for_the_officer(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """login() and logout() come after the period, in their order."""
    async with make_pool() as pool:
        done = []

        async def out_and_in() -> None:
            await pool.logout()
            done.append(_who(pool))
            await pool.login()
            done.append(_who(pool))

        async with (
            anyio.create_task_group() as group,
            pool.security_officer(token.so_pin),
        ):
            group.start_soon(out_and_in)
            await anyio.wait_all_tasks_blocked()
            assert done == []
            assert _who(pool) is LoginState.SO
        assert done == [LoginState.PUBLIC, LoginState.USER]


async def test_a_second_officer_waits_for_the_first(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """Two tasks want a period: one after the other has it."""
    first, second = (_Officer(pool, token.so_pin) for _ in range(2))
    async with anyio.create_task_group() as group:
        group.start_soon(first)
        await first.inside.wait()
        group.start_soon(second)
        await anyio.wait_all_tasks_blocked()
        assert not second.inside.is_set()
        first.go.set()
        await second.inside.wait()
        assert first.ended.is_set()
        second.go.set()
    assert (first.error, second.error) == (None, None)
    assert _who(pool) is LoginState.USER


async def test_the_officer_waits_for_open_sessions_and_they_can_finish(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """A holder signs, makes and uses session objects while the officer waits."""
    key = await _make_signer(pool)
    holder = _Holder(pool, rw=True)
    officer = _Officer(pool, token.so_pin)
    async with anyio.create_task_group() as group:
        group.start_soon(holder)
        await holder.has.wait()
        session = holder.session
        assert session is not None
        group.start_soon(officer)
        await paused(pool)
        for _ in range(3):
            signature = await _sign(key.on(session))
            assert _is_signature(await key.on(session).public_key_der(), signature)
        secret = await session.generate_key(KeyType.AES, 128)
        iv = bytes(16)
        sealed = await secret.on(session).encrypt(b"x" * 16, mechanism_param=iv)
        opened = await secret.on(session).decrypt(sealed, mechanism_param=iv)
        assert opened == b"x" * 16
        assert not officer.inside.is_set()
        assert _who(pool) is LoginState.USER
        holder.go.set()
        await officer.inside.wait()
        assert _who(pool) is LoginState.SO
        officer.go.set()
    assert officer.error is None
    assert await _works(key)


@pytest.mark.parametrize("before", [False, True])
async def test_who_holds_a_session_comes_to_his_end_while_the_officer_waits(
    make_pool: MakePool, token: ThrowawayToken, *, before: bool
) -> None:
    """Also by calls of the pool's own, that came before the officer or after him.

    Else he would wait for the session, and its holder for him.
    """
    async with make_pool(max_sessions=2) as pool:
        officer, asks = _Officer(pool, token.so_pin), anyio.Event()

        async def holder() -> None:
            async with pool.session():
                has.set()
                await asks.wait()
                await pool.generate_random(8, timeout=_LAST_RESORT)

        async with anyio.create_task_group() as group:
            has = anyio.Event()
            group.start_soon(holder)
            await has.wait()
            with Hold() as hold:
                if before:
                    # It is in line, behind one who must wait for the officer.
                    group.start_soon(pool.run, hold)
                    await hold.entered()
                    group.start_soon(pool.generate_random, 8)
                    await _until(lambda: pool.stats().operations_waiting == 1)
                    asks.set()
                    await _until(lambda: pool.stats().operations_waiting == 2)
                group.start_soon(officer)
                # A call that waits tells nothing here: there is no session for it.
                engine = pool._engine  # noqa: SLF001
                await _until(lambda: engine._mode.pause is Pause.NEW)  # noqa: SLF001
                asks.set()
            await officer.inside.wait()
            officer.go.set()
        assert officer.error is None


async def test_new_operations_wait_behind_a_waiting_officer(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """While the officer waits for a session, what is new does not overtake him."""
    holder, officer = _Holder(pool), _Officer(pool, token.so_pin)
    order = []

    async def random() -> None:
        await pool.generate_random(8)
        order.append("random")

    async with anyio.create_task_group() as group:
        group.start_soon(holder)
        await holder.has.wait()
        group.start_soon(officer)
        await paused(pool)
        group.start_soon(random)
        await _until(lambda: pool.stats().operations_waiting == 1)
        holder.go.set()
        await officer.inside.wait()
        order.append("officer")
        officer.go.set()
    assert order == ["officer", "random"]


async def test_what_must_not_wait_does_not_wait_for_the_officer(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """With timeout=0 it is served or refused, also when he comes just then."""
    for _ in range(20):
        officer = _Officer(pool, token.so_pin)
        refused = 0
        async with anyio.create_task_group() as group:
            group.start_soon(officer)
            try:
                with anyio.fail_after(_LAST_RESORT):
                    while not refused:
                        try:
                            await pool.generate_random(8, timeout=0)
                        except PoolTimeout as error:
                            assert error.phase == "waiting"  # noqa: PT017  # of many
                            refused += 1
            finally:
                officer.go.set()
        assert refused == 1


async def test_the_officer_waits_for_a_running_call(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """A call that is inside when he comes is let finish."""
    started, release = threading.Event(), threading.Event()
    results = []

    def stay(_session: pkcs11.Session) -> str:
        started.set()
        release.wait(_LAST_RESORT)
        return "stayed"

    async def run() -> None:
        results.append(await pool.run(stay))

    officer = _Officer(pool, token.so_pin)
    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await _in_thread(started.wait)
        group.start_soon(officer)
        await paused(pool)
        assert not officer.inside.is_set()
        assert results == []
        release.set()
        await officer.inside.wait()
        officer.go.set()
    assert results == ["stayed"]
    assert officer.error is None


async def test_sessions_that_stay_open_are_pool_timeout_and_nothing_has_changed(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Epoch, state and sessions are as before, and no PIN was sent."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        epoch = pool.login_epoch
        holder = _Holder(pool)
        async with anyio.create_task_group() as group:
            group.start_soon(holder)
            await holder.has.wait()
            session = holder.session
            assert session is not None
            fault.reset_counts()
            with pytest.raises(PoolTimeout) as caught:
                async with pool.security_officer(token.so_pin, timeout=0.1):
                    pytest.fail("the block was entered")
            assert caught.value.phase == "waiting"
            assert fault.count("C_Login") == fault.count("C_Logout") == 0
            assert pool.login_epoch == epoch
            assert _who(pool) is LoginState.USER
            assert not session.closed
            assert (await session.info()).state is SessionState.RO_USER_FUNCTIONS
            assert len(await _sign(key.on(session))) > 64
            assert await _works(key)
            holder.go.set()
        async with pool.security_officer(token.so_pin):
            pass


async def test_a_timeout_of_the_officer_is_always_waiting(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """Whichever clock strikes first, the drain's or the timekeeper's."""
    holder = _Holder(pool)
    phases = []
    async with anyio.create_task_group() as group:
        group.start_soon(holder)
        await holder.has.wait()
        for _ in range(30):
            with pytest.raises(PoolTimeout) as caught:
                async with pool.security_officer(token.so_pin, timeout=0.03):
                    pass
            phases.append(caught.value.phase)
        holder.go.set()
    assert phases == ["waiting"] * 30


async def test_the_officer_with_timeout_zero_does_not_wait(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """With a session open it is PoolTimeout; with none the period begins."""
    holder = _Holder(pool)
    async with anyio.create_task_group() as group:
        group.start_soon(holder)
        await holder.has.wait()
        with pytest.raises(PoolTimeout) as caught:
            async with pool.security_officer(token.so_pin, timeout=0):
                pass
        assert caught.value.phase == "waiting"
        holder.go.set()
    async with pool.security_officer(token.so_pin, timeout=0):
        assert _who(pool) is LoginState.SO


async def test_the_holder_of_a_session_would_deadlock(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """From a task that holds a session it is WouldDeadlock, and the session goes on."""
    async with pool.session() as session:
        with pytest.raises(WouldDeadlock):
            async with pool.security_officer(token.so_pin):
                pass
        assert len(await session.generate_random(64)) == 8
        assert len(await pool.generate_random(64)) == 8


async def test_an_officer_inside_his_period_would_deadlock(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """The task that has so.session asks for what waits for its own end."""

    async def again() -> None:
        async with pool.security_officer(token.so_pin, timeout=_LAST_RESORT):
            pass

    async def lease() -> None:
        async with pool.session(timeout=_LAST_RESORT):
            pass

    async def operation() -> None:
        await pool.generate_random(8, timeout=_LAST_RESORT)

    async with pool.security_officer(token.so_pin) as so:
        for call in (again, lease, operation):
            with pytest.raises(WouldDeadlock):
                await call()
        assert len(await so.session.generate_random(64)) == 8
    assert _who(pool) is LoginState.USER


async def test_an_officer_who_logs_in_or_out_would_deadlock(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """Both wait for the end of the period, and that waits for this very task."""
    async with make_pool(timeout=_LAST_RESORT) as pool:
        async with pool.security_officer(token.so_pin):
            for call in (pool.login, pool.logout):
                with pytest.raises(WouldDeadlock):
                    await call()
        assert _who(pool) is LoginState.USER


async def test_a_login_lost_while_the_officer_waits_is_restored(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The holder he waits for needs the login to come to its end."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        holder, officer = _Holder(pool), _Officer(pool, token.so_pin)
        async with anyio.create_task_group() as group:
            group.start_soon(holder)
            await holder.has.wait()
            assert holder.session is not None
            group.start_soon(officer)
            await paused(pool)
            fault.lose_login()
            try:
                signature = await _sign(key.on(holder.session), timeout=_LAST_RESORT)
            finally:
                holder.go.set()
                officer.go.set()
        assert officer.error is None
        assert _is_signature(await key.public_key_der(), signature)


# -- Cancellation -----------------------------------------------------------------


async def test_an_entry_cancelled_while_it_waits_leaves_nothing(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """No SO period begins when the session he waited for is closed at last."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        officers = fault.on("C_Login", delay_us=1, every=True, when_user=_CKU_SO)
        holder, officer = _Holder(pool), _Officer(pool, token.so_pin)
        async with anyio.create_task_group() as group:
            group.start_soon(holder)
            await holder.has.wait()
            group.start_soon(officer)
            await paused(pool)
            officer.scope.cancel()
            await anyio.wait_all_tasks_blocked()
            holder.go.set()
        assert await _works(key)
        assert _who(pool) is LoginState.USER
        assert not officer.inside.is_set()
        assert fault.fired(officers) in (0, 1)
        assert [session.rw for session in fault.sessions()].count(True) == 0


class _Turn:
    """Holds the login's thread where it has taken a request and not begun with it."""

    def __init__(self, pool: TokenPool) -> None:
        self._begin = pool._engine.begin  # noqa: SLF001
        self._taken, self._go = threading.Event(), threading.Event()
        pool._engine.begin = self  # type: ignore[method-assign]  # noqa: SLF001

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        """As always, and a moment later."""
        begins = self._begin(*args, **kwargs)
        self._taken.set()
        assert self._go.wait(_LAST_RESORT)
        return begins

    async def taken(self) -> None:
        """Wait until it is there."""
        assert await _in_thread(self._taken.wait, _LAST_RESORT)

    def let_go(self) -> None:
        """Let it go on, now and ever after."""
        self._go.set()


@pytest.mark.parametrize("what", ["officer", "logout"])
@pytest.mark.parametrize("end", ["cancelled", "late"])
async def test_whoever_waits_for_quiet_has_not_begun_when_his_turn_comes(
    make_pool: MakePool, token: ThrowawayToken, what: str, end: str
) -> None:
    """Nothing was sent: cancelled he goes at once, late he is told that he waited."""
    async with make_pool() as pool:
        holder, turn = _Holder(pool), _Turn(pool)
        officer = _Officer(pool, token.so_pin)
        if what == "logout":
            officer._pool = _LogsOut(pool)  # type: ignore[assignment]  # noqa: SLF001
        epoch = pool.login_epoch
        async with anyio.create_task_group() as group:
            group.start_soon(holder)
            await holder.has.wait()
            group.start_soon(officer)
            await turn.taken()
            if end == "cancelled":
                officer.scope.cancel()
            else:
                time_is_up(pool)
            with anyio.move_on_after(_LAST_RESORT / 2) as too_long:
                await officer.ended.wait()
            turn.let_go()
            holder.go.set()
            officer.go.set()
        assert not too_long.cancelled_caught
        assert end == "cancelled" or isinstance(officer.error, PoolTimeout)
        assert getattr(officer.error, "phase", "waiting") == "waiting"
        assert len(await pool.generate_random(64, timeout=_LAST_RESORT)) == 8
        assert pool.login_epoch == epoch


class _LogsOut:
    """Where others have a period of the officer, the user is logged out."""

    def __init__(self, pool: TokenPool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def security_officer(self, _pin: str) -> AsyncIterator[None]:
        """Log him out."""
        await self._pool.logout()
        yield


async def test_an_entry_cancelled_while_the_officer_logs_in_leaves_no_period(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The login succeeds, nobody is there to have it: the user is logged in again."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        fault.on("C_Login", hang="after", when_user=_CKU_SO)
        officer = _Officer(pool, token.so_pin)
        async with anyio.create_task_group() as group:
            group.start_soon(officer)
            await _in_thread(fault.wait_until_hanging, "C_Login")
            officer.scope.cancel()
            fault.clear()
        assert not officer.inside.is_set()
        assert await _works(key)
        assert _who(pool) is LoginState.USER


async def test_a_deadline_that_passes_while_the_officer_logs_in_leaves_no_period(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The caller is gone by PoolTimeout when the SO is in at last: he is put out."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        fault.on("C_Login", hang="after", when_user=_CKU_SO)
        with pytest.raises(PoolTimeout):
            async with pool.security_officer(token.so_pin, timeout=0.1):
                pytest.fail("the block was entered")
        fault.clear()
        assert await _works(key)
        assert _who(pool) is LoginState.USER


async def test_a_cancelled_block_ends_the_period(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """The exit is done in any case: the SO is out and the user in again."""
    for _ in range(20):
        with anyio.CancelScope() as scope:
            async with pool.security_officer(token.so_pin):
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert _who(pool) is LoginState.USER
    assert len(await pool.generate_random(64, timeout=_LAST_RESORT)) == 8


async def test_a_deadline_of_the_callers_own_ends_the_period(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """A fail_after around the block stays a TimeoutError, and no PoolTimeout."""
    with pytest.raises(TimeoutError) as caught, anyio.fail_after(0.2):
        async with pool.security_officer(token.so_pin):
            await anyio.sleep_forever()
    assert not isinstance(caught.value, PoolTimeout)
    assert _who(pool) is LoginState.USER


# -- The PIN of the officer -------------------------------------------------------

_HOPELESS = {
    "final try": TokenFlag.SO_PIN_FINAL_TRY,
    "locked": TokenFlag.SO_PIN_LOCKED,
}


@pytest.mark.parametrize("flag", _HOPELESS)
async def test_at_its_end_the_token_is_sent_no_so_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, flag: str
) -> None:
    """FINAL_TRY and LOCKED of the SO are PinRefused, and the user's login stays."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        officers = fault.on("C_Login", delay_us=1, every=True, when_user=_CKU_SO)
        fault.token_info(flags_set=_HOPELESS[flag])
        with pytest.raises(PinRefused):
            async with pool.security_officer(token.so_pin):
                pass
        assert fault.fired(officers) == 0
        assert _who(pool) is LoginState.USER
        assert await _works(key)


async def test_flags_of_the_user_do_not_stop_the_officer(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """He is the one who can mend a locked user."""
    async with make_pool(module=fault.path, pin=None) as pool:
        fault.token_info(flags_set=TokenFlag.USER_PIN_LOCKED)
        async with pool.security_officer(token.so_pin) as so:
            await so.init_pin(_NEW)
        fault.token_info()
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_another_token_is_sent_no_so_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """A stranger in the slot sees neither the SO's PIN nor the user's."""
    async with make_pool(module=fault.path, pin=None) as pool:
        fault.token_info(serial="another")
        with pytest.raises(TokenUnavailable):
            async with pool.security_officer(token.so_pin):
                pass
        assert fault.count("C_Login") == 0
        # The stranger goes, and the pool is ready with what it opened.
        fault.token_info()
        await _until(lambda: pool.state is PoolState.READY)


async def test_a_so_pin_of_a_wrong_length_is_not_sent(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It is PinLengthInvalid, and the login stays."""
    async with make_pool(module=fault.path) as pool:
        fault.reset_counts()
        with pytest.raises(PinLengthInvalid):
            async with pool.security_officer("123"):
                pass
        assert _who(pool) is LoginState.USER
        officers = [c for c in fault.calls("C_Login") if c.rv != CKR.OK]
        assert officers == []


async def test_the_officers_pin_can_come_from_a_pad(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """With PROTECTED_AUTH the token asks for the PIN itself."""
    async with make_pool(module=fault.path) as pool:
        fault.pin_pad = token.so_pin.encode()
        async with pool.security_officer(pkcs11.PROTECTED_AUTH):
            assert _who(pool) is LoginState.SO
        assert _who(pool) is LoginState.USER


# -- Closing ----------------------------------------------------------------------


async def test_a_pool_that_is_not_open_has_no_officer(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """Before opening and after closing it is PoolClosed at once."""

    async def enter(pool: TokenPool) -> None:
        async with pool.security_officer(token.so_pin, timeout=_LAST_RESORT):
            pytest.fail("the block was entered")

    pool = make_pool()
    with pytest.raises(PoolClosed):
        await enter(pool)
    async with pool:
        pass
    with pytest.raises(PoolClosed):
        await enter(pool)


async def test_closing_the_pool_ends_a_waiting_officer(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """PoolClosed wins over his own deadline, and closing does not wait for that."""
    pool = make_pool(close_timeout=0.5)
    await pool.open()
    holder, officer = _Holder(pool), _Officer(pool, token.so_pin, timeout=_LAST_RESORT)
    officer.go.set()  # should he get in, he comes out
    async with anyio.create_task_group() as group:
        group.start_soon(holder)
        await holder.has.wait()
        group.start_soon(officer)
        await paused(pool)
        try:
            await pool.close()
        finally:
            holder.go.set()
        await officer.ended.wait()
    assert isinstance(officer.error, PoolClosed)
    assert pool.state is PoolState.CLOSED


async def test_closing_the_pool_inside_a_period_lets_the_block_end(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Another task closes: the officer's session is over, and his exit returns."""
    pool = make_pool(module=fault.path, close_timeout=0.5)
    await pool.open()
    officer = _Officer(pool, token.so_pin)
    async with anyio.create_task_group() as group:
        group.start_soon(officer)
        await officer.inside.wait()
        await pool.close()
        assert pool.state is PoolState.CLOSED
        assert fault.sessions() == []
        officer.go.set()
        with anyio.move_on_after(_LAST_RESORT / 2):
            await officer.ended.wait()
        if not officer.ended.is_set():
            pytest.fail("the exit waits for a pool that is closed")
    assert officer.error is None or isinstance(officer.error, PoolClosed)


async def test_closing_the_pool_ends_what_waits_for_the_officer(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """An operation, a login and a second officer get PoolClosed, and at once."""
    pool = make_pool(close_timeout=0.5)
    await pool.open()
    first = _Officer(pool, token.so_pin)
    second = _Officer(pool, token.so_pin)
    second.go.set()  # should he get in, he comes out
    errors: list[type[BaseException]] = []

    async def refused(call: Callable[[], Any]) -> None:
        with pytest.raises(PoolClosed) as caught:
            await call()
        errors.append(type(caught.value))

    with anyio.fail_after(_LAST_RESORT):
        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await first.inside.wait()
            group.start_soon(second)
            group.start_soon(refused, lambda: pool.generate_random(8))
            group.start_soon(refused, pool.logout)
            await anyio.wait_all_tasks_blocked()
            await pool.close()
            first.go.set()
    assert errors == [PoolClosed] * 2
    assert isinstance(second.error, PoolClosed)


async def test_an_officer_who_outlives_his_block_can_do_nothing(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """After an error in the block as well his session is over."""
    kept: list[SecurityOfficer] = []

    def fail(so: SecurityOfficer) -> None:
        kept.append(so)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        async with pool.security_officer(token.so_pin) as so:
            fail(so)
    with pytest.raises(SessionClosed):
        await kept[0].set_pin(token.so_pin, "new-so-pin")
    async with pool.security_officer(token.so_pin):
        pass
