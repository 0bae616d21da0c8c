"""Whatever a PIN source gives or raises: told as PinSourceError, and no PIN is shown.

And whatever it takes to get there, the pool logs in with the next good answer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from fuzzkit import (
    ANYTHING,
    MARK,
    PINS,
    examples,
    made,
    on_a_loop,
    shown,
)
from pkcs11_pool import InvalidOption, PinRefused, PinSourceError, pins

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import ThrowawayToken


class _Interrupt(BaseException):
    """As KeyboardInterrupt is one, without stopping the tests."""


class _Mute(Exception):
    """An error that cannot be shown."""

    def __str__(self) -> str:
        """Not even this."""
        raise RuntimeError

    __repr__ = __str__


_RAISED: tuple[Callable[[], BaseException], ...] = (
    ValueError,
    lambda: OSError(2, "no such file"),
    lambda: PinSourceError("the vault is sealed"),
    lambda: PinRefused("no"),
    TimeoutError,
    lambda: StopIteration("x"),
    concurrent.futures.CancelledError,
    _Mute,
    MemoryError,
    RecursionError,
    lambda: ExceptionGroup("many", [ValueError("x")]),
)
_RAISED_BEYOND: tuple[Callable[[], BaseException], ...] = (
    _Interrupt,
    lambda: SystemExit(1),
    KeyboardInterrupt,
    asyncio.CancelledError,
    GeneratorExit,
    lambda: BaseExceptionGroup("many", [_Interrupt()]),
)
_GIVEN = st.one_of(ANYTHING, PINS)


class Source:
    """A PIN source, plain or awaited, that does what it is told."""

    def __init__(self, good: str) -> None:
        self.good = good
        self.given: Any = None
        self.error: Callable[[], BaseException] | None = None
        self.bad = False

    def answer(self) -> Any:
        """What it gives or raises."""
        if not self.bad:
            return self.good
        if self.error is not None:
            raise self.error()
        return made(self.given)


def _caught(call: Callable[[], Any]) -> BaseException | None:
    """The error of a source: whatever it did, one that may come."""
    error = call()
    return error if isinstance(error, BaseException) else None


def _is_quiet(error: BaseException) -> bool:
    """Whether an error shows nothing of the PIN, nor does its cause."""
    with suppress(RuntimeError):
        return MARK not in shown(error)
    return True


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("awaited", [False, True], ids=["plain", "awaited"])
def test_whatever_a_source_gives_or_raises(
    make_pool: MakePool,
    fault: FaultModule,
    token: ThrowawayToken,
    backend: str,
    request: Any,
    *,
    awaited: bool,
) -> None:
    """At a login, PinRefused; then the pool logs in with a good answer."""
    source = Source(token.user_pin)

    async def later() -> Any:
        await anyio.lowlevel.checkpoint()
        return source.answer()

    def now() -> Any:
        return source.answer()

    raised = _RAISED if awaited else (*_RAISED, *_RAISED_BEYOND)
    pool = make_pool(module=fault.path, pin=later if awaited else now, timeout=20.0)
    with on_a_loop(pool, backend) as bench, structlog.testing.capture_logs() as logs:

        @examples(request, 120)
        @given(st.one_of(_GIVEN, st.sampled_from(raised).map(_Raises)))
        def check(drawn: Any) -> None:
            bench.call(pool.logout)
            raises = isinstance(drawn, _Raises)
            source.given, source.error = drawn, drawn.make if raises else None
            source.bad = True
            error = bench.attempt(pool.login)
            source.bad = False
            assert isinstance(error, PinRefused)
            assert _is_quiet(error)
            bench.call(pool.login)
            bench.is_well()

        check()
        assert MARK not in repr(logs)


class _Raises:
    """An error to raise, made when it is raised."""

    def __init__(self, make: Callable[[], BaseException]) -> None:
        self.make = make

    def __repr__(self) -> str:
        """What is raised, as far as it can be shown."""
        return f"raises {type(self.make()).__name__}"


def test_whatever_is_passed_as_a_pin(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken, request: Any
) -> None:
    """To each call that takes one; nothing of it is shown, and the pool goes on."""
    pool = make_pool(module=fault.path, timeout=20.0)

    async def login(pin: Any) -> None:
        await pool.logout()
        try:
            await pool.login(pin)
        finally:
            await pool.login()

    async def officer(pin: Any) -> None:
        async with pool.security_officer(pin):
            pass

    async def so_pins(pin: Any) -> None:
        async with pool.security_officer(token.so_pin) as so:
            await so.set_pin(pin, pin)

    async def user_pin(pin: Any) -> None:
        async with pool.security_officer(token.so_pin) as so:
            try:
                await so.init_pin(pin)
            finally:
                await so.init_pin(token.user_pin)

    calls: dict[str, Callable[[Any], Any]] = {
        "login": login,
        "officer": officer,
        "so.set_pin": so_pins,
        "so.init_pin": user_pin,
        "set_pin": lambda pin: pool.set_pin(pin, pin),
        "sign": lambda pin: pool.key(label="x").sign(b"x", pin=pin),
        "decrypt": lambda pin: pool.key(label="x").decrypt(b"x", pin=pin),
    }

    with on_a_loop(pool, "asyncio") as bench, structlog.testing.capture_logs() as logs:

        @examples(request, 150)
        @given(st.sampled_from(sorted(calls)), PINS)
        def check(name: str, drawn: Any) -> None:
            error = bench.attempt(lambda: calls[name](made(drawn)))
            if isinstance(error, BaseException):
                assert MARK not in shown(error)
            bench.is_well()

        check()
        assert MARK not in repr(logs)


def _asked(source: Callable[[], str]) -> None:
    """Ask a source as a login does: a PIN, or an error that does not show it."""
    try:
        pins.ask(pins.Source(source))
    except PinSourceError as error:
        assert MARK not in shown(error)  # noqa: PT017  # whichever it is


_LINES = st.one_of(
    st.binary(max_size=20).map(lambda tail: MARK.encode() + tail),
    st.binary(max_size=20),
    st.sampled_from(
        [b"", b"\n", b"\r\n", b"\0", MARK.encode() * 2000, MARK.encode() + b"\xff\n"]
    ),
)


def test_whatever_a_file_holds(tmp_path: Path, request: Any) -> None:
    """Its content, its mode, and what it is."""
    path = tmp_path / "pin"

    @examples(request, 200)
    @given(_LINES, st.integers(0, 0o7777), st.booleans(), st.booleans())
    def check(line: bytes, mode: int, check: bool, pipe: bool) -> None:  # noqa: FBT001
        path.unlink(missing_ok=True)
        path.write_bytes(line)
        path.chmod(mode)
        _asked(pins.file(path, check=check, pipe=pipe))

    check()


@pytest.mark.parametrize("make", ["directory", "nothing", "loop", "socket", "device"])
def test_what_is_no_file_gives_no_pin(tmp_path: Path, make: str) -> None:
    """At once, and whatever it is: a directory, a link to itself, a device."""
    path = tmp_path / "pin"
    if make == "directory":
        path.mkdir()
    elif make == "loop":
        path.symlink_to(path)
    elif make == "socket":
        os.mknod(path, 0o140600)
    source = pins.file("/dev/zero" if make == "device" else path, check=False)
    with pytest.raises(PinSourceError):
        source()


def test_whatever_names_a_source(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """InvalidOption when it is made, or a source that gives a PIN or says why not."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/nonexistent")
    makers: dict[str, Callable[[Any], Any]] = {
        "env": pins.env,
        "file": pins.file,
        "credential": pins.systemd_credential,
        "prompt": pins.prompt,
        "keyring": lambda v: pins.keyring("pkcs11-pool tests", v),
        "command": pins.command,
        "word": lambda v: pins.command(["/nonexistent", v]),
        "timeout": lambda v: pins.command(["/nonexistent"], timeout=v),
        "literal": pins.literal,
        "check": lambda v: pins.file("/nonexistent", check=v),
    }

    @examples(request, 250)
    @given(st.sampled_from(sorted(makers)), st.one_of(ANYTHING, PINS))
    def check(name: str, drawn: Any) -> None:
        try:
            source = makers[name](made(drawn))
        except InvalidOption as error:
            if name == "literal":
                assert MARK not in shown(error)  # noqa: PT017
        else:
            if name not in ("literal", "prompt", "keyring"):
                with suppress(PinSourceError):
                    pins.ask(pins.Source(source))

    check()


def test_whatever_a_variable_holds(
    request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are no text too: the system allows all but NUL."""

    @examples(request, 150)
    @given(_LINES)
    def check(value: bytes) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("FUZZED_PIN", os.fsdecode(value.replace(b"\0", b"")))
            _asked(pins.env("FUZZED_PIN"))

    check()
