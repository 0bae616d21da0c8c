"""What an operation costs on the module, counted; and that nobody waits for others."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import Attribute, KeyType, Mechanism

from poolkit import blocking, copy_object, eventually, make_ec_key, settled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_DIGEST = b"d" * 32
_MANY = 200
_CALLERS = 8


async def _warm(operation: Callable[[], Awaitable[object]]) -> None:
    """Until numbers are known, and the pool knows how fast the token is."""
    for _ in range(40):
        await operation()


async def _operations(pool: TokenPool) -> dict[str, tuple[Any, dict[str, int]]]:
    """Each operation, with the calls of one."""
    key = await make_ec_key(pool)
    signature = await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
    aes: KeyRef = await pool.generate_key(KeyType.AES, 256, label="aes", store=True)
    iv = bytes(16)
    cipher: Any = {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": iv}
    hidden = await aes.encrypt(b"hidden", **cipher)
    return {
        "sign": (
            lambda: key.sign(_DIGEST, mechanism=Mechanism.ECDSA),
            {"C_SignInit": 1, "C_Sign": 1},
        ),
        "verify": (
            lambda: key.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA),
            {"C_VerifyInit": 1, "C_Verify": 1},
        ),
        "encrypt": (
            lambda: aes.encrypt(b"hidden", **cipher),
            {"C_EncryptInit": 1, "C_Encrypt": 1},
        ),
        "decrypt": (
            lambda: aes.decrypt(hidden, **cipher),
            {"C_DecryptInit": 1, "C_Decrypt": 1},
        ),
        "digest": (
            lambda: pool.digest(b"x", mechanism=Mechanism.SHA256),
            {"C_DigestInit": 1, "C_Digest": 1},
        ),
        "random": (lambda: pool.generate_random(64), {"C_GenerateRandom": 1}),
        "seed": (lambda: pool.seed_random(b"seed"), {"C_SeedRandom": 1}),
    }


_NAMES = ["sign", "verify", "encrypt", "decrypt", "digest", "random", "seed"]


async def _spent(
    pool: TokenPool,
    fault: FaultModule,
    operation: Callable[[], Awaitable[object]],
    callers: int = 1,
) -> dict[str, int]:
    """What the module was called for, over many operations in the steady state."""
    await _warm(operation)
    await settled(pool)
    before = fault.counts()

    async def caller() -> None:
        for _ in range(_MANY // callers):
            await operation()

    async with anyio.create_task_group() as group:
        for _ in range(callers):
            group.start_soon(caller)
    await settled(pool)
    after = fault.counts()
    spent = {k: after[k] - before.get(k, 0) for k in after}
    return {k: n for k, n in spent.items() if n}


def _assert_within_budget(
    spent: dict[str, int], calls: dict[str, int], ahead: int
) -> None:
    """Its own calls and a session for each; only sessions ahead may differ."""
    opened, closed = spent.pop("C_OpenSession"), spent.pop("C_CloseSession")
    assert spent == {k: n * _MANY for k, n in calls.items()}
    assert abs(opened - _MANY) <= ahead
    assert abs(closed - _MANY) <= ahead


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("callers", [1, _CALLERS])
@pytest.mark.usefixtures("never_idle")
async def test_an_operation_costs_its_own_calls_and_a_session(
    make_pool: MakePool, fault: FaultModule, name: str, callers: int
) -> None:
    """No lookup, no login, no size query, no state; only sessions ahead may differ."""
    most = 2 * _CALLERS
    async with make_pool(module=fault.path, max_sessions=most) as pool:
        operation, calls = (await _operations(pool))[name]
        spent = await _spent(pool, fault, operation, callers)
    _assert_within_budget(spent, calls, most)


@pytest.mark.parametrize("objects", [10, 5000])
@pytest.mark.usefixtures("never_idle")
async def test_an_operation_costs_the_same_however_many_objects_there_are(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, objects: int
) -> None:
    """A number that is known is not looked for again: each operation, one by one."""
    async with make_pool(module=fault.path) as pool:
        await pool.generate_key(KeyType.AES, 128, label="other", store=True)
    copy_object(token, objects)
    async with make_pool(module=fault.path) as pool:
        assert await pool.run(_count) == objects
        found = await _operations(pool)
        assert list(found) == _NAMES
        for operation, calls in found.values():
            _assert_within_budget(await _spent(pool, fault, operation), calls, 8)


def _count(session: Any) -> int:
    return sum(1 for _ in session.get_objects({Attribute.LABEL: "other"}))


_LARGE = {
    "ML-DSA-44": 2420,
    "ML-DSA-87": 4627,
    "SLH-DSA-128s": 7856,
    "SLH-DSA-256f": 49856,
}


@pytest.mark.parametrize("size", list(_LARGE.values()), ids=list(_LARGE))
@pytest.mark.usefixtures("never_idle")
async def test_the_largest_signatures_cost_no_size_query_either(
    make_pool: MakePool, fault: FaultModule, size: int
) -> None:
    """The fault module answers as a token that has such keys."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        fault.signature_size = size

        async def sign() -> None:
            signature = await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
            assert len(signature) == size

        spent = await _spent(pool, fault, sign)
    _assert_within_budget(spent, {"C_SignInit": 1, "C_Sign": 1}, 8)


