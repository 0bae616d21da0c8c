"""A PIN shows nowhere: each way in, each way to go wrong, each place, each spelling.

The tables are elsewhere: ``pinways`` has the ways in and the sources that go wrong,
``pinsearch`` the places and the spellings. Here is what is done meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import subprocess
import sys
import traceback
from contextlib import asynccontextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from unittest.mock import AsyncMock, create_autospec
from urllib.parse import quote

import anyio
import anyio.lowlevel
import pkcs11
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pkcs11 import Attribute, KeyType, Mechanism

import pinsearch
from faultmodule import CKR
from pinsearch import Hidden, Scene, Searcher, look
from pinways import WAYS, WRONG_SOURCES, Way
from pkcs11_pool import (
    InvalidOption,
    KeyRef,
    PinRefused,
    PinSourceError,
    Pkcs11URI,
    PoolError,
    PoolState,
    PoolTimeout,
    SecurityOfficer,
    TokenPool,
    init_token,
    pins,
)
from pkcs11_pool.integrations import (
    cryptography,
    jose,
    opentelemetry,
    pdf,
    tuf,
    x509,
)
from pkcs11_pool.integrations.settings import PoolSettings
from poolkit import blocking, eventually, hangs, make_ec_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import ThrowawayToken, TokenDirectory

_PKCS1: dict[str, Any] = {"mechanism": Mechanism.SHA256_RSA_PKCS}
_CARRIED: Final = (pkcs11.PKCS11Error, PoolError)
_USER: Final = 1
_CONTEXT: Final = 2


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Uvloop has asyncio's tasks."""
    return request.param


@pytest.fixture
def pin() -> Hidden:
    """The user's PIN."""
    return pinsearch.make()


@pytest.fixture
def so_pin() -> Hidden:
    """The security officer's PIN."""
    return pinsearch.make()


@pytest.fixture
def wrong() -> Hidden:
    """A PIN that the token does not know. It must not show either."""
    return pinsearch.make()


@pytest.fixture
def token(
    token_directory: TokenDirectory, pin: Hidden, so_pin: Hidden
) -> ThrowawayToken:
    """A token with PINs as no others."""
    return token_directory.add_token("demo", user_pin=pin.text, so_pin=so_pin.text)


@pytest.fixture
def scene(
    pin: Hidden, so_pin: Hidden, wrong: Hidden, fault: FaultModule
) -> Iterator[Scene]:
    """Everything is logged, traced and measured meanwhile."""
    made = Scene(Searcher(pin, so_pin, wrong))
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    opentelemetry.instrument(tracer_provider=tracers, meter_provider=meters)
    made.more |= {
        "spans": lambda: [span.to_json() for span in spans.get_finished_spans()],
        "metrics": lambda: [
            data.to_json() if (data := reader.get_metrics_data()) else ""
        ],
        "fault module": lambda: [repr(fault.calls()), repr(fault.counts())],
    }
    try:
        with made.log:
            yield made
    finally:
        opentelemetry.uninstrument()
        tracers.shutdown()
        meters.shutdown()


