"""The pool's own PIN, or where it comes from; and whether anybody knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkcs11_pool.errors import LoginRequired

if TYPE_CHECKING:
    from pkcs11_pool.pins import Pin, Source


class OwnPin:
    """What the pool logs the user in with, when nobody gives another PIN.

    Attributes:
        in_doubt: Whether the PIN was being changed, and nobody knows if it was:
            neither the old nor the new one is sent then. Set by the worker that
            changes it.
    """

    def __init__(self, given: Pin | Source | None) -> None:
        self._pin = given
        self.in_doubt = False

    @property
    def is_given(self) -> bool:
        """Whether there is one."""
        return self._pin is not None

    def becomes(self, pin: Pin) -> None:
        """This is the user's PIN from here on."""
        self._pin = pin

    def get(self) -> Pin | Source:
        """The PIN, or its source.

        Raises:
            LoginRequired: There is none; or a change of the PIN was lost, and either
                may be the wrong one.
        """
        if self._pin is None:
            message = "no PIN to log in with: await pool.login(pin)"
            raise LoginRequired(message)
        if self.in_doubt:
            message = (
                "a change of the PIN was lost, so the pool sends neither the old nor "
                "the new one: await pool.login(pin)"
            )
            raise LoginRequired(message)
        return self._pin
