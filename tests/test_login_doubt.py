"""Logins and logouts whose answer was lost: the pool and the token still agree."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import Mechanism
from pkcs11.exceptions import PKCS11Error

from faultmodule import CKR
from pkcs11_pool import LoginRequired, LoginState, OutcomeUnknown, PinRefused
from pkcs11_pool.login.attachment import who_is_in
from poolkit import digest, eventually, hangs, settled

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_CODES = [CKR.DEVICE_ERROR, CKR.GENERAL_ERROR, CKR.FUNCTION_FAILED, 0x80000123]
"""Of a token that is away; and codes that say nothing."""
_SO = 0
"""``CKU_SO``."""


async def _agreed(pool: TokenPool) -> LoginState:
    """Who is logged in: by the pool and by the token, when all is quiet."""
    await eventually(lambda: pool.state.value == "ready")
    async with pool.session() as session:
        who = who_is_in(session._lease.session)  # noqa: SLF001  # what the token says
    assert who is pool.login_state
    return who


codes = pytest.mark.parametrize("code", _CODES, ids=hex)


@codes
async def test_a_login_whose_answer_was_lost_is_a_login(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, code: int
) -> None:
    """The token is asked, and says so: nothing else tells that the PIN is right."""
    async with make_pool(module=fault.path, pin=None) as pool:
        fault.on("C_Login", replace=code)
        await pool.login(token.user_pin)
        assert await _agreed(pool) is LoginState.USER
        assert fault.count("C_Login") == 1


@codes
async def test_a_login_that_was_not_made_is_none(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, code: int
) -> None:
    """The same answer, and the token says that nobody is in: its error is raised."""
    async with make_pool(module=fault.path, pin=None) as pool:
        fault.on("C_Login", answer=code)
        with pytest.raises(PKCS11Error):
            await pool.login(token.user_pin)
        assert await _agreed(pool) is LoginState.PUBLIC
        with pytest.raises(PinRefused):
            await pool.login("9999")


async def test_a_token_that_cannot_be_asked_is_logged_out_for_certain(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """A login that nobody knows of would let a wrong PIN pass for the right one."""
    async with make_pool(module=fault.path, pin=None) as pool:
        fault.on("C_Login", replace=CKR.DEVICE_ERROR)
        fault.on("C_GetSessionInfo", nth=2, answer=CKR.DEVICE_ERROR)
        with pytest.raises(PKCS11Error):
            await pool.login(token.user_pin)
        assert await _agreed(pool) is LoginState.PUBLIC
        with pytest.raises(PinRefused):
            await pool.login("9999")


async def test_a_session_that_closes_late_keeps_no_login_that_nobody_knows_of(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """It is in a worker's hands when all others are closed: it is logged out."""
    async with make_pool(module=fault.path, pin=None) as pool:
        await digest(pool)
        hold = fault.on("C_CloseSession", hang="before")
        await digest(pool)
        await hangs(fault, "C_CloseSession")
        fault.remove(hold)
        fault.on("C_Login", replace=CKR.USER_NOT_LOGGED_IN)
        fault.on("C_GetSessionInfo", nth=2, answer=CKR.USER_NOT_LOGGED_IN)
        with pytest.raises(PKCS11Error):
            await pool.login(token.user_pin)
        fault.on("C_DigestInit", answer=CKR.SESSION_HANDLE_INVALID)
        await digest(pool)
        assert pool.stats().recoveries_total == 1
        assert await _agreed(pool) is LoginState.PUBLIC
        fault.release()


@pytest.mark.parametrize("code", [*_CODES, CKR.USER_NOT_LOGGED_IN], ids=hex)
@pytest.mark.parametrize("how", ["answer", "replace"])
async def test_a_logout_is_a_logout_whatever_the_token_answers(
    make_pool: MakePool, fault: FaultModule, code: int, how: str
) -> None:
    """Where C_Logout does nothing, closing the last session logs out."""
    async with make_pool(module=fault.path) as pool:
        given: dict[str, Any] = {how: code}
        fault.on("C_Logout", **given)
        await pool.logout()
        assert await _agreed(pool) is LoginState.PUBLIC
        with pytest.raises(LoginRequired):
            await pool.key(label="any").sign(b"", mechanism=Mechanism.ECDSA)