@pytest.fixture
def way(
    fault: FaultModule, pin: Hidden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Way:
    """To a pool on the token, by way of the fault module."""
    options: dict[str, Any] = {"timeout": 2.0, "recovery_timeout": 0.2}
    return Way(fault.path, "demo", pin, tmp_path, monkeypatch, options)


@asynccontextmanager
async def opened(scene: Scene, way: Way) -> AsyncIterator[TokenPool]:
    """An open pool that is one of the objects of the scene."""
    async with way.pool(way.pin.text) as pool:
        scene.objects.append(pool)
        yield pool


async def _caught(
    scene: Scene, name: str, call: Callable[[], Awaitable[object]]
) -> None:
    """Keep the error of a call that must fail."""
    try:
        await call()
    except BaseException as error:
        if not isinstance(error, _CARRIED):
            scene.errors[f"{name}, {type(error).__name__}"] = error
            raise
        scene.errors[name] = error
    else:
        pytest.fail(f"{name}: no error")


async def _make_key(pool: TokenPool) -> KeyRef:
    """An RSA key that wants the PIN each time."""
    _, private = await pool.generate_keypair(
        KeyType.RSA,
        1024,
        label="each time",
        store=True,
        timeout=30.0,
        private_template={Attribute.ALWAYS_AUTHENTICATE: True},
    )
    return private


# -- The searcher itself ----------------------------------------------------------


@pytest.mark.parametrize("spelling", pinsearch.SPELLINGS)
def test_the_searcher_finds_every_spelling(spelling: str) -> None:
    """In the middle of a text; and it finds none where there is none."""
    pin = pinsearch.make()
    find = Searcher(pin)
    for spelt in pinsearch.SPELLINGS[spelling](pin.text):
        assert spelling in find(f"a line\nbefore {spelt} after")
        assert find(f"before {spelt} after".encode("latin-1", "replace"))
    assert find("neither here nor there") == []
    assert Searcher(pinsearch.make())(pin.text) == []


def test_the_searcher_sees_what_a_console_wrapped_and_what_was_cut() -> None:
    """A long line is broken by a frame of lines, a long value by dots."""
    pin = pinsearch.make()
    find = Searcher(pin)
    assert find(f"│ pin = '{pin.text[:6]} │\n│ {pin.text[6:12]}…' │")
    assert find(f"pin = '…{pin.text[-12:]}'")


async def _leaks(scene: Scene, text: str) -> None:
    del scene
    raise ValueError(len(text))


_KEPT: Final[list[object]] = []
_LEAKS: Final[dict[str, Callable[[Scene, str], Any]]] = {
    "log": lambda scene, text: scene.log.written.write(text),
    "held by a public object": lambda scene, text: scene.objects.append(
        functools.partial(lambda a: a, [{"x": (text,)}])
    ),
    "pickle and copy": lambda scene, text: scene.objects.append({"x": text}),
    "repr of anything alive": lambda _scene, text: _KEPT.append(Pkcs11URI(token=text)),
    "words of the process": lambda _scene, text: sys.argv.append(text),
    "extra": lambda scene, text: scene.more.update(extra=lambda: [text]),
}


@pytest.mark.parametrize("place", _LEAKS)
async def test_the_searcher_finds_a_leak(
    scene: Scene, wrong: Hidden, place: str
) -> None:
    """One that is made on purpose, where it was made, also after a clean look."""
    words = list(sys.argv)
    assert await look(scene, "before") == []
    try:
        _LEAKS[place](scene, wrong.text)
        found = await look(scene, "now")
    finally:
        sys.argv[:] = words
        _KEPT.clear()
    assert [one for one in found if one.startswith(f"now: {place}:")]


async def test_the_searcher_finds_a_leak_in_a_task_a_thread_and_an_error(
    scene: Scene, wrong: Hidden
) -> None:
    """Variables of a coroutine that waits, a thread, a function that failed."""
    go, there = anyio.Event(), anyio.Event()

    async def waits(text: str) -> str:
        there.set()
        await go.wait()
        return text

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waits, wrong.text)
        await there.wait()
        try:
            await _leaks(scene, wrong.text)
        except ValueError as error:
            scene.errors["leaks"] = error
        scene.printed = "leaks"
        found = await look(scene, "now")
        go.set()
    told = {one.split(": ")[1] for one in found}
    assert "task" in told
    ways = {name for name in pinsearch.RENDERERS if f"error of 'leaks', {name}" in told}
    # These write no variables.
    assert set(pinsearch.RENDERERS) - ways == {
        "repr and str",
        "format_exception",
        "logging.exception",
        "structlog, plain",
    }
    text = wrong.text
    assert [one for one in await look(scene, "now") if ": thread: " in one]
    del text


# -- Each way in ------------------------------------------------------------------

_ASYNCIO: Final = ("asyncio", {"debug": True})
_EACH_WAY: Final = pytest.mark.parametrize(
    ("anyio_backend", "name"),
    [
        *(pytest.param(_ASYNCIO, name, id=name) for name in WAYS),
        # The loop only matters to what is awaited on it.
        *(
            pytest.param(("trio", {}), name, id=f"trio, {name}")
            for name in ("text", "coroutine function", "coroutine method")
        ),
    ],
)


