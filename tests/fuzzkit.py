"""Values that nobody expects, and what must hold whatever they are given as.

For tests by hypothesis. What is drawn here is finite and small enough not to fill
the machine: an endless iterable is a caller's right, and so is a key of 16,384 bits.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import fractions
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn

import anyio
import anyio.from_thread
import pkcs11
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass

from pkcs11_pool import PoolError
from poolkit import LAST_RESORT, settled

if TYPE_CHECKING:
    import pytest

    from pkcs11_pool import TokenPool

PROPER: Final = (PoolError, pkcs11.PKCS11Error)
"""What may come of any value: the pool's refusal, or the token's answer."""
MARK: Final = "tOpsEcret"
"""Stands in every PIN that is drawn, and nowhere else."""
LONG: Final = 20
"""With ``--long`` so many times as many examples."""


def examples(request: pytest.FixtureRequest, count: int) -> settings:
    """How many examples a test draws: the same ones each time, but with ``--long``."""
    long = request.config.getoption("--long")
    return settings(
        max_examples=count * LONG if long else count,
        deadline=None,
        database=None,
        derandomize=not long,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


# -- Values -----------------------------------------------------------------------


class Boom(Exception):
    """What a hostile value raises when it is looked at. It must never be seen."""


def _boom(*_arguments: object, **_options: object) -> NoReturn:
    raise Boom


class Hostile:
    """Cannot be shown, compared, counted, hashed or made anything else of."""

    __repr__ = __str__ = __bytes__ = __bool__ = __len__ = __format__ = _boom
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _boom
    __int__ = __float__ = __index__ = __fspath__ = __buffer__ = _boom


class Text(str):
    """A text of another kind, that cannot be shown."""

    __slots__ = ()
    __repr__ = __format__ = _boom


class Number(int):
    """The same for a number."""

    __slots__ = ()
    __repr__ = __str__ = __format__ = _boom


class Real(float):
    """The same for a number that need not be whole."""

    __slots__ = ()
    __repr__ = __str__ = __format__ = _boom


class Octets(bytes):
    """The same for bytes."""

    __slots__ = ()
    __repr__ = __str__ = __format__ = _boom


class Moving(Mapping[Any, Any]):
    """A mapping that another thread changes while it is read."""

    def __getitem__(self, _key: object) -> Any:
        """A value that fits."""
        return b"x"

    def __len__(self) -> int:
        """As it was at first."""
        return 2

    def __iter__(self) -> Iterator[Any]:
        """One key, and what a dictionary says then."""
        yield Attribute.LABEL
        message = "dictionary changed size during iteration"
        raise RuntimeError(message)


class Odd(enum.IntEnum):
    """Numbers that are members of another enumeration."""

    ZERO = 0
    ONE = 1


def _generator() -> Iterator[bytes]:
    yield b"x"


async def _coroutine_function() -> str:
    return "x"


def _released() -> memoryview:
    view = memoryview(b"released")
    view.release()
    return view


class Drawn:
    """A value that is made when it is passed: it may be good for one use only.

    It can be shown, other than the value.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self.make = make
        self.arguments = arguments

    def __repr__(self) -> str:
        """How the value is made."""
        name = getattr(self.make, "__name__", "made")
        if name == "<lambda>":
            name = f"{name} of line {self.make.__code__.co_firstlineno}"
        return f"{name}{self.arguments!r}"


def made(value: Any) -> Any:
    """A value that was drawn."""
    return value.make(*value.arguments) if isinstance(value, Drawn) else value


