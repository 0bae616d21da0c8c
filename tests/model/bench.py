"""The bench: makes a step with the pool and the model, and then counts everything.

What steps there are is told by the classes above it.
"""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine

from model import steps
from model.spec import Kind, Model, Ref, Refused, Token, User
from model.world import World, left_over, open_files, wait_until
from pkcs11_pool import LoginState

if TYPE_CHECKING:
    from model.callers import Callers, Running
    from model.steps import Step
    from model.world import Tokens

WRONG: Final = ("9999", "8888")
WRONG_SO: Final = "wrong-so"
PINS: Final = ("1234", "4321")
STATES: Final = {
    LoginState.PUBLIC: User.NOBODY,
    LoginState.USER: User.USER,
    LoginState.SO: User.SO,
}

# Names of what was made, or should have been: hypothesis must not see whether it was,
# because threads make it another each time.
LIVES: Final[Any] = Bundle("lives", draw_references=False)
SESSIONS: Final[Any] = Bundle("sessions", draw_references=False)
SECRETS: Final[Any] = Bundle("secrets", draw_references=False)
PRIVATES: Final[Any] = Bundle("privates", draw_references=False)
PUBLICS: Final[Any] = Bundle("publics", draw_references=False)
REFS: Final[Any] = Bundle("refs", draw_references=False)
STREAMS: Final[Any] = Bundle("streams", draw_references=False)

WHO: Final = st.integers(0, 3)
LOOP: Final = st.integers(0, 1)
PLACE: Final = st.integers(0, 5)
"""The pool, or one of the sessions of late."""


class Disagreement(AssertionError):
    """The pool did what the model rules out. The text has all the steps."""


