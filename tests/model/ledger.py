"""What the module was really called with, and what must never be among it.

Read from the log of the fault module, which stands in front of the real one. The
pool does not know of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from faultmodule import CKR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from faultmodule import Call, FaultModule

_MAKES: Final = frozenset(
    {
        "C_CreateObject",
        "C_CopyObject",
        "C_GenerateKey",
        "C_GenerateKeyPair",
        "C_UnwrapKey",
        "C_DeriveKey",
    }
)
_NEVER: Final = {
    CKR.SESSION_HANDLE_INVALID: "a session that is not there",
    CKR.SESSION_CLOSED: "a session that is not there",
    CKR.CRYPTOKI_NOT_INITIALIZED: "a module that is not initialised",
    CKR.CRYPTOKI_ALREADY_INITIALIZED: "a module that is initialised already",
    CKR.OPERATION_ACTIVE: "a session that somebody else is at work in",
    CKR.SESSION_READ_ONLY_EXISTS: "the SO's login beside R/O sessions",
    CKR.SESSION_READ_WRITE_SO_EXISTS: "a R/O session beside the SO",
    CKR.USER_ALREADY_LOGGED_IN: "a PIN that was not needed",
    CKR.USER_ANOTHER_ALREADY_LOGGED_IN: "a PIN while another user was in",
}
"""Answers that show, on a token without faults, that the pool made a mistake."""
_LOGINS: Final = frozenset({"C_Login", "C_Logout"})
CHANGES: Final = _MAKES | {
    "C_DestroyObject",
    "C_SetAttributeValue",
    "C_SetPIN",
    "C_InitPIN",
}
"""The calls that may change the token."""
_SPARED: Final = frozenset({"C_Initialize", "C_Finalize", "C_GetFunctionList"})
_VAGUE: Final = frozenset({CKR.GENERAL_ERROR, CKR.TEMPLATE_INCONSISTENT})
"""What SoftHSM2 2.6.1 answers now and then where two sessions get into each other's
way; the file of the object stays behind."""


@dataclass
class _Open:
    """A session that is open, as the calls tell."""

    slot: int
    #: The login in which it was opened.
    epoch: int
    #: It is somebody's for longer than one operation: the login's own, or lent.
    kept: bool = False
    searched: bool = False
    #: A search in it could not be ended.
    unended: bool = False
    #: Numbers of the keys with which something began here.
    begun_with: set[int] = field(default_factory=set)
    #: A call was given up on in it, and its thread may go on there at any time.
    written_off: bool = False
    busy_until: int = 0
    threads: set[int] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)


@dataclass
class _Slot:
    """A token, as the calls tell."""

    epoch: int = 0
    logged_in: bool = False
    #: Numbers of objects, and the login in which they were looked up or made.
    seen: dict[int, int] = field(default_factory=dict)


@dataclass
class Blow:
    """A fault that was played between two calls.

    Attributes:
        kind: As ``FaultModule.strike`` has it.
        first: The number of the call that came when it was played.
        struck: How many calls it hit.
        hits: Those calls' numbers, if it answered them.
        functions: And their names.
        changed: Whether a call that changes the token was made before it, or hit: the
            answer to it is lost, or what was to be learnt of its object is.
    """

    kind: str
    first: int
    struck: int
    hits: frozenset[int] = frozenset()
    functions: tuple[str, ...] = ()
    changed: bool = False
    is_over: bool = False

    def read(self, calls: list[Call]) -> Blow:
        """Find out which calls those were."""
        after = [c for c in sorted(calls) if c.sequence >= self.first]
        if self.kind in {"answer", "replace"}:
            hit = [c for c in after if c.function not in _SPARED][: self.struck]
            self.hits = frozenset(call.sequence for call in hit)
            self.functions = tuple(call.function for call in hit)
            last = max(self.hits)
        else:
            gone = {
                CKR.SESSION_HANDLE_INVALID,
                CKR.CRYPTOKI_NOT_INITIALIZED,
                CKR.OBJECT_HANDLE_INVALID,
                CKR.KEY_HANDLE_INVALID,
                CKR.USER_NOT_LOGGED_IN,
            }
            last = max((c.sequence for c in after if c.rv in gone), default=0)
        self.changed = any(c.function in CHANGES and c.sequence <= last for c in calls)
        return self

    def has_lost_answer_to(self, call: Call) -> bool:
        """Whether nobody but the token knows what it answered."""
        return self.kind == "replace" and call.sequence in self.hits

    def has_come(self, call: Call) -> bool:
        """Whether something was lost just before a call."""
        loses = self.kind not in {"answer", "replace"}
        return loses and not self.is_over and call.sequence >= self.first


class Broken(AssertionError):
    """A rule was broken. The text has the calls around it."""


class Ledger:
    """Reads the log step by step, and raises where a rule is broken."""

    def __init__(self, fault: FaultModule, strangers: Callable[[], set[int]]) -> None:
        self._fault = fault
        #: Threads that must never call the module: they are the test's own.
        self._strangers = strangers
        self._last = 0
        self._step = 0
        self._sessions: dict[int, _Open] = {}
        self._slots: dict[int, _Slot] = {}
        self._logins: dict[int, int] = {}
        self._began_with: dict[int, int] = {}
        #: Sessions that are lent just now, and numbers of public session objects,
        #: which outlive a login: told by the test.
        self.lent: set[int] = set()
        self.outliving: set[int] = set()
        self.calls = 0
        #: Slots where the token may have accepted a PIN in the last step, or a new one.
        self.accepted: set[int] = set()
        #: What was called in the last step, to be shown where it is not explained.
        self.recent: list[Call] = []
        #: The fault that was played in the step that is read next, if one was.
        self.strike: Blow | None = None
        self._blow: Blow | None = None
        #: Sessions that a fault closed, and that the pool may not know to be closed.
        self._dead: set[int] = set()
        self._is_finalized = False
        #: Calls that hang, by their numbers: told by the test. And those of them that
        #: had not ended at the last reading.
        self.hung: set[int] = set()
        #: Those that hung on their way back, also when they are back.
        self.hung_after: set[int] = set()
        self._inside: set[int] = set()
        #: Those that were inside when all sessions were closed, theirs too.
        self._swept: set[int] = set()
        #: How many objects the module failed to make in the last step, without a
        #: reason that makes sense.
        self.failed_to_make = 0

    def skip(self) -> None:
        """Forget what was called so far: others did."""
        calls = self._fault.calls()
        self._last = calls[-1].sequence if calls else self._last

    @property
    def last(self) -> int:
        """The number of the last call that was read."""
        return self._last

    def logins(self, slot: int) -> int:
        """How many C_Login calls there were on a slot."""
        return self._logins.get(slot, 0)

    def open_sessions(self) -> dict[int, int]:
        """How many sessions are open, by slot."""
        counts: dict[int, int] = {}
        for session in self._sessions.values():
            counts[session.slot] = counts.get(session.slot, 0) + 1
        return counts

    def read(self) -> None:
        """Look at what was called since the last time.

        Raises:
            Broken: It broke a rule.
        """
        self._step += 1
        self.failed_to_make = 0
        self.accepted.clear()
        struck, self.strike = self.strike, None
        self._began_with = {n: slot.epoch for n, slot in self._slots.items()}
        calls = self._finished()
        new = [call for call in calls if call.sequence > self._last]
        if new and new[0].sequence != self._last + 1:
            raise Broken(f"the log lost calls after {self._last}")
        inside = [call for call in calls if call.rv is None]
        # A session is there from the end of its opening to the beginning of its end.
        events = sorted((c for c in calls if c.rv is not None), key=_moment)
        self._blow = None if struck is None else struck.read(calls)
        strangers = self._strangers()
        for place, call in enumerate(events):
            try:
                self._take(call, strangers)
            except Broken as error:
                around = events[max(0, place - 12) : place + 3]
                raise Broken("\n".join([str(error), *map(str, around)])) from None
        if new:
            self._last = new[-1].sequence
        if calls:
            self.recent = events
        self._inside = {call.sequence for call in inside}
        for call in inside:
            if call.session in self._sessions:
                self._sessions[call.session].written_off = True
        self.calls += len(new)

    def shown(self) -> list[str]:
        """What was called in the last step, a line for each call."""
        return [
            f"    {c.sequence} thread {c.thread % 100_000}: {c.function}, session "
            f"{c.session}, object {c.object} -> {c.rv}"
            for c in self.recent
        ]

    def _finished(self) -> list[Call]:
        deadline = time.monotonic() + 5
        first = min(self._inside, default=self._last + 1) - 1
        while True:
            calls = [
                call
                for call in self._fault.calls(after=first)
                if call.sequence > self._last or call.sequence in self._inside
            ]
            if all(c.rv is not None or c.sequence in self.hung for c in calls):
                return calls
            if time.monotonic() > deadline:
                inside = [c for c in calls if c.rv is None]
                raise Broken(f"calls that do not come back: {inside}")
            time.sleep(0.001)

    def _take(self, call: Call, strangers: Iterable[int]) -> None:
        if call.session is None and call.rv == CKR.SESSION_HANDLE_INVALID:
            # A session that a caller kept beyond its end: it has no number any more.
            return
        blow = self._blow
        if blow is not None and blow.has_come(call):
            self._struck(blow)
        if call.function == "C_Initialize" and call.rv == 0:
            self._dead.clear()
            self._is_finalized = False
        swept = self._swept and call.rv == CKR.SESSION_HANDLE_INVALID
        excused = self._is_excused(call) or (swept and call.session in self._dead)
        if call.rv in _NEVER and not excused:
            raise Broken(f"{call.function}: {_NEVER[CKR(call.rv)]}")
        if call.function == "C_Finalize":
            self._finalized()
        elif call.function == "C_CloseAllSessions" and call.rv == 0:
            self._closed_all()
        elif call.session is None:
            return
        elif call.thread in strangers:
            raise Broken(f"{call.function} by a thread that is not the pool's")
        elif call.function == "C_OpenSession":
            self._opened(call, call.session)
        else:
            self._called(call, call.session)

    def _struck(self, blow: Blow) -> None:
        """What is lost behind the pool's back is lost here, too."""
        blow.is_over = True
        if blow.kind in {"sessions", "finalize"}:
            self._dead |= set(self._sessions)
            self._sessions.clear()
        for slot in self._slots.values():
            self._out(slot)
        if blow.kind == "finalize":
            self._is_finalized = True

    def _closed_all(self) -> None:
        """Where one could not be closed, all are: those of calls that hang, too."""
        gone = {n for n, session in self._sessions.items() if session.written_off}
        self._dead |= gone
        self._swept |= self._inside
        for number in gone:
            del self._sessions[number]

    def _is_excused(self, call: Call) -> bool:
        """Whether it was the fault that answered so, or what the fault took away."""
        blow, session = self._blow, self._sessions.get(call.session or 0)
        if call.rv == CKR.OPERATION_ACTIVE and call.function.endswith("Init"):
            return session is not None and session.unended
        if blow is None or call.sequence < blow.first:
            return False
        lost = blow.kind == "replace" and "C_Login" in blow.functions
        if call.sequence in blow.hits or call.rv == CKR.USER_ALREADY_LOGGED_IN:
            return call.sequence in blow.hits or lost
        if call.rv == CKR.CRYPTOKI_NOT_INITIALIZED:
            return self._is_finalized
        if call.rv == CKR.SESSION_READ_WRITE_SO_EXISTS:
            # Nobody but the token knows that he is in.
            return not {"C_Login", "C_Logout"}.isdisjoint(blow.functions)
        return call.rv == CKR.SESSION_HANDLE_INVALID and call.session in self._dead

    def _finalized(self) -> None:
        """A new generation: every number of the old one is void."""
        self._sessions.clear()
        self._slots.clear()
        self._began_with.clear()
        self._dead.clear()
        self._swept.clear()

    def _called(self, call: Call, number: int) -> None:
        session = self._sessions.get(number)
        if session is None and number in self._dead:
            # Lost, and nobody knew it: it is told so, or that all is down.
            if not call.rv and call.sequence not in self._swept:
                raise Broken(f"{call.function} on session {number}: it was lost")
            return
        if session is None:
            raise Broken(f"{call.function} on session {number}: it is not open")
        if call.began_ns < session.busy_until:
            raise Broken(f"{call.function}: two calls on session {number} at once")
        session.busy_until = call.ended_ns or 0
        lent = session.written_off or number in self.lent
        session.kept |= lent or call.function in _LOGINS
        if call.function == "C_SetPIN" and call.rv == 0:
            self.accepted.add(session.slot)
        if call.function == "C_CloseSession":
            self._closed(number)
        elif call.function in _LOGINS:
            self._login(call, session.slot)
        elif call.function == "C_GetSessionInfo":
            pass  # the login's own session is asked after faults: no operation
        else:
            self._used(call, session)

    def _opened(self, call: Call, number: int) -> None:
        if call.rv or call.slot is None:
            return
        if number in self._sessions:
            raise Broken(f"session {number} was opened twice")
        self._dead.discard(number)
        if call.sequence in self._swept and call.sequence in self.hung_after:
            # It hung on its way back, when what it had opened was closed with all.
            self._dead.add(number)
            return
        self._sessions[number] = _Open(call.slot, self._slot(call.slot).epoch)

    def _slot(self, number: int) -> _Slot:
        return self._slots.setdefault(number, _Slot())

    def _closed(self, number: int) -> None:
        slot = self._sessions.pop(number).slot
        if not any(session.slot == slot for session in self._sessions.values()):
            # Closing the last session logs out.
            self._out(self._slots[slot])

    def _out(self, slot: _Slot) -> None:
        slot.epoch += slot.logged_in
        slot.logged_in = False

    def _login(self, call: Call, number: int) -> None:
        slot = self._slots[number]
        if call.function == "C_Logout":
            self._out(slot)
            return
        self._logins[number] = self.logins(number) + 1
        if slot.logged_in:
            raise Broken("C_Login while somebody was logged in")
        if call.rv == 0:
            slot.logged_in = True
            slot.epoch += 1
        blow = self._blow
        if call.rv == 0 or (blow is not None and blow.has_lost_answer_to(call)):
            self.accepted.add(number)

    def _used(self, call: Call, session: _Open) -> None:
        session.threads.add(call.thread)
        session.steps.add(self._step)
        self.failed_to_make += call.function in _MAKES and call.rv in _VAGUE
        if not session.kept and len(session.threads) > 1:
            raise Broken(f"session {call.session} was handed to two workers")
        if not session.kept and len(session.steps) > 1:
            raise Broken(f"session {call.session} was used for a second operation")
        if not session.kept and session.epoch < self._began_with.get(session.slot, 0):
            raise Broken(f"session {call.session} is of an earlier login")
        session.searched |= call.function == "C_FindObjects"
        if call.function == "C_FindObjectsFinal":
            session.unended = call.rv not in {CKR.OK, CKR.OPERATION_NOT_INITIALIZED}
        if call.object is not None and not session.written_off:
            self._named(call, session)

    def _named(self, call: Call, session: _Open) -> None:
        """No number is used in another login than that in which it was looked up."""
        assert call.object is not None
        slot = self._slots[session.slot]
        if call.function in _MAKES:
            # It names what it made; of a pair, one half.
            session.searched = True
            if call.rv == 0:
                slot.seen[call.object] = slot.epoch
            return
        if call.function == "C_GetAttributeValue" and session.searched:
            # Looked at right after a search, or after it was made.
            slot.seen[call.object] = slot.epoch
            return
        if call.object in self.outliving:
            # Or its number: it may be another's within the same step.
            return
        if call.function == "C_GetAttributeValue" and call.object in session.begun_with:
            # Data in parts goes on after a logout. Whether its key is still the one
            # that it began with can be asked by that number only.
            return
        known = slot.seen.get(call.object, -1)
        # What began before a login of this very step may end after it.
        if known < self._began_with.get(session.slot, slot.epoch):
            raise Broken(
                f"{call.function} with object {call.object}, which was looked up in "
                f"login {known}; this is login {slot.epoch}"
            )
        if call.function.endswith("Init") and call.rv == 0:
            session.begun_with.add(call.object)


def _moment(call: Call) -> tuple[int, int]:
    if call.function == "C_OpenSession":
        return call.ended_ns or 0, 0
    return call.began_ns, 1
