"""The process that a pool belongs to; a forked child is refused, and touches nothing.

First of all in each call: in a child even the engine's lock may be held for ever, and
asyncio says that no loop is running. So this takes no lock.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pkcs11_pool.errors import ForkedProcess
from pkcs11_pool.state import PoolState

if TYPE_CHECKING:
    from pkcs11_pool.engine.mode import Mode


class _Process:
    """The number of this process, without a system call for each operation."""

    def __init__(self) -> None:
        self.look()
        os.register_at_fork(after_in_child=self.look)

    def look(self) -> None:
        self.pid = os.getpid()


process = _Process()


class Home:
    """Where one pool was made or opened.

    A pool that was made before a fork and not opened may be opened in the child.

    Attributes:
        pid: The number of that process.
    """

    def __init__(self, mode: Mode) -> None:
        self.pid = process.pid
        self._mode = mode

    @property
    def is_forked(self) -> bool:
        """Whether the pool was opened in the process that this one was forked from."""
        return process.pid != self.pid and self._mode.state is not PoolState.NEW

    def check(self) -> None:
        """Refuse a child process that uses its parent's pool, and touch nothing.

        Raises:
            ForkedProcess: This is such a child.
        """
        if process.pid != self.pid and self.is_forked:
            message = (
                f"this pool belongs to process {self.pid}: use the start method spawn "
                "or forkserver, or open a pool after the fork"
            )
            raise ForkedProcess(message)

    def move_in(self) -> None:
        """It is opened here.

        Raises:
            ForkedProcess: It was opened in the parent process.
        """
        self.check()
        self.pid = process.pid
