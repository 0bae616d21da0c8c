"""What several test files need: calls that stay inside, and ways to wait for them.

Order is forced by what is here, never by sleeping. Blocking waits run on AnyIO's
threads, so that the loop goes on meanwhile.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

import anyio
import anyio.to_thread
import pytest
from pkcs11 import KeyType, Mechanism

from pkcs11_pool import PoolClosed, PoolError, PoolState, PoolTimeout
from pkcs11_pool.engine.mode import Pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from faultmodule import Call, FaultModule
    from pkcs11_pool import KeyRef, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

P = ParamSpec("P")
T = TypeVar("T")

LAST_RESORT = 20.0
"""Seconds after which a wait that should have ended long ago fails its test.

Less than the 30 s that a pool gives its calls by default, lest it hide a wait for them.
"""

SLACK = 5.0
"""Seconds that a machine may stand still, besides three times what is promised."""

_FAR = 100.0
"""Seconds: later than all deadlines, but for those of minutes."""

ASYNCIO_ONLY = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)
"""For what only asyncio has: ``Task.cancel()`` and ``asyncio.timeout()``."""


async def blocking(func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that blocks, while the loop goes on."""
    return await anyio.to_thread.run_sync(lambda: func(*args, **kwargs))


def wait_for(predicate: Callable[[], object]) -> None:
    """Block until something is so that no event tells of."""
    deadline = time.monotonic() + LAST_RESORT
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {LAST_RESORT} s")
        threading.Event().wait(0.002)


async def eventually(predicate: Callable[[], object]) -> None:
    """Wait until something is so that no event tells of."""
    await blocking(wait_for, predicate)


async def settled(pool: TokenPool) -> None:
    """Wait until no worker is busy any more, tidying included."""

    def quiet() -> bool:
        stats = pool.stats()
        idle = stats.sessions_open == stats.sessions_ahead + stats.sessions_leased
        busy = stats.operations_running or pool._engine._staff.busy  # noqa: SLF001
        return idle and not busy

    await eventually(quiet)


async def paused(pool: TokenPool) -> None:
    """Wait until nothing new starts any more, for a logout or for the officer.

    A caller with a time limit would tell it, too, if the machine did not stand still.
    """
    await eventually(lambda: pool._engine._mode.pause is not Pause.NOT)  # noqa: SLF001


async def digest(pool: Any, data: bytes = b"data", **options: Any) -> bytes:
    """Make the cheapest call with a result; on a pool or on a session."""
    result: bytes = await pool.digest(data, mechanism=Mechanism.SHA256, **options)
    return result


async def make_ec_key(pool: Any, label: str = "signer", **options: Any) -> KeyRef:
    """Make a P-256 key on the token; the reference names both halves."""
    await pool.generate_keypair(
        KeyType.EC, curve="secp256r1", label=label, store=True, **options
    )
    key: KeyRef = pool.key(label=label)
    return key


