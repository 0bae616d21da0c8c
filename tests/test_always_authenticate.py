"""Keys that want the PIN each time: sent between Init and the call, and guarded."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import anyio
import pkcs11
import pytest
import structlog
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, KeyType, Mechanism, TokenFlag

from faultmodule import CKR
from keykit import PIECE, data_of, is_signature, make_secret
from pkcs11_pool import (
    InvalidOption,
    LoginRequired,
    LoginState,
    PinLengthInvalid,
    PinRefused,
    PoolTimeout,
    TokenUnavailable,
)
from poolkit import (
    blocking,
    digest,
    eventually,
    hangs,
    settled,
    time_is_up,
)

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_PKCS1: dict[str, Any] = {"mechanism": Mechanism.SHA256_RSA_PKCS}
_WRONG = "87654321"


async def _make_key(pool: Any) -> tuple[bytes, KeyRef]:
    """An RSA key that wants the PIN each time, and its public half."""
    public, private = await pool.generate_keypair(
        KeyType.RSA,
        1024,
        label="each time",
        store=True,
        private_template={Attribute.ALWAYS_AUTHENTICATE: True},
    )
    return await public.public_key_der(), private


def _is_right(public_der: bytes, signature: bytes, data: bytes = b"message") -> bool:
    how = (padding.PKCS1v15(), hashes.SHA256())
    return is_signature(public_der, signature, data, *how)


async def test_the_pin_goes_between_init_and_the_call(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """On the operation's own session, once for each use; the user stays logged in."""
    async with make_pool(module=fault.path) as pool:
        der, key = await _make_key(pool)
        epoch = pool.login_epoch
        await settled(pool)
        fault.clear_log()
        for _ in range(2):
            signature = await key.sign(b"message", pin=token.user_pin, **_PKCS1)
            assert _is_right(der, signature)
        await settled(pool)
        names = [call.function for call in fault.calls()]
        used = ["C_SignInit", "C_GetTokenInfo", "C_Login", "C_Sign"]
        assert [name for name in names if name in used] == used * 2
        sessions = {c.session for c in fault.calls() if c.function == "C_Login"}
        assert len(sessions) == 2
        assert pool.login_epoch == epoch
        assert pool.login_state is LoginState.USER


async def test_decryption_wants_it_too(pool: TokenPool, token: ThrowawayToken) -> None:
    """What ``cryptography`` encrypted is decrypted, in one part and as a stream."""
    der, key = await _make_key(pool)
    public: Any = load_der_public_key(der)
    oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)  # noqa: S303
    sealed = public.encrypt(b"secret", oaep)
    assert await key.decrypt(sealed, pin=token.user_pin) == b"secret"
    stream = key.decrypt_stream(sealed, pin=token.user_pin)
    assert [piece async for piece in stream] == [b"secret"]
    with pytest.raises(LoginRequired, match="pin="):
        await key.decrypt(sealed)