_ROOM = 64 * 1024
_SIZES = [_ROOM - 2048, _ROOM, _ROOM + 1, 3 * _ROOM + 5, 1 << 20]


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("mode", ["AES_CBC_PAD", "AES_ECB"])
@pytest.mark.usefixtures("never_idle")
async def test_large_data_costs_no_size_query_either(
    make_pool: MakePool, fault: FaultModule, mode: str, size: int
) -> None:
    """Also when it does not fit into the room that a worker keeps: one call each."""
    cipher: dict[str, Any] = {"mechanism": Mechanism[mode]}
    if mode == "AES_CBC_PAD":
        cipher["mechanism_param"] = bytes(range(16))
    else:
        size += -size % 16
    data = random.Random(size).randbytes(size)  # noqa: S311  # no secret
    async with make_pool(module=fault.path) as pool:
        key: KeyRef = await pool.generate_key(KeyType.AES, 256, label="aes", store=True)
        small = await key.encrypt(bytes(16), **cipher)
        assert await key.decrypt(small, **cipher) == bytes(16)
        await settled(pool)

        before = fault.counts()
        hidden = await key.encrypt(data, **cipher)
        await settled(pool)
        between = fault.counts()
        assert await key.decrypt(hidden, **cipher) == data
        await settled(pool)
        after = fault.counts()
    assert len(hidden) > len(data) or mode == "AES_ECB"
    assert _own(before, between) == {"C_EncryptInit": 1, "C_Encrypt": 1}
    assert _own(between, after) == {"C_DecryptInit": 1, "C_Decrypt": 1}


def _own(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What was called between, but for opening and closing sessions."""
    spent = {k: n - before.get(k, 0) for k, n in after.items()}
    sessions = {"C_OpenSession", "C_CloseSession"}
    return {k: n for k, n in spent.items() if n and k not in sessions}


@pytest.mark.parametrize("function", ["C_CloseSession", "C_OpenSession"])
async def test_a_result_does_not_wait_for_a_hang_behind_it(
    make_pool: MakePool, fault: FaultModule, function: str
) -> None:
    """What a worker does behind its caller's back is nothing to the caller."""
    # With one session there is none to spare: the next one is always opened behind.
    async with make_pool(module=fault.path, max_sessions=1, close_timeout=0.3) as pool:
        # Set while its session is in use: nobody opens or closes another in front.
        fault.on("C_GenerateRandom", hang="before")
        async with anyio.create_task_group() as group:
            group.start_soon(pool.generate_random, 64)
            await blocking(fault.wait_until_hanging, "C_GenerateRandom")
            fault.on(function, hang="before")
            fault.release("C_GenerateRandom")
            await blocking(fault.wait_until_hanging, function)
        assert fault.inside(function)
        fault.clear()


async def test_a_result_that_is_held_back_waits_for_no_hang_either(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fast token results wait for each other a moment, but for no call."""
    # All results come fast enough for that, however slow the machine is.
    monkeypatch.setattr("pkcs11_pool.engine.held._LATE", math.inf)
    done = anyio.Event()

    async def caller() -> None:
        await pool.generate_random(64)
        done.set()

    async with make_pool(module=fault.path, max_sessions=1, close_timeout=0.3) as pool:
        fault.on("C_GenerateRandom", hang="before")
        fault.on("C_CloseSession", hang="before")
        async with anyio.create_task_group() as group:
            for _ in range(_CALLERS):
                group.start_soon(caller)
            await blocking(fault.wait_until_hanging, "C_GenerateRandom")
            await eventually(lambda: pool.stats().operations_waiting == _CALLERS - 1)
            fault.release("C_GenerateRandom")
            await blocking(fault.wait_until_hanging, "C_CloseSession")
            await done.wait()
            assert fault.inside("C_CloseSession")
            fault.clear()


async def test_behind_slow_calls_all_workers_come(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Also when calls were short until now: what hangs does not count as awake."""
    async with make_pool(module=fault.path, max_sessions=_CALLERS) as pool:
        await _warm(lambda: pool.digest(b"x", mechanism=Mechanism.SHA256))
        fault.on("C_Digest", hang="before", every=True)
        async with anyio.create_task_group() as group:
            for _ in range(_CALLERS):
                group.start_soon(_digest, pool)
            await blocking(fault.wait_until_hanging, "C_Digest", _CALLERS)
            assert pool.stats().operations_running == _CALLERS
            fault.clear()


async def _digest(pool: TokenPool) -> None:
    await pool.digest(b"x", mechanism=Mechanism.SHA256)


async def test_sessions_ahead_are_open_in_use_and_gone_when_idle(
    pool: TokenPool,
) -> None:
    """The next operation finds a session; an idle pool keeps none."""
    await _warm(lambda: pool.generate_random(64))
    # Before the pool is idle for the first time, at the latest in the next round.
    while pool.stats().sessions_ahead < 1:
        await pool.generate_random(64)
    await eventually(lambda: pool.stats().sessions_open == 0)


async def test_a_session_opened_ahead_does_not_survive_a_login(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Also one that is just being opened when the login comes."""
    async with make_pool(module=fault.path, pin=None) as pool:
        # The second one: the session after the operation's own.
        fault.on("C_OpenSession", nth=2, hang="before")
        await pool.generate_random(64)
        await blocking(fault.wait_until_hanging, "C_OpenSession")
        await pool.login(token.user_pin)
        fault.release()
        await settled(pool)
        assert pool.stats().sessions_ahead == 0
        assert pool.stats().sessions_opened_total == 2
        # The anchor alone.
        assert len(fault.sessions()) == 1
