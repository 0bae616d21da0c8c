"""The Cryptoki module: initialised right, shared, and called as it can bear."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import pkcs11
import pytest
import structlog
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from faultmodule import CKR, FaultModule
from pkcs11_pool import (
    LoginState,
    PoolClosed,
    PoolError,
    PoolTimeout,
    TokenInUse,
    TokenNotFound,
    list_tokens,
)
from pkcs11_pool.cryptoki import module as modules
from pkcs11_pool.cryptoki.session import Session
from pkcs11_pool.state import Epoch
from poolkit import (
    LAST_RESORT,
    blocking,
    digest,
    eventually,
    hangs,
    make_ec_key,
    settled,
)

if TYPE_CHECKING:
    from conftest import MakePool
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory

_OS_LOCKING_OK = 0x2
_DIGEST = b"d" * 32


@pytest.fixture
def tokens(token_directory: TokenDirectory, token: ThrowawayToken) -> tuple[str, str]:
    """The labels of two tokens."""
    return token.label, token_directory.add_token("second").label


async def test_the_module_is_told_of_threads(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``C_Initialize`` gets ``CKF_OS_LOCKING_OK``, at each opening."""
    for _ in range(2):
        async with make_pool(module=fault.path):
            assert fault.init_args
            assert fault.init_flags == _OS_LOCKING_OK
            assert fault.init_reserved is None
    assert fault.count("C_Initialize") == fault.count("C_Finalize") == 2


