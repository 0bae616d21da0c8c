"""What opencryptoki itself does of the odd things that the fault module plays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import KeyType, Mechanism

from pkcs11_pool import LoginRequired, LoginState, SessionObjectDestroyed
from pkcs11_pool.cryptoki import interface

if TYPE_CHECKING:
    from conftest import MakePool
    from pkcs11_pool import KeyRef

_TASKS = 64
_AES: Any = {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": bytes(16)}


async def _seal_many(key: KeyRef) -> None:
    """Use a private key from many tasks at once."""

    async def one() -> None:
        assert await key.decrypt(await key.encrypt(b"text", **_AES), **_AES) == b"text"

    async with anyio.create_task_group() as tasks:
        for _ in range(_TASKS):
            tasks.start_soon(one)


def _opened_twice(session: Any) -> tuple[int, int]:
    numbers = []
    for _ in range(2):
        opened = session.token.open()
        numbers.append(interface.handle_of(opened))
        opened.close()
    return numbers[0], numbers[1]


async def test_session_numbers_are_handed_out_again_at_once(
    make_pool: MakePool,
) -> None:
    """Or what is tested with them here would be no test."""
    async with make_pool(max_sessions=1) as pool:
        first, second = await pool.run(_opened_twice)
        assert first == second


async def test_a_private_keys_number_dies_with_the_login(make_pool: MakePool) -> None:
    """It is found anew after the next one; what was made in the session is gone."""
    async with make_pool() as pool:
        key = await pool.generate_key(KeyType.AES, 256, label="kept", store=True)
        async with pool.session() as session:
            secret = await session.generate_key(KeyType.AES, 256)
            await _seal_many(key)
            await pool.logout()
            with pytest.raises(LoginRequired):
                await key.encrypt(b"text", **_AES)
            await pool.login()
            with pytest.raises(SessionObjectDestroyed):
                await secret.encrypt(b"text", **_AES)
        await _seal_many(key)
        await _seal_many(pool.key(label="kept"))


@pytest.mark.parametrize(
    "options",
    [
        {"rw_sessions_only": True},
        {"login_per_session": True},
        {"session_max_idle": 0.3},
    ],
    ids=str,
)
async def test_an_option_that_the_token_does_not_need_does_no_harm(
    make_pool: MakePool, options: dict[str, Any]
) -> None:
    """Sessions that are R/W, logged in once more, or kept alive work as others do."""
    async with make_pool(**options) as pool:
        key = await pool.generate_key(KeyType.AES, 256, label="kept", store=True)
        await _seal_many(key)
        await pool.logout()
        assert pool.login_state is LoginState.PUBLIC
        with pytest.raises(LoginRequired):
            await key.encrypt(b"text", **_AES)
        await pool.login()
        await _seal_many(key)
        assert pool.stats().recoveries_total == 0
