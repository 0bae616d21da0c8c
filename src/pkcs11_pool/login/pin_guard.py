"""What may be sent to a token as a PIN, and what it answered.

Tokens count wrong PINs and lock after a few. So a PIN that was refused is not
sent again, none is sent at the final try, and none to a token that is locked,
unless the caller insists. The guard is per process: it cannot know what others
try.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from pkcs11 import exceptions as p11
from pkcs11.constants import TokenFlag

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.errors import PinLengthInvalid, PinRefused, PoolError
from pkcs11_pool.pins import PinPad, Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from pkcs11_pool.pins import Pin
    from pkcs11_pool.state import TokenInfo

USER: Final = "user"
SO: Final = "security officer"
CONTEXT: Final = "key's user"

_REJECTED: Final = {
    rv.CODES[name]: text
    for name, text in {
        "CKR_PIN_INCORRECT": "the token refused the PIN of the {who}; {left}",
        "CKR_PIN_LOCKED": "the PIN of the {who} is locked: {unlock}",
        "CKR_PIN_INVALID": "the token does not take this PIN of the {who}",
        "CKR_PIN_LEN_RANGE": "this PIN of the {who} is too short or too long for it",
    }.items()
}
_FLAGS: Final = {
    USER: (TokenFlag.USER_PIN_LOCKED, TokenFlag.USER_PIN_FINAL_TRY),
    SO: (TokenFlag.SO_PIN_LOCKED, TokenFlag.SO_PIN_FINAL_TRY),
    CONTEXT: (TokenFlag.USER_PIN_LOCKED, TokenFlag.USER_PIN_FINAL_TRY),
}
_UNLOCK: Final = {
    USER: "the security officer can set a new one (so.init_pin)",
    SO: "only init_token helps, and it destroys all objects",
    CONTEXT: "the security officer can set a new one (so.init_pin)",
}
_INSIST: Final = {
    USER: "insist with force=True",
    SO: "insist with force=True",
    CONTEXT: "log out, and in again with pool.login(pin, force=True)",
}


def guard_of(token: Hashable) -> PinGuard:
    """The guard of a token, the same for every pool that this process opens on it.

    A loop that opens one pool after the other with a wrong PIN must not lock it.
    """
    return _guards.setdefault(token, PinGuard())


class PinGuard:
    """The book of the PINs that one token refused, as keyed hashes, by user."""

    def __init__(self) -> None:
        self._refused: dict[str, frozenset[bytes]] = {
            USER: frozenset(),
            SO: frozenset(),
            CONTEXT: frozenset(),
        }
        self._trying = threading.Lock()

    @contextmanager
    def one_try(self, pin: Pin) -> Iterator[None]:
        """Around each try of a PIN that many callers may give at once.

        One at a time: the others then see what the token answered, so that a wrong
        PIN is sent once. What is typed at the token is not known, and waits for none.
        """
        with nullcontext() if isinstance(pin, PinPad) else self._trying:
            yield

    def check(self, who: str, pin: Pin, info: TokenInfo, *, force: bool) -> None:
        """Refuse a PIN that would be wasted; ``info`` is what the token tells now.

        Raises:
            PinLengthInvalid: The token has no PIN of this length.
            PinRefused: It was refused before, or the next wrong one locks, or did.
        """
        check_length(pin, info)
        if force:
            return
        self.check_refused(who, pin)
        locked, final = _FLAGS[who]
        if info.flags & locked:
            raise PinRefused(
                f"the PIN of the {who} is locked on the token, so none is sent: "
                f"{_UNLOCK[who]}"
            )
        if info.flags & final:
            raise PinRefused(
                f"one more wrong PIN locks the {who} out, so none is sent: if this one "
                f"is right, {_INSIST[who]}"
            )

    def check_refused(self, who: str, pin: Pin) -> None:
        """Refuse a PIN that the token refused before.

        Raises:
            PinRefused: It is in the book.
        """
        if isinstance(pin, Secret) and pin.fingerprint() in self._refused[who]:
            raise PinRefused(
                f"this PIN of the {who} was refused before and is not sent again: give "
                f"another one, or {_INSIST[who]}"
            )

    def answered(  # the call, and what came of it
        self,
        who: str,
        pin: Pin,
        code: int,
        function: str,
        ask: Callable[[], TokenInfo] | None = None,
    ) -> None:
        """Take down what the token said of a PIN.

        Args:
            who: Whose PIN it is.
            pin: What was sent.
            code: What came back.
            function: From which function.
            ask: Gives what the token says of itself now, if it can be asked: whether
                there is a try left.

        Raises:
            PinRefused, PKCS11Error: As the code says; nothing for ``CKR_OK``.
        """
        text = _REJECTED.get(code)
        if text is None:
            rv.check(code, function)
            return
        if isinstance(pin, Secret):
            self._refused[who] |= {pin.fingerprint()}
        kind = PinRefused
        if code == rv.CODES["CKR_PIN_LEN_RANGE"]:
            kind = PinLengthInvalid
        told = text.format(who=who, left=_left(who, ask), unlock=_UNLOCK[who])
        raise kind(told) from rv.error_of(code, function)

    def accepted(self, who: str) -> None:
        """A PIN of this user was accepted, or changed: the page is struck."""
        # The user's PIN may be another now, and a key's often is the same.
        pages = (SO,) if who == SO else (who, CONTEXT)
        self._refused |= dict.fromkeys(pages, frozenset())


def _left(who: str, ask: Callable[[], TokenInfo] | None) -> str:
    """What a token says of the tries that are left; it never tells a number."""
    try:
        flags = TokenFlag(0) if ask is None else ask().flags
    except (PoolError, p11.PKCS11Error):
        # What it answered to the PIN is what counts.
        flags = TokenFlag(0)
    locked, final = _FLAGS[who]
    if flags & locked:
        return f"it is locked now: {_UNLOCK[who]}"
    if flags & final:
        return "one more wrong one locks it"
    return "a few wrong ones may lock it"


def check_length(pin: Pin, info: TokenInfo) -> None:
    """Refuse a PIN that the token cannot have.

    Raises:
        PinLengthInvalid: Too short or too long. It was not sent.
    """
    if isinstance(pin, PinPad):
        return
    # Some tokens tell no lengths: then it is theirs to refuse.
    if 0 < info.max_pin_len < len(pin) or len(pin) < info.min_pin_len:
        raise PinLengthInvalid(
            f"a PIN of this token has {info.min_pin_len} to {info.max_pin_len} bytes; "
            f"this one has {len(pin)} and was not sent"
        )


_guards: Final[dict[Hashable, PinGuard]] = {}
