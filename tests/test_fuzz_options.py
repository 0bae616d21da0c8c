"""Whatever a pool is made with: it opens and signs, or is refused in words of ours."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzkit import ANYTHING, HUGE, MARK, PINS, PROPER, examples, made, shown
from pkcs11_pool import InvalidOption, Pkcs11URI, TokenPool, init_token, list_tokens
from pkcs11_pool.config import option_names
from poolkit import LAST_RESORT, pool_threads, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import ThrowawayToken

_NAMES = [name for name in option_names() if name != "pin"]
_LIMITS = ("timeout", "open_timeout", "close_timeout", "recovery_timeout")


@st.composite
def _odd(draw: st.DrawFn, names: list[str]) -> dict[str, Any]:
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
    return {name: draw(ANYTHING) for name in chosen}


async def _use(pool: TokenPool) -> None:
    """Open it, use it, close it; each comes to its end."""
    with anyio.fail_after(LAST_RESORT):
        async with pool:
            await pool.generate_random(64)
            await _use_by_many(pool)
            async with pool.session() as session:
                await session.generate_random(64)
            await pool.logout()
            await pool.login()


async def _use_by_many(pool: TokenPool) -> None:
    """More callers than sessions: what is said of those who wait is heeded, too."""

    async def call() -> None:
        with contextlib.suppress(*PROPER):
            await pool.generate_random(64)

    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(call)


def _run(func: Callable[..., Any], *arguments: Any) -> None:
    with contextlib.suppress(*PROPER):
        anyio.run(func, *arguments)
    wait_for(lambda: not pool_threads())


def test_whatever_the_options_are(
    make_pool: MakePool, fault: FaultModule, request: Any
) -> None:
    """Refused when the pool is made, when it opens, or good for use."""

    @examples(request, 250)
    @given(_odd(_NAMES))
    def check(drawn: dict[str, Any]) -> None:
        options = {name: made(value) for name, value in drawn.items()}
        try:
            pool = make_pool(**({"module": fault.path} | options))
        except InvalidOption as error:
            assert len(str(error)) > 20  # noqa: PT017  # its text says what to do
        else:
            _run(_use, pool)
            assert fault.sessions() == []

    check()


@pytest.mark.parametrize("name", _LIMITS)
@pytest.mark.parametrize("limit", [*HUGE, 10**5000, 1.7e308, 1e300], ids=range(11))
def test_no_time_limit_is_too_long(
    make_pool: MakePool, name: str, limit: float
) -> None:
    """What passes for a number of seconds works, however large."""
    anyio.run(_use, make_pool(**{name: limit}))


def test_whatever_the_pin_of_a_pool_is(
    make_pool: MakePool, fault: FaultModule, request: Any
) -> None:
    """It is refused, and never to be seen."""

    @examples(request, 60)
    @given(PINS, st.dictionaries(st.sampled_from(_NAMES), ANYTHING, max_size=1))
    def check(pin: Any, drawn: dict[str, Any]) -> None:
        options = {name: made(value) for name, value in drawn.items()}
        try:
            pool = make_pool(**({"module": fault.path} | options), pin=made(pin))
            anyio.run(_use, pool)
        except PROPER as error:
            assert MARK not in shown(error)  # noqa: PT017  # whichever it is
        else:
            raise AssertionError
        assert fault.sessions() == []

    check()


def test_whatever_a_token_is_initialised_with(
    token: ThrowawayToken, request: Any
) -> None:
    """Nothing is wiped by mistake, and no PIN is to be seen."""
    names = [
        "module",
        "slot_id",
        "label",
        "so_pin",
        "user_pin",
        "wipe",
        "init_reserved",
    ]
    before = anyio.run(list_tokens, token.module)

    @examples(request, 100)
    @given(_odd(names[1:]), PINS)
    def check(drawn: dict[str, Any], pin: Any) -> None:
        options: dict[str, Any] = {
            "slot_id": before[0].slot_id,
            "label": "new",
            "so_pin": made(pin),
            "user_pin": made(pin),
        } | {name: made(value) for name, value in drawn.items()}

        async def initialize() -> None:
            await init_token(token.module, **options)

        with pytest.raises(PROPER) as caught:
            anyio.run(initialize)
        assert MARK not in shown(caught.value)

    check()
    assert anyio.run(list_tokens, token.module) == before


def test_whatever_tokens_are_listed_of(request: Any) -> None:
    """A module that is none, and parameters that are none."""

    @examples(request, 60)
    @given(ANYTHING, ANYTHING)
    def check(module: Any, reserved: Any) -> None:
        with pytest.raises(PROPER):
            anyio.run(list_tokens, made(module), made(reserved))

    check()


def test_whatever_a_uri_is_made_of(request: Any) -> None:
    """Refused by InvalidOption, or written and read as the same."""
    names = [*Pkcs11URI.__dataclass_fields__, "nonsense"]

    @examples(request, 300)
    @given(_odd(names))
    def check(drawn: dict[str, Any]) -> None:
        try:
            uri = Pkcs11URI(**{name: made(value) for name, value in drawn.items()})
        except InvalidOption as error:
            assert MARK not in shown(error)  # noqa: PT017  # if there is one
        else:
            assert Pkcs11URI.parse(uri.format(with_pin=True)) == uri
            assert Pkcs11URI.parse(str(uri)).format() == str(uri)

    check()


def test_whatever_is_read_as_a_uri(make_pool: MakePool, request: Any) -> None:
    """By all that take one: read, or InvalidOption."""
    pool = make_pool()

    @examples(request, 150)
    @given(ANYTHING)
    def check(drawn: Any) -> None:
        for read in (Pkcs11URI.parse, TokenPool.from_uri, pool.key_from_uri):
            with pytest.raises(InvalidOption):
                read(made(drawn))

    check()
