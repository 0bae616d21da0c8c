"""Modules that are odd: each oddity played, with its option and without.

What the real devices do, and where that is written: docs/reference/odd-modules.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pkcs11
import pytest
import structlog
from pkcs11 import KeyType, Mechanism

from faultmodule import CKR, FaultModule
from pkcs11_pool import (
    InvalidOption,
    KeyNotFound,
    LoginRequired,
    LoginState,
    PinRefused,
    PoolClosed,
    PoolState,
    PoolTimeout,
    SessionClosed,
    SessionObjectDestroyed,
    SessionState,
    TokenPool,
)
from poolkit import (
    LAST_RESORT,
    blocking,
    closes_in_time,
    digest,
    eventually,
    hangs,
    make_ec_key,
    settled,
    time_is_up,
    workers,
)

if TYPE_CHECKING:
    from conftest import MakePool
    from pkcs11_pool import KeyRef
    from pkcs11_pool.softhsm import ThrowawayToken

_DIGEST = b"d" * 32
_TASKS = 64
_FEW = 8
_CBC: Any = {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": bytes(16)}

ONE_LOOP = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")]
)
"""For what has many cases and nothing to do with the event loop."""

Play = Callable[[FaultModule, bytes], object]


@dataclass
class Odd:
    """One oddity: how it is played, and the options for it."""

    name: str
    play: Play
    options: dict[str, Any] = field(default_factory=dict)
    has_officer: bool = True

    def __repr__(self) -> str:
        """For the name of a test."""
        return self.name


def _nothing(_fault: FaultModule, _pin: bytes) -> None:
    """Play what is not odd."""


def _everything(fault: FaultModule, pin: bytes) -> None:
    """Play all that one device can have at once."""
    fault.reuse_numbers()
    fault.no_ro_sessions()
    fault.play_login("per_session", pin)
    fault.drop_idle_sessions(30)


_ODD = [
    Odd("ordinary", _nothing),
    Odd(
        "no R/O sessions",
        lambda fault, _: fault.no_ro_sessions(),
        {"rw_sessions_only": True},
    ),
    Odd(
        "login per session",
        lambda fault, pin: fault.play_login("per_session", pin),
        {"login_per_session": True},
    ),
    Odd(
        "login ignored, always the user",
        lambda fault, pin: fault.play_login("ignored", pin),
        {"login_ignored": True, "pin": None},
        has_officer=False,
    ),
    Odd(
        "login ignored, always public",
        lambda fault, pin: fault.play_login("ignored", pin, always_user=False),
        {"login_ignored": True, "pin": None},
        has_officer=False,
    ),
    Odd(
        "dropped when idle",
        lambda fault, _: fault.drop_idle_sessions(30),
        {"session_max_idle": 30},
    ),
    Odd("handles live on", lambda fault, pin: fault.play_login("kept", pin)),
    Odd("numbers reused", lambda fault, _: fault.reuse_numbers()),
    Odd(
        "everything",
        _everything,
        {
            "rw_sessions_only": True,
            "login_per_session": True,
            "session_max_idle": 30,
        },
    ),
    # An option that the token would not have needed does no harm.
    Odd(
        "options for nothing",
        _nothing,
        {
            "rw_sessions_only": True,
            "login_per_session": True,
            "session_max_idle": 30,
        },
    ),
]


def _pool(make_pool: MakePool, fault: FaultModule, odd: Odd, **more: Any) -> TokenPool:
    return make_pool(module=fault.path, **(odd.options | more))


def _room(pool: TokenPool) -> Any:
    """Return what no figure of the pool tells: which sessions are open for what."""
    return pool._engine._room  # noqa: SLF001


def _resting(pool: TokenPool) -> Any:
    """Return the operations that the token was too busy for."""
    return pool._engine._waiting.resting  # noqa: SLF001


def _is(pool: TokenPool, state: LoginState) -> None:
    assert pool.login_state is state


async def _sign(key: KeyRef, **options: Any) -> bytes:
    return await key.sign(_DIGEST, mechanism=Mechanism.ECDSA, **options)


async def _sign_many(key: KeyRef, tasks: int = _TASKS) -> None:
    """Sign from many tasks at once; each signature is right."""

    async def one() -> None:
        assert await key.verify(_DIGEST, await _sign(key), mechanism=Mechanism.ECDSA)

    async with anyio.create_task_group() as group:
        for _ in range(tasks):
            group.start_soon(one)


async def _session_objects(pool: TokenPool) -> None:
    """A session object is seen by all sessions, and gone with its owner."""
    async with pool.session() as session:
        info = await session.info()
        assert info.rw == session.rw
        key = await session.generate_key(KeyType.AES, 256)
        await pool.run(_noop)
        sealed = await key.encrypt(b"text", **_CBC)
        async with pool.session() as other:
            assert await key.on(other).decrypt(sealed, **_CBC) == b"text"
    with pytest.raises(SessionObjectDestroyed):
        await key.encrypt(b"text", **_CBC)


def _noop(_session: object) -> None:
    """Do nothing."""


async def _out_and_in(pool: TokenPool, key: KeyRef, pin: str) -> None:
    """Every session observes the same logout, and the same login."""
    async with pool.session() as session:
        await _sign(key.on(session))
        await pool.logout()
        _is(pool, LoginState.PUBLIC)
        with pytest.raises(LoginRequired):
            await _sign(key)
        with pytest.raises((LoginRequired, SessionClosed)):
            await _sign(key.on(session))
    async with pool.session() as session:
        with pytest.raises(LoginRequired):
            await _sign(key.on(session))
        await pool.login(pin)
        _is(pool, LoginState.USER)
        await _sign(key.on(session))
    await _sign_many(key, _FEW)


async def _officer(
    pool: TokenPool, key: KeyRef, token: ThrowawayToken, *, has_officer: bool
) -> None:
    """A period of the security officer, or the error of a token that has none."""
    if not has_officer:
        with pytest.raises((PinRefused, pkcs11.exceptions.PinLocked)):
            async with pool.security_officer(token.so_pin):
                pass
        assert pool.login_state is LoginState.USER
        await _sign_many(key, _FEW)
        return
    async with pool.security_officer(token.so_pin) as officer:
        _is(pool, LoginState.SO)
        info = await officer.session.info()
        assert info.state is SessionState.RW_SO_FUNCTIONS
        await officer.init_pin("55667788")
    assert pool.login_state is LoginState.USER
    await _sign_many(key, _FEW)
    await pool.set_pin("55667788", token.user_pin)
    await _sign_many(key, _FEW)


@pytest.mark.parametrize("odd", _ODD, ids=repr)
async def test_the_main_path_with_the_option(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, odd: Odd
) -> None:
    """Sign, log out and in, the officer, session objects, a loss, close: all of it."""
    odd.play(fault, token.user_pin.encode())
    async with _pool(make_pool, fault, odd) as pool:
        assert pool.login_state is LoginState.USER
        key = await make_ec_key(pool)
        await _sign_many(key)
        await _session_objects(pool)
        await _out_and_in(pool, key, token.user_pin)
        await _officer(pool, key, token, has_officer=odd.has_officer)

        assert pool.token is not None
        # SoftHSM2 itself does not bear that a session goes while a call is inside.
        await settled(pool)
        fault.lose_sessions(pool.token.slot_id)
        # One at first, which finds that out. Where numbers are used again, of many one
        # could use a lost session by the number of that which another one opens.
        await _sign(key)
        await _sign_many(key, _FEW)
        fault.go_down(CKR.DEVICE_REMOVED, stays=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_sign_many, key, _FEW)
            await eventually(lambda: pool.state is PoolState.RECOVERING)
            fault.come_back()
        assert pool.login_state is LoginState.USER
        refused = [c for c in fault.calls("C_Login") if c.rv == CKR.PIN_INCORRECT]
        assert refused == []
    assert fault.sessions() == []
    assert fault.count("C_Finalize") == fault.count("C_Initialize")


# -- No R/O sessions (AWS CloudHSM) -----------------------------------------------


async def test_without_ro_sessions_the_error_names_the_option(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It is the token's own error, and tried out: R/W ones it opens."""
    fault.no_ro_sessions()
    pool = make_pool(module=fault.path)
    with pytest.raises(pkcs11.exceptions.FunctionFailed, match="rw_sessions_only=True"):
        await pool.open()
    assert fault.sessions() == []


