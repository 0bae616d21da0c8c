# ruff: noqa: SLF001  # it stands where results come in
"""Cancels a coroutine at its n-th checkpoint, in every way that there is.

A checkpoint is where a coroutine yields to its event loop. :class:`Checkpoints`
stands between the two and counts. What it does at the n-th comes at one of four
moments, because between "not there yet" and "too late" lies what goes wrong.
"""

from __future__ import annotations

import asyncio
import threading
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import sniffio

from pkcs11_pool.faces import waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator

    import pytest

_LONG = 0.1
"""Seconds after which nothing is waited for that may come from the loop itself."""
_MANY = 100
"""More checkpoints than any coroutine here has: one that never ends fails."""


class Way(Enum):
    """Who cancels."""

    SCOPE = "AnyIO scope"
    CANCEL = "Task.cancel()"
    TIMEOUT = "asyncio.timeout()"


class Moment(Enum):
    """When, around a checkpoint."""

    BEFORE = "before the loop has it"
    """Whatever the coroutine waits for has hardly begun."""
    AGAIN = "before the loop has it, and three times more"
    """It is cancelled once more while it waits for its outcome."""
    ARRIVED = "when the result is there, and the loop has not looked"
    """What was handed over must be given back, or taken."""
    RACE = "between the wake-up and the coroutine"
    """The loop has resumed it, and it has not run yet."""


WAYS = {"asyncio": tuple(Way), "trio": (Way.SCOPE,)}


