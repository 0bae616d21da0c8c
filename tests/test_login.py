"""The login: one state for every session, and PINs that are neither wasted nor shown.

What the fault module counts is what reached the token. Nothing here sleeps: calls are
held inside the module, and callers by events.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import hashlib
import pickle
import subprocess
import sys
import threading
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pkcs11
import pytest
import structlog.testing
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import KeyType, Mechanism, ObjectClass, TokenFlag

from faultmodule import CKR
from pkcs11_pool import (
    InvalidOption,
    InvalidType,
    KeyNotFound,
    LoginRequired,
    LoginState,
    OutcomeUnknown,
    PinLengthInvalid,
    PinRefused,
    PinSourceError,
    PoolClosed,
    PoolState,
    PoolTimeout,
    SessionState,
    TokenPool,
    TokenUnavailable,
    pins,
)
from poolkit import (
    given_up,
    hangs,
    paused,
    time_is_up,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef
    from pkcs11_pool.softhsm import ThrowawayToken

_WRONG = "4321"
_DIGEST = hashlib.sha256(b"message").digest()
_SECRET = "geheim-77-geheim"  # noqa: S105  # no token has it
_LAST_RESORT = 20
"""Seconds after which a test that would hang fails instead."""


async def _make_signer(pool: TokenPool, label: str = "signer") -> KeyRef:
    await pool.generate_keypair(KeyType.EC, curve="secp256r1", label=label, store=True)
    return pool.key(label=label)


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


def _who(pool: TokenPool) -> LoginState:
    """Who is logged in now; a type checker would take the property for fixed."""
    return pool.login_state


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event; a test that would hang fails instead."""
    with anyio.fail_after(_LAST_RESORT):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments)


# -- Opening ----------------------------------------------------------------------


