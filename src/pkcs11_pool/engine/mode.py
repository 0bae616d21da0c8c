"""What keeps jobs back: the life of the pool, a pause, a lost token, a lost login.

Written under the engine's lock. Knows no job.
"""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.errors import TokenUnavailable
from pkcs11_pool.state import PoolState

if TYPE_CHECKING:
    from pkcs11_pool.engine.leases import Lease


class Pause(Enum):
    """What may start at present."""

    NOT = "not"
    """Everything."""
    NEW = "new"
    """Only jobs of open leases: the security officer waits for their end.

    When no others are open, he stops chains that have a session to themselves.
    """
    ALL = "all"
    """Nothing, but the jobs of a period of the security officer.

    And those neither while the token may be lost.
    """


# Reading a member of an Enum is a call into Python before 3.12: once is enough.
_NOT: Final = Pause.NOT
_READY: Final = PoolState.READY


class Outage:
    """One time that nothing may start, because the token is lost or may be.

    Attributes:
        since: When it began.
        until: How long callers wait.
        error: How the token is down.
        over: Whether they have waited too long.
        before: What might start before it began.
    """

    def __init__(self, error: BaseException, limit: float, before: Pause) -> None:
        self.since = time.monotonic()
        self.until = self.since + limit
        self.error = error
        self.over = False
        self.before = before

    def unavailable(self) -> TokenUnavailable:
        """What callers are told who have waited too long."""
        down = time.monotonic() - self.since
        error = TokenUnavailable(
            f"the token is down since {down:.1f} s: {rv.text_of(self.error)}. The "
            "pool goes on trying, and refuses all calls until it is back"
        )
        error.__cause__ = self.error
        return error


class Mode:
    """What keeps jobs back in one engine.

    Attributes:
        usual: Nothing does, which is nearly always so: jobs take a short way then, and
            one look for each of them does in place of four.
        state: Where the pool is in its life.
        pause: What may start.
        outage: What is known of a token that may be lost, while it may be.
        login_awaited: A lost login is being restored: what may not start twice waits
            for it.
        stuck: Calls that were given up on and have not returned.
        so_lane: The session of a period of the security officer, while there is one.
    """

    usual = False
    state = PoolState.NEW
    pause = Pause.NOT
    outage: Outage | None = None
    login_awaited = False
    stuck = 0
    so_lane: Lease | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Whatever changes, it is looked at once whether all is as usual."""
        super().__setattr__(name, value)
        usual = self.state is _READY and not (
            self.pause is not _NOT or self.login_awaited or self.stuck
        )
        super().__setattr__("usual", usual)
