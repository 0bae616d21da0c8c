"""PIN sources that hang, fail, or give nonsense, under a pool that goes on.

A source is asked on a thread of its own. Deadlines are kept, nothing else waits for it,
and what it gives in the end is used by whoever wants it then.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import anyio
import pytest
from pkcs11 import Mechanism

from pkcs11_pool import (
    InvalidOption,
    LoginState,
    PinRefused,
    PinSourceError,
    PoolState,
    PoolTimeout,
    pins,
)
from poolkit import (
    LAST_RESORT,
    blocking,
    closes_in_time,
    digest,
    eventually,
    make_ec_key,
    pool_threads,
    time_is_up,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_ASKING = "pkcs11-pool PIN source"


class Slow:
    """A plain source that answers at once, until it is told to hang."""

    def __init__(self, pin: str) -> None:
        self.pin = pin
        self.asked = 0
        self._go = threading.Event()
        self._go.set()
        self._came = threading.Event()

    def __call__(self) -> str:
        """Hang, or give the PIN."""
        self.asked += 1
        self._came.set()
        assert self._go.wait(2 * LAST_RESORT)
        return self.pin

    def __enter__(self) -> Self:
        """Hang from now on."""
        self._came.clear()
        self._go.clear()
        return self

    def __exit__(self, *_error: object) -> None:
        """Answer."""
        self._go.set()

    async def came(self) -> None:
        """Wait until it is asked."""
        assert await blocking(self._came.wait, LAST_RESORT)


def _who(pool: TokenPool) -> LoginState:
    return pool.login_state


async def _answered() -> None:
    await eventually(lambda: _ASKING not in pool_threads())


async def _times_out(
    pool: TokenPool, source: Slow, call: Callable[[], Any] | None = None
) -> None:
    """Log in, or make another call, until its deadline, while the source hangs."""

    async def late() -> None:
        with pytest.raises(PoolTimeout):
            await (call or pool.login)()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(late)
        await source.came()
        await anyio.wait_all_tasks_blocked()
        time_is_up(pool)


async def test_a_source_that_hangs_keeps_the_deadline_of_a_login(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """And its answer, when it comes, serves who asks then."""
    source = Slow(token.user_pin)
    async with make_pool(pin=source) as pool:
        await pool.logout()
        with source:
            for _ in range(3):
                await _times_out(pool, source)
            # It hangs once, however many ask.
            assert source.asked == 2
        await _answered()
        await pool.login()
        assert _who(pool) is LoginState.USER


async def test_nothing_else_waits_for_a_source_that_hangs(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """What needs no login works; what needs it has its deadline; both at once."""
    source = Slow(token.user_pin)
    async with make_pool(module=fault.path, pin=source) as pool:
        key = await make_ec_key(pool)
        fault.lose_login()
        with source:
            async with anyio.create_task_group() as tasks:

                async def sign() -> None:
                    with pytest.raises(PoolTimeout):
                        await key.sign(b"d" * 32)

                tasks.start_soon(sign)
                await source.came()
                assert len(await digest(pool)) == 32
                async with pool.session() as session:
                    assert len(await digest(session)) == 32
                time_is_up(pool)
        assert await key.sign(b"d" * 32, mechanism=Mechanism.ECDSA)


async def test_another_pin_is_taken_while_a_source_hangs(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The late answer is dropped: it is not sent, and changes no login."""
    source = Slow(token.user_pin)
    async with make_pool(module=fault.path, pin=source) as pool:
        await pool.logout()
        with source:
            await _times_out(pool, source)
            await pool.login(token.user_pin)
            assert _who(pool) is LoginState.USER
            source.pin = "wrong"
            fault.reset_counts()
        await _answered()
        await digest(pool)
        assert fault.count("C_Login") == 0
        assert _who(pool) is LoginState.USER


async def test_a_late_answer_does_not_log_in_against_a_logout(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The user's word was to stay out; it was said while the source hung."""
    source = Slow(token.user_pin)
    async with make_pool(module=fault.path, pin=source) as pool:
        await pool.logout()
        with source:
            await _times_out(pool, source)
            await pool.logout()
            fault.reset_counts()
        await _answered()
        await digest(pool)
        assert fault.count("C_Login") == 0
        assert _who(pool) is LoginState.PUBLIC


async def test_a_cancelled_login_leaves_a_source_that_hangs_to_the_next(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """Its cancellation costs the others nothing."""
    source = Slow(token.user_pin)
    async with make_pool(pin=source) as pool:
        await pool.logout()
        with source, anyio.fail_after(LAST_RESORT):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.login)
                await source.came()
                tasks.cancel_scope.cancel()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.login)
                await anyio.wait_all_tasks_blocked()
                source.__exit__()
        assert _who(pool) is LoginState.USER
        assert source.asked == 2