async def test_without_a_pin_nothing_is_sent(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It says what is missing, before the operation is begun."""
    async with make_pool(module=fault.path) as pool:
        _, key = await _make_key(pool)
        fault.reset_counts()
        with pytest.raises(LoginRequired, match="pin=") as caught:
            await key.sign(b"message", **_PKCS1)
        assert isinstance(caught.value, pkcs11.UserNotLoggedIn)
        with pytest.raises(LoginRequired, match="pin="):
            await key.sign(iter([data_of(2 * PIECE)]), **_PKCS1)
        assert fault.count("C_SignInit") == 0
        assert pool.login_state is LoginState.USER
        assert pool.stats().recoveries_total == 0


async def test_data_in_parts_and_many_at_once(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """One login for a chain, and one for each of many."""
    der, key = await _make_key(pool)
    data = data_of(2 * PIECE)
    signature = await key.sign(iter([data]), pin=token.user_pin, **_PKCS1)
    assert _is_right(der, signature, data)
    items = [bytes([n]) for n in range(10)]
    signatures = [s async for s in key.sign_many(items, pin=token.user_pin, **_PKCS1)]
    assert all(_is_right(der, s, i) for s, i in zip(signatures, items, strict=True))
    signature = await blocking(
        lambda: key.sync.sign(b"message", pin=token.user_pin, **_PKCS1)
    )
    assert _is_right(der, signature)


@pytest.mark.parametrize("parts", [False, True])
async def test_a_wrong_pin_is_sent_once(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, *, parts: bool
) -> None:
    """By all who give it at the same time together; the right one still goes."""
    async with make_pool(module=fault.path) as pool:
        der, key = await _make_key(pool)
        whole = data_of(2 * PIECE) if parts else b"message"
        refused: list[PinRefused] = []

        async def sign(pin: str) -> None:
            data: Any = iter([whole]) if parts else whole
            try:
                await key.sign(data, pin=pin, **_PKCS1)
            except PinRefused as error:
                refused.append(error)

        fault.reset_counts()
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(sign, _WRONG)
        assert len(refused) == 20
        assert fault.count("C_Login") == 1
        assert sum("before" in str(error) for error in refused) == 19
        # The pool's own login is another matter, and so is another PIN.
        signature = await key.sign(whole, pin=token.user_pin, **_PKCS1)
        assert _is_right(der, signature, whole)
        assert fault.count("C_Login") == 2
        # A PIN that was taken strikes the book: the wrong one would be sent again.
        await sign(_WRONG)
        assert fault.count("C_Login") == 3
        await pool.logout()
        await pool.login()
        await sign(_WRONG)
        assert fault.count("C_Login") == 5


async def test_a_session_is_of_use_after_a_refused_pin(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """What Init began in it is ended: any other operation can follow."""
    der, key = await _make_key(pool)
    other = await make_secret(pool)
    async with pool.session() as session:
        lent = key.on(session)
        for data in (b"message", iter([data_of(2 * PIECE)])):
            with pytest.raises(PinRefused):
                await lent.sign(data, pin=_WRONG, **_PKCS1)
            assert await digest(session)
            assert await other.on(session).sign(b"x", mechanism=Mechanism.AES_CMAC)
        with pytest.raises(PinRefused):
            await lent.decrypt(bytes(128), pin=_WRONG)
        assert await digest(session)
        signature = await lent.sign(b"message", pin=token.user_pin, **_PKCS1)
        assert _is_right(der, signature)


async def test_a_pin_that_is_not_wanted_is_not_sent(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """An ordinary key needs none, and the guard never hears of it."""
    async with make_pool(module=fault.path) as pool:
        key = await make_secret(pool)
        _, private = await pool.generate_keypair(
            KeyType.RSA, 1024, label="ordinary", store=True
        )
        fault.reset_counts()
        how: dict[str, Any] = {"mechanism": Mechanism.AES_CMAC, "pin": _WRONG}
        assert await key.sign(b"x", **how)
        assert await key.sign(iter([data_of(2 * PIECE)]), **how)
        assert await private.sign(b"x", pin=_WRONG, **_PKCS1)
        assert fault.count("C_Login") == 0


@pytest.mark.parametrize(
    "flag", [TokenFlag.USER_PIN_FINAL_TRY, TokenFlag.USER_PIN_LOCKED]
)
async def test_the_guard_heeds_the_flags_of_the_moment(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, flag: TokenFlag
) -> None:
    """At the final try, and when it is locked, nothing is sent."""
    async with make_pool(module=fault.path) as pool:
        der, key = await _make_key(pool)
        fault.reset_counts()
        fault.token_info(flags_set=int(flag))
        with pytest.raises(PinRefused):
            await key.sign(b"message", pin=token.user_pin, **_PKCS1)
        assert fault.count("C_Login") == 0
        fault.token_info()
        signature = await key.sign(b"message", pin=token.user_pin, **_PKCS1)
        assert _is_right(der, signature)
        with pytest.raises(PinLengthInvalid):
            await key.sign(b"message", pin="1", **_PKCS1)
        assert fault.count("C_Login") == 1
        fault.on("C_Login", answer=CKR.PIN_LOCKED)
        with pytest.raises(PinRefused, match="locked"):
            await key.sign(b"message", pin=token.user_pin, **_PKCS1)


async def test_no_pin_is_sent_to_another_token(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """What stands in the slot is compared before each login."""
    async with make_pool(module=fault.path, recovery_timeout=0.3) as pool:
        _, key = await _make_key(pool)
        fault.reset_counts()
        fault.token_info(serial="another")
        with pytest.raises(TokenUnavailable):
            await key.sign(b"message", pin=token.user_pin, **_PKCS1)
        assert fault.count("C_Login") == 0
        fault.token_info()


async def test_a_pin_pad_is_asked_each_time(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """``PROTECTED_AUTH``: the PIN is typed at the token, also after a wrong one."""
    fault.pin_pad = token.user_pin.encode()
    async with make_pool(module=fault.path, pin=pkcs11.PROTECTED_AUTH) as pool:
        der, key = await _make_key(pool)
        pad: Any = pkcs11.PROTECTED_AUTH
        assert _is_right(der, await key.sign(b"message", pin=pad, **_PKCS1))
        fault.pin_pad = _WRONG.encode()
        for _ in range(2):
            with pytest.raises(PinRefused):
                await key.sign(b"message", pin=pad, **_PKCS1)
        fault.pin_pad = token.user_pin.encode()
        assert _is_right(der, await key.sign(b"message", pin=pad, **_PKCS1))


async def test_a_login_that_hangs_is_lost_in_time(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The caller is told, and others go on."""
    async with make_pool(module=fault.path) as pool:
        der, key = await _make_key(pool)
        fault.on("C_Login", hang="before")
        async with anyio.create_task_group() as tasks:

            async def late() -> None:
                with pytest.raises(PoolTimeout) as caught:
                    await key.sign(b"message", pin=token.user_pin, **_PKCS1)
                assert caught.value.phase == "running"

            tasks.start_soon(late)
            await hangs(fault, "C_Login")
            assert await digest(pool)
            time_is_up(pool)
        fault.release()
        await eventually(lambda: pool.stats().calls_stuck == 0)
        signature = await key.sign(b"message", pin=token.user_pin, **_PKCS1)
        assert _is_right(der, signature)


async def test_the_pin_shows_nowhere(pool: TokenPool) -> None:
    """Not in a traceback with the locals of our frames, and not in the log."""
    _, key = await _make_key(pool)
    calls = (
        lambda: key.sign(b"message", pin=_WRONG, **_PKCS1),
        lambda: key.sign(iter([data_of(2 * PIECE)]), pin=_WRONG, **_PKCS1),
        lambda: key.decrypt(bytes(128), pin=_WRONG),
        lambda: anext(key.decrypt_stream(bytes(128), pin=_WRONG)),
        lambda: anext(key.sign_many([b"message"], pin=_WRONG, **_PKCS1)),
    )
    with structlog.testing.capture_logs() as log:
        for call in calls:
            with pytest.raises(PinRefused) as caught:
                await call()
            seen = traceback.TracebackException.from_exception(
                caught.value, capture_locals=True
            )
            frames = [frame for frame in seen.stack if "pkcs11_pool" in frame.filename]
            assert frames
            assert _WRONG not in "".join(str(frame.locals) for frame in frames)
    assert log
    assert _WRONG not in str(log)


@pytest.mark.parametrize("pin", ["", 1234, b"1234", lambda: "1234"])
async def test_what_is_no_pin_is_refused_at_the_door(
    make_pool: MakePool, pin: Any
) -> None:
    """By a pool that is not even open."""
    key = make_pool().key(label="any")
    with pytest.raises(InvalidOption, match="PIN"):
        await key.sign(b"x", pin=pin)
    with pytest.raises(InvalidOption, match="PIN"):
        await key.decrypt(b"x", pin=pin)
    with pytest.raises(InvalidOption, match="PIN"):
        key.decrypt_stream(b"x", pin=pin)
    with pytest.raises(InvalidOption, match="PIN"):
        key.sign_many([], pin=pin)
