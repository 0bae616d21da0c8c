"""Uses the sessions that stay open, where the token drops those that idle."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from pkcs11_pool.cryptoki.operations import touch
from pkcs11_pool.login.recovering import in_turn

if TYPE_CHECKING:
    from pkcs11_pool.login.attachment import Attachment
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.login.officer import Officer
    from pkcs11_pool.login.recovering import Recovery

_OFTEN: Final = 3
"""How often an idle session is used before the token would drop it."""


class KeepAlive:
    """When the anchor, and what is lent, is used next.

    Args:
        idle: Seconds after which the token drops a session; None: it drops none.
        attachment: Has the anchor.
        gate: Uses the sessions that are lent.
        officer: He may have the anchor.
        recovery: Is told when the anchor is lost.
    """

    def __init__(
        self,
        idle: float | None,
        attachment: Attachment,
        gate: Gate,
        officer: Officer,
        recovery: Recovery,
    ) -> None:
        self._idle = idle
        self._attachment = attachment
        self._gate = gate
        self._officer = officer
        self._recovery = recovery
        self._until = 0.0

    def rests(self) -> float | None:
        """Seconds until they are to be used; None: there is nothing to use."""
        if self._idle is None or self._attachment.anchor is None:
            return None
        return max(0.0, self._until - time.monotonic())

    def look(self) -> None:
        """Use them, if it is time."""
        idle, now = self._idle, time.monotonic()
        anchor = self._attachment.anchor
        if idle is None or now < self._until or anchor is None:
            return
        self._until = now + idle / _OFTEN
        if not self._recovery.is_over:
            return
        try:
            # The officer's session is the workers', as are all that are lent.
            if not self._officer.is_in:
                with in_turn(self._attachment.standing.attached):
                    touch(anchor)
        except Exception as error:  # noqa: BLE001  # whatever it is, the next look tells
            if self._recovery.gone(error):
                self._recovery.suspect(error)
        else:
            self._gate.keep_alive(idle)