async def test_a_source_that_hangs_at_opening_keeps_open_timeout(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The pool is closed then, and has left nothing on the token."""
    source = Slow(token.user_pin)
    pool = make_pool(module=fault.path, pin=source, open_timeout=0.2)
    with source:
        with anyio.fail_after(LAST_RESORT), pytest.raises(PoolTimeout):
            await pool.open()
        assert pool.state is PoolState.CLOSED
        assert fault.sessions() == []


async def test_a_pool_closes_while_its_source_hangs(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """In its time, and who waits for the login is told."""
    source = Slow(token.user_pin)
    pool = make_pool(pin=source, close_timeout=0.3)
    await pool.open()
    await pool.logout()
    with source:
        await _times_out(pool, source)
        await closes_in_time(pool)


async def test_a_token_comes_back_while_a_source_hangs(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """What needs no login is served again; the login follows with the answer."""
    source = Slow(token.user_pin)
    async with make_pool(module=fault.path, pin=source) as pool:
        with source:
            fault.lose_sessions(pool.token.slot_id)
            assert len(await digest(pool)) == 32
        key = await make_ec_key(pool)
        assert await key.sign(b"d" * 32, mechanism=Mechanism.ECDSA)
        assert _who(pool) is LoginState.USER


# -- Each source, by what can go wrong with it ------------------------------------


@contextmanager
def _a_pipe(path: Path) -> Iterator[Callable[[], None]]:
    """A pipe that nobody writes to, and what ends the wait for it."""
    os.mkfifo(path)

    def write() -> None:
        path.write_text("1234\n")

    yield write


async def test_a_pipe_that_nobody_writes_to_keeps_the_deadline(
    make_pool: MakePool, token: ThrowawayToken, tmp_path: Path
) -> None:
    """``pins.file(pipe=True)`` waits for its writer, and nobody else does."""
    with _a_pipe(tmp_path / "pin") as write:
        source = pins.file(tmp_path / "pin", pipe=True)
        async with make_pool(pin=None) as pool:
            assert _who(pool) is LoginState.PUBLIC
        pool = make_pool(pin=source)

        async def late() -> None:
            with pytest.raises(PoolTimeout):
                await pool.open()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(late)
            # Else nobody would read what is written.
            await eventually(lambda: _ASKING in pool_threads())
            time_is_up(pool)
        await blocking(write)
    await _answered()
    del token


class _Ring(ModuleType):
    """A keyring that does what the test says."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        super().__init__("keyring")
        self._answer = answer

    def get_password(self, _service: str, _username: str) -> Any:
        """As the package has it."""
        return self._answer()


class _Locked(Exception):
    """As ``keyring.errors.KeyringLocked``."""


def _locked() -> str:
    raise _Locked("the collection is locked")


@pytest.mark.parametrize("answer", [_locked, lambda: None, lambda: b"1234", str])
async def test_a_keyring_that_fails_is_told(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Any]
) -> None:
    """Locked, without the PIN, or with nonsense: nothing is sent."""
    monkeypatch.setitem(sys.modules, "keyring", _Ring(answer))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    pool = make_pool(pin=pins.keyring("hsm", "me"))
    with pytest.raises(PinSourceError):
        await pool.open()
    assert pool.state is PoolState.CLOSED


async def test_a_keyring_that_waits_to_be_unlocked_keeps_the_deadline(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, token: ThrowawayToken
) -> None:
    """Somebody may have to type a password; meanwhile the pool goes on."""
    answer = Slow(token.user_pin)
    monkeypatch.setitem(sys.modules, "keyring", _Ring(answer))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    async with make_pool(pin=pins.keyring("hsm", "me")) as pool:
        await pool.logout()
        with answer:
            await _times_out(pool, answer)
            assert len(await digest(pool)) == 32


async def test_a_prompt_that_nobody_answers_keeps_the_deadline(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, token: ThrowawayToken
) -> None:
    """It is shown once, not once for each login that was given up."""
    answer = Slow(token.user_pin)
    monkeypatch.setattr("pkcs11_pool.pin_sources.can_prompt", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda _text: answer())
    async with make_pool(pin=pins.prompt()) as pool:
        await pool.logout()
        with answer:
            for _ in range(2):
                await _times_out(pool, answer)
            assert answer.asked == 2
        await _answered()
        await pool.login()


@pytest.mark.parametrize("typed", ["", EOFError, KeyboardInterrupt])
async def test_a_prompt_that_is_left_gives_no_pin(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, typed: Any
) -> None:
    """Nothing, an end of file, an interrupt: told, and nothing is sent."""

    def answer(_text: str) -> str:
        if typed == "":
            return ""
        raise typed

    monkeypatch.setattr("pkcs11_pool.pin_sources.can_prompt", lambda: True)
    monkeypatch.setattr("getpass.getpass", answer)
    with pytest.raises(PinSourceError):
        await make_pool(pin=pins.prompt()).open()


@pytest.mark.parametrize("held", [None, b"", b"\n", b"\xff", b"1\n"])
async def test_a_credential_that_holds_no_pin_is_told(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Any
) -> None:
    """Not there, empty, no text, or too short for the token."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    if held is not None:
        (tmp_path / "pin").write_bytes(held)
    with pytest.raises(PinRefused):
        await make_pool(pin=pins.systemd_credential("pin")).open()


@pytest.mark.parametrize("value", ["", "1", "x" * 300])
async def test_a_variable_that_holds_no_pin_is_told(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Empty, too short, or too long: it is not sent."""
    monkeypatch.setenv("HANGING_PIN", value)
    with pytest.raises(PinRefused):
        await make_pool(pin=pins.env("HANGING_PIN")).open()


@pytest.mark.parametrize("text", ["1", "x" * 300, "", "\ud800"])
async def test_a_literal_that_is_no_pin_is_told(make_pool: MakePool, text: str) -> None:
    """When the pool is made, or when it opens."""
    with pytest.raises((PinRefused, InvalidOption)):
        await make_pool(pin=text).open()
