"""Many operations of one kind: results in order, a bounded number under way.

The library has no task of its own to read ahead with. So everything happens
inside ``__anext__``: items are taken as results are taken, up to a window's
size, and their jobs run on the workers while the consumer does something else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

import anyio.lowlevel

from pkcs11_pool.errors import (
    ForkedProcess,
    InvalidType,
    PoolTimeout,
    TooManyWaiting,
    WouldDeadlock,
)
from pkcs11_pool.faces import arguments
from pkcs11_pool.faces.waiting import blocking, blocks, checkpoint, current_waiter
from pkcs11_pool.jobs import Job, Phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from types import TracebackType

    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.faces.arguments import Timeout
    from pkcs11_pool.faces.calls import Calls
    from pkcs11_pool.faces.waiting import FaceWaiter

T = TypeVar("T")

_AHEAD: Final = 2
"""Operations under way for each session: a worker that is done finds the next."""
_READ: Final = "another task is reading these results"
_END: Final = object()


class Work:
    """What is done with each item, and how.

    Attributes:
        make: Gives the work on a worker for one item, or raises what is wrong with it.
        calls: Where it is done.
        home: Where else, when all sessions are lent to the caller.
        options: How each job is made: ``rw``, ``changes``, ``restart``, ``target``.
    """

    def __init__(
        self,
        calls: Calls,
        make: Callable[[Any], Callable[[Session], Any]],
        *,
        timeout: Timeout,
        home: Calls | None = None,
        **options: Any,
    ) -> None:
        self.calls = calls
        self.make = make
        self.timeout = timeout
        self.home = home
        self.options = options
        arguments.timeout(timeout, None)


class Results(Generic[T]):
    """The results of many operations, in the order of their items: ``async for``.

    At most ``limit`` operations are under way or wait to be taken, whatever the number
    of items; items are taken only as results are. To break off is harmless: what is
    under way then is finished and dropped. ``aclose()`` takes back what still waits.

    Example:
        .. code-block:: python

            digests = (bytes([n]) * 32 for n in range(100))
            async for signature in pool.key(label="p256").sign_many(
                digests, mechanism=Mechanism.ECDSA
            ):
                assert len(signature) == 64
    """

    def __init__(
        self, work: Work, items: Any, *, limit: int | None, return_errors: bool
    ) -> None:
        self._work = work
        self._engine: TokenEngine = work.calls._engine  # noqa: SLF001  # one package
        most = _AHEAD * self._engine.options.max_sessions
        if limit is not None:
            most = arguments.count(limit, "limit", "operations")
        self._limit = most
        self._return_errors = return_errors
        self._items = _Items(items)
        self._window: deque[Job | Exception] = deque()
        # An item that was taken and found no room yet.
        self._held: Any = _END
        # What ends the results, once those before it are taken.
        self._failure: Exception | None = None
        self._waiter: FaceWaiter | None = None
        self._in_use = False
        self._over = False

    def __aiter__(self) -> Self:
        """Itself: the items are taken once."""
        return self

    async def __anext__(self) -> T:
        """The next result, or the error of its item.

        Raises:
            Exception: What the operation raised, unless ``return_errors``; what the
                items raised, as itself, after the results before it.
            TooManyWaiting: Others fill the pool, and none of these is under way.

        Cancellation:
            Takes back what waits. What changes the token and is inside is waited for.

        Cryptoki:
            What the operations send.
        """
        if self._in_use:
            raise RuntimeError(_READ)
        self._in_use = True
        try:
            result: T = await self._next()
        except GeneratorExit:
            # Thrown away with its loop, by the garbage collector.
            self._forget()
            raise
        except BaseException:
            await self._abandon()
            raise
        finally:
            self._in_use = False
        return result

    async def aclose(self) -> None:
        """Break off: take back what waits, and wait for what changes the token.

        Cancellation:
            Nothing more is waited for; what is under way is finished and dropped.

        Cryptoki:
            Nothing of its own.
        """
        if self._in_use:
            raise RuntimeError(_READ)
        await self._abandon()

    async def __aenter__(self) -> Self:
        """Close it at the end of the block."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        await self.aclose()

    async def _next(self) -> Any:
        if self._over:
            raise StopAsyncIteration
        self._engine.home.check()
        if self._waiter is None:
            self._waiter = current_waiter()
        await self._fill(self._waiter)
        if not self._window:
            if self._failure is not None:
                raise self._failure
            raise StopAsyncIteration
        head = self._window[0]
        if isinstance(head, Exception):
            if not blocks():
                # The consumer of nothing but errors must not hold up the loop.
                await anyio.lowlevel.checkpoint()
            self._window.popleft()
            return self._error(head)
        if not _is_done(head):
            # Only who waits can be sent for a PIN.
            self._engine.is_back(head)
        try:
            whole: Any = _Whole(self._engine, self._window)
            result = await self._waiter.result(whole, head)
        except Exception as error:
            if error is not head.error:
                raise
            self._window.popleft()
            return self._error(error)
        self._window.popleft()
        return result

    def _error(self, error: Exception) -> Exception:
        if self._return_errors:
            return error
        raise error

    # -- Taking items -------------------------------------------------------------

    async def _fill(self, waiter: FaceWaiter) -> None:
        """Start operations, as far as the window and the items allow.

        Items that must be awaited are only taken while no result is there.
        """
        window = self._window
        while len(window) < self._limit and self._failure is None:
            if self._items.wait and window and _is_done(window[0]):
                return
            if self._held is _END:
                try:
                    self._held = await self._items.take()
                except Exception as error:  # noqa: BLE001  # raised when it is its turn
                    self._failure = error
                    return
                if self._held is _END:
                    return
            try:
                window.append(self._start(waiter, self._held))
            except TooManyWaiting as error:
                if not window:
                    self._failure = error
                # Others fill the pool: one of these must come to its end first.
                return
            except ForkedProcess:
                # Taking the item forked: what is under way is the parent's.
                raise
            except Exception as error:  # noqa: BLE001  # raised when it is its turn
                self._failure = error
                return
            self._held = _END

    def _start(self, waiter: FaceWaiter, item: Any) -> Job | Exception:
        """Submit the operation of one item; what is wrong with the item alone."""
        work = self._work
        try:
            call = work.make(item)
        except Exception as error:  # noqa: BLE001  # it is this item's
            return error
        while True:
            job = work.calls._job(  # noqa: SLF001  # one package
                call, work.timeout, waiter=waiter, **work.options
            )
            job.away = True
            try:
                self._engine.submit(job)
            except PoolTimeout as error:
                return error
            except WouldDeadlock:
                if work.home is None or getattr(work.home, "closed", True):
                    raise
                work.calls, work.home = work.home, None
            else:
                return job

    # -- Breaking off -------------------------------------------------------------

    def _forget(self) -> None:
        self._over = True
        for job in self._window:
            if isinstance(job, Job):
                self._engine.forget(job)
        self._window.clear()

    async def _abandon(self) -> None:
        self._over = True
        self._held = _END
        left = [job for job in self._window if isinstance(job, Job)]
        self._window.clear()
        if self._engine.home.is_forked:
            return
        inside = [job for job in left if not self._engine.cancel(job)]
        if inside and self._waiter is not None:
            await self._waiter.outlast(*inside)
            await checkpoint()


