"""The fault switch plays odd logins and odd numbers, for the tests of users."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from pkcs11_pool import (
    InvalidOption,
    InvalidType,
    LoginRequired,
    LoginState,
    ModuleInUse,
    PinRefused,
    SessionObjectDestroyed,
    TokenPool,
)
from pkcs11_pool.cryptoki import interface, rv
from poolkit import blocking, digest, make_ec_key, settled

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool import KeyRef
    from pkcs11_pool.faults import Faults
    from pkcs11_pool.softhsm import ThrowawayToken

_DIGEST = b"d" * 32
_AES_CBC: dict[str, Any] = {
    "mechanism": Mechanism.AES_CBC_PAD,
    "mechanism_param": bytes(16),
}


@pytest.fixture
def make(pkcs11_faults: Faults, pkcs11_token: ThrowawayToken) -> Callable[..., Any]:
    """Make a pool behind the switch; the test opens it."""
    del pkcs11_faults

    def make(**options: Any) -> TokenPool:
        given = {"token_label": pkcs11_token.label, "pin": pkcs11_token.user_pin}
        return TokenPool(pkcs11_token.module, **(given | options))

    return make


async def _sign(key: KeyRef) -> bytes:
    return await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)


async def _uses(pool: TokenPool) -> None:
    """All that a login makes possible, in many sessions."""
    key = await make_ec_key(pool)
    for _ in range(3):
        signature = await _sign(key)
        assert await key.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)
    async with pool.session() as session:
        secret = await session.generate_key(KeyType.AES, 128)
        sealed = await secret.encrypt(b"data", **_AES_CBC)
        assert await secret.decrypt(sealed, **_AES_CBC) == b"data"
    await _destroy(pool, "signer")


async def _destroy(pool: TokenPool, label: str) -> None:
    for half in await pool.find({Attribute.LABEL: label}):
        await half.destroy()


# -- A login for each session -------------------------------------------------------


async def test_with_the_option_a_login_per_session_is_as_any(
    make: Any, pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """Every session is logged in, out with the others, and the officer has his."""
    pkcs11_faults.login_per_session(pkcs11_token.user_pin)
    async with make(login_per_session=True) as pool:
        await _uses(pool)
        assert pkcs11_faults.count("C_Login") > 3
        await pool.logout()
        with pytest.raises(LoginRequired):
            await _sign(pool.key(label="any"))
        await pool.login(pkcs11_token.user_pin)
        await _uses(pool)
        async with pool.security_officer(pkcs11_token.so_pin) as so:
            await so.init_pin("87654321")
        await _uses(pool)
        await pool.set_pin("87654321", "11223344")
        await _uses(pool)
        await blocking(pkcs11_faults.drop_sessions)
        await _uses(pool)
    async with make(login_per_session=True, pin="11223344") as pool:
        await _uses(pool)


async def test_without_the_option_it_is_named(
    make: Any, pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """As with such a token."""
    pkcs11_faults.login_per_session(pkcs11_token.user_pin)
    async with make() as pool:
        with pytest.raises(LoginRequired, match="login_per_session=True"):
            await make_ec_key(pool)
        assert await digest(pool)


async def test_a_wrong_pin_is_refused_by_a_token_with_a_login_per_session(
    make: Any, pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """Though the token behind the switch is logged in all the while."""
    pkcs11_faults.login_per_session(pkcs11_token.user_pin)
    with pytest.raises(PinRefused):
        await make(login_per_session=True, pin="99999999").open()
    async with make(login_per_session=True) as pool:
        with pytest.raises(PinRefused):
            async with pool.security_officer("99999999"):
                pass
        await _uses(pool)


async def test_such_a_session_tells_of_its_own_login(
    make: Any, pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """And of no other's."""
    pkcs11_faults.login_per_session(pkcs11_token.user_pin)
    told = set()
    for option in (False, True):
        async with make(login_per_session=option) as pool:
            for rw in (False, True):
                async with pool.session(rw=rw) as session:
                    told.add((await session.info()).state.name)
    assert told == {
        *("RO_PUBLIC_SESSION", "RW_PUBLIC_SESSION"),
        *("RO_USER_FUNCTIONS", "RW_USER_FUNCTIONS"),
    }


