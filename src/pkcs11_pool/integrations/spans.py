"""What is a span of OpenTelemetry: an awaited operation, a batch, a stream.

One span each, also for a batch of a million signatures: it says how many there were.
No wrapper is here before :func:`~pkcs11_pool.integrations.opentelemetry.instrument`
puts it around a method, so a span costs nothing where none is made.

A span is the current one while its operation is awaited: what the pool awaits of the
caller's (items, data, a PIN) has its spans below it.

Source: OpenTelemetry's semantic conventions for database client spans ("Batch
operations": one span, with ``db.operation.batch.size``) and for recording errors.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections import deque
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool import pins
from pkcs11_pool.cryptoki import rv
from pkcs11_pool.faces.mapping import Results
from pkcs11_pool.faces.streams import CryptStream
from pkcs11_pool.integrations import extras
from pkcs11_pool.jobs import Phase

try:
    from opentelemetry import context, trace
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ModuleNotFoundError as error:
    raise extras.missing("otel", error) from error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from opentelemetry.trace import Span, Tracer

    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.jobs import Job

POOL_NAME: Final = "pkcs11.pool.name"
OPERATION: Final = "pkcs11.operation.name"
MECHANISM: Final = "pkcs11.mechanism"
CODE: Final = "pkcs11.rv"
CANCELLED: Final = "pkcs11.operation.cancelled"
BATCH_SIZE: Final = "pkcs11.operation.batch.size"
BATCH_FAILED: Final = "pkcs11.operation.batch.failed"
OUTPUT_SIZE: Final = "pkcs11.operation.output.size"
WAIT_TIME: Final = "pkcs11.pool.session.wait_time"
ERROR_TYPE: Final = "error.type"
_PINS: Final = frozenset({"pin", "old", "new", "so_pin"})
"""What the parameters are called that a PIN may be given as."""
_SPAN: Final = "_opentelemetry_span"
"""Where results and streams have theirs; those from before `instrument` have none."""


class Call:
    """What was sent to the engine for one span."""

    __slots__ = ("_jobs", "_waited")

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._waited: float | None = None

    def add(self, job: Job) -> None:
        """One more. Those that ended are let go: a stream has no end of them."""
        while self._jobs and self._jobs[0].phase is Phase.SETTLED:
            self._waited = (self._waited or 0.0) + self._jobs.popleft().wait_seconds
        self._jobs.append(job)

    @property
    def waited(self) -> float | None:
        """Seconds in line, all together; None: nothing was sent."""
        if self._waited is None and not self._jobs:
            return None
        return (self._waited or 0.0) + sum(job.wait_seconds for job in self._jobs)


current: ContextVar[Call | None] = ContextVar("pkcs11_pool_call", default=None)
"""The call that what is sent now belongs to."""

# Ends of spans whose owner was thrown away. The garbage collector may come while the
# SDK holds a lock of its own, so it only puts them here; `drain` ends them.
_thrown_away: deque[tuple[_Begun, int]] = deque()


def drain() -> None:
    """End the spans whose owner was thrown away, at the time when that was."""
    while _thrown_away:
        # Another thread may take the last one meanwhile.
        with suppress(IndexError):
            begun, at = _thrown_away.popleft()
            begun.end(_Gone(), at=at)


class _Gone(BaseException):
    """Counts as a cancellation."""


class _Begun:
    """A span that has begun."""

    def __init__(
        self, tracer: Tracer, operation: str, attributes: dict[str, Any]
    ) -> None:
        drain()
        #: What is told at its end, beside what became of it.
        self.counts: dict[str, int] = {}
        self._call = Call()
        self._span: Span = tracer.start_span(
            f"pkcs11 {operation}", kind=SpanKind.CLIENT, attributes=attributes
        )

    def current(self) -> _Current:
        """``with`` it, this span is the current one, and what is sent is its own."""
        return _Current(self._span, self._call)

    def end(self, error: BaseException | None, *, at: int | None = None) -> None:
        """End it, with what became of its operation."""
        span, waited = self._span, self._call.waited
        if waited is not None:
            span.set_attribute(WAIT_TIME, waited)
        span.set_attributes(self.counts)
        if isinstance(error, Exception):
            # Neither its text nor its traceback, which may name a key.
            span.set_attributes(_told_by(error))
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        elif error is not None:
            span.set_attribute(CANCELLED, value=True)
        span.end(end_time=at)

    def throw_away(self) -> None:
        """End it as soon as somebody else comes by. Takes no lock."""
        _thrown_away.append((self, time.time_ns()))


class _Current:
    """Makes a span the current one for a block."""

    def __init__(self, span: Span, call: Call) -> None:
        self._inside = trace.set_span_in_context(span)
        self._tokens = (current.set(call), context.attach(self._inside))

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        mine, theirs = self._tokens
        if context.get_current() is self._inside:
            context.detach(theirs)
        # A coroutine that is thrown away with its loop ends in some other context, in
        # which there is nothing to put back.
        with suppress(ValueError):
            current.reset(mine)


def _told_by(error: Exception) -> dict[str, str]:
    told = {ERROR_TYPE: type(error).__name__}
    code = rv.code_of(error)
    if code is not None:
        told[CODE] = rv.name_of(code)
    return told


# -- Around the methods of the pool ---------------------------------------------------


def operation(
    func: Callable[..., Awaitable[Any]], tracer: Tracer
) -> Callable[..., Awaitable[Any]]:
    """A coroutine function with a span around each call."""
    secret = _secret(func)

    @functools.wraps(func)
    async def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        # First of all: no frame of ours holds a PIN as text.
        args, kwargs = _hidden(args, kwargs, secret)
        begun = _Begun(tracer, func.__name__, _attributes(self, func, kwargs))
        try:
            with begun.current():
                result = await func(self, *args, **kwargs)
        except GeneratorExit:
            begun.throw_away()
            raise
        except BaseException as error:
            begun.end(error)
            raise
        begun.end(None)
        return result

    return traced


def iterable(func: Callable[..., Any], tracer: Tracer) -> Callable[..., Any]:
    """A method that gives results or a stream: what it gives will have a span."""
    secret = _secret(func)

    @functools.wraps(func)
    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _hidden(args, kwargs, secret)
        given = func(self, *args, **kwargs)
        attributes = _attributes(self, func, kwargs)
        begin = functools.partial(_Begun, tracer, func.__name__, attributes)
        setattr(given, _SPAN, _Iteration(begin))
        return given

    return traced


def following(func: Callable[[Any], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The ``__anext__`` of what has a span."""

    @functools.wraps(func)
    async def traced(self: Any) -> Any:
        span: _Iteration | None = getattr(self, _SPAN, None)
        if span is None:
            return await func(self)
        return await span.following(self, func)

    return traced