@_EACH_WAY
async def test_the_life_of_a_pool_shows_no_pin(
    scene: Scene, way: Way, fault: FaultModule, name: str
) -> None:
    """Opening, open, used, logging in again, in an outage, back, and closed."""
    way.options["timeout"] = 60.0  # its loop stands still while the PIN is looked for
    pool = WAYS[name](way)
    scene.objects.append(pool)
    found = await look(scene, "new")
    fault.on("C_Login", hang="before")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.open)
        await hangs(fault, "C_Login")
        found += await look(scene, "opening")
        fault.clear()
    try:
        key = await make_ec_key(pool)
        found += await look(scene, "open")
        fault.lose_login()
        fault.on("C_Login", hang="before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_sign, key)
            await hangs(fault, "C_Login")
            found += await look(scene, "logging in again")
            fault.clear()
        fault.go_down(CKR.DEVICE_REMOVED)
        await _caught(scene, "outage", lambda: _sign(key, timeout=0.1))
        found += await look(scene, "outage")
        fault.come_back()
        await eventually(lambda: pool.state is PoolState.READY)
        await _sign(key)
    finally:
        await pool.close()
    found += await look(scene, "closed")
    assert found == []
    assert scene.moments == 6
    assert scene.log.events > 5


async def _sign(key: KeyRef, **options: Any) -> bytes:
    return await key.sign(bytes(32), mechanism=Mechanism.ECDSA, **options)


@_EACH_WAY
async def test_a_wrong_pin_shows_no_more(
    scene: Scene, way: Way, wrong: Hidden, name: str
) -> None:
    """Each way gives a PIN that the token refuses."""
    way.pin = wrong
    pool = WAYS[name](way)
    scene.objects.append(pool)
    await _caught(scene, name, pool.open)
    assert isinstance(scene.errors[name], pkcs11.PinIncorrect)
    assert await look(scene, "refused") == []


# -- A source that goes wrong -----------------------------------------------------


@pytest.mark.parametrize("awaited", [False, True], ids=["plain", "awaited"])
@pytest.mark.parametrize("name", WRONG_SOURCES)
async def test_a_source_that_fails_shows_nothing_of_its_variables(
    scene: Scene,
    way: Way,
    fault: FaultModule,
    name: str,
    *,
    awaited: bool,
) -> None:
    """Its frames are in the traceback, with their lines and without what they knew."""
    source = functools.partial(WRONG_SOURCES[name], way.pin)

    async def ask() -> Any:
        await anyio.lowlevel.checkpoint()
        return source()

    if awaited and name == "ends the program":
        pytest.skip("it is awaited on the caller's own thread, and ends his program")
    pool = way.pool(ask if awaited else source)
    scene.objects.append(pool)
    await _caught(scene, name, pool.open)
    assert isinstance(scene.errors[name], PinSourceError)
    assert fault.count("C_Login") == 0
    assert pool.state is PoolState.CLOSED
    assert await look(scene, "failed") == []


async def test_a_source_that_fails_is_told_by_its_place(scene: Scene, way: Way) -> None:
    """What it raised is the cause, with the lines where it did."""
    source = functools.partial(WRONG_SOURCES["raises in a chain"], way.pin)
    with pytest.raises(PinSourceError) as caught:
        await way.pool(source).open()
    shown = pinsearch.RENDERERS["traceback with locals"](caught.value)
    assert "in _raises_in_a_chain" in shown
    assert "raise LookupError(len(text))" in shown
    assert scene.find(shown) == []


async def test_what_was_being_handled_keeps_its_variables(way: Way) -> None:
    """A source is awaited by a caller, who may be in the middle of another error."""

    async def ask() -> str:
        await anyio.lowlevel.checkpoint()
        raise OSError("no such card")

    def fails(value: int) -> None:
        raise ValueError(value)

    try:
        fails(4711)
    except ValueError as error:
        with pytest.raises(PinSourceError):
            await way.pool(ask).open()
        shown = pinsearch.RENDERERS["each frame"](error)
    assert "4711" in shown


# -- Calls that take a PIN, and go wrong ------------------------------------------

Call = tuple[
    "dict[str, Any]", "Callable[[TokenPool, KeyRef, Hidden], Awaitable[object]]"
]


async def _officer(pool: TokenPool, so_pin: Any, **options: Any) -> None:
    async with pool.security_officer(so_pin, **options):
        pass


async def _login(pool: TokenPool, *given: Any, **options: Any) -> None:
    await pool.logout()
    await pool.login(*given, **options)


_Taking = dict[str, "Callable[[TokenPool, KeyRef, Hidden], Awaitable[object]]"]

_TAKE_A_PIN: Final[_Taking] = {
    "login": lambda pool, _key, pin: pool.login(pin.text),
    "login, by name": lambda pool, _key, pin: pool.login(pin=pin.text, force=True),
    "set_pin, old": lambda pool, _key, pin: pool.set_pin(pin.text, "another-one"),
    "set_pin, both": lambda pool, _key, pin: pool.set_pin(pin.text, pin.text),
    "set_pin, by name": lambda pool, _key, pin: pool.set_pin(old=pin.text, new="1"),
    "set_pin, new": lambda pool, _key, pin: pool.set_pin("12", pin.text * 20),
    "set_pin, no new": lambda pool, _key, pin: pool.set_pin(pin.text, None),  # type: ignore[arg-type]
    "set_pin, timeout": lambda pool, _key, pin: pool.set_pin(
        pin.text, pin.text, timeout=-1
    ),
    "officer": lambda pool, _key, pin: _officer(pool, pins.literal(pin.text)),
    "sign": lambda _pool, key, pin: key.sign(b"x", pin=pin.text, **_PKCS1),
    "decrypt": lambda _pool, key, pin: key.decrypt(bytes(128), pin=pin.text),
    "sign_many": lambda _pool, key, pin: anext(
        key.sign_many([b"x"], pin=pin.text, **_PKCS1)
    ),
    "decrypt_stream": lambda _pool, key, pin: anext(
        key.decrypt_stream(bytes(128), pin=pin.text)
    ),
    "sync.sign": lambda _pool, key, pin: blocking(
        lambda: key.sync.sign(b"x", pin=pin.text, **_PKCS1)
    ),
    "sync.decrypt": lambda _pool, key, pin: blocking(
        lambda: key.sync.decrypt(bytes(128), pin=pin.text)
    ),
    "sync.sign_many": lambda _pool, key, pin: blocking(
        lambda: list(key.sync.sign_many([b"x"], pin=pin.text, **_PKCS1))
    ),
    "sync.decrypt_stream": lambda _pool, key, pin: blocking(
        lambda: list(key.sync.decrypt_stream(bytes(128), pin=pin.text))
    ),
    "sync on the loop": lambda _pool, key, pin: _at_once(
        lambda: key.sync.sign(b"x", pin=pin.text)
    ),
}
"""Calls on an open pool that take a PIN, each with one that the token refuses."""


async def _at_once(call: Callable[[], object]) -> object:
    return call()


async def test_a_refused_pin_shows_in_no_error_of_any_call(
    scene: Scene, way: Way, wrong: Hidden
) -> None:
    """Each call that takes a PIN takes one that is wrong."""
    async with opened(scene, way) as pool:
        key = await _make_key(pool)
        scene.objects.append(key)
        scene.printed = "sync.sign"
        for name, call in _TAKE_A_PIN.items():
            if name.startswith("login"):
                await pool.logout()
            await _caught(scene, name, lambda call=call: call(pool, key, wrong))  # type: ignore[misc]
            if name.startswith("login"):
                await pool.login()
        found = await look(scene, "refused")
    assert found == []
    assert set(scene.errors) == set(_TAKE_A_PIN)


class _Bad(NamedTuple):
    """What is no PIN, made of one inside of an expression."""

    pin: Hidden
    make: Callable[[str], Any]

    @property
    def value(self) -> Any:
        """For the argument of a call and no variable."""
        return self.make(self.pin.text)


_BAD: Final[dict[str, Callable[[str], Any]]] = {
    "bytes": str.encode,
    "bytearray": lambda text: bytearray(text.encode()),
    "list": lambda text: [text],
    "path": PurePath,
    "surrogate": lambda text: text + "\udcff",
}

_Giving = dict[str, "Callable[[TokenPool, KeyRef, _Bad], Awaitable[object]]"]

_GIVE: Final[_Giving] = {
    "login": lambda pool, _key, bad: pool.login(bad.value),
    "login, by name": lambda pool, _key, bad: pool.login(pin=bad.value),
    "set_pin, old": lambda pool, _key, bad: pool.set_pin(bad.value, "new-pin"),
    "set_pin, new": lambda pool, _key, bad: pool.set_pin("old-pin", bad.value),
    "officer": lambda pool, _key, bad: _at_once(
        lambda: pool.security_officer(bad.value)
    ),
    "sign": lambda _pool, key, bad: key.sign(b"x", pin=bad.value),
    "sync.sign": lambda _pool, key, bad: blocking(
        lambda: key.sync.sign(b"", pin=bad.value)
    ),
    "sign_many": lambda _pool, key, bad: _at_once(
        lambda: key.sign_many([], pin=bad.value)
    ),
    "decrypt_stream": lambda _pool, key, bad: _at_once(
        lambda: key.decrypt_stream(b"", pin=bad.value)
    ),
    "pool": lambda _pool, _key, bad: _at_once(
        lambda: TokenPool("/m", slot_id=0, pin=bad.value)
    ),
    "from_uri": lambda _pool, _key, bad: _at_once(
        lambda: TokenPool.from_uri(_URI, pin=bad.value)
    ),
    "settings": lambda _pool, _key, bad: _at_once(
        lambda: PoolSettings(module=Path("/m"), slot_id=0).pool(pin=bad.value)
    ),
    "init_token, so_pin": lambda _pool, _key, bad: init_token(
        "/m", slot_id=0, label="x", so_pin=bad.value
    ),
    "init_token, user_pin": lambda _pool, _key, bad: init_token(
        "/m", slot_id=0, label="x", so_pin="12345678", user_pin=bad.value
    ),
    "URI": lambda _pool, _key, bad: _at_once(lambda: Pkcs11URI(pin_value=bad.value)),
    "literal": lambda _pool, _key, bad: _at_once(lambda: pins.literal(bad.value)),
}
"""Everything that takes a PIN, given what is none."""
_URI: Final = "pkcs11:slot-id=0?module-path=/m"


@pytest.mark.parametrize("anyio_backend", [_ASYNCIO], ids=["asyncio"])
@pytest.mark.parametrize("kind", _BAD)
async def test_what_is_no_pin_is_refused_and_not_shown(
    scene: Scene, way: Way, wrong: Hidden, kind: str
) -> None:
    """Most likely it is the PIN, in a wrong type."""
    async with opened(scene, way) as pool:
        key = pool.key(label="any")
        bad = _Bad(wrong, _BAD[kind])
        for name, call in _GIVE.items():
            await _caught(scene, name, functools.partial(call, pool, key, bad))
            assert isinstance(scene.errors[name], InvalidOption)
        assert await look(scene, kind) == []


_BESIDE: Final[dict[str, Callable[[Hidden], object]]] = {
    "pool, bad module": lambda pin: TokenPool(7, slot_id=0, pin=pin.text),  # type: ignore[arg-type]
    "pool, no token": lambda pin: TokenPool("/m", pin=pin.text),
    "pool, partial": lambda pin: TokenPool("/m", pin=functools.partial(str, pin.text)),
    "pool, bad limit": lambda pin: TokenPool(
        "/m", slot_id=0, pin=pin.text, max_sessions=0
    ),
    "from_uri, bad limit": lambda pin: TokenPool.from_uri(
        _URI, pin=pin.text, max_sessions=0
    ),
    "from_uri, bad flag": lambda pin: TokenPool.from_uri(
        _URI,
        pin=pin.text,
        allow_pin_command="yes",  # type: ignore[arg-type]
    ),
    "from_uri, no module": lambda pin: TokenPool.from_uri(
        "pkcs11:slot-id=0", pin=pin.text
    ),
    "from_uri, no URI": lambda pin: TokenPool.from_uri("http://x", pin=pin.text),
    "from_uri, its PIN and a bad limit": lambda pin: TokenPool.from_uri(
        f"{_URI}&pin-value={quote(pin.text, '')}", max_sessions=0
    ),
    "from_uri, twice": lambda pin: TokenPool.from_uri(
        f"{_URI}&pin-value={quote(pin.text, '')}&pin-value={quote(pin.text, '')}"
    ),
    "from_uri, not UTF-8": lambda pin: TokenPool.from_uri(
        f"{_URI}&pin-value={quote(pin.text, '')}%FF"
    ),
    "from_uri, not encoded": lambda pin: TokenPool.from_uri(
        f"{_URI}&pin-value={pin.text}#"
    ),
    "from_uri, both": lambda pin: TokenPool.from_uri(
        f"{_URI}&pin-value={quote(pin.text, '')}&pin-source=/x"
    ),
    "URI, unknown": lambda pin: Pkcs11URI(pin_value=pin.text, label="x"),  # type: ignore[call-arg]
    "URI, bad slot": lambda pin: Pkcs11URI(pin_value=pin.text, slot_id=-1),
    "settings, bad limit": lambda pin: PoolSettings(
        module=Path("/m"),
        slot_id=0,
        pin=pin.text,  # type: ignore[arg-type]
    ).pool(max_sessions=0),
    "settings, PIN beside": lambda pin: PoolSettings(module=Path("/m"), slot_id=0).pool(
        pin=pin.text, max_sessions=0
    ),
}
"""A PIN beside something that is wrong."""


async def test_a_pin_beside_a_wrong_option_does_not_show(
    scene: Scene, wrong: Hidden
) -> None:
    """Constructors, URIs and settings."""
    for name, call in _BESIDE.items():
        await _caught(scene, name, lambda call=call: _at_once(lambda: call(wrong)))  # type: ignore[misc]
    assert await look(scene, "refused") == []
    assert set(scene.errors) == set(_BESIDE)


# -- Calls that end otherwise -----------------------------------------------------


async def _as_officer(
    pool: TokenPool, so_pin: Hidden, do: Callable[[Any], Awaitable[object]]
) -> None:
    async with pool.security_officer(so_pin.text) as so:
        await do(so)


_RIGHT: Final[dict[str, tuple[str, Callable[..., Awaitable[object]]]]] = {
    "login": ("C_Login", lambda pool, _key, pin, _so: _login_again(pool, pin)),
    "set_pin": (
        "C_SetPIN",
        lambda pool, _key, pin, _so: pool.set_pin(pin.text, pin.text),
    ),
    "officer": (
        "C_Login",
        lambda pool, _key, _pin, so: _as_officer(pool, so, _nothing),
    ),
    "init_pin": (
        "C_InitPIN",
        lambda pool, _key, pin, so: _as_officer(
            pool, so, lambda made: made.init_pin(pin.text)
        ),
    ),
    "officer's set_pin": (
        "C_SetPIN",
        lambda pool, _key, _pin, so: _as_officer(
            pool, so, lambda made: made.set_pin(so.text, so.text)
        ),
    ),
    "sign": (
        "C_Login",
        lambda _pool, key, pin, _so: key.sign(b"x", pin=pin.text, **_PKCS1),
    ),
    "decrypt": (
        "C_Login",
        lambda _pool, key, pin, _so: key.decrypt(bytes(128), pin=pin.text),
    ),
}
"""Each call that sends a PIN, and the function by which it goes; the PINs are right."""


async def _login_again(pool: TokenPool, pin: Hidden) -> None:
    await pool.logout()
    await pool.login(pin.text)


async def _nothing(_so: object) -> None:
    pass


_ENDS: Final[dict[str, dict[str, Any]]] = {
    "lost with the token": {"answer": CKR.DEVICE_REMOVED, "every": True},
    "lost after it was done": {"replace": CKR.DEVICE_ERROR, "every": True},
    "locked": {"answer": CKR.PIN_LOCKED},
    "failed": {"answer": CKR.FUNCTION_FAILED, "every": True},
}


@pytest.mark.parametrize("anyio_backend", [_ASYNCIO], ids=["asyncio"])
@pytest.mark.parametrize("end", _ENDS)
@pytest.mark.parametrize("name", _RIGHT)
async def test_a_right_pin_shows_in_no_error_of_the_token(
    scene: Scene, way: Way, fault: FaultModule, so_pin: Hidden, name: str, *, end: str
) -> None:
    """The token goes away, locks, or fails, with the PIN inside of the call."""
    function, call = _RIGHT[name]
    way.options["timeout"] = 0.5
    async with opened(scene, way) as pool:
        key = await _make_key(pool)
        scene.objects.append(key)
        fault.on(function, **_ENDS[end])
        try:
            await call(pool, key, way.pin, so_pin)
        except _CARRIED as error:
            scene.errors[name] = error
        # A login that was lost may be found to have been done: then there is none.
        assert scene.errors or "after" in end
        assert await look(scene, end) == []
        fault.clear()


@pytest.mark.parametrize("name", _RIGHT)
async def test_a_pin_shows_nowhere_while_its_call_hangs(
    scene: Scene, way: Way, fault: FaultModule, so_pin: Hidden, name: str
) -> None:
    """In no thread and no task; and after that in no PoolTimeout."""
    function, call = _RIGHT[name]
    way.options |= {"timeout": 0.5, "close_timeout": 0.2}
    async with opened(scene, way) as pool:
        key = await _make_key(pool)
        scene.objects.append(key)
        fault.on(function, hang="before")
        ended = anyio.Event()

        async def late() -> None:
            await _caught(scene, name, lambda: call(pool, key, way.pin, so_pin))
            ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(late)
            await hangs(fault, function)
            found = await look(scene, "inside")
            await ended.wait()
        found += await look(scene, "given up")
        fault.clear()
        await eventually(lambda: pool.stats().calls_stuck == 0)
    assert found == []
    assert isinstance(scene.errors[name], PoolTimeout)


@pytest.mark.parametrize("name", _RIGHT)
async def test_a_pin_shows_nowhere_when_its_caller_is_cancelled(
    scene: Scene, way: Way, fault: FaultModule, so_pin: Hidden, name: str
) -> None:
    """While the call is inside of the module."""
    function, call = _RIGHT[name]
    async with opened(scene, way) as pool:
        key = await _make_key(pool)
        fault.on(function, hang="before")

        async def cancelled() -> None:
            try:
                await call(pool, key, way.pin, so_pin)
            except BaseException as error:
                scene.errors[name] = error
                raise

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancelled)
            await hangs(fault, function)
            tasks.cancel_scope.cancel()
            fault.clear()
        assert await look(scene, "cancelled") == []
    assert isinstance(scene.errors[name], anyio.get_cancelled_exc_class())


