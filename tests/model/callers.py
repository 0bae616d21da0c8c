"""Who calls the pool: tasks of several event loops, each in a thread, and threads.

A call is a coroutine function. A loop awaits it; a plain thread runs it the way the
blocking twins do.
"""

from __future__ import annotations

import queue
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import anyio
from anyio.from_thread import start_blocking_portal

from pkcs11_pool.faces.waiting import blocking

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.from_thread import BlockingPortal

    Work = Callable[[], Awaitable[Any]]

LAST_RESORT = 20.0
"""Seconds after which a call that should have ended long ago fails its test."""
LOOPS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "asyncio": (("asyncio", {}), ("asyncio", {"use_uvloop": True})),
    "trio": (("trio", {}), ("asyncio", {"debug": True})),
}
"""The loops of each of the two ways in which the machine runs."""


class Lost(AssertionError):
    """A caller never heard of its call again."""


class Running:
    """A call under way.

    Attributes:
        value: What it gave.
        error: What it raised.
        cancelled: It ended by being cancelled.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.ends = 0
        self._over = threading.Event()
        self.cancel: Callable[[], None] | None = None

    def end(self) -> None:
        """It has ended. Once."""
        self.ends += 1
        self._over.set()

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            Lost: It did not end.
        """
        if not self._over.wait(LAST_RESORT):
            raise Lost(f"a call did not end within {LAST_RESORT} s")

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    @property
    def outcome(self) -> str:
        """How it ended, in one word or two."""
        if self.cancelled:
            return "cancelled"
        if self.error is None:
            return "ok"
        phase = getattr(self.error, "phase", None)
        name = type(self.error).__name__
        return name if phase is None else f"{name} {phase}"


class Callers:
    """Two event loops in threads of their own, and two plain threads."""

    def __init__(self, backend: str) -> None:
        self._stack = ExitStack()
        self._portals: list[BlockingPortal] = []
        self._threads: list[_Plain] = []
        self._backend = backend
        #: The identities of the threads: none of them may call the module.
        self.idents = {threading.get_ident()}

    def __enter__(self) -> Self:
        """Start them."""
        with ExitStack() as stack:
            for name, options in LOOPS[self._backend]:
                portal = stack.enter_context(start_blocking_portal(name, options))
                self._portals.append(portal)
                self.idents.add(portal.call(_ident))
            for _ in range(2):
                plain = _Plain()
                stack.callback(plain.stop)
                self._threads.append(plain)
                self.idents.add(plain.ident)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        """End them."""
        self._stack.close()

    @property
    def count(self) -> int:
        """How many there are: the loops first."""
        return len(self._portals) + len(self._threads)

    def start(self, who: int, work: Work) -> Running:
        """Let one of them make a call."""
        running = Running()
        who %= self.count
        if who < len(self._portals):
            _start_on(self._portals[who], running, work)
        else:
            self._threads[who - len(self._portals)].start(running, work)
        return running

    def run(self, who: int, work: Work) -> Running:
        """Let one of them make a call, and wait for its end."""
        running = self.start(who, work)
        running.wait()
        return running


async def _ident() -> int:
    return threading.get_ident()


def _start_on(portal: BlockingPortal, running: Running, work: Work) -> None:
    scopes: list[anyio.CancelScope] = []
    gone: list[bool] = []

    async def task() -> None:
        try:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                if gone:
                    scope.cancel()
                running.value = await work()
            running.cancelled = scope.cancelled_caught
        except Exception as error:  # noqa: BLE001  # looked at by the machine
            running.error = error
        finally:
            running.end()

    async def cancel() -> None:
        # Trio may come to this before it comes to the task.
        gone.append(True)
        for scope in scopes:
            scope.cancel()

    running.cancel = lambda: portal.call(cancel)
    portal.start_task_soon(task)


class _Plain:
    """A thread without an event loop."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Running, Work] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="caller", daemon=True)
        self._thread.start()
        assert self._thread.ident is not None
        self.ident = self._thread.ident

    def start(self, running: Running, work: Work) -> None:
        self._calls.put((running, work))

    def stop(self) -> None:
        self._calls.put(None)
        self._thread.join(LAST_RESORT)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            running, work = call
            try:
                running.value = blocking(_coroutine(work))
            except Exception as error:  # noqa: BLE001  # looked at by the machine
                running.error = error
            finally:
                running.end()
            del call, running, work


async def _coroutine(work: Work) -> Any:
    return await work()
