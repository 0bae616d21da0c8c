"""The input of an operation: bytes, a file, or what gives bytes one after another.

It is read by the caller's own task or thread, never by a worker: whoever brings
the data slowly keeps nothing of the pool waiting. An error of an iterable leaves
as itself.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio

from pkcs11_pool.engine.multipart import PIECE
from pkcs11_pool.errors import InvalidType, PoolTimeout
from pkcs11_pool.faces.arguments import whole
from pkcs11_pool.faces.waiting import LATE, blocks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pkcs11_pool.cryptoki.keys import Target
    from pkcs11_pool.engine.multipart import Piece
    from pkcs11_pool.faces.arguments import Data

T = TypeVar("T")

_END: Final = object()
_MIDDLE: Final = "the deadline passed while the data was read"


class Reader:
    """Reads pieces of a size that pays, from chunks as they come.

    Attributes:
        repeatable: The data can be read once more from its start.
        waits: Reading may take the caller's time: it is awaited.
    """

    def __init__(
        self,
        data: Data,
        deadline: float | None,
        *,
        key_of: Callable[[object], Target | None] | None = None,
    ) -> None:
        self._deadline = deadline
        self._name = name = "data"
        self._key_of = key_of
        # A key among the bytes, that comes next.
        self._key: Target | None = None
        self._rest = memoryview(b"")
        self._ended = False
        self.waits = self.repeatable = False
        self._pull: Callable[[], Awaitable[object]]
        source: Any = data
        if (given := whole(source)) is not None:
            self._rest, self._ended, self.repeatable = memoryview(given), True, True
        elif callable(read := getattr(source, "read", None)):
            self._pull = self._from_file(read)
            self.waits = not blocks()
        elif isinstance(source, AsyncIterable):
            if blocks():
                message = (
                    f"{name} must be awaited, and a blocking call cannot: give bytes, "
                    "a file or a plain iterable"
                )
                raise InvalidType(message)
            self._pull = self._from_async(source)
            self.waits = True
        elif isinstance(source, Iterable) and not isinstance(source, Mapping):
            self._pull = self._from_iterable(source)
            # An iterator gives its data once; so may any iterable that is not known.
            self.repeatable = isinstance(source, Sequence)
        else:
            raise _no_data(source, name)

    async def take(self, at_least: int = PIECE) -> tuple[Piece, bool]:
        """The next piece, and whether it is the last.

        Of so many bytes at least, unless the data ends or a key comes; never of more
        than ``PIECE``. A key is a piece of its own.

        Raises:
            PoolTimeout: The deadline has passed.
            InvalidType: The iterable gave something that is not bytes.
        """
        self.check_time()
        parts: list[bytes] = []
        size = 0
        while size < at_least and await self._more() and self._key is None:
            part = bytes(self._rest[: PIECE - size])
            self._rest = self._rest[len(part) :]
            parts.append(part)
            size += len(part)
        piece: Piece = parts[0] if len(parts) == 1 else b"".join(parts)
        if self._key is not None and not parts:
            piece, self._key = self._key, None
        # Where nobody waits for this piece, see whether it is the last.
        more = bool(self._rest) or not self._ended
        if at_least == PIECE:
            more = await self._more()
        return piece, not more

    async def _more(self) -> bool:
        """Whether there is more data; reads on until that is known."""
        while not self._rest and self._key is None and not self._ended:
            self.check_time()
            self._take_in(await self._pull())
        return bool(self._rest) or self._key is not None

    async def take_all(self) -> bytes:
        """All that is left, for a mechanism that takes its data in one part."""
        parts, last = [], False
        while not last:
            piece, last = await self.take()
            if not isinstance(piece, bytes):
                raise InvalidType("a key cannot be data of this mechanism")
            parts.append(piece)
        return b"".join(parts)

    def check_time(self) -> None:
        """Give up in time also where nothing is awaited.

        Raises:
            PoolTimeout: The deadline has passed.
        """
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise PoolTimeout(_MIDDLE, "waiting")

    async def in_time(self, func: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Await something that reads, no longer than the deadline allows.

        Raises:
            PoolTimeout: The deadline has passed.
        """
        if not self.waits or self._deadline is None:
            return await func(*arguments)
        # Jobs have this deadline, too, and know better how far they came: so later.
        left = self._deadline - time.monotonic() + LATE
        with anyio.move_on_after(max(0.0, left)):
            return await func(*arguments)
        raise PoolTimeout(_MIDDLE, "waiting")

    # -- Where the data comes from ------------------------------------------------

    def _take_in(self, chunk: object) -> None:
        if chunk is _END:
            self._ended = True
        elif isinstance(chunk, (bytes, bytearray)):
            # A bytearray may be filled anew by whoever gave it.
            self._rest = memoryview(bytes(chunk))
        elif isinstance(chunk, memoryview):
            self._rest = memoryview(chunk.tobytes())
        elif self._key_of is not None and (key := self._key_of(chunk)) is not None:
            self._key = key
        else:
            message = f"{self._name} must give bytes, not {type(chunk).__name__}"
            raise InvalidType(message)

    def _from_iterable(self, source: Iterable[object]) -> Callable[[], Any]:
        iterator = iter(source)

        async def pull() -> object:
            return next(iterator, _END)

        return pull

    def _from_async(self, source: AsyncIterable[object]) -> Callable[[], Any]:
        iterator = source.__aiter__()

        async def pull() -> object:
            try:
                return await iterator.__anext__()
            except StopAsyncIteration:
                return _END

        return pull

    def _from_file(self, read: Callable[[int], Any]) -> Callable[[], Any]:
        async def pull() -> object:
            chunk = read(PIECE)
            if inspect.isawaitable(chunk):
                if blocks():
                    getattr(chunk, "close", _nothing)()
                    message = (
                        f"{self._name} is read by awaiting: a blocking call cannot"
                    )
                    raise InvalidType(message)
                chunk = await chunk
            return _END if chunk == b"" else chunk

        return pull


def check_data(data: object, name: str = "data") -> None:
    """Refuse what is no data, before anything of it is read.

    Raises:
        InvalidType: It is neither bytes, nor a file, nor an iterable.
    """
    readable = callable(getattr(data, "read", None))
    given = (str, bytes, bytearray, memoryview, AsyncIterable, Iterable)
    if not readable and (not isinstance(data, given) or isinstance(data, Mapping)):
        raise _no_data(data, name)


def _no_data(data: object, name: str) -> InvalidType:
    kind = type(data).__name__
    return InvalidType(f"{name} must be bytes or an iterable of bytes, not {kind}")


def _nothing() -> None:
    pass