_NOT_BEGUN: Final[dict[str, Callable[[TokenPool, KeyRef, Hidden], Any]]] = {
    "login": lambda pool, _key, pin: pool.login(pin.text),
    "login, by name": lambda pool, _key, pin: pool.login(pin=pin.text),
    "set_pin": lambda pool, _key, pin: pool.set_pin(pin.text, new=pin.text),
    "sign": lambda _pool, key, pin: key.sign(b"x", pin=pin.text),
    "decrypt": lambda _pool, key, pin: key.decrypt(b"x", pin=pin.text),
    "init_token": lambda _pool, _key, pin: init_token(
        "/m", slot_id=0, label="x", so_pin=pin.text, user_pin=pin.text
    ),
    "init_pin": lambda pool, _key, pin: _officer_of(pool).init_pin(pin.text),
    "officer's set_pin": lambda pool, _key, pin: _officer_of(pool).set_pin(
        pin.text, pin.text
    ),
    "JWS": lambda _pool, key, pin: jose.load_signer(key, pin=pin.text),
    "TUF": lambda _pool, key, pin: tuf.load_signer(key, keyid="x", pin=pin.text),
    "x509": lambda _pool, key, pin: x509.load_issuer(key, name="CN=x", pin=pin.text),
    "PDF": lambda _pool, key, pin: pdf.load_signer(key, b"", pin=pin.text),
    "cryptography": lambda _pool, key, pin: cryptography.load_private_key(
        key, pin=pin.text
    ),
}