class Hold:
    """A function for ``pool.run`` that stays inside until it is let go.

    Attributes:
        calls: The arguments of each call, in the order in which they came.
        ended: How many calls have returned.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.ended = 0
        self._changed = threading.Condition()
        self._let_go = threading.Event()

    def __call__(self, _session: object, *args: Any) -> tuple[Any, ...]:
        """Stay inside; return the arguments."""
        with self._changed:
            self.calls.append(args)
            self._changed.notify_all()
        assert self._let_go.wait(2 * LAST_RESORT)
        with self._changed:
            self.ended += 1
            self._changed.notify_all()
        return args

    def __enter__(self) -> Self:
        """Nothing stays inside after the block."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Let all calls go."""
        self.let_go()

    def let_go(self) -> None:
        """Let all calls return, those to come as well."""
        self._let_go.set()

    async def entered(self, calls: int = 1) -> None:
        """Wait until so many calls have come."""
        await blocking(self._wait, lambda: len(self.calls) >= calls)

    async def left(self, calls: int = 1) -> None:
        """Wait until so many calls have returned."""
        await blocking(self._wait, lambda: self.ended >= calls)

    def _wait(self, predicate: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(predicate, LAST_RESORT):
                raise TimeoutError(f"{len(self.calls)} came, {self.ended} returned")


async def hangs(fault: FaultModule, function: str, calls: int = 1) -> None:
    """Wait until calls of a function hang in the fault module."""
    await blocking(fault.wait_until_hanging, function, calls)


def time_is_up(pool: TokenPool) -> None:
    """Let the deadlines of all calls pass now, however far they are.

    For what comes after a deadline. A short one in its place would have to be long
    enough for the call to get into the module, on whatever machine.
    """
    engine, then = pool._engine, time.monotonic() + _FAR  # noqa: SLF001
    with engine._lock:  # noqa: SLF001
        for worker in engine._staff.workers:  # noqa: SLF001
            if worker.job is None:
                # It tidies up, or is about to look for more: for that it has time yet.
                worker.done = then
    engine.sweep(then)


async def given_up(
    pool: TokenPool, call: Callable[[], Awaitable[object]], inside: Awaitable[None]
) -> PoolTimeout:
    """Make a call, wait until it is inside, and let its deadline pass there.

    Args:
        pool: Whose call it is.
        call: Makes it.
        inside: Waits until it hangs.
    """
    errors = []

    async def runs_out() -> None:
        with pytest.raises(PoolTimeout) as caught:
            await call()
        errors.append(caught.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runs_out)
        await inside
        time_is_up(pool)
    (error,) = errors
    assert error.phase == "running"
    return error


async def lost(pool: TokenPool, fault: FaultModule, calls: int = 1) -> PoolTimeout:
    """Make a call that hangs in ``C_Digest``, and is given up on.

    Args:
        pool: Whose call it is.
        fault: It has a rule for it.
        calls: How many hang then.
    """
    return await given_up(pool, lambda: digest(pool), hangs(fault, "C_Digest", calls))


def time_limits(first: float) -> Iterator[float]:
    """Time limits, each four times the one before.

    For a call that must have got somewhere when its time is over. On a machine that
    stands still it has not, and another one with more time has to be made.
    """
    limit = first
    while limit < LAST_RESORT:
        yield limit
        limit *= 4
    pytest.fail(f"no call got anywhere within {limit / 4} s")


def by_session(calls: Iterable[Call]) -> dict[int, list[str]]:
    """The functions that were called on each session, in order."""
    found: dict[int, list[str]] = {}
    for call in calls:
        if call.session is not None:
            found.setdefault(call.session, []).append(call.function)
    return found


def most_open(calls: Iterable[Call]) -> int:
    """The most sessions that can have been open at once, by a log of calls."""
    steps = []
    for call in calls:
        if call.function == "C_OpenSession" and call.rv == 0:
            assert call.ended_ns is not None
            steps.append((call.ended_ns, 1))
        elif call.function == "C_CloseSession":
            steps.append((call.began_ns, -1))
    most = count = 0
    for _, step in sorted(steps):
        count += step
        most = max(most, count)
    return most


def workers() -> list[threading.Thread]:
    """The worker threads of all pools."""
    return [t for t in threading.enumerate() if t.name == "pkcs11-pool worker"]


def pool_threads() -> list[str]:
    """The names of all threads that belong to pools."""
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith("pkcs11-pool")]


def copy_object(token: ThrowawayToken, count: int) -> None:
    """Bring a SoftHSM2 token that has one object to so many like it.

    By its files: 5,000 calls of ``C_CreateObject`` take a minute. While the module is
    not initialised; it finds them when it is.
    """
    found = token.directory.rglob("*.object")
    (made,) = [one for one in found if one.name != "token.object"]
    content = made.read_bytes()
    for _ in range(count - 1):
        name = made.with_name(f"{uuid.uuid4()}.object")
        name.write_bytes(content)
        name.with_suffix(".lock").touch()


class Refused:
    """A caller who is told that the pool is closed."""

    def __init__(self, error: type[PoolError] = PoolClosed) -> None:
        self.error = error
        self.done = anyio.Event()

    async def __call__(self, pool: TokenPool, **options: Any) -> None:
        """Make a call that does not end well."""
        with pytest.raises(self.error):
            await digest(pool, **options)
        self.done.set()


async def closes_in_time(pool: TokenPool, promised: float = 0.3) -> None:
    """Close a pool whose ``close_timeout`` was promised."""
    began = time.monotonic()
    await pool.close()
    assert time.monotonic() - began < 3 * promised + SLACK
    assert pool.state is PoolState.CLOSED