HUGE: Final = (2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400)
TEXTS: Final = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["", "\0", "a\0b", "\ud800", "\udcff", "x" * 33, "é" * 17, "%s{0}"]
    ),
    st.builds(Drawn, st.just(Text), st.text(max_size=8)),
)
BYTES: Final = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"\0", b"x" * 300, b"\xff" * 33]),
    st.builds(Drawn, st.just(Octets), st.binary(max_size=8)),
)
NUMBERS: Final = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([*HUGE, *(-n for n in HUGE)]),
    st.builds(Drawn, st.just(Number), st.integers(-3, 300)),
)
REALS: Final = st.one_of(
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7e308, -1e-9]),
    st.builds(Drawn, st.just(Real), st.floats(-2, 5)),
)
_MAKERS: Final[tuple[Callable[[], object], ...]] = (
    Hostile,
    Moving,
    object,
    dict,
    list,
    set,
    lambda: {"x": 1},
    lambda: {Attribute.LABEL: {Attribute.LABEL: "x"}},
    lambda: [b"x", "x", 7],
    lambda: (1, 2, 3),
    lambda: {b"x"},
    lambda: range(3),
    lambda: bytearray(b"array"),
    lambda: memoryview(b"views")[::2],
    lambda: memoryview(bytearray(8)).cast("I"),
    _released,
    _generator,
    lambda: iter([Hostile()]),
    lambda: Hostile,
    lambda: len,
    lambda: _coroutine_function,
    lambda: lambda *_: None,
    lambda: Odd.ONE,
    lambda: decimal.Decimal("NaN"),
    lambda: decimal.Decimal(8),
    lambda: fractions.Fraction(1, 3),
    lambda: 1j,
    lambda: ...,
    lambda: NotImplemented,
    lambda: dt.date(2026, 11, 24),
    lambda: dt.timedelta(seconds=1),
    lambda: ObjectClass.DATA,
    lambda: KeyType.AES,
    lambda: Mechanism.SHA256,
    lambda: Attribute.LABEL,
    lambda: MechanismFlag.SIGN,
    lambda: pkcs11.PROTECTED_AUTH,
)
OBJECTS: Final = st.sampled_from(_MAKERS).map(Drawn)
ANYTHING: Final = st.one_of(
    st.none(), st.booleans(), NUMBERS, REALS, TEXTS, BYTES, OBJECTS
)
"""Whatever somebody may pass, once it is :func:`made`."""
PINS: Final = st.one_of(
    st.text(max_size=8).map(lambda text: MARK + text),
    st.sampled_from(["\0", "\ud800", "\udcff", "é", "x" * 250, ""]).map(
        lambda text: MARK + text
    ),
    st.builds(Drawn, st.just(Text), st.text(max_size=3).map(lambda text: MARK + text)),
    st.sampled_from([MARK.encode(), bytearray(MARK.encode()), [MARK], {MARK: MARK}]),
)
"""What somebody may pass as a PIN, and must not show. Not the token's."""


def shown(error: BaseException) -> str:
    """All that can be seen of an error: its texts, and its frames with their locals.

    Not those of the tests, which hold what they drew.
    """
    seen, chain, texts = set(), [error], []
    while chain:
        one = chain.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        texts += [str(one), repr(one), repr(vars(one))]
        chain += [e for e in (one.__cause__, one.__context__) if e is not None]
        chain += getattr(one, "exceptions", ())
        for frame, line in traceback.walk_tb(one.__traceback__):
            if "pkcs11_pool" in frame.f_globals.get("__name__", ""):
                texts += [
                    f"{line} {name}={_repr(v)}" for name, v in frame.f_locals.items()
                ]
    return "\n".join(texts)


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001  # as those who show tracebacks do
        return "<cannot be shown>"


# -- Whoever draws is on a thread of its own, and the pool on a loop --------------


class Bench:
    """A pool on an event loop, for tests that draw on another thread."""

    def __init__(self, portal: anyio.from_thread.BlockingPortal, pool: Any) -> None:
        self._portal = portal
        self.pool: TokenPool = pool

    def attempt(self, call: Callable[[], Any]) -> Any:
        """Await what a call gives; its result, or the error that came of it.

        Raises:
            Exception: It is none that may come; or the call never came to an end.
        """
        return self._portal.call(self._attempt, call)

    async def _attempt(self, call: Callable[[], Any]) -> Any:
        with anyio.fail_after(LAST_RESORT):
            try:
                given = call()
                return await given if hasattr(given, "__await__") else given
            except PROPER as error:
                return error

    def call(self, func: Callable[..., Any], *arguments: Any) -> Any:
        """Await a coroutine function on the loop."""
        return self._portal.call(func, *arguments)

    def is_well(self) -> None:
        """Nothing is left of the call before, and the pool works."""
        stats = self.pool.stats()
        assert (stats.sessions_leased, stats.operations_waiting) == (0, 0)
        assert len(self._portal.call(self.pool.generate_random, 64)) == 8


@contextmanager
def on_a_loop(pool: TokenPool, backend: str) -> Iterator[Bench]:
    """Open a pool on an event loop; nothing may be left of what is done meanwhile."""
    with anyio.from_thread.start_blocking_portal(backend) as portal:
        portal.call(pool.open)
        try:
            bench = Bench(portal, pool)
            yield bench
            portal.call(settled, pool)
            bench.is_well()
            stats = pool.stats()
            assert stats.calls_stuck == 0
        finally:
            portal.call(pool.close)