class Bench(RuleBasedStateMachine):
    """One run: two tokens, some pools, many steps."""

    #: Given by the test that runs it.
    tokens: ClassVar[Tokens]
    callers: ClassVar[Callers]
    counts: ClassVar[dict[str, int]]
    problems: ClassVar[list[Disagreement]]
    #: Holds something until the first run, which is the simplest, has been left out.
    simplest: ClassVar[list[bool]]

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.tokens, self.callers)
        real = self.tokens.all
        self.model = Model([Token(token.user_pin, token.so_pin) for token in real])
        self.journal: list[str] = []
        self._numbers = itertools.count(1)
        self._epochs: dict[str, tuple[int, int]] = {}
        self._failed = False
        self._is_left_out = False
        self._turns = 0
        #: Numbers of public session objects.
        self._outliving: set[int] = set()
        #: Calls that were given up on, by pool.
        self.lost: dict[str, int] = {}

    # -- Making steps -------------------------------------------------------------

    def leave_out_simplest(self) -> None:
        """Before anything else, hypothesis makes one step again and again."""
        if self.simplest:
            self.simplest.clear()
            self._is_left_out = True
            reject()

    def new(self, letter: str) -> str:
        """A name that nothing has had."""
        return f"{letter}{next(self._numbers)}"

    def step(self, who: int, step: Step) -> bool:
        """Make one; whether it came to a result and not to an error."""
        self._begin(f"{self._name(who)}: {step}")
        running = self.callers.run(who, lambda: step.act(self.world))
        self._note(running)
        before = copy.deepcopy(self.model)
        problem = judge(step, running, self.model)
        if problem:
            self.model = before
            self.fail(problem, running)
        self._finish()
        return running.error is None

    def _name(self, who: int) -> str:
        who %= self.callers.count
        return f"loop {who + 1}" if who < 2 else f"thread {who - 1}"

    def _begin(self, text: str) -> None:
        self.counts["steps"] += 1
        self.counts["calls"] += 1
        self.journal.append(text)
        self.world.visited = self.world.lent()

    def _note(self, running: Running) -> None:
        error = "" if running.error is None else f" ({running.error})"
        self.journal[-1] += f" -> {running.outcome}{error}"

    def fail(self, problem: str, running: Running | None = None) -> None:
        """The two disagree."""
        cause = None if running is None else running.error
        self._disagree(problem, cause)

    def _disagree(self, problem: str, cause: BaseException | None) -> NoReturn:
        self._failed = True
        error = Disagreement(self._story(problem))
        # hypothesis may tell of something else, as it does where a second try differs.
        self.problems.append(error)
        raise error from cause

    def _story(self, problem: str) -> str:
        return "\n".join(["", *self.journal, problem])

    # -- What there is -------------------------------------------------------------

    def now(self, life: str) -> str:
        """Mostly the pool that is there now, instead of one that is closed."""
        self._turns += 1
        token = self.model.lives[life].token
        return life if self._turns % 4 == 0 else self.model.life_of(token)

    def place(self, life: str, where: int) -> str:
        """The pool, or one of its last sessions, open or not."""
        mine = [n for n, s in self.model.sessions.items() if s.life == life]
        return mine[-where] if 0 < where <= len(mine) else "pool"

    def _owner(self, who: int, life: str, where: int, *, token: bool) -> str:
        """Where to make an object: a session object mostly in an open session."""
        place = self.place(life, where)
        if token or place != "pool" or not self.model.lives[life].open:
            return place
        if not self.model.held(life) and self._has_room(life):
            self.step(who % 2, steps.OpenSession(life, self.new("s"), rw=where > 2))
        held = self.model.held(life)
        return held[-1] if held and self._turns % 4 else place

    def _knows(self, who: int, ref: str) -> bool:
        """Whether there is such a reference; what should have made it may have failed.

        hypothesis must not see the difference: threads make it another each time.
        """
        if ref in self.model.refs:
            return True
        self.step(who, steps.Digest(self.model.life_of(who % 2), "pool"))
        return False

    def at(self, ref: str, where: int) -> str:
        """The same, for the pool of a reference."""
        return self.place(self.model.refs[ref].life, where)

    def _word(self, ref: str, label: str) -> str:
        """Key pairs have other labels than secret keys."""
        secret = self.model.refs[ref].kind is Kind.AES
        return label if secret else {"a": "x", "b": "y"}[label]

    def _value(self, ref: str) -> bytes:
        known = self.model.refs[ref]
        thing = self.model.token_of(known.life).things.get(known.thing)
        return bytes(16) if thing is None else thing.value

    def _has_room(self, life: str) -> bool:
        """Whether sessions can be lent, one after the other at least."""
        pool = self.model.lives[life]
        return self.model.leased(life) < max(1, pool.max_sessions - 1)

    # -- After each step ----------------------------------------------------------

    def _finish(self) -> None:
        """Wait until all is tidied up, and compare everything that can be counted."""
        try:
            self.world.quiet()
            self._look()
        except AssertionError as error:
            self._disagree(f"{type(error).__name__}: {error}", error)

    def _read(self) -> None:
        """Read what was called, knowing which sessions and objects are kept."""
        world, before = self.world, self._outliving
        self._outliving = {
            world.number_of(name)
            for name, ref in self.model.refs.items()
            if not ref.token and name in world.refs and self._outlives(ref)
        }
        world.ledger.lent = world.visited | world.lent()
        world.ledger.outliving = before | self._outliving
        world.ledger.read()

    def _outlives(self, ref: Ref) -> bool:
        """Whether a session object is there, and goes on after a logout."""
        thing = self.model.token_of(ref.life).things.get(ref.thing)
        return thing is not None and not thing.private

    def _look(self) -> None:
        world, model = self.world, self.model
        self._read()
        for name, life in model.lives.items():
            pool = world.pools[name]
            world.audits[name].check()
            stuck = pool.stats().calls_stuck
            assert stuck == world.stuck[name], pool.stats()
            if not life.open:
                assert pool.state.value == "closed", pool
                continue
            token = model.token_of(name)
            assert STATES[pool.login_state] is token.user, pool.login_state
            self._check_epoch(name, pool.login_epoch, token.epoch)
            stats = pool.stats()
            assert stats.sessions_leased == model.leased(name), stats
            assert stats.operations_total == world.audits[name].operations, stats
            assert stats.calls_lost == self.lost.get(name, 0), stats
            self.check_sessions(name)
        for number, token in enumerate(model.tokens):
            if number in world.slots:
                sent = world.ledger.logins(world.slots[number])
                assert sent == token.logins, f"{sent} C_Login, not {token.logins}"
            there = world.tokens.objects(number)
            assert there == token.stored, f"{there} objects, not {token.stored}"

    def _check_epoch(self, life: str, real: int, expected: int) -> None:
        """The number moves with every change of the login, and never without one."""
        before_real, before = self._epochs.get(life, (real, expected))
        assert (real != before_real) is (expected != before), "the epoch's number"
        assert real >= before_real, "the epoch's number went back"
        self._epochs[life] = real, expected

    def check_sessions(self, life: str, running: int = 0) -> None:
        """Sessions are those running, ahead, and leased; and the anchor."""
        world, pool = self.world, self.world.pools[life]
        slot = pool.token.slot_id

        def agree() -> bool:
            # What is opened ahead goes away by itself meanwhile.
            here = [s for s in world.fault.sessions() if s.slot == slot]
            s = pool.stats()
            hung = world.kept_by_hung(slot)
            rw = sum(s.rw for s in here)
            return (
                len(here) == s.sessions_open + 1 + hung
                and s.operations_running == running
                and s.sessions_open == running + s.sessions_ahead + s.sessions_leased
                and 0 <= rw - len(self._held_rw(life)) <= hung
            )

        wait_until(agree, lambda: f"{world.fault.sessions()} beside {pool.stats()}")

    def _held_rw(self, life: str) -> list[str]:
        held = self.model.held(life)
        return [name for name in held if self.model.sessions[name].rw]

    def teardown(self) -> None:
        """Close all; nothing is left."""
        try:
            if not self._failed:
                self._end()
        finally:
            # In any case: all tests after this one need the module.
            left = self.world.close()
        if left and not self._failed:
            self._disagree("\n".join(["At the end:", *left]), None)
        self.counts["runs"] += not self._is_left_out
        self.counts["module calls"] += self.world.ledger.calls

    def _end(self) -> None:
        for name, life in self.model.lives.items():
            if life.open:
                self.step(0, steps.ClosePool(name))
        self.world.streams.clear()
        try:
            wait_until(lambda: not left_over(), lambda: str(left_over()))
            assert self.world.fault.sessions() == [], "sessions are left over"
            # What the loops open once for themselves is there after the first run.
            files = self.counts["files"] or open_files()
            wait_until(lambda: open_files() <= files, lambda: f"{open_files()} files")
            self.counts["files"] = files * (self.counts["runs"] > 0)
        except AssertionError as error:
            self._disagree(f"At the end: {type(error).__name__}: {error}", error)


def judge(step: Step, running: Running, model: Model) -> str | None:
    """Compare one step with the model, which moves on; what is wrong, or None."""
    try:
        right = step.expect(model)
    except Refused as refused:
        if running.outcome in refused.names:
            return None
        return f"It must be {' or '.join(sorted(refused.names))}."
    if running.error is not None:
        allowed = isinstance(right, frozenset) and running.outcome in right
        return None if allowed else "It must come to a result."
    if callable(right):
        return None if right(running.value) else f"{running.value!r} is wrong."
    if right is not None and running.value not in right:
        return f"{running.value!r} is wrong: it must be {sorted(map(repr, right))}."
    return None