async def test_a_logout_keeps_open_sessions_where_the_token_says_that_it_is_out(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Only the answer was lost, and they are well."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        fault.on("C_Logout", replace=CKR.DEVICE_ERROR)
        await pool.logout()
        assert await digest(session)


@codes
@pytest.mark.parametrize("how", ["answer", "replace"])
@pytest.mark.parametrize("answers", [True, False], ids=["asked", "mute"])
async def test_an_officers_login_whose_answer_was_lost_leaves_a_pool_that_works(  # noqa: PLR0917
    make_pool: MakePool,
    fault: FaultModule,
    token: ThrowawayToken,
    code: int,
    how: str,
    answers: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """He is in, or the user is again; never an officer whom nobody knows of."""
    async with make_pool(module=fault.path) as pool:
        given: dict[str, Any] = {how: code}
        fault.on("C_Login", when_user=_SO, **given)
        if not answers:
            fault.on("C_GetSessionInfo", nth=2, answer=code)
        made = how == "replace" and answers
        with nullcontext() if made else pytest.raises(PKCS11Error):
            async with pool.security_officer(token.so_pin) as so:
                assert (await so.session.info()).state.name == "RW_SO_FUNCTIONS"
        assert await _agreed(pool) is LoginState.USER
        assert {session.rw for session in fault.sessions()} == {False}


@codes
@pytest.mark.parametrize("how", ["answer", "replace"])
async def test_an_officer_whose_logout_fails_is_out_all_the_same(
    make_pool: MakePool,
    fault: FaultModule,
    token: ThrowawayToken,
    code: int,
    how: str,
) -> None:
    """And the user is in again, without a word: what was there before is restored."""
    async with make_pool(module=fault.path) as pool:
        async with pool.security_officer(token.so_pin):
            given: dict[str, Any] = {how: code}
            fault.on("C_Logout", **given)
        assert await _agreed(pool) is LoginState.USER
        await settled(pool)
        assert {session.rw for session in fault.sessions()} == {False}


@codes
@pytest.mark.parametrize("how", ["answer", "replace"])
async def test_a_pin_whose_change_is_not_told_of_is_sent_no_more(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, code: int, how: str
) -> None:
    """Neither the old one nor the new one: a wrong one would count."""
    async with make_pool(module=fault.path) as pool:
        given: dict[str, Any] = {how: code}
        fault.on("C_SetPIN", **given)
        with pytest.raises(OutcomeUnknown):
            await pool.set_pin(token.user_pin, "4321")
        await eventually(lambda: pool.state.value == "ready")
        await pool.logout()
        fault.reset_counts()
        with pytest.raises(LoginRequired):
            await pool.login()
        assert fault.count("C_Login") == 0
        await pool.login("4321" if how == "replace" else token.user_pin)


@pytest.mark.parametrize("code", _CODES[:2], ids=hex)
@pytest.mark.parametrize("how", ["answer", "replace"])
async def test_an_error_of_a_pin_whose_change_is_not_told_of_says_what_to_do(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, code: int, how: str
) -> None:
    """Which PIN it may be, what the pool does with its own, and it helps to obey."""
    given: dict[str, Any] = {how: code}
    async with make_pool(module=fault.path) as pool:
        fault.on("C_SetPIN", **given)
        with pytest.raises(
            OutcomeUnknown, match=r"set_pin.*old one or the.*neither"
        ) as e:
            await pool.set_pin(token.user_pin, "4321")
        assert "pool.login" in str(e.value)
        assert "pool.logout" in str(e.value)
        await eventually(lambda: pool.state.value == "ready")
        await pool.logout()
        try:
            await pool.login("4321")
        except PinRefused:
            await pool.login(token.user_pin)
        assert pool.login_state is LoginState.USER


@pytest.mark.parametrize("code", _CODES[:2], ids=hex)
@pytest.mark.parametrize("how", ["answer", "replace"])
async def test_an_error_of_the_officers_calls_says_what_to_do(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, code: int, how: str
) -> None:
    """init_pin may be made again; his own PIN is tried by a period."""
    given: dict[str, Any] = {how: code}
    async with make_pool(module=fault.path, pin=None) as pool:
        fault.on("C_InitPIN", **given)
        async with pool.security_officer(token.so_pin) as so:
            with pytest.raises(OutcomeUnknown, match=r"init_pin.*it again.*twice"):
                await so.init_pin("4321")
        await eventually(lambda: pool.state.value == "ready")
        async with pool.security_officer(token.so_pin) as so:
            await so.init_pin("4321")
        await pool.login("4321")
        await pool.logout()
        fault.on("C_SetPIN", **given)
        async with pool.security_officer(token.so_pin) as so:
            with pytest.raises(OutcomeUnknown, match="next period with the new one"):
                await so.set_pin(token.so_pin, "12344321")
        await eventually(lambda: pool.state.value == "ready")
        his = "12344321" if how == "replace" else token.so_pin
        async with pool.security_officer(his):
            pass


async def test_no_pin_is_sent_where_the_login_outlived_the_outage(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A session that was still open kept it: a PIN would be sent for nothing."""
    async with make_pool(module=fault.path) as pool:
        inside = fault.on("C_DigestInit", hang="after")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(digest, pool)
            await hangs(fault, "C_DigestInit")
            fault.remove(inside)
            # The anchor is thought to be dead, and the call inside has its own session.
            fault.on("C_GetSessionInfo", answer=CKR.DEVICE_ERROR)
            fault.on("C_GenerateRandom", answer=CKR.DEVICE_ERROR)
            await pool.generate_random(8)
            fault.release()
        assert await _agreed(pool) is LoginState.USER
        assert pool.stats().recoveries_total == 1
        assert fault.count("C_Login") == 1