async def test_a_token_that_opens_nothing_is_not_called_odd(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Where R/W sessions are refused as well, the option would be no help."""
    fault.on("C_OpenSession", every=True, answer=CKR.FUNCTION_FAILED)
    pool = make_pool(module=fault.path)
    with pytest.raises(pkcs11.exceptions.FunctionFailed) as caught:
        await pool.open()
    assert "rw_sessions_only" not in str(caught.value)


async def test_all_sessions_are_rw_and_count_as_what_was_asked_for(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No R/O one is opened; R/O operations are not held up by the share of writers."""
    fault.no_ro_sessions()
    fault.token_info(max_rw=3)
    async with make_pool(module=fault.path, rw_sessions_only=True) as pool:
        # One of the three is the anchor's.
        assert pool.stats().sessions_max == 2
        async with pool.session() as session:
            assert session.rw
            assert (await session.info()).rw
            assert await digest(pool)
        await settled(pool)
        assert all(open_.rw for open_ in fault.sessions())
        refused = [c for c in fault.calls("C_OpenSession") if c.rv != CKR.OK]
        assert refused == []
        room = _room(pool)
        assert room.open_rw == 0


# -- Login per session (Nitrokey NetHSM) ------------------------------------------


async def test_without_the_option_a_login_per_session_is_named(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The user is in, his sessions are not: the error says which option to set."""
    fault.play_login("per_session", token.user_pin.encode())
    async with make_pool(module=fault.path) as pool:
        with pytest.raises(LoginRequired, match="login_per_session=True"):
            await _sign(pool.key(label="signer"))
        assert pool.stats().logins_failed_total == 0


async def test_each_session_is_logged_in_before_it_is_used(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Also the one for a caller's function, and a leased one that was open before."""
    fault.play_login("per_session", token.user_pin.encode())
    async with make_pool(module=fault.path, pin=None, login_per_session=True) as pool:
        async with pool.session(rw=True) as session:
            await pool.login(token.user_pin)
            await make_ec_key(session)
            await _sign(pool.key(label="signer").on(session))
        await pool.run(lambda s: list(s.get_objects()))
        await _sign(pool.key(label="signer"))
        assert fault.count("C_Login") >= 3


async def test_a_logout_closes_the_sessions_that_have_their_own_login(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """`C_Logout` would be for one alone: none that was logged in stays open."""
    fault.play_login("per_session", token.user_pin.encode())
    async with make_pool(module=fault.path, login_per_session=True) as pool:
        await make_ec_key(pool)
        async with pool.session() as session:
            before = {s.number for s in fault.sessions()}
            await pool.logout()
            assert before.isdisjoint(s.number for s in fault.sessions())
            with pytest.raises(SessionClosed, match="logged out"):
                await digest(session)
        assert fault.count("C_Logout") == 0
        assert pool.state is PoolState.READY
        assert await digest(pool)


async def test_a_pin_changed_behind_each_session_costs_one_try(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """All sessions have the same PIN: the first that is refused speaks for all."""
    fault.play_login("per_session", token.user_pin.encode())
    async with make_pool(module=fault.path, login_per_session=True) as pool:
        key = await make_ec_key(pool)
        await settled(pool)
        await eventually(lambda: not pool.stats().sessions_open)
        await pool.run(lambda s: s.set_pin(token.user_pin, "55667788"), rw=True)
        await eventually(lambda: not pool.stats().sessions_open)
        answers = []
        fault.reset_counts()

        async def one() -> None:
            with pytest.raises(PinRefused) as caught:
                await _sign(key)
            answers.append(caught.value)

        async with anyio.create_task_group() as tasks:
            for _ in range(_TASKS):
                tasks.start_soon(one)
        refused = [c for c in fault.calls("C_Login") if c.rv == CKR.PIN_INCORRECT]
        assert len(refused) == 1
        assert len(answers) == _TASKS
        assert pool.login_state is LoginState.PUBLIC
        await pool.login("55667788")
        await _sign_many(key, _FEW)


async def test_sessions_that_log_in_at_once_try_a_pin_one_at_a_time(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The others wait for the answer: a wrong PIN costs one try also there."""
    fault.play_login("per_session", token.user_pin.encode())
    async with make_pool(module=fault.path, login_per_session=True) as pool:
        key = await make_ec_key(pool)
        await settled(pool)
        await pool.run(lambda s: s.set_pin(token.user_pin, "55667788"), rw=True)
        await eventually(lambda: not pool.stats().sessions_open)
        fault.reset_counts()
        fault.on("C_Login", hang="before", every=True)

        async def one() -> None:
            with pytest.raises(PinRefused):
                await _sign(key)

        async with anyio.create_task_group() as tasks:
            for _ in range(_FEW):
                tasks.start_soon(one)
            # All have a session, so all are at the PIN, or wait to be.
            await eventually(lambda: fault.count("C_OpenSession") == _FEW)
            await hangs(fault, "C_Login")
            assert fault.count("C_Login") == 1
            fault.release()
        refused = [c for c in fault.calls("C_Login") if c.rv == CKR.PIN_INCORRECT]
        assert len(refused) == 1
        fault.clear()


async def test_the_pin_of_sessions_follows_set_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """What is opened after `set_pin` is logged in with the new one."""
    fault.play_login("per_session", token.user_pin.encode())
    async with make_pool(module=fault.path, login_per_session=True) as pool:
        key = await make_ec_key(pool)
        await pool.set_pin(token.user_pin, "55667788")
        await _sign_many(key)
        assert all(c.rv == CKR.OK for c in fault.calls("C_Login"))


async def test_a_login_per_session_that_is_lost_is_restored(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """All sessions drop to public at once, the leased one as well."""
    fault.play_login("per_session", token.user_pin.encode())
    async with make_pool(module=fault.path, login_per_session=True) as pool:
        key = await make_ec_key(pool)
        async with pool.session() as session:
            fault.lose_login()
            await _sign(key.on(session))
            await _sign_many(key, _FEW)
        assert pool.login_state is LoginState.USER


# -- Login ignored (Google Cloud KMS) ---------------------------------------------


@pytest.mark.parametrize("always_user", [True, False])
async def test_without_the_option_an_ignored_login_works_with_any_pin(
    make_pool: MakePool,
    fault: FaultModule,
    token: ThrowawayToken,
    *,
    always_user: bool,
) -> None:
    """Keys sign; a key that is not there is not found, whatever sessions tell."""
    fault.play_login("ignored", token.user_pin.encode(), always_user=always_user)
    async with make_pool(module=fault.path, pin="anything") as pool:
        key = await make_ec_key(pool)
        await _sign_many(key, _FEW)
        with pytest.raises((KeyNotFound, LoginRequired)):
            await _sign(pool.key(label="nobody"))
        await _sign(key)


async def test_with_an_ignored_login_no_pin_is_sent(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Not at opening, not by `login()`, not after a loss; missing keys are missing."""
    fault.play_login("ignored", token.user_pin.encode(), always_user=False)
    async with make_pool(module=fault.path, pin=None, login_ignored=True) as pool:
        key = await make_ec_key(pool)
        with pytest.raises(KeyNotFound):
            await _sign(pool.key(label="nobody"))
        await pool.logout()
        await pool.login("anything")
        assert pool.token is not None
        # SoftHSM2 itself does not bear that a session goes while a call is inside.
        await settled(pool)
        fault.lose_sessions(pool.token.slot_id)
        await _sign(key)
        assert pool.login_state is LoginState.USER
    assert fault.count("C_Login") == fault.count("C_Logout") == 0


async def test_a_logout_that_the_token_ignores_is_kept_by_the_pool(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Private objects are neither used nor found; public ones are."""
    fault.play_login("ignored", token.user_pin.encode())
    async with make_pool(module=fault.path, pin=None, login_ignored=True) as pool:
        key = await make_ec_key(pool)
        signature = await _sign(key)
        everything = await pool.find()
        await pool.logout()
        with pytest.raises(LoginRequired):
            await _sign(key)
        assert await key.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)
        assert len(await pool.find()) == 1 < len(everything)
        await pool.login()
        await _sign(key)


def _made(pool: Any) -> dict[str, Any]:
    """What makes an object that may be private."""
    data = {
        pkcs11.Attribute.CLASS: pkcs11.ObjectClass.DATA,
        pkcs11.Attribute.TOKEN: True,
        pkcs11.Attribute.VALUE: b"data",
    }
    return {
        "key": partial(pool.generate_key, KeyType.AES, 128, store=True),
        "pair": partial(
            pool.generate_keypair, KeyType.EC, curve="secp256r1", store=True
        ),
        "object": partial(pool.create_object, data),
    }


async def test_after_a_logout_that_is_ignored_nothing_private_is_made(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """As on a token that asks for a login; what is said to be public is made."""
    fault.play_login("ignored", token.user_pin.encode())
    public = {pkcs11.Attribute.PRIVATE: False}
    async with make_pool(module=fault.path, pin=None, login_ignored=True) as pool:
        await pool.logout()
        fault.reset_counts()
        for make in _made(pool).values():
            with pytest.raises(LoginRequired, match="PRIVATE: False"):
                await make()
        assert not any(name.startswith(("C_Gen", "C_Cre")) for name in fault.counts())
        await _made(pool)["key"](template=public)
        await _made(pool)["pair"](private_template=public)
        await pool.login()
        for make in _made(pool).values():
            await make()


async def test_after_a_logout_that_is_ignored_nothing_public_makes_what_is_private(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """A public key is used by whoever comes; what it makes is not for everybody."""
    fault.play_login("ignored", token.user_pin.encode())
    public = {pkcs11.Attribute.PRIVATE: False}
    private = {pkcs11.Attribute.PRIVATE: True}
    new: dict[str, Any] = {"label": "new", "store": True}
    async with make_pool(module=fault.path, pin=None, login_ignored=True) as pool:
        key = await pool.generate_key(
            KeyType.AES, 128, label="k", store=True, template=_EXPORTABLE | public
        )
        wrapped = await key.wrap_key(key, mechanism=Mechanism.AES_KEY_WRAP)
        unwrap = partial(
            key.unwrap_key,
            pkcs11.ObjectClass.SECRET_KEY,
            KeyType.AES,
            wrapped,
            mechanism=Mechanism.AES_KEY_WRAP,
            **new,
        )
        group: Any = await pool.create_object(_GROUP | public)
        makers: list[Any] = [
            unwrap,
            lambda: unwrap(template=private),
            lambda: key.derive_key(KeyType.AES, 128, **new),
            lambda: key.copy(private),
            lambda: key.set_attributes(private),
            lambda: group.generate_keypair(store=True),
        ]
        await pool.logout()
        fault.reset_counts()
        for make in makers:
            with pytest.raises(LoginRequired, match="PRIVATE: False"):
                await make()
        assert not _CHANGING & fault.counts().keys()
        await unwrap(template=public)
        await key.copy({pkcs11.Attribute.LABEL: "copy"})
        await key.set_attributes({pkcs11.Attribute.LABEL: "other"})
        await pool.login()
        await (await pool.find({pkcs11.Attribute.LABEL: "copy"}))[0].copy(private)


_EXPORTABLE = {pkcs11.Attribute.EXTRACTABLE: True, pkcs11.Attribute.SENSITIVE: False}
_GROUP = {
    pkcs11.Attribute.CLASS: pkcs11.ObjectClass.DOMAIN_PARAMETERS,
    pkcs11.Attribute.KEY_TYPE: KeyType.DH,
    pkcs11.Attribute.TOKEN: True,
    pkcs11.Attribute.PRIME: (2**127 - 1).to_bytes(16, "big"),
    pkcs11.Attribute.BASE: b"\x03",
}
_CHANGING = {
    "C_UnwrapKey",
    "C_DeriveKey",
    "C_CopyObject",
    "C_SetAttributeValue",
    "C_GenerateKeyPair",
}


async def test_after_a_logout_that_is_ignored_no_function_is_let_in(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """It would see every private key: neither by `run`, in a session, nor by `map`."""
    fault.play_login("ignored", token.user_pin.encode())
    async with make_pool(module=fault.path, pin=None, login_ignored=True) as pool:
        await pool.logout()
        with pytest.raises(LoginRequired, match="login_ignored"):
            await pool.run(_noop)
        async with pool.session() as session:
            with pytest.raises(LoginRequired):
                await session.run(_noop)
        with pytest.raises(LoginRequired):
            [one async for one in pool.map(lambda _s, item: item, [1])]
        assert await digest(pool)
        await pool.login()
        await pool.run(_noop)


async def test_what_an_ignored_login_tells_is_no_sign_of_a_lost_token(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Its sessions say that nobody is in, or always the user: in neither case is it."""
    for always_user in (False, True):
        fault.play_login("ignored", token.user_pin.encode(), always_user=always_user)
        async with make_pool(module=fault.path, pin=None, login_ignored=True) as pool:
            key = await make_ec_key(pool, f"signer {always_user}")
            for state in (LoginState.USER, LoginState.PUBLIC):
                # It says no more than that it failed: so it is looked at the token.
                epoch = pool.login_epoch
                pool._engine.doubt(pkcs11.exceptions.DeviceError())  # noqa: SLF001
                await eventually(lambda: pool.state is PoolState.READY)
                assert (pool.login_state, pool.login_epoch) == (state, epoch)
                assert pool.stats().recoveries_total == 0
                await pool.logout()
            await pool.login()
            await _sign(key)


async def test_a_login_that_is_not_ignored_is_said_so(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The option on a token that does ask names itself as what is wrong."""
    fault.play_login("kept", token.user_pin.encode())
    async with make_pool(module=fault.path, pin=None, login_ignored=True) as pool:
        with pytest.raises(LoginRequired, match="login_ignored=True out"):
            await _sign(pool.key(label="signer"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"login_ignored": True, "pin": "1234"}, "leave pin= out"),
        ({"login_ignored": True, "login_per_session": True}, "give one of them"),
        ({"login_per_session": True, "pin": pkcs11.PROTECTED_AUTH}, "another pin="),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], text: str) -> None:
    """They are refused at once, with what to do."""
    with pytest.raises(InvalidOption, match=text):
        TokenPool("/m", slot_id=0, **options)


# -- Sessions dropped when idle (YubiHSM 2) ---------------------------------------


async def test_without_the_option_a_pool_that_idled_comes_back_by_itself(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Anchor, login and all are gone after 30 s; whoever calls next does not see it."""
    fault.drop_idle_sessions(30)
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        async with pool.session() as session:
            fault.pass_time(31)
            await _sign_many(key, _FEW)
            with pytest.raises(SessionClosed):
                await digest(session)
        assert pool.stats().recoveries_total > 0


def _all_used(fault: FaultModule, sessions: set[int], after: int) -> bool:
    calls = fault.calls("C_GenerateRandom", after=after)
    return sessions <= {call.session for call in calls if call.ended_ns}


async def test_with_the_option_sessions_that_stay_open_are_kept_alive(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Twice as long as the token waits: anchor, login, lease and its objects live."""
    fault.drop_idle_sessions(1000)
    async with make_pool(module=fault.path, session_max_idle=0.15) as pool:
        key = await make_ec_key(pool)
        async with pool.session() as session:
            secret = await session.generate_key(KeyType.AES, 256)
            await settled(pool)
            for _ in range(3):
                fault.pass_time(600)
                seen = fault.calls("C_GenerateRandom")
                after = seen[-1].sequence if seen else 0
                ahead = {s.handle for s in _room(pool).ahead}
                used = {s.number for s in fault.sessions()} - ahead
                await eventually(partial(_all_used, fault, used, after))
            await secret.encrypt(b"text", **_CBC)
        await _sign(key)
        assert pool.stats().recoveries_total == 0
        assert fault.count("C_Login") == 1


@pytest.mark.usefixtures("never_idle")
async def test_a_session_opened_ahead_that_is_too_old_is_not_used(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It is closed, and another opened for the operation."""
    async with make_pool(module=fault.path, session_max_idle=3600) as pool:
        await digest(pool)
        ahead = _room(pool).ahead
        await eventually(lambda: ahead)
        old = ahead[0].handle
        ahead[0].opened_at -= 3600
        await digest(pool)
        await settled(pool)
        used = {c.session for c in fault.calls("C_Digest")}
        assert old not in used
        assert old not in {s.number for s in fault.sessions()}
        assert pool.stats().recoveries_total == 0


async def test_a_ping_that_fails_brings_the_login_back(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Where sessions died all the same, nobody has to call for them to come back."""
    async with make_pool(module=fault.path, session_max_idle=0.15) as pool:
        assert pool.token is not None
        await settled(pool)
        fault.lose_sessions(pool.token.slot_id)
        await eventually(lambda: pool.stats().recoveries_total)
        await eventually(lambda: pool.login_state is LoginState.USER)


@pytest.mark.parametrize("rv", [CKR.FUNCTION_NOT_SUPPORTED, CKR.OPERATION_ACTIVE])
async def test_a_token_without_random_numbers_is_kept_alive_all_the_same(
    make_pool: MakePool, fault: FaultModule, rv: int
) -> None:
    """What it answers to the call does not matter, as long as it is there."""
    fault.on("C_GenerateRandom", every=True, answer=rv)
    async with make_pool(module=fault.path, session_max_idle=0.15) as pool:
        await blocking(fault.wait_until_count, "C_GenerateRandom", 3)
        assert pool.stats().recoveries_total == 0
        assert pool.stats().operations_failed == 0


# -- CKR_FUNCTION_FAILED as throttling --------------------------------------------


@pytest.mark.parametrize("function", ["C_SignInit", "C_Sign", "C_OpenSession"])
async def test_what_a_busy_token_refuses_is_tried_again(
    make_pool: MakePool, fault: FaultModule, function: str
) -> None:
    """Signing may happen twice; sessions that are not opened harm nobody."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await settled(pool)
        fault.on(function, times=3, answer=CKR.FUNCTION_FAILED)
        await _sign_many(key)
        assert pool.stats().operations_failed == 0
        assert pool.state is PoolState.READY


@pytest.mark.parametrize("function", ["C_DigestInit", "C_OpenSession"])
async def test_each_rest_of_an_operation_is_told(
    make_pool: MakePool, fault: FaultModule, function: str
) -> None:
    """Whoever runs the service sees that his token throttles."""
    async with make_pool(module=fault.path) as pool:
        fault.on(function, times=3, answer=CKR.FUNCTION_FAILED)
        with structlog.testing.capture_logs() as log:
            await digest(pool)
        assert {told["event"] for told in log} == {"operation.throttled"}
        assert [told["rests"] for told in log] == [1, 2, 3]
        for told in log:
            assert told["log_level"] == "warning"
            assert told["token"] == pool.token.label
            assert "CKR_FUNCTION_FAILED" in told["error"]
            assert 0.025 <= told["retry_in"] <= 0.2


@pytest.mark.parametrize("lent", [False, True])
async def test_a_function_that_always_fails_is_given_up_soon(
    make_pool: MakePool, fault: FaultModule, *, lent: bool
) -> None:
    """Five tries, then the token's own error; the session of a lease stays."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_DigestInit", every=True, answer=CKR.FUNCTION_FAILED)
        async with pool.session() as session:
            with pytest.raises(pkcs11.exceptions.FunctionFailed):
                await digest(session if lent else pool)
            fault.clear()
            assert await digest(session)
        assert fault.count("C_DigestInit") == 6


async def test_what_changes_the_token_is_not_tried_again(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a caller's function, nor what must not wait or cannot in time."""
    failed = pkcs11.exceptions.FunctionFailed
    async with make_pool(module=fault.path) as pool:
        rule = fault.on("C_GenerateKeyPair", every=True, answer=CKR.FUNCTION_FAILED)
        with pytest.raises(failed):
            await make_ec_key(pool)
        assert fault.fired(rule) == 1
        fault.on("C_DigestInit", every=True, answer=CKR.FUNCTION_FAILED)
        fault.reset_counts()
        with pytest.raises(failed):
            await digest(pool, timeout=0)
        with pytest.raises(failed):
            await pool.run(
                lambda s: s.digest(b"data", mechanism=Mechanism.SHA256), repeat=True
            )
        assert fault.count("C_DigestInit") == 2
        # The next rest would be longer than what is left: no PoolTimeout instead.
        monkeypatch.setattr("pkcs11_pool.engine.outage._RESTS", (4 * LAST_RESORT,))
        with pytest.raises(failed):
            await digest(pool, timeout=LAST_RESORT)
        assert fault.count("C_DigestInit") == 3


async def test_a_resting_operation_can_be_cancelled_and_closed_over(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It counts as waiting, and is gone at once when its caller or the pool is."""
    pool = make_pool(module=fault.path)
    await pool.open()
    fault.on("C_DigestInit", every=True, answer=CKR.FUNCTION_FAILED)

    async def rests() -> None:
        await eventually(lambda: _resting(pool))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(digest, pool)
        await rests()
        assert pool.stats().operations_waiting == 1
        tasks.cancel_scope.cancel()
    assert not _resting(pool)
    assert pool.stats().operations_waiting == 0

    async def refused() -> None:
        with pytest.raises((PoolTimeout, PoolClosed)):
            await digest(pool)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(refused)
        await rests()
        await pool.close()
    assert fault.sessions() == []


# -- C_Logout and C_CloseSession that fail ----------------------------------------


@pytest.mark.parametrize("always", [False, True])
async def test_a_logout_that_fails_is_done_by_closing(
    make_pool: MakePool, fault: FaultModule, *, always: bool
) -> None:
    """Once or always: the user is out, for closing the last session logs out, too."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        times: dict[str, Any] = {"every": True} if always else {"times": 1}
        fault.on("C_Logout", **times, answer=CKR.GENERAL_ERROR)
        for _ in range(3):
            await pool.logout()
            _is(pool, LoginState.PUBLIC)
            with pytest.raises(LoginRequired):
                await _sign(key)
            await pool.login()
            await _sign_many(key, _FEW)
    assert fault.sessions() == []


async def test_a_logout_and_a_close_that_fail_leave_nobody_in(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """What stays open when it should have been closed is closed with all others."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        for function in ("C_Logout", "C_CloseSession"):
            fault.on(function, every=True, answer=CKR.GENERAL_ERROR)
        await pool.logout()
        with pytest.raises(LoginRequired):
            await _sign(key)
        await pool.login()
        await _sign_many(key, _FEW)
    assert fault.sessions() == []


async def test_an_officer_whose_logout_fails_is_out_all_the_same(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The last session is closed, and that logs out; the user is in again."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        async with pool.security_officer(token.so_pin):
            fault.on("C_Logout", every=True, answer=CKR.GENERAL_ERROR)
        assert pool.login_state is LoginState.USER
        await _sign_many(key, _FEW)
    assert fault.sessions() == []


async def test_a_logout_that_hangs_holds_up_callers_no_longer_than_they_said(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """They get `PoolTimeout`; when it is back, they go on, and the user is out."""
    pool = make_pool(module=fault.path, close_timeout=0.3)
    await pool.open()
    fault.on("C_Logout", hang="before")
    async with anyio.create_task_group() as tasks:

        async def late(call: Callable[[], Any]) -> None:
            with pytest.raises(PoolTimeout):
                await call()

        tasks.start_soon(late, pool.logout)
        await hangs(fault, "C_Logout")
        tasks.start_soon(late, lambda: digest(pool))
        await anyio.wait_all_tasks_blocked()
        time_is_up(pool)
    fault.release()
    assert await digest(pool, timeout=LAST_RESORT)
    assert pool.login_state is LoginState.PUBLIC
    await pool.close()
    assert fault.sessions() == []


@pytest.mark.parametrize("often", [1, 3, None])
async def test_sessions_that_are_not_closed_are_closed_with_the_pool(
    make_pool: MakePool, fault: FaultModule, often: int | None
) -> None:
    """Never by a second `C_CloseSession`: the number may be another's by then."""
    fault.reuse_numbers()
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        if often is None:
            fault.on("C_CloseSession", every=True, answer=CKR.GENERAL_ERROR)
        else:
            fault.on("C_CloseSession", times=often, answer=CKR.GENERAL_ERROR)
        await _sign_many(key, _FEW)
        await settled(pool)
        closes = [c.session for c in fault.calls("C_CloseSession") if c.rv]
        assert closes
        if often is None:
            assert len(set(closes)) == len(closes)
        leaked = len(fault.sessions()) - pool.stats().sessions_open - 1
        assert leaked > 0
    assert fault.sessions() == []
    assert fault.count("C_CloseAllSessions") == 1


async def test_where_all_sessions_were_closed_none_of_others_is(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """`C_CloseAllSessions` would end those of other code as well."""
    async with make_pool(module=fault.path) as pool:
        await digest(pool)
    assert fault.count("C_CloseAllSessions") == 0


async def test_sessions_that_are_not_closed_do_not_keep_the_officer_out(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """A R/O one that stayed open would: what stayed is closed before."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        fault.on("C_CloseSession", every=True, answer=CKR.GENERAL_ERROR)
        await _sign(key)
        await settled(pool)
        fault.clear()
        async with pool.security_officer(token.so_pin):
            assert len(fault.sessions()) == 1
        await _sign_many(key, _FEW)


async def test_sessions_that_are_not_closed_and_use_up_the_token(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Who finds no session any more waits, is told so, and closing mends it."""
    fault.session_limit(total=5)
    pool = make_pool(module=fault.path, timeout=0.3)
    await pool.open()
    fault.on("C_CloseSession", every=True, answer=CKR.GENERAL_ERROR)
    told = ""
    with anyio.fail_after(LAST_RESORT):
        while "max_sessions=0" not in told:
            try:
                await digest(pool)
            except PoolTimeout as error:
                told = str(error)
    await pool.close()
    assert fault.sessions() == []


async def test_a_close_that_hangs_holds_up_nobody(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its caller has his result, others go on, and closing the pool ends in time."""
    pool = make_pool(module=fault.path, close_timeout=0.3)
    await pool.open()
    fault.on("C_CloseSession", hang="before", times=2)
    await digest(pool)
    await digest(pool)
    await hangs(fault, "C_CloseSession", 2)
    assert await digest(pool)
    await closes_in_time(pool)
    fault.release()
    await eventually(lambda: not workers())
    assert pool.stats().calls_stuck == 0
    # With a lost call inside nothing was finalised: the next pool does it.
    async with make_pool(module=fault.path) as another:
        assert await digest(another)
    assert fault.sessions() == []


# -- Session counts that are wrong -------------------------------------------------

_UNKNOWN, _INFINITE = -1, 0


@pytest.mark.parametrize(
    "told",
    [
        {"session_count": _UNKNOWN, "rw_count": _UNKNOWN},
        {"session_count": 0, "rw_count": 0},
        {"session_count": 4000, "rw_count": 4000},
        {"max_sessions": _UNKNOWN, "max_rw": _UNKNOWN},
        {"max_sessions": _INFINITE, "max_rw": _INFINITE},
        {"max_sessions": -2, "max_rw": -2},
        {"max_sessions": 1, "max_rw": 1, "session_count": 1},
        {"max_sessions": 2, "max_rw": 0},
        {"max_sessions": 5, "max_rw": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("there_are", [None, 3])
@ONE_LOOP
async def test_counts_that_are_wrong_stop_nobody(
    make_pool: MakePool,
    fault: FaultModule,
    told: dict[str, int],
    there_are: int | None,
) -> None:
    """Told too few, too many, or nothing: what the token really has is found out."""
    fault.token_info(**told)  # type: ignore[arg-type]  # numbers only
    fault.session_limit(total=there_are)
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await _sign_many(key)
        assert pool.stats().operations_failed == 0
    assert fault.sessions() == []


# -- Handles that die, or live, with a login ---------------------------------------


@pytest.mark.parametrize("lives", [True, False])
@pytest.mark.parametrize("reused", [True, False])
async def test_a_handle_is_found_anew_after_a_login_whether_it_died_or_not(
    make_pool: MakePool,
    fault: FaultModule,
    token: ThrowawayToken,
    *,
    lives: bool,
    reused: bool,
) -> None:
    """A number from the login before is never used: it may be another key's by now."""
    if reused:
        fault.reuse_numbers()
    if lives:
        fault.play_login("kept", token.user_pin.encode())
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await make_ec_key(pool, "other")
        await _sign(key)
        await pool.logout()
        if reused and not lives:
            fault.forget_objects()
        await pool.login()
        found = fault.count("C_FindObjectsInit")
        await _sign_many(key, _FEW)
        assert fault.count("C_FindObjectsInit") > found