class SyncResults(Generic[T]):
    """The blocking twin of :class:`Results`, for a plain ``for`` loop."""

    def __init__(self, results: Results[T]) -> None:
        self._results = results

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> T:
        """See :meth:`Results.__anext__`."""
        try:
            return blocking(self._results.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """See :meth:`Results.aclose`."""
        blocking(self._results.aclose())

    def __enter__(self) -> Self:
        """Close it at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


class _Items:
    """Items one after another, from an iterable or an async iterable."""

    def __init__(self, items: object) -> None:
        self._later: AsyncIterator[Any] | None = None
        self._now: Iterator[Any] = iter(())
        #: They are awaited, which may take long.
        self.wait = isinstance(items, AsyncIterable)
        self._over = False
        if isinstance(items, AsyncIterable):
            self._later = items.__aiter__()
        elif isinstance(items, Iterable) and not isinstance(
            items, (str, bytes, bytearray, memoryview, Mapping)
        ):
            self._now = iter(items)
        else:
            kind = type(items).__name__
            message = f"items must be an iterable of items, not {kind}"
            raise InvalidType(message)

    async def take(self) -> Any:
        """The next item, or ``_END`` from the end on."""
        if self._over:
            return _END
        if self._later is None:
            item = next(self._now, _END)
        elif blocks():
            message = "items must be awaited, and a blocking call cannot: give a list"
            raise InvalidType(message)
        else:
            try:
                item = await self._later.__anext__()
            except StopAsyncIteration:
                item = _END
        self._over = item is _END
        return item


class _Whole:
    """Stands in for the engine where one job is waited for, with many behind it.

    When the caller goes, those that wait are taken back first: otherwise they would
    start while the one that cannot be left is waited for.
    """

    def __init__(self, engine: TokenEngine, window: Iterable[Job | Exception]) -> None:
        self._window = window
        self._engine = engine
        self.pin_came = engine.pin_came
        self.forget = engine.forget

    def cancel(self, head: Job) -> bool:
        for job in self._window:
            if isinstance(job, Job) and job is not head:
                self._engine.cancel(job)
        return self._engine.cancel(head)


def _is_done(head: Job | Exception) -> bool:
    return not isinstance(head, Job) or head.phase is Phase.SETTLED
