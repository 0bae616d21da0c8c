"""PINs on a token that counts the wrong ones and really locks."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import Mechanism, TokenFlag
from pkcs11.exceptions import PinLocked

from opencryptoki.ocktoken import MODULE, SO_PIN, USER_PIN
from pkcs11_pool import LoginState, PinRefused, PoolState, TokenPool
from pkcs11_pool.cryptoki import interface
from poolkit import blocking

if TYPE_CHECKING:
    from conftest import MakePool

_CALLERS = 1000
_LOW = TokenFlag.USER_PIN_COUNT_LOW
_FINAL = TokenFlag.USER_PIN_FINAL_TRY
_LOCKED = TokenFlag.USER_PIN_LOCKED

# The same token from another process, that changes the user's PIN.
_CHANGE = """
import sys, anyio
from pkcs11_pool import TokenPool

async def main(module, old, new):
    async with TokenPool(module, token_label="ock", pin=old) as pool:
        await pool.set_pin(old, new)

anyio.run(main, *sys.argv[1:])
"""


async def _flags(pool: TokenPool) -> TokenFlag:
    """What the token says of its user's PIN now."""

    def ask(session: Any) -> TokenFlag:
        return TokenFlag(session.token.slot.get_token().flags)

    return await pool.run(ask) & (_LOW | _FINAL | _LOCKED)


def _log_out_behind(pool: TokenPool, session: Any) -> None:
    """Do what other code in the process may do."""
    assert pool.lib.functions.C_Logout(interface.handle_of(session)) == 0


async def _answers(func: Any, *args: Any) -> Counter[str]:
    """How many callers got which answer, all at once."""
    answers: Counter[str] = Counter()

    async def call() -> None:
        try:
            await func(*args)
        except PinRefused as error:
            answers[type(error).__name__] += 1
        else:
            answers["in"] += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(_CALLERS):
            tasks.start_soon(call)
    return answers


async def _lock(pool: TokenPool) -> None:
    """Use up every try."""
    for number in range(3):
        with pytest.raises(PinRefused):
            await pool.login(f"000{number}", force=True)
    assert await _flags(pool) & _LOCKED


async def test_a_thousand_callers_with_a_wrong_pin_cost_one_try(
    make_pool: MakePool,
) -> None:
    """The token counts one wrong PIN, and the right one still opens it."""
    async with make_pool(pin=None) as pool:
        answers = await _answers(pool.login, "00000000")
        assert answers == {"PinRefused": _CALLERS}
        assert pool.stats().logins_failed_total == 1
        assert await _flags(pool) == _LOW
        await pool.login(USER_PIN)
        assert pool.login_state is LoginState.USER


async def test_a_thousand_callers_after_a_changed_pin_cost_one_try(
    make_pool: MakePool,
) -> None:
    """Another process changes the PIN; the pool's old one is sent once."""
    async with make_pool() as pool:
        await blocking(
            subprocess.run,
            [sys.executable, "-c", _CHANGE, str(MODULE), USER_PIN, "11223344"],
            check=True,
        )
        await pool.logout()
        answers = await _answers(pool.login)
        assert answers == {"PinRefused": _CALLERS}
        assert pool.stats().logins_failed_total == 1
        assert await _flags(pool) == _LOW
        await pool.login("11223344")
        assert pool.login_state is LoginState.USER


async def test_the_final_try_is_kept_back_unless_insisted_on(
    make_pool: MakePool,
) -> None:
    """Neither a wrong nor the right PIN is sent; ``force=True`` sends it."""
    async with make_pool(pin=None) as pool:
        for number in range(2):
            with pytest.raises(PinRefused):
                await pool.login(f"000{number}")
        assert await _flags(pool) & _FINAL
        for pin in ("0002", USER_PIN):
            with pytest.raises(PinRefused, match="force=True"):
                await pool.login(pin)
        assert pool.stats().logins_failed_total == 2
        await pool.login(USER_PIN, force=True)
        assert await _flags(pool) == 0


async def test_the_security_officer_unlocks_what_is_locked(
    make_pool: MakePool,
) -> None:
    """A locked PIN is said to be locked, and not sent; ``init_pin`` opens it again."""
    async with make_pool(pin=None) as pool:
        await _lock(pool)
        failed = pool.stats().logins_failed_total
        with pytest.raises(PinRefused, match=r"so\.init_pin"):
            await pool.login(USER_PIN)
        assert pool.stats().logins_failed_total == failed
        with pytest.raises((PinRefused, PinLocked)):
            await pool.login(USER_PIN, force=True)
        assert pool.state is PoolState.READY
        async with pool.security_officer(SO_PIN) as officer:
            await officer.init_pin("55667788")
        await pool.login()
        assert pool.login_state is LoginState.USER
        assert await _flags(pool) == 0


async def test_no_pin_is_sent_for_operations_after_a_refused_one(
    make_pool: MakePool,
) -> None:
    """Callers whose login got lost share one refused try, and then none."""
    pins = [USER_PIN, "00000000"]
    async with make_pool(pin=lambda: pins.pop(0) if len(pins) > 1 else pins[0]) as pool:
        await pool.run(partial(_log_out_behind, pool))
        # Private, so only a user sees it.
        sign = pool.key(label="nobody", id=b"n").sign

        async def use() -> None:
            await sign(b"data", mechanism=Mechanism.RSA_PKCS)

        answers = await _answers(use)
        assert answers == {"PinRefused": _CALLERS}
        assert pool.stats().logins_failed_total == 1
        assert await _flags(pool) == _LOW