async def test_such_a_session_is_the_users_or_the_officers(
    make: Any, pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """One after the other, in the same session; and whoever fails leaves no trace."""
    pkcs11_faults.login_per_session(pkcs11_token.user_pin)
    async with make(login_per_session=True) as pool:
        await make_ec_key(pool)
    pins = (pkcs11_token.so_pin.encode(), pkcs11_token.user_pin.encode())
    async with make(pin=None, rw_sessions_only=True) as pool:
        functions, number = pool.lib.functions, ctypes.c_ulong()
        flags = interface.CKF_SERIAL_SESSION | interface.CKF_RW_SESSION
        slot = pool.token.slot_id
        functions.C_OpenSession(slot, flags, None, None, ctypes.byref(number))

        def login(session: int, who: int, pin: bytes) -> str:
            return rv.name_of(functions.C_Login(session, who, pin, len(pin)))

        def finds() -> bool:
            handle, count = ctypes.c_ulong(), ctypes.c_ulong()
            private = ctypes.c_ubyte(1)
            asked = interface.RawAttribute(
                int(Attribute.PRIVATE), ctypes.addressof(private), 1
            )
            code = functions.C_FindObjectsInit(number, ctypes.byref(asked), 1)
            if code:
                return False
            functions.C_FindObjects(
                number, ctypes.byref(handle), 1, ctypes.byref(count)
            )
            functions.C_FindObjectsFinal(number)
            return count.value == 1

        ours: Any = number.value
        assert login(ours, 0, pins[0]) == "CKR_OK"
        async with pool.session() as other:
            clash = login(other.handle, 1, pins[1])
            assert clash == "CKR_USER_ANOTHER_ALREADY_LOGGED_IN"
        assert functions.C_Logout(ours) == 0
        assert not finds()
        assert login(ours, 1, pins[1]) == "CKR_OK"
        assert login(ours, 1, pins[1]) == "CKR_USER_ALREADY_LOGGED_IN"
        assert finds()
        assert functions.C_Logout(ours) == 0
        assert login(ours, 0, b"99999999") == "CKR_PIN_INCORRECT"
        assert login(ours, 1, pins[1]) == "CKR_OK"
        assert finds()
        functions.C_CloseSession(ours)


# -- A login that is ignored ----------------------------------------------------------


async def test_with_the_option_no_login_is_needed(
    make: Any, pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """None is sent, and a logout is the pool's alone."""
    pkcs11_faults.login_ignored(pkcs11_token.user_pin)
    async with make(login_ignored=True, pin=None) as pool:
        await _uses(pool)
        assert pkcs11_faults.count("C_Login") == pkcs11_faults.count("C_Logout") == 0
        await make_ec_key(pool)
        await pool.logout()
        with pytest.raises(LoginRequired):
            await _sign(pool.key(label="signer"))
        await pool.login("any")
        assert await _sign(pool.key(label="signer"))
        await blocking(pkcs11_faults.drop_sessions)
        assert await _sign(pool.key(label="signer"))


async def test_where_the_login_is_ignored_any_pin_will_do(
    make: Any, pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """But there is no officer; and after a logout all is as it was."""
    pkcs11_faults.login_ignored(pkcs11_token.user_pin)
    async with make(pin="99999999") as pool:
        await _uses(pool)
        with pytest.raises(PinRefused):
            async with pool.security_officer(pkcs11_token.so_pin):
                pass
        await _uses(pool)
        await pool.logout()
        assert pool.login_state is LoginState.PUBLIC
        await make_ec_key(pool)
        assert await pool.run(
            lambda session: session.get_key(
                object_class=ObjectClass.PRIVATE_KEY, label="signer"
            )
        )


# -- Numbers that are given anew at once ----------------------------------------------


async def test_a_session_gets_the_number_of_the_one_before(
    make: Any, pkcs11_faults: Faults
) -> None:
    """And what is closed already is not closed once more, nor used."""
    pkcs11_faults.reuse_numbers()
    async with make(max_sessions=2) as pool:
        numbers = set()
        for _ in range(5):
            async with pool.session() as session:
                numbers.add(session.handle)
        assert len(numbers) <= 2
        await _uses(pool)
        kept: list[Any] = []
        await pool.run(kept.append)
        async with pool.session() as session:
            with pytest.raises(pkcs11.PKCS11Error):
                kept[0].generate_random(64)
            with pytest.raises(pkcs11.SessionHandleInvalid):
                kept[0].close()
            assert await digest(session)


async def test_a_key_gets_the_number_of_the_one_that_was_destroyed(
    make: Any, pkcs11_faults: Faults
) -> None:
    """A reference is not misled: it signs with its own key, or not at all."""
    pkcs11_faults.reuse_numbers()
    async with make() as pool:
        first = await make_ec_key(pool, "first")
        public = await first.public_key_der()
        await _sign(first)
        numbers = await pool.run(_numbers)

        await _destroy(pool, "first")
        second = await make_ec_key(pool, "second")
        assert await pool.run(_numbers) == numbers
        assert await second.public_key_der() != public
        with pytest.raises(pkcs11.NoSuchKey):
            await _sign(first)
        await _uses(pool)


def _numbers(session: Any) -> set[int]:
    return {found.handle for found in session.get_objects()}


async def test_the_number_of_a_session_object_ends_with_its_session(
    make: Any, pkcs11_faults: Faults
) -> None:
    """The next object has it, and who kept the first is told."""
    pkcs11_faults.reuse_numbers()
    numbers = []
    async with make() as pool:
        for _ in range(3):
            async with pool.session() as session:
                key = await session.generate_key(KeyType.AES, 128)
                numbers.append((await session.run(_numbers)).copy())
            with pytest.raises(SessionObjectDestroyed):
                await key.encrypt(b"data", **_AES_CBC)
        await settled(pool)
    assert numbers[0] == numbers[1] == numbers[2]


async def test_a_number_that_nobody_has_is_refused(
    make: Any, pkcs11_faults: Faults
) -> None:
    """Though it may be the module's own number of something."""
    pkcs11_faults.reuse_numbers()
    async with make() as pool:
        for _ in range(5):
            await _uses(pool)
        key = await pool.generate_key(KeyType.AES, 128, label="k", store=True)
        async with pool.session() as session:
            functions, info = pool.lib.functions, interface.RawSessionInfo()
            open_ones = {
                number
                for number in range(1, 100)
                if not functions.C_GetSessionInfo(number, ctypes.byref(info))
            }
            assert session.handle in open_ones
            assert max(open_ones) <= 1 + pool.stats().sessions_max
            there = set()
            for number in range(1, 100):
                asked = interface.RawAttribute(int(Attribute.CLASS), None, 0)
                code = functions.C_GetAttributeValue(
                    session.handle, number, ctypes.byref(asked), 1
                )
                if code == 0:
                    there.add(number)
            assert there == await pool.run(_numbers)
            assert len(there) == 1
        assert await key.attributes([Attribute.LABEL])


async def test_with_the_last_session_the_numbers_of_all_objects_end(
    make: Any, pkcs11_faults: Faults
) -> None:
    """And begin again from 1."""
    pkcs11_faults.reuse_numbers()
    async with make() as pool:
        key = await make_ec_key(pool)
        before = await pool.run(_numbers)
        await blocking(pkcs11_faults.drop_sessions)
        assert await _sign(key)  # finds the login lost
        assert await pool.run(_numbers) == before == {1, 2}


# -- All of it ------------------------------------------------------------------------


async def test_a_token_may_have_all_of_them_at_once(
    make: Any, pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """As the worst device has."""
    pkcs11_faults.no_ro_sessions()
    pkcs11_faults.login_per_session(pkcs11_token.user_pin)
    pkcs11_faults.reuse_numbers()
    async with make(login_per_session=True, rw_sessions_only=True) as pool:
        await _uses(pool)
        await blocking(pkcs11_faults.drop_sessions)
        await _uses(pool)
        async with pool.security_officer(pkcs11_token.so_pin):
            pass
        await _uses(pool)


async def test_what_a_token_is_like_is_said_before_a_pool_opens(
    make: Any, pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """Its sessions have their numbers, and their logins."""
    pin = pkcs11_token.user_pin
    async with make() as pool:
        with pytest.raises(ModuleInUse, match="before a pool opens"):
            pkcs11_faults.login_per_session(pin)
        with pytest.raises(ModuleInUse, match="before a pool opens"):
            pkcs11_faults.login_ignored(pin)
        with pytest.raises(ModuleInUse, match="before a pool opens"):
            pkcs11_faults.reuse_numbers()
        await _uses(pool)
    pkcs11_faults.reuse_numbers()


def test_what_is_no_pin_is_refused(pkcs11_faults: Faults) -> None:
    """As everywhere."""
    wrong: Any
    for wrong, error in ((None, InvalidType), (1234, InvalidType), ("", InvalidOption)):
        for say in (pkcs11_faults.login_per_session, pkcs11_faults.login_ignored):
            with pytest.raises(error):
                say(wrong)
