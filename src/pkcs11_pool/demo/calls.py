"""How many ``C_`` functions are called: counted, not reckoned.

The pool calls the module through one object, its function list. Here another takes
its place that counts what passes.

``tests/test_demo.py`` holds these counts against those of a module that counts for
itself.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pkcs11_pool.cryptoki.interface import FunctionList

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkcs11_pool.cryptoki.interface import Library


class CountingFunctions(FunctionList):
    """A function list that counts the calls through it."""

    def __init__(self, pointer: int) -> None:
        super().__init__(pointer)
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Bind a function at its first use, with a counter in front of it."""
        function = super().__getattr__(name)
        lock, calls = self._lock, self._calls

        def counted(*arguments: object) -> int:
            with lock:
                calls[name] += 1
            return function(*arguments)

        setattr(self, name, counted)
        return counted

    def snapshot(self) -> dict[str, int]:
        """Return the counts so far."""
        with self._lock:
            return dict(self._calls)


class CallCount:
    """The calls from now on."""

    def __init__(self, functions: CountingFunctions) -> None:
        self._functions = functions
        self._before = self._total()

    def _total(self) -> Counter[str]:
        return Counter(self._functions.snapshot())

    def snapshot(self) -> dict[str, int]:
        """Return how often each function was called, those never called left out."""
        return dict(sorted((self._total() - self._before).items()))


@contextmanager
def counting(library: Library) -> Iterator[CountingFunctions]:
    """Count the calls into a module.

    Args:
        library: The module. No pool may be open on it: each of its sessions keeps the
            function list that it found when it was opened.
    """
    before = library.functions
    functions = CountingFunctions(before.pointer)
    library.functions = functions
    try:
        yield functions
    finally:
        library.functions = before