def closing(func: Callable[[Any], Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """The ``aclose`` of what has a span."""

    @functools.wraps(func)
    async def traced(self: Any) -> None:
        try:
            await func(self)
        finally:
            span: _Iteration | None = getattr(self, _SPAN, None)
            if span is not None and _is_over(self):
                span.end(_Gone())

    return traced


class _Iteration:
    """The span of results or a stream, from the first that is asked for to the end."""

    def __init__(self, begin: Callable[[], _Begun]) -> None:
        self._begin = begin
        self._begun: _Begun | None = None

    async def following(
        self, given: Any, original: Callable[[Any], Awaitable[Any]]
    ) -> Any:
        """The next result, in the span."""
        if self._begun is None:
            if _is_over(given):
                return await original(given)
            self._begun = self._begin()
        begun = self._begun
        try:
            with begun.current():
                result = await original(given)
        except GeneratorExit:
            raise  # thrown away with its loop: see `__del__`
        except StopAsyncIteration:
            self.end(None)
            raise
        except BaseException as error:
            if _is_over(given):  # and not: another task is reading
                self.end(error)
            raise
        _count(begun.counts, given, result)
        if isinstance(given, CryptStream) and _is_over(given):
            self.end(None)
        return result

    def end(self, error: BaseException | None) -> None:
        """End it, unless that was done."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.end(error)

    def __del__(self) -> None:
        if self._begun is not None:
            self._begun.throw_away()


def _is_over(given: Any) -> bool:
    over: bool = given._over if isinstance(given, Results) else given._last  # noqa: SLF001  # one package
    return over


def _count(counts: dict[str, int], given: Any, result: Any) -> None:
    if isinstance(given, CryptStream):
        counts[OUTPUT_SIZE] = counts.get(OUTPUT_SIZE, 0) + len(result)
        return
    failed = given._return_errors and isinstance(result, Exception)  # noqa: SLF001
    counts[BATCH_SIZE] = counts.get(BATCH_SIZE, 0) + 1
    counts[BATCH_FAILED] = counts.get(BATCH_FAILED, 0) + failed


def _attributes(
    caller: Any, func: Callable[..., Any], kwargs: dict[str, Any]
) -> dict[str, str]:
    calls = getattr(caller, "_calls", caller)
    engine: TokenEngine = calls._engine  # noqa: SLF001  # one package
    found = {POOL_NAME: engine.name, OPERATION: func.__name__}
    mechanism = getattr(kwargs.get("mechanism"), "name", None)
    if mechanism is not None:
        found[MECHANISM] = f"CKM_{mechanism}"
    return found


def _secret(func: Callable[..., Any]) -> list[int]:
    """Where among its positional arguments a PIN may be."""
    names = list(inspect.signature(func).parameters)[1:]
    return [number for number, name in enumerate(names) if name in _PINS]


def _hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], secret: list[int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with PINs out of sight. What is no PIN is refused later."""
    positional = tuple(
        pins.hide(value) if number in secret and isinstance(value, str) else value
        for number, value in enumerate(args)
    )
    named = {
        name: pins.hide(value) if name in _PINS and isinstance(value, str) else value
        for name, value in kwargs.items()
    }
    return positional, named