def _officer_of(pool: TokenPool) -> SecurityOfficer:
    """A security officer of no period."""
    return SecurityOfficer(pool._engine, None)  # type: ignore[arg-type]  # noqa: SLF001


@pytest.mark.parametrize("anyio_backend", [_ASYNCIO], ids=["asyncio"])
@pytest.mark.parametrize("instrumented", [True, False], ids=["spans", "bare"])
@pytest.mark.parametrize("name", _NOT_BEGUN)
async def test_a_pin_does_not_show_where_a_call_was_cancelled_before_it_began(
    scene: Scene, way: Way, wrong: Hidden, name: str, *, instrumented: bool
) -> None:
    """Its coroutine holds the arguments, and its frame is in the traceback."""
    if not instrumented:
        opentelemetry.uninstrument()
    pool = way.pool(None)
    key = pool.key(label="any")
    task = asyncio.ensure_future(_NOT_BEGUN[name](pool, key, wrong))
    found = await look_now(scene)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    scene.errors[name] = caught.value
    assert found == []
    assert await look(scene, "cancelled") == []


async def look_now(scene: Scene) -> list[str]:
    """What can be seen of tasks before any of them has begun."""
    return [
        how
        for place in ("task", "repr of anything alive")
        for seen in pinsearch.PLACES[place](scene)
        for how in scene.find(seen)
    ]


