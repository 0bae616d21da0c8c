# ruff: noqa: SLF001  # what is left over shows inside
"""Cancelled at every checkpoint, in every way: nothing is left or done twice."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sniffio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
)
from pkcs11 import Attribute, KeyType, Mechanism

from cancellation_integrations import INTEGRATIONS, integration_coroutines
from cancellation_table import (
    ASYNC_PIN,
    CASES,
    Case,
    Ground,
    awaited_pin,
    public_coroutines,
)
from checkpoints import WAYS, Cancelled, Held, Posted, Way, every, numbers
from faultmodule import FaultModule
from keykit import is_signature, make_secret, sha256
from pkcs11_pool import TokenPool, softhsm
from poolkit import ASYNCIO_ONLY, LAST_RESORT, digest, eventually, hangs, make_ec_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from pkcs11_pool.softhsm import SoftHSM

_SIGN: dict[str, Any] = {"mechanism": Mechanism.ECDSA, "signature_format": "der"}
_PREHASHED = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
_HOMES = [
    pytest.param(case, home, id=f"{case}-{number}-{home}")
    for number, case in enumerate((*CASES, *INTEGRATIONS))
    for home in ("pool", "session")
    if case.in_session or home == "pool"
    if home == "session" or case.covers != "PooledSession.info"
    if not case.asyncio_only
]
_HELD = [
    parameters
    for parameters in _HOMES
    if isinstance(case := parameters.values[0], Case)
    if case.function and case.covers != "TokenPool.open"
]
_ON_ASYNCIO = [case for case in (*CASES, *INTEGRATIONS) if case.asyncio_only]


class _Shared:
    """What all tests here share: tokens, keys, and a fault module."""

    def __init__(self, fault: FaultModule, directory: Any) -> None:
        self.fault = fault
        self.token, self.other, self.blank = (
            directory.add_token(label) for label in ("demo", "other", "blank")
        )
        mine = ec.generate_private_key(ec.SECP256R1()).public_key()
        self.point = mine.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self.signer_der = self.wrapped = b""

    def pool(self, **options: Any) -> TokenPool:
        given: dict[str, Any] = {
            "module": self.fault.path,
            "token_label": self.token.label,
            "pin": self.token.user_pin,
            "max_sessions": 4,
            "close_timeout": 2.0,
            "timeout": LAST_RESORT,
        }
        return TokenPool(**(given | options))

    async def make_keys(self) -> None:
        async with self.pool() as pool:
            signer = await make_ec_key(pool)
            self.signer_der = await signer.public_key_der()
            secret = await make_secret(pool, wrap=True, unwrap=True)
            await make_secret(pool, label="kek", wrap=True, unwrap=True)
            await pool.generate_keypair(
                KeyType.RSA,
                1024,
                label="each time",
                store=True,
                private_template={Attribute.ALWAYS_AUTHENTICATE: True},
            )
            await make_secret(pool, KeyType.GENERIC_SECRET, "mac")
            plain = await make_secret(pool, label="plain", extractable=True)
            self.wrapped = await secret.wrap_key(
                plain, mechanism=Mechanism.AES_KEY_WRAP
            )


@pytest.fixture(scope="module")
def shared(
    soft_hsm: SoftHSM, fault_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_Shared]:
    """The tokens, and keys on the first of them."""
    place = tmp_path_factory.mktemp("cancelled")
    # In memory, where there is such a place: each change is written to the disk, which
    # would take most of the time.
    memory = Path("/dev/shm")  # noqa: S108  # not our own file: a directory in it
    tokens = memory if os.access(memory, os.W_OK) else place
    with softhsm.token_directory(tokens, softhsm=soft_hsm) as directory:
        fault = FaultModule(
            fault_library, soft_hsm.module, copy_to=place / "libfault.so"
        )
        found = _Shared(fault, directory)
        anyio.run(found.make_keys)
        yield found
        fault.clear()


@asynccontextmanager
async def _ground(shared: _Shared, case: Case, home: str) -> AsyncIterator[Ground]:
    pin = shared.token.user_pin
    pool = shared.pool(
        pin=awaited_pin(pin) if case in ASYNC_PIN else pin,
        # So long a session block waits for the call inside with its session object.
        close_timeout=0.2 if case in INTEGRATIONS else 2.0,
    )
    async with AsyncExitStack() as stack:
        session = None
        if not case.alone:
            await stack.enter_async_context(pool)
        if home == "session":
            session = await stack.enter_async_context(pool.session(rw=True))
        yield Ground(
            pool=pool,
            calls=pool if session is None else session,
            fault=shared.fault,
            token=shared.token,
            other=shared.other,
            blank=shared.blank,
            make_pool=shared.pool,
            signer_der=shared.signer_der,
            point=shared.point,
            wrapped=shared.wrapped,
            session=session,
        )
    await _nothing_open(shared.fault)


async def _nothing_open(fault: FaultModule) -> None:
    await _soon(lambda: not fault.sessions())


async def _soon(predicate: Callable[[], object]) -> None:
    if not predicate():
        await eventually(predicate)


async def _ready(ground: Ground, case: Case) -> None:
    ground.fault.clear()
    if case.before is not None:
        await case.before(ground)
    ground.fault.reset_counts()
    ground.fault.clear_log()


async def _look(ground: Ground, case: Case) -> None:
    """All is at rest, the change is there or not, and the pool works."""
    fault, function = ground.fault, case.function
    inside = fault.inside(function) if function else 0
    asked = fault.count(function) if function else 0
    if case.waits:
        assert inside == 0, "it was not waited for"
    if not case.alone:
        await _at_rest(ground)
    if case.waits and function:
        assert fault.count(function) == asked, "it was done behind its caller's back"
    fault.clear()
    happened = None if case.after is None else await case.after(ground)
    if happened is not None:
        assert happened in (0, 1), "it was done twice"
        assert happened == asked or not function
    if case.alone:
        await _nothing_open(fault)
        return
    await _works(ground)


async def _at_rest(ground: Ground) -> None:
    """Gauges are those of a pool that nobody uses; no waiter is left."""
    pool, fault = ground.pool, ground.fault
    engine = pool._engine
    lent = int(ground.session is not None)

    def rests() -> bool:
        stats = pool.stats()
        return (
            stats.sessions_open == stats.sessions_ahead + stats.sessions_leased
            and stats.sessions_leased == lent
            and not stats.operations_running
            and not stats.operations_waiting
            # Where the machine stood still, a call was given up, and is on its way.
            and not stats.calls_stuck
            and not engine._staff.busy
            and not engine._room.leasing
            and not engine._waiting.requests
            and not engine._waiting.parked
            and engine._mode.so_lane is None
            and len(fault.sessions()) == 1 + stats.sessions_open
        )

    try:
        await _soon(rests)
    except TimeoutError:
        raise AssertionError(f"{pool.stats()}, {fault.sessions()}") from None


def _under_way(pool: TokenPool) -> bool:
    engine = pool._engine
    return bool(
        engine._staff.running
        or engine._waiting.requests
        or engine._lines
        or engine._waiting.parked
    )


async def _works(ground: Ground) -> None:
    """It signs, and so does the open session that was there all the time."""
    data = sha256(b"still there")
    signature = await ground.pool.key("signer").sign(data, **_SIGN, timeout=LAST_RESORT)
    assert is_signature(ground.signer_der, signature, data, _PREHASHED)
    if ground.session is not None:
        assert not ground.session.closed
        assert await digest(ground.session, timeout=LAST_RESORT)


async def _everywhere(ground: Ground, case: Case, posted: Posted) -> int:
    """Run a case until it has been cancelled at each checkpoint; how often it was."""
    runs = 0
    if not case.alone:
        posted.expected = lambda: _under_way(ground.pool)
    # Uncancelled: how often it asks the module, and that it works at all.
    await _ready(ground, case)
    await case.call(ground)
    most = ground.fault.count(case.function) if case.function else 0
    assert most or not case.function, "it does not call what the table says"
    most = case.most or most
    await _look(ground, case)
    for way, moment in every(sniffio.current_async_library()):
        for at in numbers():
            run = Cancelled(way, moment, at)
            try:
                await _ready(ground, case)
                await run.run(case.call(ground), posted)
                if case.function:
                    assert ground.fault.count(case.function) <= most, "done twice"
                if (
                    at == 0
                    and way is Way.SCOPE
                    and case.waits
                    and case.door
                    and case.function
                ):
                    assert not ground.fault.count(case.function), "begun nevertheless"
                await _look(ground, case)
            except Exception as error:
                error.add_note(str(run))
                # The other tests find what they expect.
                with suppress(Exception):
                    await _look(ground, case)
                raise
            runs += 1
            if not run.asked:
                break
    return runs


@pytest.mark.parametrize(("case", "home"), _HOMES)
async def test_cancelled_at_every_checkpoint(
    shared: _Shared, monkeypatch: pytest.MonkeyPatch, case: Case, home: str
) -> None:
    """Gauges rest, nobody waits, what changes happened once or not, and it works."""
    posted = Posted(monkeypatch)
    async with _ground(shared, case, home) as ground:
        assert await _everywhere(ground, case, posted) > 3


@ASYNCIO_ONLY
@pytest.mark.parametrize("case", _ON_ASYNCIO, ids=str)
async def test_cancelled_at_every_checkpoint_on_asyncio(
    shared: _Shared, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """The same for what stands on a library that knows no other loop."""
    posted = Posted(monkeypatch)
    async with _ground(shared, case, "pool") as ground:
        assert await _everywhere(ground, case, posted) > 3


@pytest.mark.parametrize(("case", "home"), _HELD)
async def test_cancelled_while_its_call_is_inside(
    shared: _Shared, case: Case, home: str
) -> None:
    """The caller goes at once, or with the outcome, however often it is cancelled."""
    async with _ground(shared, case, home) as ground:
        for way in WAYS[sniffio.current_async_library()]:
            for place in ("before", "after"):
                await _ready(ground, case)
                try:
                    await _held(ground, case, way, place)
                    await _look(ground, case)
                except Exception as error:
                    error.add_note(f"{way.value}, {place} the call")
                    ground.fault.clear()
                    with suppress(Exception):
                        await _look(ground, case)
                    raise


async def _held(ground: Ground, case: Case, way: Way, place: Any) -> None:
    fault = ground.fault
    fault.on(case.function, hang=place)
    caller = Held(way, case.call(ground))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller)
        await hangs(fault, case.function)
        async for _ in caller.cancelled():
            # Whoever waits for the outcome goes on to wait.
            assert not (case.waits and caller.done.is_set()), "it did not wait"
        if not case.waits:
            with anyio.fail_after(LAST_RESORT):
                await caller.done.wait()
            assert fault.inside(case.function)
        fault.release()
    assert caller.came, "swallowed"


@pytest.mark.parametrize("case", ASYNC_PIN, ids=str)
async def test_cancelled_at_every_checkpoint_with_a_pin_that_is_awaited(
    shared: _Shared, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """Whoever was sent for the PIN may go at any moment: another one is sent."""
    posted = Posted(monkeypatch)
    async with _ground(shared, case, "pool") as ground:
        assert await _everywhere(ground, case, posted) > 3


def test_every_public_coroutine_is_in_the_table() -> None:
    """What is added to the pool is cancelled here, too."""
    covered = {name for case in CASES for name in case.covers.split()}
    assert covered == public_coroutines()


def test_every_coroutine_of_an_integration_is_in_the_table() -> None:
    """And what is added to them."""
    covered = {name for case in INTEGRATIONS for name in case.covers.split()}
    assert covered == integration_coroutines()
