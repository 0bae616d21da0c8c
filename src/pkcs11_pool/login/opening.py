"""How often opening is tried anew, before its error is the caller's.

A module or server that is down is waited for until the caller's deadline. One that
answers may have misread its tokens: SoftHSM2 reads them from files, which other
processes write at each login, and it misses one that is being written until it is
initialised anew. So what tells of that is believed only when it is told again and
again, for at most a second: a token that is not there is said soon.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar

from pkcs11 import exceptions as p11

from pkcs11_pool.cryptoki import recovery, rv
from pkcs11_pool.errors import (
    ModuleError,
    PoolError,
    TokenNotFound,
    TokenUnavailable,
)
from pkcs11_pool.login.steps import Backoff

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_RETRY: Final = 0.2
"""Seconds between two tries to reach a module that is down."""
_PATIENCE: Final = 1.0
"""Seconds, the tries counted, for a token that may be misread."""
_MOMENTS: Final = (0.02, 0.04)
"""Seconds between two looks at a token that was read well before."""
_FAILED: Final = rv.CODES["CKR_GENERAL_ERROR"]


class Tries:
    """The tries of one opening.

    Args:
        module: For messages.
        deadline: On the monotonic clock, or None: the caller's.
    """

    def __init__(self, module: object, deadline: float | None) -> None:
        self._module = module
        self._deadline = deadline
        self._began = 0.0
        # When the first try began that may have misread the token.
        self._since: float | None = None
        self._backoff = Backoff()

    def begin(self) -> None:
        """One more try."""
        self._began = time.monotonic()

    def rest(self, error: Exception, *, shared: bool) -> float:
        """Seconds until the next try, after ``error``.

        Args:
            error: How the last one ended.
            shared: Whether another pool uses the module, so that it stays initialised.

        Raises:
            TokenUnavailable: The module is down, and there is no time left.
            Exception: ``error``, which another try does not mend.
        """
        now = time.monotonic()
        left = float("inf") if self._deadline is None else self._deadline - now
        if is_down(error):
            if left <= _RETRY:
                message = f"{self._module} does not answer: {error}"
                raise TokenUnavailable(message) from error
            return _RETRY
        if not may_be_misread(error) or (shared and isinstance(error, TokenNotFound)):
            raise error
        self._since = since = self._began if self._since is None else self._since
        rest = self._backoff.rest()
        # The next try takes as long as the last one did.
        ends = now + rest + (now - self._began)
        if left <= rest or ends - since > _PATIENCE:
            raise error
        return rest


def is_down(error: BaseException) -> bool:
    """Whether the module, or what is behind it, does not answer."""
    if isinstance(error, ModuleError) and error.__cause__ is not None:
        # ``C_Initialize`` tells of it, too.
        error = error.__cause__
    return not isinstance(error, PoolError) and recovery.classify(error).is_outage


def may_be_misread(error: BaseException) -> bool:
    """Whether an error may come of a token that was read while others wrote it.

    One that is blank, which has a cause, is no such error.
    """
    if isinstance(error, TokenNotFound):
        return error.__cause__ is None
    # Another token than a moment ago; or ``CKR_GENERAL_ERROR``.
    return isinstance(error, TokenUnavailable) or (
        isinstance(error, p11.PKCS11Error) and rv.code_of(error) == _FAILED
    )


def surely(look: Callable[[], T]) -> T:
    """What is read of a token that was read well before; looked at again if it fails.

    Nothing was sent that could be counted, so it may be done again.
    """
    for moment in _MOMENTS:
        try:
            return look()
        except (p11.PKCS11Error, TokenUnavailable) as error:
            if not may_be_misread(error):
                raise
        time.sleep(moment)
    return look()