async def test_what_takes_a_pin_is_still_a_coroutine_function() -> None:
    """For those who ask as ``asyncio`` and mocks do."""
    for func in (
        TokenPool.login,
        TokenPool.set_pin,
        KeyRef.sign,
        SecurityOfficer.init_pin,
        init_token,
    ):
        assert asyncio.iscoroutinefunction(func)
        assert "pin" in str(inspect.signature(func)) or "old" in str(
            inspect.signature(func)
        )
    assert isinstance(create_autospec(TokenPool).login, AsyncMock)


# -- Other processes --------------------------------------------------------------

_COMMANDS: Final[dict[str, tuple[list[str], dict[str, str]]]] = {
    "env": (["--pin-env", "HSM"], {"HSM": "{wrong}"}),
    "default variable": ([], {"PKCS11_PIN": "{wrong}"}),
    "file": (["--pin-file", "{file}"], {}),
    "credential": (
        ["--pin-credential", "pin"],
        {"CREDENTIALS_DIRECTORY": "{directory}"},
    ),
}


@pytest.mark.parametrize("words", [["--json"], []], ids=["json", "text"])
@pytest.mark.parametrize("name", _COMMANDS)
def test_the_command_line_shows_no_pin(
    token: ThrowawayToken, tmp_path: Path, wrong: Hidden, name: str, words: list[str]
) -> None:
    """One that the token refuses, in what is written and how it ends."""
    find = Searcher(wrong)
    file = tmp_path / "pin"
    file.write_text(wrong.text)
    file.chmod(0o600)
    given, variables = _COMMANDS[name]
    known = {"file": str(file), "directory": str(tmp_path), "wrong": wrong.text}
    done = subprocess.run(
        [
            *(sys.executable, "-X", "dev", "-m", "pkcs11_pool", "objects"),
            *("--module", str(token.module), "--token-label", token.label),
            *(word.format(**known) for word in given),
            *words,
        ],
        env=os.environ | {k: v.format(**known) for k, v in variables.items()},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 4, done.stderr.decode()
    assert find(done.stdout + done.stderr) == []


# -- What Python cannot keep ------------------------------------------------------


async def test_a_pin_in_the_callers_own_variables_shows_there_and_nowhere_else(
    way: Way, wrong: Hidden
) -> None:
    """The frame of whoever gave it as text is in the traceback, with his variables."""
    find = Searcher(wrong)
    async with way.pool(None) as pool:
        text = wrong.text
        try:
            await pool.login(text)
        except PinRefused as error:
            frames = [
                frame.f_code.co_name
                for frame, _ in traceback.walk_tb(error.__traceback__)
                if find(repr(frame.f_locals))
            ]
    me = test_a_pin_in_the_callers_own_variables_shows_there_and_nowhere_else
    assert frames == [me.__name__]


async def test_the_words_of_a_sources_own_error_are_not_looked_at(
    way: Way, wrong: Hidden
) -> None:
    """What it says of its own accord is the cause, as it is; nothing else is."""

    async def ask() -> str:
        raise ValueError(wrong.text)

    with pytest.raises(PinSourceError) as caught:
        await way.pool(ask).open()
    find = Searcher(wrong)
    assert find(f"{caught.value} {caught.value!r}") == []
    assert find(str(caught.value.__cause__)) == ["text"]


async def test_a_literal_is_in_memory_as_long_as_its_pool(way: Way) -> None:
    """In one object, whose text is behind a mangled name: Python cannot wipe it."""
    pool = way.pool(way.pin.text)
    held = [one for one in pinsearch.reached(pool) if isinstance(one, pins.Secret)]
    (secret,) = held
    assert Searcher(way.pin)(secret.encoded()) != []