async def test_module_parameters_are_passed_on(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``init_reserved`` of the pool that initialises reaches the module."""
    fault.hide_reserved = True
    for words in ("configdir='sql:/a' flags=", "configdir='sql:/b'", None):
        async with make_pool(module=fault.path, init_reserved=words) as pool:
            assert fault.init_reserved == words
            assert fault.init_flags == _OS_LOCKING_OK
            assert await digest(pool)


# -- One call at a time -----------------------------------------------------------


_TAKES_TURNS = pytest.mark.parametrize(
    ("cant_lock", "serialize"),
    [
        pytest.param(True, None, id="it cannot lock"),
        pytest.param(False, True, id="turns are asked for"),
    ],
)


@_TAKES_TURNS
async def test_a_module_that_takes_turns_has_one_call_inside(
    make_pool: MakePool,
    fault: FaultModule,
    token: ThrowawayToken,
    *,
    cant_lock: bool,
    serialize: bool | None,
) -> None:
    """No two calls are ever inside: not of operations, not of the actor."""
    fault.cant_lock = cant_lock
    fault.latency_us = 200
    async with make_pool(module=fault.path, pin=None, serialize=serialize) as pool:
        assert fault.init_flags == (0 if cant_lock else _OS_LOCKING_OK)
        fault.reset_counts()
        stop = anyio.Event()

        async def load() -> None:
            while not stop.is_set():
                await digest(pool)

        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(load)
            for _ in range(10):
                await pool.login(token.user_pin)
                await pool.logout()
            for _ in range(5):
                async with pool.session(rw=True) as session:
                    await digest(session)
            stop.set()
        await eventually(lambda: pool.stats().sessions_open == 0)
        assert fault.overlaps == 0


@_TAKES_TURNS
async def test_two_pools_take_turns_on_one_module(
    make_pool: MakePool,
    tokens: tuple[str, str],
    fault: FaultModule,
    *,
    cant_lock: bool,
    serialize: bool | None,
) -> None:
    """The turn is the module's, not the pool's: also when one of them falls idle."""
    fault.cant_lock = cant_lock
    fault.latency_us = 200
    first, second = tokens
    options = {"module": fault.path, "serialize": serialize}
    async with (
        make_pool(**options, token_label=first) as one,
        make_pool(**options, token_label=second) as two,
    ):
        fault.reset_counts()
        stop = anyio.Event()

        async def load() -> None:
            while not stop.is_set():
                await digest(one)

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(load)
            for _ in range(3):
                async with anyio.create_task_group() as some:
                    for _ in range(8):
                        some.start_soon(digest, two)
                await settled(two)
                await eventually(lambda: two.stats().sessions_open == 0)
                await two.logout()
                await two.login("1234")
            stop.set()
        assert fault.overlaps == 0


@pytest.mark.parametrize(
    ("cant_lock", "serialize"), [(False, None), (False, False), (True, False)]
)
async def test_without_turns_calls_are_inside_at_once(
    make_pool: MakePool,
    fault: FaultModule,
    *,
    cant_lock: bool,
    serialize: bool | None,
) -> None:
    """As the module can bear, or as the user says that it can."""
    fault.cant_lock = cant_lock
    async with make_pool(module=fault.path, serialize=serialize) as pool:
        fault.on("C_Digest", times=3, hang="before")
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(digest, pool)
            await hangs(fault, "C_Digest", 3)
            fault.release()


async def test_behind_a_call_that_hangs_others_wait_for_their_turn(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """They time out with nothing sent; and go on when the call has returned."""
    async with make_pool(module=fault.path, serialize=True) as pool:
        fault.on("C_Digest", hang="before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(digest, pool)
            await hangs(fault, "C_Digest")
            fault.reset_counts()
            with pytest.raises(PoolTimeout) as caught:
                await digest(pool, timeout=0.1)
            assert caught.value.phase == "waiting"
            assert fault.counts() == {}
            fault.release()
        assert await digest(pool, timeout=LAST_RESORT)


@pytest.mark.parametrize(("serialize", "inside"), [(None, 1), (False, 2)])
async def test_a_module_known_to_hang_with_threads_takes_turns(
    make_pool: MakePool,
    fault: FaultModule,
    soft_hsm: SoftHSM,
    *,
    serialize: bool | None,
    inside: int,
) -> None:
    """p11-kit's client loses wake-ups when its server goes; the user may insist."""
    named = fault.path.with_name("p11-kit-client.so")
    fault = FaultModule(fault.path, soft_hsm.module, copy_to=named)
    async with make_pool(module=fault.path, serialize=serialize) as pool:
        fault.on("C_Digest", times=inside, hang="before")
        fault.reset_counts()
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(digest, pool)
            await hangs(fault, "C_Digest", inside)
            fault.clear()
        await eventually(lambda: pool.stats().sessions_open == 0)
        assert bool(fault.overlaps) is (inside > 1)


# -- Shared, and counted ----------------------------------------------------------


async def test_the_last_pool_of_a_module_finalises_it(
    make_pool: MakePool, tokens: tuple[str, str], fault: FaultModule
) -> None:
    """In whichever order they end; what else uses it for a moment counts, too."""
    first, second = (
        make_pool(module=fault.path, token_label=label) for label in tokens
    )
    counts = fault.count
    await first.open()
    await second.open()
    assert second.lib is first.lib
    await list_tokens(fault.path)
    with pytest.raises(TokenInUse):
        await make_pool(module=fault.path, token_label=tokens[0]).open()
    with pytest.raises(TokenNotFound):
        await make_pool(module=fault.path, token_serial=b"nobody's").open()
    await first.close()
    await first.close()
    assert (counts("C_Initialize"), counts("C_Finalize")) == (1, 0)
    assert await digest(second)
    assert second.login_state is LoginState.USER
    await second.close()
    assert (counts("C_Initialize"), counts("C_Finalize")) == (1, 1)
    await list_tokens(fault.path)
    assert (counts("C_Initialize"), counts("C_Finalize")) == (2, 2)


async def test_one_pool_of_a_module_does_not_concern_another(
    make_pool: MakePool, tokens: tuple[str, str], fault: FaultModule
) -> None:
    """A login, a key, a session: each is of one token."""
    async with AsyncExitStack() as stack:
        pools = [
            await stack.enter_async_context(
                make_pool(module=fault.path, token_label=label)
            )
            for label in tokens
        ]
        one, two = pools
        keys = [await make_ec_key(pool) for pool in pools]
        assert await keys[0].public_key_der() != await keys[1].public_key_der()
        async with two.session() as session:
            await one.logout()
            assert await digest(session)
            assert two.login_state is LoginState.USER
            assert await keys[1].sign(_DIGEST, mechanism=Mechanism.ECDSA)


# -- Generations ------------------------------------------------------------------


async def test_each_initialisation_is_a_new_generation(
    make_pool: MakePool, tokens: tuple[str, str], fault: FaultModule
) -> None:
    """A pool that finds it initialised is in the same one."""
    with structlog.testing.capture_logs() as events:
        for _ in range(2):
            async with (
                make_pool(module=fault.path, token_label=tokens[0]),
                make_pool(module=fault.path, token_label=tokens[1]),
            ):
                await list_tokens(fault.path)
        await list_tokens(fault.path)
    begun = [e["generation"] for e in events if e["event"] == "module.initialized"]
    assert begun == [1, 2, 3]
    assert fault.count("C_Initialize") == 3


class _Old:
    """All that can be kept of a pool, and used when it is closed."""

    def __init__(self, pool: TokenPool) -> None:
        self.pool = pool
        self.block = pool.session(rw=True)

    async def keep(self) -> None:
        """Have it, in good order."""
        self.session = await self.block.__aenter__()
        self.number = self.session.handle
        self.secret = await self.session.generate_key(KeyType.AES, 128)
        self.key = await make_ec_key(self.pool)
        self.signature = await self.key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        self.p11, self.p11_key = await self.session.run(_session_and_key)

    async def use(self) -> None:
        """Use it all; each refuses."""
        ecb = Mechanism.AES_ECB
        for call in (
            lambda: digest(self.pool),
            lambda: digest(self.session),
            self.session.info,
            lambda: self.secret.encrypt(b"b" * 16, mechanism=ecb),
            lambda: self.secret.on(self.session).encrypt(b"b" * 16, mechanism=ecb),
            self.secret.destroy,
            lambda: self.key.sign(_DIGEST, mechanism=Mechanism.ECDSA),
            lambda: self.key.on(self.session).sign(_DIGEST, mechanism=Mechanism.ECDSA),
            self.key.destroy,
        ):
            with pytest.raises(PoolError):
                await call()
        await self.block.__aexit__(None, None, None)
        await self.pool.close()
        for kept in (
            lambda: self.p11.generate_random(64),
            lambda: self.p11_key.sign(_DIGEST, mechanism=Mechanism.ECDSA),
            self.p11_key.destroy,
            self.p11.close,
        ):
            with pytest.raises(pkcs11.SessionHandleInvalid):
                kept()


def _session_and_key(session: Any) -> tuple[Any, Any]:
    return session, session.get_key(
        label="signer", object_class=ObjectClass.PRIVATE_KEY
    )


async def test_nothing_of_an_older_generation_enters_the_module(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Numbers start again, so a stale one is a stranger's: none is even closed."""
    fault.reuse_numbers()
    pool = make_pool(module=fault.path)
    await pool.open()
    old = _Old(pool)
    await old.keep()
    await pool.close()
    async with make_pool(module=fault.path) as new, new.session(rw=True) as stranger:
        assert stranger.handle == old.number
        secret = await stranger.generate_key(KeyType.AES, 128)
        await settled(new)
        fault.clear_log()
        await old.use()
        assert [call for call in fault.calls() if call.session is not None] == []
        assert await secret.on(stranger).encrypt(b"b" * 16, mechanism=Mechanism.AES_ECB)
        assert len(await new.find({Attribute.LABEL: "signer"})) == 2


async def test_a_session_that_was_open_at_the_end_of_its_generation(
    fault: FaultModule, make_pool: MakePool
) -> None:
    """Below the pool: neither the session nor who has it closes a stranger's."""
    fault.reuse_numbers()
    options = make_pool(module=fault.path)._engine.options  # noqa: SLF001
    path = str(fault.path)

    def open_one() -> tuple[modules.Module, Session]:
        module = modules.acquire(path, None, serialize=None)
        token, _ = module.find(options)
        return module, Session(module, token, rw=False, epoch=Epoch(1))

    module, old = open_one()
    modules.release(module)
    again, new = open_one()
    try:
        assert again is module
        assert new.generation == module.generation > old.generation
        assert new.p11.handle == 1  # type: ignore[attr-defined]
        fault.clear_log()
        with pytest.raises(pkcs11.SessionHandleInvalid):
            old.p11.close()
        assert old.close() == 0
        assert [call for call in fault.calls() if call.session is not None] == []
        assert new.info().rw is False
        assert new.close() == 0
    finally:
        modules.release(again)
    assert fault.sessions() == []


@pytest.mark.parametrize("done", [False, True])
async def test_a_module_that_does_not_end_well_is_used_again(
    make_pool: MakePool, fault: FaultModule, *, done: bool
) -> None:
    """It stays ours, whether it is finalised or says so only."""
    pool = make_pool(module=fault.path)
    await pool.open()
    if done:
        fault.on("C_Finalize", replace=CKR.GENERAL_ERROR)
    else:
        fault.on("C_Finalize", answer=CKR.GENERAL_ERROR)
    await pool.close()
    async with make_pool(module=fault.path, open_timeout=LAST_RESORT / 2) as again:
        assert await digest(again)
    with pytest.raises(PoolClosed):
        await digest(pool)


# -- Other code in the process ----------------------------------------------------


async def test_other_code_uses_the_pools_library(
    make_pool: MakePool, tokens: tuple[str, str], fault: FaultModule
) -> None:
    """Plain python-pkcs11: under the pool's login, and on a token of its own."""

    def other(library: Any) -> bool:
        found = [token.label for token in library.get_tokens()]
        assert set(tokens) <= set(found)
        with library.get_token(token_label=tokens[0]).open() as session:
            key = session.get_key(label="signer", object_class=ObjectClass.PRIVATE_KEY)
            assert key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        token = library.get_token(token_label=tokens[1])
        with token.open(rw=True, user_pin="1234") as session:
            key = session.generate_key(KeyType.AES, 128)
            sealed = key.encrypt(_DIGEST, mechanism=Mechanism.AES_ECB)
            opened: bytes = key.decrypt(sealed, mechanism=Mechanism.AES_ECB)
        return opened == _DIGEST

    async with make_pool(module=fault.path, token_label=tokens[0]) as pool:
        key = await make_ec_key(pool)
        library = pool.lib
        assert isinstance(library, pkcs11._pkcs11.lib)  # noqa: SLF001
        assert await blocking(other, library)
        assert pool.login_state is LoginState.USER
        assert await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        # pkcs11.lib() would initialise it for one thread: that cannot happen.
        with pytest.raises(pkcs11.PKCS11Error, match="already initialized"):
            pkcs11.lib(str(fault.path))
        assert fault.count("C_Finalize") == 0
        assert await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
    async with make_pool(module=fault.path, token_label=tokens[0]) as pool:
        # There is one for the life of the process.
        assert pool.lib is library
        assert await blocking(other, library)
    assert fault.sessions() == []