class Posted:
    """Knows of each result that a pool hands to an event loop.

    Attributes:
        expected: Whether there may be one to come.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.expected: Callable[[], object] = lambda: True
        self._event = threading.Event()
        wake = waiting._LoopWaiter.wake

        def told(waiter: Any) -> bool:
            try:
                return wake(waiter)
            finally:
                self._event.set()

        monkeypatch.setattr(waiting._LoopWaiter, "wake", told)

    def forget(self) -> None:
        """What came so far does not count."""
        self._event.clear()

    def wait(self) -> None:
        """Block this thread, and its loop, until something was posted."""
        if self.expected():
            self._event.wait(_LONG)


class Checkpoints:
    """A coroutine whose yields are counted: at one of them something is done.

    Attributes:
        seen: How many there were.
        acted: Whether it was done.
    """

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        at: int,
        moment: Moment,
        act: Callable[[], object],
        posted: Posted | None = None,
    ) -> None:
        self.seen = 0
        self.acted = 0
        self._coroutine = coroutine
        self._at = at
        self._moment = moment
        self._act = act
        self._posted = posted

    def __await__(self) -> Generator[Any, Any, Any]:
        """Drive it."""
        if self._at == 0:
            self._do()
        step: Callable[[Any], Any] = self._coroutine.send
        given: Any = None
        while True:
            if self._posted is not None:
                self._posted.forget()
            try:
                yielded = step(given)
            except StopIteration as done:
                return done.value
            self.seen += 1
            late = self._pass(yielded)
            try:
                given = yield yielded
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001  # the coroutine's
                step, given = self._coroutine.throw, error
            else:
                step = self._coroutine.send
            if late:
                self._do()

    def _pass(self, yielded: Any) -> bool:
        """Before the loop has what was yielded; whether to act when it is back."""
        here, moment = self.seen == self._at, self._moment
        if moment is Moment.AGAIN:
            here = self._at <= self.seen <= self._at + 3
        if not here:
            return False
        if moment is Moment.RACE:
            return self._race(yielded)
        if moment is Moment.ARRIVED and self._posted is not None:
            self._posted.wait()
        self._do()
        return False

    def _race(self, yielded: Any) -> bool:
        """Act after the wake-up and before the coroutine; True: when it is back."""
        if hasattr(yielded, "add_done_callback"):
            # Before the task's own, so it is called first.
            yielded.add_done_callback(lambda _: self._do())
            return False
        if yielded is None and sniffio.current_async_library() == "asyncio":
            asyncio.get_running_loop().call_soon(self._do)
            return False
        return True

    def _do(self) -> None:
        self.acted += 1
        self._act()


class Cancelled:
    """What a coroutine came to that was cancelled at one checkpoint.

    Attributes:
        asked: How often it was cancelled; 0: it has fewer checkpoints.
        came: Whether the cancellation left it.
        waited: Whether it has a checkpoint at all.
        result: What it gave, if not.
    """

    def __init__(self, way: Way, moment: Moment, at: int) -> None:
        self.way = way
        self.moment = moment
        self.at = at
        self.asked = 0
        self.came = False
        self.waited = False
        self.result: Any = None

    def __str__(self) -> str:
        """Which it was, for messages."""
        return f"{self.way.value} at checkpoint {self.at}, {self.moment.value}"

    async def run(
        self, coroutine: Coroutine[Any, Any, Any], posted: Posted | None
    ) -> None:
        """Run it in this way; see that nothing of the cancellation remains."""
        how = {
            Way.SCOPE: self._by_scope,
            Way.CANCEL: self._by_cancel,
            Way.TIMEOUT: self._by_timeout,
        }
        await how[self.way](coroutine, posted)
        # Nothing is left over that hits somebody else.
        await anyio.lowlevel.checkpoint()
        if sniffio.current_async_library() == "asyncio":
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0, self
        if self.asked and self.waited and self._must_come:
            assert self.came, f"swallowed: {self}"

    @property
    def _must_come(self) -> bool:
        """Whether no result can have been first."""
        if self.way is Way.CANCEL:
            return True
        # A scope on asyncio, and a time limit, cancel a moment later; trio does not
        # cancel a task that is on its way. What comes of a scope comes again.
        trio = sniffio.current_async_library() == "trio"
        return trio and self.moment is not Moment.RACE

    async def _by_scope(
        self, coroutine: Coroutine[Any, Any, Any], posted: Posted | None
    ) -> None:
        with anyio.CancelScope() as outer, anyio.CancelScope() as scope:

            def act() -> None:
                (outer if scope.cancel_called else scope).cancel()

            steps = Checkpoints(coroutine, self.at, self.moment, act, posted)
            self.result = await steps
        self.asked, self.waited = steps.acted, steps.seen > 0
        self.came = scope.cancelled_caught or outer.cancelled_caught

    async def _by_cancel(
        self, coroutine: Coroutine[Any, Any, Any], posted: Posted | None
    ) -> None:
        async def main() -> Any:
            return await steps

        def act() -> None:
            task.cancel()

        steps = Checkpoints(coroutine, self.at, self.moment, act, posted)
        task = asyncio.create_task(main())
        await asyncio.wait([task])
        self.asked, self.waited = steps.acted, steps.seen > 0
        self.came = task.cancelled()
        assert task.cancelling() == self.asked, self
        if not self.came:
            self.result = task.result()

    async def _by_timeout(
        self, coroutine: Coroutine[Any, Any, Any], posted: Posted | None
    ) -> None:
        try:
            async with asyncio.timeout(None) as limit:
                steps = Checkpoints(
                    coroutine, self.at, self.moment, lambda: limit.reschedule(0), posted
                )
                self.result = await steps
        except TimeoutError as error:
            if type(error) is not TimeoutError:
                raise
            self.came = True
        # It had cancelled: then that must have come.
        assert limit.expired() == self.came, f"swallowed: {self}"
        self.asked, self.waited = steps.acted, steps.seen > 0


class Held:
    """A task with a coroutine that is cancelled while its call is inside the module.

    Attributes:
        done: Set when it is over.
        came: Whether the cancellation left it.
    """

    def __init__(self, way: Way, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.done = anyio.Event()
        self.came = False
        self._way = way
        self._coroutine = coroutine
        self._cancel: list[Callable[[], object]] = []

    async def __call__(self) -> None:
        """Run it."""
        how = {
            Way.SCOPE: self._by_scope,
            Way.CANCEL: self._by_cancel,
            Way.TIMEOUT: self._by_timeout,
        }
        try:
            await how[self._way]()
        finally:
            self.done.set()

    async def cancelled(self) -> AsyncIterator[None]:
        """Cancel it as often as the way allows, and let it act upon that each time."""
        for cancel in self._cancel:
            cancel()
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            yield

    async def _by_scope(self) -> None:
        with anyio.CancelScope() as outer, anyio.CancelScope() as scope:
            self._cancel = [scope.cancel, outer.cancel]
            await self._coroutine
        self.came = scope.cancelled_caught or outer.cancelled_caught

    async def _by_cancel(self) -> None:
        async def main() -> None:
            await self._coroutine

        task = asyncio.create_task(main())
        self._cancel = [task.cancel] * 3
        await asyncio.wait([task])
        self.came = task.cancelled()
        if not self.came:
            task.result()

    async def _by_timeout(self) -> None:
        try:
            async with asyncio.timeout(None) as limit:
                self._cancel = [lambda: limit.reschedule(0)]
                await self._coroutine
        except TimeoutError as error:
            if type(error) is not TimeoutError:
                raise
            self.came = True


def every(backend: str) -> Iterator[tuple[Way, Moment]]:
    """All combinations that there are."""
    for way in WAYS[backend]:
        for moment in Moment:
            # One time limit does not pass twice.
            if moment is not Moment.AGAIN or way is not Way.TIMEOUT:
                yield way, moment


def numbers() -> Iterator[int]:
    """The checkpoints, from the one before the first."""
    for at in count():
        assert at < _MANY, "it has no end"
        yield at