async def test_opening_logs_in_once(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """With a PIN the login happens at opening, by one C_Login."""
    async with make_pool(module=fault.path, pin=token.user_pin) as pool:
        assert _who(pool) is LoginState.USER
        assert fault.count("C_Login") == 1
        async with pool.session() as session:
            info = await session.info()
        assert info.state is SessionState.RO_USER_FUNCTIONS


async def test_without_a_pin_nobody_is_logged_in(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A pool without a PIN opens, sends none, and its sessions are public."""
    async with make_pool(module=fault.path, pin=None) as pool:
        assert _who(pool) is LoginState.PUBLIC
        assert fault.count("C_Login") == 0
        async with pool.session() as session:
            info = await session.info()
        assert info.state is SessionState.RO_PUBLIC_SESSION


async def test_a_wrong_pin_at_opening_fails_there_and_leaves_nothing(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The pool is closed, no session is open, the module finalised, the token free."""
    pool = make_pool(module=fault.path, pin=_WRONG)
    with pytest.raises(PinRefused):
        await pool.open()
    assert pool.state is PoolState.CLOSED
    assert _who(pool) is LoginState.PUBLIC
    assert fault.sessions() == []
    assert fault.count("C_Login") == 1
    assert fault.count("C_Initialize") == fault.count("C_Finalize") == 1
    async with make_pool(module=fault.path) as another:
        assert _who(another) is LoginState.USER


async def test_pool_after_pool_does_not_send_a_refused_pin(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The guard is the process's: a service that opens in a loop locks nothing."""
    for _ in range(4):
        with pytest.raises(PinRefused):
            await make_pool(module=fault.path, pin=_WRONG).open()
    assert fault.count("C_Login") == 1
    async with make_pool(module=fault.path) as pool:
        assert _who(pool) is LoginState.USER
    # A good login ends it: the token counts anew.
    with pytest.raises(PinRefused):
        await make_pool(module=fault.path, pin=_WRONG).open()
    assert fault.count("C_Login") == 3


async def test_login_and_logout_need_an_open_pool(make_pool: MakePool) -> None:
    """Before opening and after closing both are refused."""
    pool = make_pool()
    with pytest.raises(PoolClosed):
        await pool.login()
    with pytest.raises(PoolClosed):
        await pool.logout()
    async with pool:
        pass
    with pytest.raises(PoolClosed):
        await pool.login()
    with pytest.raises(PoolClosed):
        await pool.logout()


# -- Every session sees the same login --------------------------------------------


async def test_login_and_logout_are_seen_by_every_open_session(pool: TokenPool) -> None:
    """Sessions opened before a change are in the new state after it.

    Text: When an application's session logs into a token, all of that application's
    sessions with that token become logged in.
    Text: Conversely, when an application's session logs out of a token, all of that
    application's sessions with that token become logged out.
    """
    async with pool.session() as reader, pool.session(rw=True) as writer:

        async def states() -> tuple[SessionState, SessionState]:
            return (await reader.info()).state, (await writer.info()).state

        assert await states() == (
            SessionState.RO_USER_FUNCTIONS,
            SessionState.RW_USER_FUNCTIONS,
        )
        await pool.logout()
        assert _who(pool) is LoginState.PUBLIC
        assert await states() == (
            SessionState.RO_PUBLIC_SESSION,
            SessionState.RW_PUBLIC_SESSION,
        )
        await pool.login()
        assert _who(pool) is LoginState.USER
        assert await states() == (
            SessionState.RO_USER_FUNCTIONS,
            SessionState.RW_USER_FUNCTIONS,
        )


async def test_an_open_session_loses_its_private_key_with_the_logout(
    pool: TokenPool,
) -> None:
    """A key used in an open session is refused there after the logout, then back."""
    key = await _make_signer(pool)
    async with pool.session() as session:
        bound = key.on(session)
        await _sign(bound)
        await pool.logout()
        with pytest.raises(LoginRequired):
            await _sign(bound)
        await pool.login()
        assert _is_signature(await key.public_key_der(), await _sign(bound))


async def test_operations_under_changing_logins_are_right_or_refused(
    pool: TokenPool,
) -> None:
    """While others log in and out, a caller gets a good signature or LoginRequired."""
    key = await _make_signer(pool)
    public_der = await key.public_key_der()
    right = refused = 0

    async def sign_often() -> None:
        nonlocal right, refused
        for _ in range(20):
            try:
                signature = await _sign(key)
            except LoginRequired:
                refused += 1
            else:
                right += _is_signature(public_der, signature)

    async with anyio.create_task_group() as group:
        for _ in range(32):
            group.start_soon(sign_often)
        for _ in range(15):
            await pool.logout()
            await pool.login()
    assert right + refused == 32 * 20
    assert _who(pool) is LoginState.USER


async def test_searches_that_began_logged_out_are_login_required(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """However often a login comes just too late for a search: not KeyNotFound.

    Each round: a search finds nothing, a login comes before it ends, and a logout
    before it is made again.
    """
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        await pool.logout()

        async def sign() -> None:
            with pytest.raises(LoginRequired):
                await _sign(key)

        async with anyio.create_task_group() as group:
            # The second search of a lookup: private keys first, then secret keys.
            fault.on("C_FindObjectsFinal", nth=2, hang="before")
            group.start_soon(sign)
            for _ in range(3):
                await _in_thread(fault.wait_until_hanging, "C_FindObjectsFinal")
                await pool.login()
                group.start_soon(pool.logout)
                await paused(pool)
                fault.on("C_FindObjectsFinal", nth=2, hang="before")
                fault.release()
            fault.clear()
        assert _who(pool) is LoginState.PUBLIC


# -- Logged out -------------------------------------------------------------------

_PRIVATE_USES: dict[str, Callable[[TokenPool], Awaitable[object]]] = {
    "sign": lambda pool: _sign(pool.key(label="signer")),
    "decrypt": lambda pool: pool.key(label="signer").decrypt(b"x" * 16),
    "decrypt by id": lambda pool: pool.key(id=b"7").decrypt(b"x" * 16),
    "attributes": lambda pool: pool.key(
        label="signer", object_class=ObjectClass.PRIVATE_KEY
    ).attributes(),
    "generate": lambda pool: pool.generate_keypair(
        KeyType.EC, curve="secp256r1", label="new", store=True
    ),
    "destroy": lambda pool: pool.key(
        label="signer", object_class=ObjectClass.PRIVATE_KEY
    ).destroy(),
}


@pytest.mark.parametrize("use", _PRIVATE_USES)
async def test_logged_out_a_private_key_is_login_required(
    pool: TokenPool, use: str
) -> None:
    """It is LoginRequired, also a pkcs11.UserNotLoggedIn, and not KeyNotFound."""
    await _make_signer(pool)
    await pool.logout()
    with pytest.raises(LoginRequired) as caught:
        await _PRIVATE_USES[use](pool)
    assert isinstance(caught.value, pkcs11.UserNotLoggedIn)
    assert not isinstance(caught.value, KeyNotFound)
    assert "login" in str(caught.value)


async def test_logged_in_a_missing_key_is_not_found(pool: TokenPool) -> None:
    """While somebody is logged in, a key that is not there is KeyNotFound."""
    with pytest.raises(KeyNotFound) as caught:
        await _sign(pool.key(label="nobody"))
    assert not isinstance(caught.value, LoginRequired)


async def test_logged_out_what_is_public_still_works(pool: TokenPool) -> None:
    """A public key, a digest and random numbers need no login."""
    key = await _make_signer(pool)
    signature = await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
    await pool.logout()
    assert await key.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)
    digest = await pool.digest(b"message", mechanism=Mechanism.SHA256)
    assert digest == _DIGEST
    assert len(await pool.generate_random(128)) == 16


async def test_logged_out_the_pool_stays_out(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The pool has the PIN, yet does not log in by itself against the user's word."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        await pool.logout()
        fault.reset_counts()
        for _ in range(3):
            with pytest.raises(LoginRequired):
                await _sign(key)
        assert fault.count("C_Login") == 0
        assert _who(pool) is LoginState.PUBLIC
        await pool.login()
        assert _is_signature(await key.public_key_der(), await _sign(key))
        assert fault.count("C_Login") == 1


async def test_logout_sends_one_logout_and_again_is_harmless(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A second logout finds nobody logged in and sends nothing."""
    async with make_pool(module=fault.path) as pool:
        await pool.logout()
        assert fault.count("C_Logout") == 1
        await pool.logout()
        assert fault.count("C_Logout") == 1
        assert _who(pool) is LoginState.PUBLIC


async def test_logout_waits_for_the_call_inside_or_changes_nothing(
    make_pool: MakePool,
) -> None:
    """A logout that would wait too long is PoolTimeout, and all is as before."""
    release = threading.Event()
    started = threading.Event()

    def stay(_session: pkcs11.Session) -> str:
        started.set()
        release.wait(_LAST_RESORT)
        return "stayed"

    results = []
    async with make_pool() as pool:
        epoch = pool.login_epoch

        async def run() -> None:
            results.append(await pool.run(stay, timeout=None))

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await _in_thread(started.wait)
            phases: list[str] = []

            async def log_out() -> None:
                with pytest.raises(PoolTimeout) as caught:
                    await pool.logout()
                phases.append(caught.value.phase)

            async with anyio.create_task_group() as late:
                late.start_soon(log_out)
                await paused(pool)
                time_is_up(pool)
            assert phases == ["waiting"]
            assert _who(pool) is LoginState.USER
            assert pool.login_epoch == epoch
            release.set()
        assert results == ["stayed"]
        await pool.logout()
        assert _who(pool) is LoginState.PUBLIC


# -- login() ----------------------------------------------------------------------


async def test_login_while_logged_in_returns_and_checks_nothing(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Even a wrong PIN passes, is not sent, and does not become the pool's."""
    async with make_pool(module=fault.path) as pool:
        epoch = pool.login_epoch
        fault.reset_counts()
        await pool.login(_WRONG)
        await pool.login(_WRONG, force=True)
        assert fault.count("C_Login") == 0
        assert pool.login_epoch == epoch
        await pool.logout()
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_an_accepted_pin_becomes_the_pools(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """A pool opened without a PIN restores a lost login with that of login()."""
    async with make_pool(module=fault.path, pin=None) as pool:
        await pool.login(token.user_pin)
        key = await _make_signer(pool)
        fault.lose_login()
        assert _is_signature(await key.public_key_der(), await _sign(key))
        await pool.logout()
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_a_refused_login_leaves_the_pool_ready_and_public(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """A wrong PIN costs nothing but the error: no epoch, and the pool goes on."""
    async with make_pool(pin=None) as pool:
        epoch = pool.login_epoch
        with pytest.raises(PinRefused) as caught:
            await pool.login(_WRONG)
        assert isinstance(caught.value, pkcs11.PinIncorrect)
        assert isinstance(caught.value.__cause__, pkcs11.PinIncorrect)
        assert pool.state is PoolState.READY
        assert _who(pool) is LoginState.PUBLIC
        assert pool.login_epoch == epoch
        assert pool.stats().logins_failed_total == 1
        assert len(await pool.generate_random(64)) == 8
        await pool.login(token.user_pin)
        assert _who(pool) is LoginState.USER
        assert pool.stats().logins_total == 1


async def test_a_refused_pin_does_not_become_the_pools(make_pool: MakePool) -> None:
    """After a wrong PIN given to login(), login() takes the pool's own again."""
    async with make_pool() as pool:
        await pool.logout()
        with pytest.raises(PinRefused):
            await pool.login(_WRONG)
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_login_without_any_pin_is_login_required(make_pool: MakePool) -> None:
    """A pool that has no PIN says so, and stays open."""
    async with make_pool(pin=None) as pool:
        with pytest.raises(LoginRequired, match="PIN"):
            await pool.login()
        assert pool.state is PoolState.READY


async def test_concurrent_logins_send_one_pin(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Fifty callers of login() cost one C_Login."""
    async with make_pool(module=fault.path) as pool:
        await pool.logout()
        fault.reset_counts()
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(pool.login)
        assert fault.count("C_Login") == 1
        assert _who(pool) is LoginState.USER


async def test_a_cancelled_login_goes_on_without_its_caller(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Cancellation stops the wait; the PIN was sent, and is not sent twice."""
    async with make_pool(module=fault.path) as pool:
        await pool.logout()
        fault.reset_counts()
        fault.on("C_Login", hang="before")
        async with anyio.create_task_group() as group:
            group.start_soon(pool.login)
            await _in_thread(fault.wait_until_hanging, "C_Login")
            group.cancel_scope.cancel()
        fault.clear()
        await pool.login()
        assert _who(pool) is LoginState.USER
        assert fault.count("C_Login") == 1


# -- PINs that were refused -------------------------------------------------------


async def test_a_rejected_pin_is_not_sent_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The second time it is PinRefused before the token hears of it."""
    async with make_pool(module=fault.path, pin=None) as pool:
        for _ in range(3):
            with pytest.raises(PinRefused):
                await pool.login(_WRONG)
        assert fault.count("C_Login") == 1


async def test_force_sends_a_rejected_pin(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """With force=True the token is asked once more."""
    async with make_pool(module=fault.path, pin=None) as pool:
        with pytest.raises(PinRefused):
            await pool.login(_WRONG)
        with pytest.raises(PinRefused):
            await pool.login(_WRONG, force=True)
        assert fault.count("C_Login") == 2


async def test_force_reaches_a_pin_that_a_callable_gives(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The pool's own source is insisted on as well, when login(force=True) is asked."""
    async with make_pool(module=fault.path, pin=lambda: token.user_pin) as pool:
        await pool.logout()
        fault.on("C_Login", replace=CKR.PIN_INCORRECT)
        with pytest.raises(PinRefused):
            await pool.login()
        fault.lose_login()
        with pytest.raises(PinRefused):
            await pool.login()
        await pool.login(force=True)
        assert _who(pool) is LoginState.USER


async def test_the_pools_own_pin_is_not_sent_again_by_its_operations(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A hundred operations that find the login lost do not lock the token."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        fault.on("C_Login", answer=CKR.PIN_INCORRECT, every=True)
        fault.lose_login()
        fault.reset_counts()
        refused = 0

        async def sign() -> None:
            nonlocal refused
            with pytest.raises(PinRefused):
                await _sign(key)
            refused += 1

        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(sign)
        with pytest.raises(PinRefused):
            await _sign(key)
        assert refused == 100
        assert fault.count("C_Login") == 1
        assert pool.state is PoolState.READY
        assert _who(pool) is LoginState.PUBLIC


async def test_another_pin_is_sent_after_a_rejected_one(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The book knows PINs, not attempts."""
    async with make_pool(module=fault.path, pin=None) as pool:
        for pin in ("aaaa", "bbbb", "aaaa", "bbbb"):
            with pytest.raises(PinRefused):
                await pool.login(pin)
        assert fault.count("C_Login") == 2
        await pool.login(token.user_pin)
        assert _who(pool) is LoginState.USER


async def test_a_good_login_strikes_the_book(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The token counts wrong PINs anew after it, so one may be sent again."""
    async with make_pool(module=fault.path, pin=None) as pool:
        with pytest.raises(PinRefused):
            await pool.login(_WRONG)
        await pool.login(token.user_pin)
        await pool.logout()
        fault.reset_counts()
        with pytest.raises(PinRefused):
            await pool.login(_WRONG)
        assert fault.count("C_Login") == 1


async def test_set_pin_strikes_the_book(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """A PIN that was refused before it was set is good afterwards, without force."""
    async with make_pool(pin=None) as pool:
        with pytest.raises(PinRefused):
            await pool.login(_WRONG)
        await pool.set_pin(token.user_pin, _WRONG)
        await pool.login(_WRONG)
        assert _who(pool) is LoginState.USER


async def test_init_pin_strikes_the_book(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """A PIN that was refused before the SO set it is good afterwards."""
    async with make_pool(pin=None) as pool:
        with pytest.raises(PinRefused):
            await pool.login(_WRONG)
        async with pool.security_officer(token.so_pin) as so:
            await so.init_pin(_WRONG)
        assert _who(pool) is LoginState.PUBLIC
        await pool.login(_WRONG)
        assert _who(pool) is LoginState.USER


# -- What the token says before a PIN is sent -------------------------------------

_HOPELESS = {
    "final try": TokenFlag.USER_PIN_FINAL_TRY,
    "locked": TokenFlag.USER_PIN_LOCKED,
}


@pytest.mark.parametrize("flag", _HOPELESS)
async def test_a_token_at_its_end_is_sent_no_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, flag: str
) -> None:
    """FINAL_TRY and LOCKED are PinRefused; gone, the next login goes through."""
    async with make_pool(module=fault.path, pin=None) as pool:
        fault.token_info(flags_set=_HOPELESS[flag])
        with pytest.raises(PinRefused):
            await pool.login(token.user_pin)
        assert fault.count("C_Login") == 0
        assert pool.state is PoolState.READY
        # Flags are read fresh: the pool need not be opened anew.
        fault.token_info()
        await pool.login(token.user_pin)
        assert _who(pool) is LoginState.USER


@pytest.mark.parametrize("flag", _HOPELESS)
async def test_a_token_at_its_end_is_not_opened_with_a_pin(
    make_pool: MakePool, fault: FaultModule, flag: str
) -> None:
    """At opening the flags hold as well, and nothing is left over."""
    fault.token_info(flags_set=_HOPELESS[flag])
    pool = make_pool(module=fault.path)
    with pytest.raises(PinRefused):
        await pool.open()
    assert fault.count("C_Login") == 0
    assert fault.sessions() == []
    assert pool.state is PoolState.CLOSED


async def test_flags_that_appear_later_stop_the_next_login(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """What the token said at opening does not count when another party spoils PINs."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        fault.token_info(flags_set=TokenFlag.USER_PIN_FINAL_TRY)
        fault.lose_login()
        fault.reset_counts()
        with pytest.raises(PinRefused):
            await _sign(key)
        assert fault.count("C_Login") == 0


async def test_the_final_try_can_be_insisted_on(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """force=True spends the last try."""
    async with make_pool(module=fault.path, pin=None) as pool:
        fault.token_info(flags_set=TokenFlag.USER_PIN_FINAL_TRY)
        await pool.login(token.user_pin, force=True)
        assert _who(pool) is LoginState.USER


async def test_the_token_is_asked_right_before_each_pin(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Between the last C_GetTokenInfo and C_Login nothing is sent by the actor."""
    async with make_pool(module=fault.path) as pool:
        for _ in range(2):
            await pool.logout()
            fault.clear_log()
            await pool.login()
            calls = fault.calls()
            place = next(i for i, c in enumerate(calls) if c.function == "C_Login")
            mine = [c for c in calls[:place] if c.thread == calls[place].thread]
            assert mine[-1].function == "C_GetTokenInfo"


@pytest.mark.parametrize("field", ["serial", "label", "model", "manufacturer"])
async def test_another_token_is_sent_no_pin(
    make_pool: MakePool, fault: FaultModule, field: str
) -> None:
    """A token that differs from the one that was opened never sees the PIN."""
    async with make_pool(module=fault.path, recovery_timeout=0.1) as pool:
        key = await _make_signer(pool)
        await pool.logout()
        fault.reset_counts()
        fault.token_info(**{field: "another"})  # type: ignore[arg-type]
        with pytest.raises(TokenUnavailable, match="another"):
            await pool.login()
        with pytest.raises(TokenUnavailable, match="another"):
            await pool.login(force=True)
        assert fault.count("C_Login") == 0
        assert _who(pool) is LoginState.PUBLIC
        fault.token_info()
        await _until(lambda: pool.state is PoolState.READY)
        await pool.login()
        await _sign(key)


async def test_another_token_is_sent_no_pin_to_restore_a_login(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """An operation that finds the login lost does not log in to a stranger."""
    async with make_pool(module=fault.path, recovery_timeout=0.1) as pool:
        key = await _make_signer(pool)
        fault.lose_login()
        fault.token_info(serial="another")
        fault.reset_counts()
        with pytest.raises(TokenUnavailable):
            await _sign(key)
        assert fault.count("C_Login") == 0


# -- A login that was lost --------------------------------------------------------


async def test_a_lost_login_is_restored_once_for_all(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """128 callers that find the token logged out cost one C_Login and no error."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        public_der = await key.public_key_der()
        epoch = pool.login_epoch
        fault.lose_login()
        fault.reset_counts()
        # The login takes until all the callers are there.
        fault.on("C_Login", hang="before")
        signatures = []

        async def sign() -> None:
            signatures.append(await _sign(key))

        async with anyio.create_task_group() as group:
            for _ in range(128):
                group.start_soon(sign)
            await _in_thread(fault.wait_until_hanging, "C_Login")
            await anyio.wait_all_tasks_blocked()
            fault.clear()
        assert fault.count("C_Login") == 1
        assert len(signatures) == 128
        assert all(_is_signature(public_der, s) for s in signatures)
        assert _who(pool) is LoginState.USER
        assert pool.login_epoch > epoch
        assert pool.stats().operations_failed == 0


async def test_a_login_lost_again_and_again_is_restored_each_time(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Each loss costs one C_Login, whichever operation finds it."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        public_der = await key.public_key_der()
        fault.reset_counts()
        for lost in range(1, 6):
            fault.lose_login()
            assert _is_signature(public_der, await _sign(key))
            assert fault.count("C_Login") == lost
        assert pool.stats().recoveries_total == 5


async def test_a_login_lost_under_an_open_session_is_restored(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """An operation in a PooledSession starts again in that same session."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        async with pool.session() as session:
            handle = session.handle
            fault.lose_login()
            signature = await _sign(key.on(session))
            assert session.handle == handle
            assert not session.closed
        assert _is_signature(await key.public_key_der(), signature)


async def test_a_run_is_not_repeated_unasked_but_the_login_is_restored(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """run() passes the error on; the next call finds the login there."""
    called = 0

    def use(session: pkcs11.Session) -> bytes:
        nonlocal called
        called += 1
        key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="signer")
        assert isinstance(key, pkcs11.PrivateKey)
        return key.sign(_DIGEST, mechanism=Mechanism.ECDSA)  # type: ignore[attr-defined, no-any-return]

    async with make_pool(module=fault.path) as pool:
        await _make_signer(pool)
        fault.lose_login()
        fault.reset_counts()
        # Still under way when the next call comes.
        fault.on("C_Login", hang="before")
        with pytest.raises(pkcs11.NoSuchKey):
            await pool.run(use)
        assert called == 1
        signatures = []

        async def run_again() -> None:
            signatures.append(await pool.run(use))

        async with anyio.create_task_group() as group:
            await _in_thread(fault.wait_until_hanging, "C_Login")
            group.start_soon(run_again)
            # A pool that does not let it wait for the login has the time to show it.
            with anyio.move_on_after(0.5):
                await _until(lambda: called == 2)
            fault.clear()
        assert len(signatures) == 1
        assert called == 2
        assert fault.count("C_Login") == 1


async def test_a_run_is_repeated_when_asked(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """With repeat=True the function is called again, once, in a fresh session."""
    sessions = []

    def use(session: pkcs11.Session) -> str:
        sessions.append(session.handle)  # type: ignore[attr-defined]
        session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="signer")
        return "found"

    async with make_pool(module=fault.path) as pool:
        await _make_signer(pool)
        fault.lose_login()
        assert await pool.run(use, repeat=True) == "found"
        assert len(sessions) == len(set(sessions)) == 2


async def test_a_wrong_call_is_no_lost_login(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A key that is not there costs one look at the session, and no C_Login."""
    async with make_pool(module=fault.path) as pool:
        epoch = pool.login_epoch
        fault.reset_counts()
        with pytest.raises(KeyNotFound):
            await _sign(pool.key(label="nobody"))
        assert fault.count("C_Login") == 0
        assert fault.count("C_GetSessionInfo") == 1
        assert pool.login_epoch == epoch


async def test_the_epoch_grows_with_every_change(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Login, logout, a period of the SO and a lost login each move it, and only up."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        epochs = [pool.login_epoch]
        await pool.logout()
        epochs.append(pool.login_epoch)
        await pool.login()
        epochs.append(pool.login_epoch)
        async with pool.security_officer(token.so_pin):
            epochs.append(pool.login_epoch)
        epochs.append(pool.login_epoch)
        fault.lose_login()
        await _sign(key)
        epochs.append(pool.login_epoch)
        assert epochs == sorted(set(epochs))
        await _sign(key)
        assert pool.login_epoch == epochs[-1]


# -- PIN sources ------------------------------------------------------------------


class _Answer(str):
    """A PIN whose end can be seen."""

    __slots__ = ("__weakref__",)


async def test_a_callable_is_asked_at_each_login_and_its_answer_dropped(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """Nothing in the pool keeps what the callable gave."""
    answers: list[weakref.ref[_Answer]] = []

    def ask() -> str:
        answer = _Answer(token.user_pin)
        answers.append(weakref.ref(answer))
        return answer

    pool = make_pool(pin=ask)
    assert len(answers) == 0
    async with pool:
        assert len(answers) == 1
        await pool.login()
        assert len(answers) == 1
        await pool.logout()
        await pool.login()
        assert len(answers) == 2

        def dropped() -> bool:
            gc.collect()
            return [answer() for answer in answers] == [None, None]

        # An object in a frame of another thread has a moment to go.
        await _until(dropped)


async def test_a_pin_that_changed_is_asked_for_again(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """A callable's new answer is sent although its old one was refused."""
    answers = iter([token.user_pin, _WRONG, token.user_pin])
    async with make_pool(module=fault.path, pin=lambda: next(answers)) as pool:
        await pool.logout()
        with pytest.raises(PinRefused):
            await pool.login()
        await pool.login()
        assert _who(pool) is LoginState.USER
        assert fault.count("C_Login") == 3


async def test_a_plain_callable_does_not_run_on_the_loop(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """It may block: no event loop stands still for it."""
    loop_thread = threading.get_ident()
    asked_on = []

    def ask() -> str:
        asked_on.append(threading.get_ident())
        return token.user_pin

    async with make_pool(pin=ask):
        assert len(asked_on) == 1
        assert loop_thread not in asked_on


async def test_a_pin_from_the_environment(
    make_pool: MakePool, token: ThrowawayToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pins.env reads the variable at each login, and names it when it is missing."""
    source = pins.env("POOL_TEST_PIN")
    monkeypatch.setenv("POOL_TEST_PIN", token.user_pin)
    async with make_pool(pin=source) as pool:
        await pool.logout()
        monkeypatch.delenv("POOL_TEST_PIN")
        with pytest.raises(PinSourceError, match="POOL_TEST_PIN"):
            await pool.login()
        assert pool.state is PoolState.READY


async def test_a_pin_from_a_file(
    make_pool: MakePool, token: ThrowawayToken, tmp_path: Path
) -> None:
    """pins.file takes the first line at each login, and names the file if it fails."""
    path = tmp_path / "pin"
    path.write_text(f"{token.user_pin}\nnot this\n")
    path.chmod(0o600)
    async with make_pool(pin=pins.file(path)) as pool:
        await pool.logout()
        path.unlink()
        with pytest.raises(PinSourceError, match=str(path)):
            await pool.login()


class _AsyncSource:
    """An async PIN source that counts, and waits when told to."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.tasks: list[int] = []
        self.came = anyio.Event()
        self.gate: anyio.Event | None = None

    async def __call__(self) -> str:
        self.asked += 1
        self.tasks.append(anyio.get_current_task().id)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.came.set()
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_an_async_source_is_awaited_by_the_caller(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """Whoever opens the pool awaits it, in its own task."""
    source = _AsyncSource(token.user_pin)
    async with make_pool(pin=source) as pool:
        assert _who(pool) is LoginState.USER
        assert source.tasks == [anyio.get_current_task().id]
        await pool.logout()
        await pool.login()
        assert source.tasks == [anyio.get_current_task().id] * 2


async def test_an_async_function_is_a_source(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """A plain coroutine function is taken as one too."""

    async def ask() -> str:
        await anyio.lowlevel.checkpoint()
        return token.user_pin

    async with make_pool(pin=ask) as pool:
        assert _who(pool) is LoginState.USER


async def test_an_async_source_is_awaited_once_for_all(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Of a hundred callers that need the login, one awaits the source."""
    source = _AsyncSource(token.user_pin)
    async with make_pool(module=fault.path, pin=source) as pool:
        key = await _make_signer(pool)
        public_der = await key.public_key_der()
        fault.lose_login()
        fault.reset_counts()
        source.asked, source.gate, source.came = 0, anyio.Event(), anyio.Event()
        signatures = []

        async def sign() -> None:
            signatures.append(await _sign(key))

        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(sign)
            await source.came.wait()
            source.gate.set()
        assert source.asked == 1
        assert fault.count("C_Login") == 1
        assert len(signatures) == 100
        assert all(_is_signature(public_der, s) for s in signatures)


async def test_another_caller_takes_over_the_source_of_a_cancelled_one(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """When the one who awaits the PIN is cancelled, the other gets the login."""
    source = _AsyncSource(token.user_pin)
    async with make_pool(module=fault.path, pin=source) as pool:
        key = await _make_signer(pool)
        fault.lose_login()
        source.gate, source.came, source.tasks = anyio.Event(), anyio.Event(), []
        done: list[int] = []
        scopes: dict[int, anyio.CancelScope] = {}

        async def sign() -> None:
            me = anyio.get_current_task().id
            with anyio.CancelScope() as scope:
                scopes[me] = scope
                await _sign(key)
                done.append(me)

        with anyio.fail_after(_LAST_RESORT):
            async with anyio.create_task_group() as group:
                group.start_soon(sign)
                group.start_soon(sign)
                await source.came.wait()
                await anyio.wait_all_tasks_blocked()
                first = source.tasks[0]
                source.came = anyio.Event()
                scopes[first].cancel()
                await source.came.wait()
                source.gate.set()
        assert len(source.tasks) == 2
        assert done == [source.tasks[1]]
        assert done != [first]
        assert _who(pool) is LoginState.USER


async def test_a_cancelled_lone_caller_leaves_the_source_to_the_next(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Nobody else waits when it is cancelled: the next caller is sent for the PIN."""
    source = _AsyncSource(token.user_pin)
    async with make_pool(module=fault.path, pin=source) as pool:
        key = await _make_signer(pool)
        fault.lose_login()
        source.gate, source.came = anyio.Event(), anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(_sign, key)
            await source.came.wait()
            group.cancel_scope.cancel()
        source.gate.set()
        with anyio.fail_after(_LAST_RESORT):
            signature = await _sign(key)
        assert _is_signature(await key.public_key_der(), signature)


async def test_a_login_that_was_cancelled_leaves_the_source_to_the_next_one(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """Nobody waits for the PIN any more: the next who logs in is sent for it."""
    source = _AsyncSource(token.user_pin)
    async with make_pool(pin=source) as pool:
        await pool.logout()
        source.gate, source.came = anyio.Event(), anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(pool.login)
            await source.came.wait()
            group.cancel_scope.cancel()
        source.gate = None
        with anyio.fail_after(_LAST_RESORT / 2):
            await pool.login()
        assert _who(pool) is LoginState.USER


async def test_the_failure_of_an_async_source_reaches_all_who_wait(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Each of them gets PinSourceError with the cause, and no PIN is sent."""
    source = _AsyncSource(token.user_pin, OSError("vault is down"))
    async with make_pool(module=fault.path, pin=source, max_sessions=20) as pool:
        key = await _make_signer(pool)
        fault.lose_login()
        fault.reset_counts()
        source.gate, source.came = anyio.Event(), anyio.Event()
        failures = []

        async def sign() -> None:
            with pytest.raises(PinSourceError) as caught:
                await _sign(key)
            failures.append(caught.value)

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(sign)
            await source.came.wait()
            # All have found the login lost: none is on a worker or in line for one.
            await _until(lambda: pool.stats().operations_waiting == 20)
            await _until(lambda: pool.stats().operations_running == 0)
            source.gate.set()
        assert len(failures) == 20
        assert all(isinstance(e.__cause__, OSError) for e in failures)
        assert fault.count("C_Login") == 0
        assert pool.state is PoolState.READY
        # Nothing sticks: the next caller asks again.
        source.answers = [token.user_pin]
        assert _is_signature(await key.public_key_der(), await _sign(key))


async def test_an_async_source_that_fails_at_opening_closes_the_pool(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The opening raises PinSourceError and leaves nothing."""
    pool = make_pool(module=fault.path, pin=_AsyncSource(OSError("vault is down")))
    with pytest.raises(PinSourceError) as caught:
        await pool.open()
    assert isinstance(caught.value.__cause__, OSError)
    assert pool.state is PoolState.CLOSED
    assert fault.sessions() == []


async def test_a_source_that_hangs_does_not_outlast_the_deadline(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The caller who awaits the PIN gets PoolTimeout on time like everybody else."""
    source = _AsyncSource(token.user_pin)
    async with make_pool(module=fault.path, pin=source) as pool:
        key = await _make_signer(pool)
        fault.lose_login()
        source.gate = anyio.Event()
        with anyio.fail_after(_LAST_RESORT), pytest.raises(PoolTimeout):
            await _sign(key, timeout=0.2)
        source.gate.set()
        assert _is_signature(await key.public_key_der(), await _sign(key))


async def test_an_async_source_serves_the_blocking_face(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """A plain thread that needs the login awaits the source in a loop of its own."""
    source = _AsyncSource(token.user_pin)
    async with make_pool(module=fault.path, pin=source) as pool:
        key = await _make_signer(pool)
        public_der = await key.public_key_der()
        fault.lose_login()
        source.asked = 0

        def sign() -> bytes:
            return key.sync.sign(
                _DIGEST, mechanism=Mechanism.ECDSA, signature_format="der"
            )

        assert _is_signature(public_der, await _in_thread(sign))
        assert source.asked == 1


def _raises() -> str:
    raise OSError("no such card")


_BROKEN_SOURCES: dict[str, Callable[[], object]] = {
    "raises": _raises,
    "gives None": lambda: None,
    "gives nothing": lambda: "",
    "gives bytes": lambda: b"1234",
    "gives a number": lambda: 1234,
}


@pytest.mark.parametrize("broken", _BROKEN_SOURCES)
async def test_a_source_that_gives_no_pin_is_a_pin_source_error(
    make_pool: MakePool, fault: FaultModule, broken: str
) -> None:
    """It fails at opening, says what the source did, and nothing was sent."""
    pool = make_pool(module=fault.path, pin=_BROKEN_SOURCES[broken])
    with pytest.raises(PinSourceError) as caught:
        await pool.open()
    assert isinstance(caught.value, PinRefused)
    assert "source" in str(caught.value)
    assert fault.count("C_Login") == 0
    assert fault.sessions() == []
    assert pool.state is PoolState.CLOSED


@pytest.mark.parametrize("broken", _BROKEN_SOURCES)
async def test_an_async_source_that_gives_no_pin_is_a_pin_source_error(
    make_pool: MakePool, fault: FaultModule, broken: str
) -> None:
    """The same from a source that is awaited."""

    async def ask() -> object:
        return _BROKEN_SOURCES[broken]()

    pool = make_pool(module=fault.path, pin=ask)
    with pytest.raises(PinSourceError):
        await pool.open()
    assert fault.count("C_Login") == 0
    assert pool.state is PoolState.CLOSED


async def test_a_pin_pad_is_sent_no_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """With PROTECTED_AUTH C_Login gets a NULL PIN, and the pad's is taken."""
    fault.pin_pad = token.user_pin.encode()
    async with make_pool(module=fault.path, pin=pkcs11.PROTECTED_AUTH) as pool:
        assert _who(pool) is LoginState.USER
        key = await _make_signer(pool)
        fault.lose_login()
        assert _is_signature(await key.public_key_der(), await _sign(key))
        # Without a pad the token answers a NULL PIN: so none was sent before.
        await pool.logout()
        fault.pin_pad = None
        with pytest.raises(pkcs11.PKCS11Error):
            await pool.login()
        assert pool.state is PoolState.READY


async def test_a_wrong_pin_on_the_pad_can_be_typed_again(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Nobody knows what was typed, so the next try is sent."""
    fault.pin_pad = _WRONG.encode()
    async with make_pool(module=fault.path, pin=None) as pool:
        with pytest.raises(PinRefused):
            await pool.login(pkcs11.PROTECTED_AUTH)  # type: ignore[arg-type]
        fault.pin_pad = token.user_pin.encode()
        await pool.login(pkcs11.PROTECTED_AUTH)  # type: ignore[arg-type]
        assert _who(pool) is LoginState.USER
        assert fault.count("C_Login") == 2


@pytest.mark.parametrize("length", [1, 3, 256])
async def test_a_pin_of_a_wrong_length_is_not_sent(
    make_pool: MakePool, fault: FaultModule, length: int
) -> None:
    """The message has the lengths that the token takes, at login and at opening."""
    async with make_pool(module=fault.path, pin=None) as pool:
        with pytest.raises(PinLengthInvalid, match=f"4 to 255 .* {length} ") as caught:
            await pool.login("7" * length)
        assert isinstance(caught.value, PinRefused)
        assert isinstance(caught.value, pkcs11.PinLenRange)
    with pytest.raises(PinLengthInvalid):
        await make_pool(module=fault.path, pin="7" * length).open()
    assert fault.count("C_Login") == 0
    assert fault.sessions() == []


async def test_a_pins_length_is_counted_in_bytes(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Two letters of two bytes each are four: long enough to be sent."""
    async with make_pool(module=fault.path, pin=None) as pool:
        with pytest.raises(PinRefused) as caught:
            await pool.login("éé")
        assert not isinstance(caught.value, PinLengthInvalid)
        assert fault.count("C_Login") == 1


# -- set_pin ----------------------------------------------------------------------


async def test_set_pin_changes_the_tokens_and_the_pools(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The pool restores a lost login with the new PIN; the old one is refused."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        await pool.set_pin(token.user_pin, "new-pin")
        fault.lose_login()
        assert _is_signature(await key.public_key_der(), await _sign(key))
        await pool.logout()
        with pytest.raises(PinRefused):
            await pool.login(token.user_pin)
        await pool.login()
    async with make_pool(module=fault.path, pin="new-pin") as pool:
        assert _who(pool) is LoginState.USER


async def test_set_pin_replaces_a_callable(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """After set_pin the pool's PIN is the new one, whatever its source says."""
    async with make_pool(pin=lambda: token.user_pin) as pool:
        await pool.set_pin(token.user_pin, "new-pin")
        await pool.logout()
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_set_pin_with_a_wrong_old_pin_changes_nothing(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It is PinRefused, the pool keeps its PIN, and the wrong one is not sent again."""
    async with make_pool(module=fault.path) as pool:
        for _ in range(2):
            with pytest.raises(PinRefused):
                await pool.set_pin(_WRONG, "new-pin")
        assert fault.count("C_SetPIN") == 1
        assert _who(pool) is LoginState.USER
        await pool.logout()
        await pool.login()
        assert _who(pool) is LoginState.USER


@pytest.mark.parametrize("new", ["123", "7" * 256])
async def test_set_pin_refuses_a_new_pin_of_a_wrong_length(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, new: str
) -> None:
    """Nothing is sent, and the old PIN goes on being the pool's."""
    async with make_pool(module=fault.path) as pool:
        with pytest.raises(PinLengthInvalid):
            await pool.set_pin(token.user_pin, new)
        assert fault.count("C_SetPIN") == 0
        await pool.logout()
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_set_pin_that_is_cancelled_waits_and_keeps_the_new_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The token has the new PIN then, so the pool must have it too."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_SetPIN", hang="before")
        async with anyio.create_task_group() as group:
            group.start_soon(pool.set_pin, token.user_pin, "new-pin")
            await _in_thread(fault.wait_until_hanging, "C_SetPIN")
            group.cancel_scope.cancel()
            fault.clear()
        await pool.logout()
        await pool.login()
        assert _who(pool) is LoginState.USER
        assert pool.stats().logins_failed_total == 0


async def test_set_pin_that_is_cancelled_by_its_task_keeps_the_new_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """A native Task.cancel() waits for the outcome too."""
    if not _on_asyncio():
        pytest.skip("Task.cancel() is asyncio's")
    async with make_pool(module=fault.path) as pool:
        fault.on("C_SetPIN", hang="before")
        task = asyncio.create_task(pool.set_pin(token.user_pin, "new-pin"))
        await _in_thread(fault.wait_until_hanging, "C_SetPIN")
        task.cancel()
        await anyio.wait_all_tasks_blocked()
        assert not task.done()
        fault.clear()
        with pytest.raises(asyncio.CancelledError):
            await task
        await pool.logout()
        await pool.login()
        assert _who(pool) is LoginState.USER


def _on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def test_a_set_pin_that_timed_out_leaves_no_pin_to_try(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Either PIN may be the wrong one, so the pool sends neither until login(pin)."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        fault.on("C_SetPIN", hang="after")
        await given_up(
            pool,
            lambda: pool.set_pin(token.user_pin, "new-pin"),
            hangs(fault, "C_SetPIN"),
        )
        try:
            fault.lose_login()
            fault.reset_counts()
            with pytest.raises(LoginRequired):
                await _sign(key)
            with pytest.raises(LoginRequired):
                await pool.login()
            assert fault.count("C_Login") == 0
            await pool.login("new-pin")
            assert _is_signature(await key.public_key_der(), await _sign(key))
        finally:
            # The call must be back before the module can be finalised.
            fault.clear()
            await _until(lambda: pool.stats().calls_stuck == 0)


async def test_a_set_pin_lost_with_the_token_leaves_no_pin_to_try(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The token did it and could not say so: neither PIN is sent until login(pin)."""
    async with make_pool(module=fault.path) as pool:
        key = await _make_signer(pool)
        fault.on("C_SetPIN", replace=CKR.DEVICE_ERROR)
        with pytest.raises(OutcomeUnknown):
            await pool.set_pin(token.user_pin, "new-pin")
        fault.lose_login()
        fault.reset_counts()
        with pytest.raises(LoginRequired):
            await _sign(key)
        assert fault.count("C_Login") == 0
        await pool.login("new-pin")
        assert _is_signature(await key.public_key_der(), await _sign(key))


# -- PINs do not show -------------------------------------------------------------


def _shown(error: BaseException) -> str:
    """A traceback as the curious print it: with the locals of our own frames."""
    seen = traceback.TracebackException.from_exception(error, capture_locals=True)
    frames = []
    chain: list[traceback.TracebackException | None] = [seen]
    while chain:
        item = chain.pop()
        if item is None:
            continue
        frames += [str(item)]
        frames += [
            f"{frame.filename}:{frame.lineno} {frame.locals}"
            for frame in item.stack
            if frame.filename != __file__
        ]
        chain += [item.__cause__, item.__context__]
    return "\n".join(frames)


async def _no_such_key(pool: TokenPool) -> object:
    return await pool.key(label="nobody").sign(b"x", pin=_SECRET)


async def _bad_data(pool: TokenPool) -> object:
    return await pool.key(label="nobody").sign(7, pin=_SECRET)  # type: ignore[arg-type]


async def _so_period(pool: TokenPool) -> object:
    async with pool.security_officer(_SECRET):
        return None


async def _so_bad_timeout(pool: TokenPool) -> object:
    async with pool.security_officer(_SECRET, timeout=-1):
        return None


async def _logged_out_login(pool: TokenPool, *arguments: Any, **options: Any) -> None:
    await pool.logout()
    await pool.login(*arguments, **options)


_FAILING_PIN_CALLS: dict[str, Callable[[TokenPool], Awaitable[object]]] = {
    "login": lambda pool: _logged_out_login(pool, _SECRET),
    "login, bytes": lambda pool: _logged_out_login(pool, _SECRET.encode()),
    "login, bad force": lambda pool: _logged_out_login(pool, _SECRET, force="yes"),
    "set_pin, wrong old": lambda pool: pool.set_pin(_SECRET, _SECRET + "1"),
    "set_pin, short new": lambda pool: pool.set_pin(_SECRET, "1"),
    "set_pin, no new": lambda pool: pool.set_pin(_SECRET, ""),
    "set_pin, bad new": lambda pool: pool.set_pin(
        _SECRET,
        None,  # type: ignore[arg-type]
    ),
    "set_pin, bad old": lambda pool: pool.set_pin(
        None,  # type: ignore[arg-type]
        _SECRET,
    ),
    "set_pin, bad timeout": lambda pool: pool.set_pin(_SECRET, _SECRET, timeout=-1),
    "sign, no key": _no_such_key,
    "sign, bad data": _bad_data,
    "decrypt": lambda pool: pool.key(label="nobody").decrypt(b"x", pin=_SECRET),
    "officer": _so_period,
    "officer, bad timeout": _so_bad_timeout,
}


@pytest.mark.parametrize("call", _FAILING_PIN_CALLS)
async def test_no_traceback_shows_a_pin(pool: TokenPool, call: str) -> None:
    """Not even one with locals: no frame of ours holds a PIN when it raises."""
    with pytest.raises((pkcs11.PKCS11Error, InvalidOption)) as caught:
        await _FAILING_PIN_CALLS[call](pool)
    assert _SECRET not in _shown(caught.value)


async def test_no_traceback_shows_the_pin_that_the_officer_sets(
    pool: TokenPool, token: ThrowawayToken, make_pool: MakePool
) -> None:
    """so.init_pin and so.set_pin hide their PINs as well."""
    del make_pool
    shown = []
    async with pool.security_officer(token.so_pin) as so:
        calls: tuple[Callable[[], Awaitable[None]], ...] = (
            lambda: so.init_pin(_SECRET * 20),
            lambda: so.init_pin(_SECRET, timeout=-1),
            lambda: so.set_pin(_SECRET, _SECRET),
            lambda: so.set_pin(_SECRET, ""),
        )
        for call in calls:
            with pytest.raises((pkcs11.PKCS11Error, InvalidOption)) as caught:
                await call()
            shown.append(_shown(caught.value))
    assert len(shown) == 4
    assert [text for text in shown if _SECRET in text] == []


_BAD_POOLS: dict[str, Callable[[], object]] = {
    "bad module": lambda: TokenPool(7, slot_id=0, pin=_SECRET),  # type: ignore[arg-type]
    "no token": lambda: TokenPool("/m", pin=_SECRET),
    "pin in bytes": lambda: TokenPool("/m", slot_id=0, pin=_SECRET.encode()),
    "uri, no module": lambda: TokenPool.from_uri(f"pkcs11:token=x?pin-value={_SECRET}"),
    "uri, bad slot": lambda: TokenPool.from_uri(
        f"pkcs11:slot-id=x?module-path=/m&pin-value={_SECRET}"
    ),
    "uri, twice": lambda: TokenPool.from_uri(
        f"pkcs11:token=x?pin-value={_SECRET}&pin-value={_SECRET}"
    ),
    "uri, no UTF-8": lambda: TokenPool.from_uri(
        f"pkcs11:token=x?module-path=/m&pin-value={_SECRET}%FF"
    ),
}


@pytest.mark.parametrize("bad", _BAD_POOLS)
def test_no_traceback_of_the_constructor_shows_a_pin(bad: str) -> None:
    """Wrong options beside a PIN, and a PIN of a wrong type, are no leak."""
    with pytest.raises(InvalidOption) as caught:
        _BAD_POOLS[bad]()
    assert _SECRET not in _shown(caught.value)


async def _gives_bytes() -> object:
    return _SECRET.encode()


_LEAKY_SOURCES: dict[str, Any] = {
    "wrong PIN": lambda: _SECRET,
    "bytes": _SECRET.encode,
    "awaited bytes": _gives_bytes,
}


@pytest.mark.parametrize("leaky", _LEAKY_SOURCES)
async def test_no_traceback_shows_what_a_source_gave(
    make_pool: MakePool, leaky: str
) -> None:
    """Neither a wrong PIN nor a PIN of a wrong type."""
    with pytest.raises(PinRefused) as caught:
        await make_pool(pin=_LEAKY_SOURCES[leaky]).open()
    assert _SECRET not in _shown(caught.value)


async def test_no_traceback_shows_a_file_that_cannot_be_decoded(
    make_pool: MakePool, tmp_path: Path
) -> None:
    """The decoder's frames and errors hold the bytes, so they are not passed on."""
    path = tmp_path / "pin"
    path.write_bytes(_SECRET.encode() + b"\xff")
    path.chmod(0o600)
    with pytest.raises(PinSourceError, match="pin") as caught:
        await make_pool(pin=pins.file(path)).open()
    assert _SECRET not in _shown(caught.value)


async def test_no_object_shows_the_pin(make_pool: MakePool) -> None:
    """Neither repr, str nor vars of the pool and of what hangs on it."""
    pool = make_pool(pin=_SECRET)
    seen: set[int] = set()
    found = []

    def look(item: object, path: str, depth: int) -> None:
        if id(item) in seen or depth > 6 or isinstance(item, type):
            return
        seen.add(id(item))
        if _SECRET in repr(item) or _SECRET in str(item):
            found.append(path)
        slots = getattr(type(item), "__slots__", ())
        inner = dict(getattr(item, "__dict__", {}))
        for name in [slots] if isinstance(slots, str) else slots:
            # A name with two underscores is mangled: not to be had by accident.
            if hasattr(item, name):
                inner[name] = getattr(item, name)
        for name, value in inner.items():
            look(value, f"{path}.{name}", depth + 1)

    look(pool, "pool", 0)
    assert len(seen) > 20
    assert found == []


def test_a_hidden_pin_is_neither_pickled_nor_copied() -> None:
    """It stays in its process, and it has no text but stars."""
    secret = pins.hide(_SECRET)
    assert repr(secret) == str(secret) == f"{secret}" == "***"
    for spoil in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="PIN"):
            spoil(secret)


async def test_a_pool_is_neither_pickled_nor_copied(pool: TokenPool) -> None:
    """Nor what leads to it, and the error says so, not a lock inside."""
    for item in (pool, pool.key(label="signer")):
        for spoil in (pickle.dumps, copy.deepcopy):
            with pytest.raises(InvalidType, match="a pool, its sessions and its keys"):
                spoil(item)


def test_the_fingerprint_of_a_pin_is_of_no_use_elsewhere() -> None:
    """Who finds the book of refused PINs in a memory dump cannot try PINs on it."""
    text = (
        f"from pkcs11_pool import pins; print(pins.Secret({_SECRET!r}).fingerprint())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True
    ).stdout
    assert pins.Secret(_SECRET).fingerprint() == pins.Secret(_SECRET).fingerprint()
    assert str(pins.Secret(_SECRET).fingerprint()) != elsewhere.strip()


async def test_no_log_event_shows_a_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Everything that can be logged about logins is, and no PIN is in it."""
    with structlog.testing.capture_logs() as events:
        async with make_pool(module=fault.path, pin=token.user_pin) as pool:
            key = await _make_signer(pool)
            await pool.set_pin(token.user_pin, _SECRET)
            fault.lose_login()
            await _sign(key)
            await pool.logout()
            with pytest.raises(PinRefused):
                await pool.login(_SECRET + "-wrong")
            with pytest.raises(PinRefused):
                async with pool.security_officer(_SECRET + "-so"):
                    pass
            async with pool.security_officer(token.so_pin) as so:
                await so.init_pin(_SECRET + "-init")
    names = {event["event"] for event in events}
    assert {"login.started", "login.completed", "login.failed", "login.lost"} <= names
    assert [event for event in events if _SECRET in repr(event)] == []
    assert [event for event in events if token.so_pin in repr(event)] == []
