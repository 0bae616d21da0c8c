"""Operations on data in parts, in bounded memory, from the caller's side.

What fits into one piece is sent as one call, as if it had been given as bytes.
What does not is a chain of calls on one session that nobody else uses meanwhile.
The session is held; no thread is, and no task: the caller's own reads the data.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Self

from pkcs11 import exceptions as p11

from pkcs11_pool.cryptoki import recovery
from pkcs11_pool.cryptoki.keys import SessionObject
from pkcs11_pool.engine.leasing import NOBODY
from pkcs11_pool.engine.multipart import ONE_PART_ONLY, PIECE, MultiPart
from pkcs11_pool.errors import (
    KeyNotFound,
    LoginRequired,
    PoolTimeout,
    StreamInterrupted,
)
from pkcs11_pool.faces import arguments
from pkcs11_pool.faces.reading import Reader, check_data
from pkcs11_pool.faces.waiting import blocking, current_waiter, ended
from pkcs11_pool.jobs import Job, Kind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from pkcs11_pool.cryptoki.keys import Target
    from pkcs11_pool.engine.leases import Hold, Lease, Loan
    from pkcs11_pool.engine.multipart import Piece, Plan
    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.faces.arguments import Data, Timeout
    from pkcs11_pool.faces.calls import Calls
    from pkcs11_pool.jobs import Waiter

_ATTEMPTS: Final = 3
"""How often an operation is begun, where the data is still there."""
_CUT: Final = frozenset(
    {
        recovery.Fault.LOGIN,
        recovery.Fault.HANDLE,
        recovery.Fault.SESSION,
        recovery.Fault.TOKEN,
        recovery.Fault.MODULE,
    }
)
_ENDED: Final = "the stream is over"


class Task:
    """An operation on data, before the data is read.

    Attributes:
        whole: Makes it in one call, within so many seconds.
        plan: How it is made in several.
        key_of: The key that stands among the bytes, where keys may.
    """

    def __init__(
        self,
        calls: Calls,
        plan: Plan,
        whole: Callable[[bytes, float | None], Awaitable[Any]],
        *,
        timeout: Timeout,
        home: Calls | None = None,
        key_of: Callable[[object], Target | None] | None = None,
    ) -> None:
        self.calls = calls
        self.plan = plan
        self.key_of = key_of
        self.home = home
        self._whole = whole
        self._limit = arguments.timeout(
            timeout,
            calls._engine.options.timeout,  # noqa: SLF001  # one package
        )
        self.nowait = self._limit == 0
        self.deadline: float | None = None

    def start(self) -> None:
        """From now on the time counts."""
        if self._limit:
            self.deadline = time.monotonic() + self._limit

    async def in_one_call(self, data: bytes) -> Any:
        """Make it with all of the data, in the time that is left."""
        left = self._limit
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                message = "the deadline passed while the data was read"
                raise PoolTimeout(message, "waiting")
        return await self._whole(data, left)


async def consume(task: Task, data: Data) -> Any:
    """Make an operation on data that comes in parts, and give its result.

    Begun anew where it was cut off and the data can be read once more.
    """
    task.start()
    for attempt in range(_ATTEMPTS):
        reader = Reader(data, task.deadline, key_of=task.key_of)
        feed = Feed(task)
        try:
            result = await reader.in_time(_consume, task, reader, feed)
        except BaseException as error:
            feed.end(error)
            again = reader.repeatable and attempt < _ATTEMPTS - 1
            if not (again and isinstance(error, StreamInterrupted)):
                raise
        else:
            feed.end(None)
            return result
    raise AssertionError


async def _consume(task: Task, reader: Reader, feed: Feed) -> Any:
    piece, last = await reader.take()
    if last and isinstance(piece, bytes):
        return await task.in_one_call(piece)
    outputs = [await feed.begin(piece)]
    if outputs[0] is ONE_PART_ONLY and isinstance(piece, bytes):
        feed.drop()
        return await task.in_one_call(piece + await reader.take_all())
    if last:
        outputs = [await feed.give(b"", last=True)]
    while not last:
        piece, last = await reader.take()
        outputs.append(await feed.give(piece, last=last))
        if not task.plan.operation.gives_output:
            del outputs[:-1]
    return b"".join(outputs) if task.plan.operation.gives_output else outputs[-1]


class CryptStream:
    """The output of an encryption or decryption, as it comes: ``async for``.

    The session is held from the first piece of data to the last; no thread is. To
    break off is harmless: forgotten or closed, it lets the session go. Its operation
    has one time limit, which counts from the first output asked for.

    Example:
        .. code-block:: python

            plain = (bytes(100_000) for part in range(10))
            sealed = bytearray()
            stream = pool.key(label="master").encrypt_stream(
                plain, mechanism_param=bytes(16)
            )
            async for output in stream:
                sealed += output
    """

    def __init__(self, task: Task, data: Data) -> None:
        check_data(data)
        self._task = task
        self._data: Data | None = data
        self._reader: Reader | None = None
        self._feed = Feed(task)
        self._last = False
        self._in_use = False

    def __aiter__(self) -> Self:
        """Itself: the data is read once."""
        return self

    async def __anext__(self) -> bytes:
        """The next output, never empty.

        Raises:
            StreamInterrupted: The SO came, or the login or the token was lost:
                begin again.
            LoginRequired: Somebody logged out in the middle.
            PoolTimeout: The time for the whole of it has passed.

        Cancellation:
            The caller goes at once, and the stream is over.

        Cryptoki:
            The update that gives it; at the end the final call.
        """
        if self._in_use:
            message = "another task is reading this stream"
            raise RuntimeError(message)
        self._in_use = True
        try:
            output = await self._next()
        except BaseException as error:
            self._end(error)
            raise
        finally:
            self._in_use = False
        if self._last:
            self._end(None)
        if not output:
            raise StopAsyncIteration
        return output

    async def aclose(self) -> None:
        """Break off: let the session go, and wait until it is closed.

        Cancellation:
            Nothing more is waited for; the session is closed behind.

        Cryptoki:
            ``C_CloseSession``, where the stream had a session for itself.
        """
        if self._in_use:
            message = "another task is reading this stream"
            raise RuntimeError(message)
        self._last, self._data = True, None
        await self._feed.end_and_wait()

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

    async def _next(self) -> bytes:
        self._task.calls._engine.home.check()  # noqa: SLF001  # one package
        if self._reader is None and self._data is not None:
            self._task.start()
            self._reader = Reader(self._data, self._task.deadline)
            self._data = None
        if self._reader is None:
            return b""
        return await self._reader.in_time(self._read, self._reader)

    async def _read(self, reader: Reader) -> bytes:
        output = b""
        while not output and not self._last:
            # What is awaited may be long in coming: what is there goes on at once.
            piece: Any
            piece, self._last = await reader.take(1 if reader.waits else PIECE)
            if self._feed.begun:
                output = await self._feed.give(piece, last=self._last)
            elif self._last:
                output = await self._task.in_one_call(piece)
            else:
                output = await self._begin(reader, piece)
        return output

    async def _begin(self, reader: Reader, piece: Any) -> bytes:
        output: Any = await self._feed.begin(piece)
        if output is ONE_PART_ONLY:
            self._feed.drop()
            self._last = True
            output = await self._task.in_one_call(piece + await reader.take_all())
        return output  # type: ignore[no-any-return]

    def _end(self, error: BaseException | None) -> None:
        self._last = True
        self._reader = self._data = None
        self._feed.end(error)


class SyncStream:
    """The blocking twin of a :class:`CryptStream`, for a plain ``for`` loop."""

    def __init__(self, stream: CryptStream) -> None:
        self._stream = stream

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> bytes:
        """See :meth:`CryptStream.__anext__`."""
        try:
            return blocking(self._stream.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """See :meth:`CryptStream.aclose`."""
        blocking(self._stream.aclose())

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


class Feed:
    """One chain of calls, from the side of the caller who brings the data."""

    def __init__(self, task: Task) -> None:
        self._chain: MultiPart | None = None
        self._lease: Lease | None = None
        # Forgotten, it lets go of the session.
        self._hold: Hold | Loan | None = None
        self._watch: Job | None = None
        self._task = task
        self._engine: TokenEngine = task.calls._engine  # noqa: SLF001  # one package

    def __del__(self) -> None:
        """Called by the garbage collector, anywhere: takes no lock."""
        # The worker that brought the hold may have it in its hands for a moment more;
        # whoever leaves a stream need not wait for that.
        lease, chain = self._lease, self._chain
        if lease is not None and chain is not None and not chain.over:
            self._engine.orphans.append((lease, None if lease.lone else chain))

    @property
    def begun(self) -> bool:
        """Whether the first piece was given."""
        return self._chain is not None and self._chain.begun

    async def begin(self, piece: Piece) -> Any:
        """Get a session, and give it the first piece."""
        for attempt in range(_ATTEMPTS):
            try:
                await self._sit_down()
                return await self.give(piece, last=False)
            except StreamInterrupted:
                # Nothing came of the piece, and it is still there.
                self._let_go()
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    async def give(self, piece: Piece, *, last: bool) -> Any:
        """Give one more piece; what came out of it."""
        task, chain, lease = self._task, self._chain, self._lease
        assert chain is not None  # noqa: S101  # begin() came before
        if lease is None:
            raise StreamInterrupted(_ENDED)
        begun = chain.begun
        # Taking the piece may have forked: a child finds no loop, nor its lock free.
        self._engine.home.check()
        waiter = current_waiter()
        target = task.plan.target
        job = Job(
            lambda session: chain.step(session, piece, last=last),
            Kind.LANE,
            waiter=waiter,
            deadline=task.deadline,
            # Before anything came of it, it may start again.
            restart=not begun,
            nowait=task.nowait and not begun and not lease.lone,
            lane=lease,
            target=target if isinstance(target, SessionObject) else None,
            holder=waiter.holder,
            chain=chain,
        )
        job.is_operation = False  # all of them together are one
        try:
            self._engine.submit(job)
            return await waiter.result(self._engine, job)
        except p11.PKCS11Error as error:
            if begun and self._is_cut_off(error, lease):
                message = f"cut off in the middle of the data, begin again: {error}"
                raise StreamInterrupted(message) from error
            raise

    def end(self, error: BaseException | None) -> None:
        """Let the session go, and count what came of it. Waits for nothing."""
        if self._chain is None or self._engine.home.is_forked:
            return  # a forked child leaves its parent's locks alone, too
        if isinstance(error, GeneratorExit):
            # Thrown away with its loop, by the garbage collector, which must take no
            # lock: the session is an orphan.
            self._chain = self._lease = self._hold = None
            return
        if isinstance(error, PoolTimeout) and self.begun:
            # Not all of it waited, whatever the last part of it did.
            error.phase = "running"
        self.drop()
        gone = error is not None and not isinstance(error, Exception)
        self._engine.counted(
            operations_total=1,
            operations_failed=error is not None and not gone,
            operations_timed_out=isinstance(error, PoolTimeout),
            operations_cancelled=gone,
        )

    def drop(self) -> None:
        """Let the session go; it counts as nothing."""
        self._let_go()
        self._chain = None

    async def end_and_wait(self) -> None:
        """Let the session go, and wait until it is closed, or free for others."""
        engine, lease, chain = self._engine, self._lease, self._chain
        if lease is None or chain is None or engine.home.is_forked:
            return
        waiter = current_waiter()
        job, self._lease = _end(engine, lease, chain, waiter), None
        self.end(_BrokenOff())
        if job is not None:
            await ended(engine, job, waiter)

    async def _sit_down(self) -> None:
        task, engine = self._task, self._engine
        engine.home.check()
        self._chain = chain = MultiPart(task.plan, current_waiter().holder)
        self._lease, self._hold = await task.calls._seat(  # noqa: SLF001  # one package
            chain, task.deadline, nowait=task.nowait, home=task.home
        )
        # Whoever breaks off and keeps the stream must not keep its session for ever.
        self._watch = Job(
            None,
            Kind.ACTOR,
            waiter=_Expiry(engine, self._lease, chain),
            deadline=task.deadline,
        )
        engine.watch_chain(self._watch)

    def _let_go(self) -> None:
        lease, self._lease, self._hold = self._lease, None, None
        if self._watch is not None:
            self._engine.unwatch_chain(self._watch)
            self._watch = None
        if lease is not None and self._chain is not None:
            _end(self._engine, lease, self._chain)

    def _is_cut_off(self, error: Exception, lease: Lease) -> bool:
        """Whether an error means that the operation is not alive any more."""
        chain = self._chain
        assert chain is not None  # noqa: S101  # begin() came before
        if isinstance(chain.cause, LoginRequired):
            return False  # by the user's word, and the error says so
        if isinstance(error, KeyNotFound):
            return chain.key_gone  # and not a key among the data
        if isinstance(error, p11.OperationNotInitialized):
            return True
        fault = recovery.classify(error)
        return fault in _CUT and (fault is not recovery.Fault.SESSION or lease.lone)


class _BrokenOff(BaseException):
    """Counts as a cancellation."""


class _Expiry:
    """Ends a chain at its deadline, whoever keeps it. Woken by the timekeeper."""

    def __init__(self, engine: TokenEngine, lease: Lease, chain: MultiPart) -> None:
        self._engine = engine
        self._lease = lease
        self._chain = chain

    def wake(self) -> bool:
        self._chain.cause = PoolTimeout(
            "the deadline passed in the middle of the data", "running"
        )
        _end(self._engine, self._lease, self._chain)
        return True


def _end(
    engine: TokenEngine, lease: Lease, chain: MultiPart, waiter: Waiter = NOBODY
) -> Job | None:
    if lease.lone:
        return engine.end_lease(lease, waiter)
    return engine.end_chain(lease, chain, waiter)
