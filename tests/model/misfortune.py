"""What a fault may excuse, and no more: a pure part of the specification.

A fault is one misfortune between two calls of the module. Whatever is not said here
must come to what it comes to without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from faultmodule import CKR
from model import steps

if TYPE_CHECKING:
    from model.ledger import Blow
    from model.steps import Step


class Trouble(Enum):
    """Whose trouble an answer is, by the standard."""

    CALLER = "caller"
    LOGIN = "login"
    SESSION = "session"
    TOKEN = "token"  # noqa: S105  # a Cryptoki token
    MODULE = "module"
    UNSURE = "unsure"


CODES: Final[dict[int, tuple[Trouble, str]]] = {
    CKR.DEVICE_MEMORY: (Trouble.CALLER, "DeviceMemory"),
    CKR.FUNCTION_CANCELED: (Trouble.CALLER, "FunctionCancelled"),
    CKR.USER_NOT_LOGGED_IN: (Trouble.LOGIN, "LoginRequired"),
    CKR.SESSION_HANDLE_INVALID: (Trouble.SESSION, "SessionHandleInvalid"),
    CKR.SESSION_CLOSED: (Trouble.SESSION, "SessionClosed"),
    CKR.DEVICE_ERROR: (Trouble.TOKEN, "DeviceError"),
    CKR.DEVICE_REMOVED: (Trouble.TOKEN, "DeviceRemoved"),
    CKR.TOKEN_NOT_PRESENT: (Trouble.TOKEN, "TokenNotPresent"),
    CKR.CRYPTOKI_NOT_INITIALIZED: (Trouble.MODULE, "PKCS11Error"),
    CKR.GENERAL_ERROR: (Trouble.UNSURE, "GeneralError"),
    CKR.FUNCTION_FAILED: (Trouble.UNSURE, "FunctionFailed"),
    CKR.HOST_MEMORY: (Trouble.UNSURE, "HostMemory"),
    0x80000123: (Trouble.UNSURE, "PKCS11Error"),
}
"""What calls are answered, whose trouble that is, and the error that says so."""
_TRIES: Final = 3
"""So often an operation is begun; then its caller is told what the token says."""
_TOLD = (steps.Login, steps.Officer, steps.Make)
"""What the pool does not make again: it is a login, or not known what it is."""
_STREAMS = (steps.BeginStream, steps.FeedStream)
"""Data in parts."""


@dataclass(frozen=True)
class Misfortune:
    """One fault.

    Attributes:
        kind: As ``FaultModule.strike`` has it.
        rv: What calls are answered.
        after: The first call that is hit.
        times: How many calls in a row are.
    """

    kind: str
    rv: int
    after: int
    times: int

    @property
    def trouble(self) -> Trouble:
        """Whose it is."""
        lost = {
            "sessions": Trouble.SESSION,
            "login": Trouble.LOGIN,
            "finalize": Trouble.MODULE,
        }
        return lost.get(self.kind) or CODES[self.rv][0]

    @property
    def is_answer(self) -> bool:
        """Whether calls are answered by it, and nothing happens."""
        return self.kind in {"answer", "replace"}

    @property
    def is_loss(self) -> bool:
        """Whether something is really lost, and not only said to be."""
        return self.kind in {"sessions", "login", "finalize"}

    @property
    def may_end_login(self) -> bool:
        """Whether the login may be another one afterwards, with the same user in."""
        return self.trouble is not Trouble.CALLER and not (
            self.trouble is Trouble.LOGIN and not self.is_loss
        )

    @property
    def may_end_sessions(self) -> bool:
        """Whether sessions in somebody's hands may be over."""
        return self.may_end_login and self.kind != "login"

    def excuses(self, step: Step, outcome: str, blow: Blow, *, is_public: bool) -> bool:
        """Whether a step may come to an error that it would not come to else."""
        if outcome == "KeyNotFound" and self.kind == "sessions" and is_public:
            # With all its sessions an application loses all numbers, and one that is
            # opened then is well. Where nobody is logged in, a number that is dead for
            # that reason looks like one of an object that was destroyed.
            return hasattr(step, "ref") and not blow.changed
        return outcome in self._errors(step, blow)

    def _errors(self, step: Step, blow: Blow) -> set[str]:
        if isinstance(step, steps.Logout):
            # The user's word stands, whatever the token says.
            return set()
        trouble = self.trouble
        told = self._told(step, blow)
        sends = step.changes or isinstance(step, steps.Visit)
        if sends and blow.changed:
            # It may have happened.
            told.add("OutcomeUnknown")
        if getattr(step, "where", "pool") != "pool" and self.may_end_sessions:
            # That its session is over says as much as that what was made in it is.
            told.add("SessionClosed")
        if isinstance(step, (steps.Officer, steps.Visit)) and self.may_end_sessions:
            # It is several calls in one session, and that is over.
            told.add("SessionClosed")
        if isinstance(step, _STREAMS) and trouble is not Trouble.CALLER:
            # Nothing of it is made again, once the token has some of it.
            told.add("StreamInterrupted")
        if isinstance(step, steps.Visit) and self.may_end_sessions:
            # And what was made in it, and is used in the next call.
            told.add("SessionObjectDestroyed")
        if isinstance(step, steps.Visit) and self.kind == "sessions":
            # Another session uses what it made, and the token tells that it is gone:
            # by the one name where numbers are the fault module's, else by the other.
            told |= {"KeyHandleInvalid", "ObjectHandleInvalid"}
        if trouble is Trouble.LOGIN and isinstance(step, (steps.Login, steps.Officer)):
            # That login() needs a login is no sensible advice: as the token says it.
            told.add("UserNotLoggedIn")
        return told

    def _told(self, step: Step, blow: Blow) -> set[str]:
        """The errors of the token that reach the caller as they are."""
        trouble, raw = self.trouble, self._raw
        if trouble is Trouble.LOGIN:
            if self.is_loss and isinstance(step, steps.Make):
                # What he holds of a private object ended with the login.
                return {"ObjectHandleInvalid"}
            # What is lost is restored unseen; what is only said to be is told.
            return set() if self.is_loss else {"LoginRequired"}
        # Nobody can make good what is the caller's, or says nothing.
        plain = trouble in {Trouble.CALLER, Trouble.UNSURE}
        once = isinstance(step, _TOLD) or blow.struck >= _TRIES
        return {raw} if plain or once else set()

    @property
    def _raw(self) -> str:
        lost = {"sessions": "SessionHandleInvalid", "finalize": "PKCS11Error"}
        return lost.get(self.kind) or CODES[self.rv][1]

    def may_have_happened(self, outcome: str, blow: Blow) -> bool:
        """Whether a step that came to this error may have been done all the same."""
        # Also where only what was to be learnt of the new object is lost.
        return outcome == "OutcomeUnknown" or blow.kind == "replace" or blow.changed
