"""How long a number is trusted: for its age, and for the module's generation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from faultmodule import CKR
from keykit import SECRET, hmac_sha256
from pkcs11_pool import LoginState, PoolState
from pkcs11_pool.cryptoki import keys
from poolkit import digest, eventually, hangs, make_ec_key, settled

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, TokenPool

_AGE = 30.0
_DATA = b"data"
_DIGEST = b"d" * 32
_HMAC = Mechanism.SHA256_HMAC
_ECDSA = Mechanism.ECDSA


class _Clock:
    """The monotonic clock as keys see it, and nobody else: it moves when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    """It stands."""
    found = _Clock()
    monkeypatch.setattr(keys, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


async def _mac(pool: TokenPool, label: str, value: bytes) -> KeyRef:
    await pool.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
            Attribute.VALUE: value,
            Attribute.TOKEN: True,
            Attribute.SIGN: True,
            Attribute.LABEL: label,
        }
    )
    return pool.key(label=label)


def _numbers_move(pool: TokenPool, fault: FaultModule, label: str) -> None:
    """Other code finds a key: it gets the lowest number, whoever had that before.

    The pool cannot know of it, no more than of what other processes do.
    """
    fault.forget_objects()
    with pool.lib.get_token(token_label=pool.token.label).open() as session:
        assert len(list(session.get_objects({Attribute.LABEL: label}))) == 1


@pytest.mark.parametrize(
    ("age", "passed", "checks"),
    [
        pytest.param(_AGE, _AGE - 1, 0, id="younger"),
        pytest.param(_AGE, _AGE, 1, id="older"),
        pytest.param(None, 1e9, 0, id="never"),
        pytest.param(0.0, 0.0, 5, id="always"),
    ],
)
async def test_a_number_is_verified_once_when_it_is_older_than_the_age(
    make_pool: MakePool,
    fault: FaultModule,
    clock: _Clock,
    *,
    age: float | None,
    passed: float,
    checks: int,
) -> None:
    """Five uses cost one check, five, or none; and nothing is looked for again."""
    async with make_pool(module=fault.path, handle_max_age=age) as pool:
        key = await _mac(pool, "mine", SECRET)
        for _ in range(2):
            await key.sign(_DATA, mechanism=_HMAC)
        await settled(pool)
        fault.reset_counts()
        clock.now += passed
        for _ in range(5):
            await key.sign(_DATA, mechanism=_HMAC)
        assert fault.count("C_GetAttributeValue") == checks
        assert fault.count("C_FindObjectsInit") == 0


async def test_a_number_that_others_gave_away_is_not_used_beyond_its_age(
    make_pool: MakePool, fault: FaultModule, clock: _Clock
) -> None:
    """It is another key's by now: once it is old, the right key is found again."""
    fault.reuse_numbers()
    async with make_pool(module=fault.path, handle_max_age=_AGE) as pool:
        key = await _mac(pool, "mine", SECRET)
        await _mac(pool, "stranger", bytes(32))
        for _ in range(2):
            assert await key.sign(_DATA, mechanism=_HMAC) == hmac_sha256(_DATA)
        (used,) = {call.object for call in fault.calls("C_SignInit")}
        _numbers_move(pool, fault, "stranger")
        clock.now += _AGE
        assert await key.sign(_DATA, mechanism=_HMAC) == hmac_sha256(_DATA)
        # The old number names something, and that was not used.
        assert fault.calls("C_SignInit")[-1].object != used


async def _used(pool: TokenPool) -> Any:
    """A key whose number and mechanism are known."""
    key = await _mac(pool, "mine", SECRET)
    for _ in range(2):
        assert await key.sign(_DATA, mechanism=_HMAC) == hmac_sha256(_DATA)
    return key


async def test_a_signature_during_which_objects_changed_is_checked_before_it_leaves(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The key may have been destroyed meanwhile, and its number be another key's."""
    async with make_pool(module=fault.path) as pool:
        key = await _used(pool)
        fault.on("C_Sign", hang="before")
        made: list[bytes] = []

        async def sign() -> None:
            made.append(await key.sign(_DATA, mechanism=_HMAC))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sign)
            await hangs(fault, "C_Sign")
            await _mac(pool, "other", bytes(32))
            before = fault.count("C_GetAttributeValue")
            fault.release()
        assert made == [hmac_sha256(_DATA)]
        assert fault.count("C_GetAttributeValue") == before + 1


async def test_a_known_number_that_is_dead_is_looked_up_once_more(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Another process has made the key anew, say; its caller does not notice."""
    async with make_pool(module=fault.path) as pool:
        key = await _used(pool)
        before = fault.count("C_FindObjectsInit")
        fault.on("C_SignInit", answer=CKR.KEY_HANDLE_INVALID)
        assert await key.sign(_DATA, mechanism=_HMAC) == hmac_sha256(_DATA)
        # A private key or a secret one: that is two searches.
        assert fault.count("C_FindObjectsInit") == before + 2
        # Known again.
        assert await key.sign(_DATA, mechanism=_HMAC) == hmac_sha256(_DATA)
        assert fault.count("C_FindObjectsInit") == before + 2


async def test_a_number_is_never_used_in_another_generation_than_its_own(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A key that is found after the token was lost, and before ``C_Initialize``.

    A call that was inside all the time finds it, in the epoch that goes on after the
    recovery: nobody logs in to a public pool. Then the numbers begin anew.
    """
    fault.reuse_numbers()
    async with make_pool(module=fault.path) as pool:
        signature = await (await make_ec_key(pool, "mine")).sign(
            _DIGEST, mechanism=_ECDSA
        )
        await make_ec_key(pool, "stranger")
    fault.clear_log()
    async with make_pool(module=fault.path, pin=None, max_sessions=4) as pool:
        assert pool.login_state is LoginState.PUBLIC
        key = pool.key(label="mine")
        outcomes: list[Any] = []

        async def verify() -> None:
            outcomes.append(await key.verify(_DIGEST, signature, mechanism=_ECDSA))

        fault.on("C_OpenSession", hang="before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(verify)
            await hangs(fault, "C_OpenSession")
            # To the next who comes, the module is not initialised; to the actor, too.
            fault.on("C_OpenSession", answer=CKR.CRYPTOKI_NOT_INITIALIZED)
            fault.on("C_GetSessionInfo", answer=CKR.CRYPTOKI_NOT_INITIALIZED)
            lost = fault.on(
                "C_GetSlotList", answer=CKR.CRYPTOKI_NOT_INITIALIZED, every=True
            )
            begun = fault.count("C_Initialize")
            tasks.start_soon(digest, pool)
            await eventually(lambda: fault.fired(lost))
            fault.release()
            await eventually(lambda: fault.count("C_Initialize") > begun)
            fault.remove(lost)
        assert outcomes == [True]
        await eventually(lambda: pool.state is PoolState.READY)
        functions = [call.function for call in fault.calls()]
        found = functions.index("C_VerifyInit")
        assert found < functions.index("C_Initialize", found)
        _numbers_move(pool, fault, "stranger")
        assert await key.verify(_DIGEST, signature, mechanism=_ECDSA)
