"""The machine: hypothesis makes steps, the pool and the model make them together.

Each step is made by one of several callers: a task of one of two event loops, or a
plain thread. Some steps are made at once, as a batch: their results must be those of
some order. After each step all is counted.
"""

from __future__ import annotations

import copy
import itertools
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    multiple,
    rule,
)

from model import steps
from model.spec import Kind, Model, Refused, Token, User
from model.world import World, left_over, wait_until
from pkcs11_pool import LoginState, PoolState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.callers import Callers, Running
    from model.steps import Step
    from model.world import Tokens

WRONG = ("9999", "8888")
PINS = ("1234", "4321")
_WHO = st.integers(0, 3)
_LOOP = st.integers(0, 1)
_TOKEN = st.integers(0, 1)
_SIZE = st.integers(2, 5)
_PIN = st.sampled_from([None, PINS[0], PINS[0], *WRONG])
_LABEL = st.sampled_from(["a", "b"])
_PLACE = st.integers(0, 5)
"""The pool, or one of the sessions of late."""
_STATES = {
    LoginState.PUBLIC: User.NOBODY,
    LoginState.USER: User.USER,
    LoginState.SO: User.SO,
}


Pick = tuple[str, int, int, bool, bool, int]
Seen = tuple[User | None, int, tuple[str, ...]]
KINDS = (
    *("use", "use", "use", "label", "digest", "create", "copy", "unwrap", "make"),
    *("destroy", "destroy", "relabel", "login", "logout", "officer", "close", "visit"),
)


_RELOGIN = (steps.Login, steps.Logout, steps.Officer)


class Part:
    """One of several steps that are made at once."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.running: Running

    def start(self, callers: Callers, who: int, world: World) -> None:
        """Let somebody make it."""
        self.running = callers.start(who, lambda: self.step.act(world))

    @property
    def is_in_doubt(self) -> bool:
        """Whether nobody knows if it happened.

        SoftHSM2 2.6.1 sometimes says so of an object that it makes while another
        session searches.
        """
        failed = self.step.changes and self.running.outcome == "GeneralError"
        return self.running.cancelled or failed

    def explains(self, model: Model, *, happened: bool) -> bool:
        """Whether its result is right, if it is its turn now."""
        if not self.is_in_doubt:
            return _judge(self.step, self.running, model) is None
        if happened:
            with suppress(Refused):
                self.step.expect(model)
        return True


def _peaceful(life: str, parts: list[Step]) -> list[Step]:
    """Without what may come to other errors at once than one after the other.

    A session that closes tells those in its line that it is closed, also where their
    object dies with it. A reference is not what it was while its object gets another
    label. The SO does not wait for sessions that are opened or closed meanwhile.
    SoftHSM2 shows a copy under the name of its original before it has its own, so
    there are two of that name for a moment.
    """
    refs = [getattr(part, "ref", None) for part in parts]
    closed = {part.where for part in parts if isinstance(part, steps.CloseSession)}
    copied = {part.ref for part in parts if isinstance(part, steps.Copy)}
    officer = any(isinstance(part, steps.Officer) for part in parts)
    kept: list[Step] = []
    relogin = any(isinstance(part, _RELOGIN) for part in parts)
    for place, (part, ref) in enumerate(zip(parts, refs, strict=True)):
        if isinstance(part, steps.Relabel) and refs.count(ref) > 1:
            kept.append(steps.Encrypt(part.ref, part.where))
        elif copied and isinstance(part, steps.EncryptBy):
            kept.append(steps.Digest(part.life, part.where))
        elif ref in copied and refs.index(ref) != place and not (
            isinstance(part, steps.Destroy) and not relogin
        ):
            kept.append(steps.Digest(life, "pool"))
        elif isinstance(part, steps.CloseSession) and officer:
            kept.append(steps.Info(part.where))
        elif ref is not None and getattr(part, "where", "") in closed:
            kept.append(replace(part, where="pool"))  # type: ignore[type-var]
        else:
            kept.append(part)
    return kept


class Disagreement(AssertionError):
    """The pool did what the model rules out. The text has all the steps."""


class Machine(RuleBasedStateMachine):
    """One run: two tokens, some pools, many steps."""

    #: Given by the test that runs it.
    tokens: ClassVar[Tokens]
    callers: ClassVar[Callers]
    counts: ClassVar[dict[str, int]]
    problems: ClassVar[list[Disagreement]]

    lives: ClassVar[Any] = Bundle("lives", draw_references=False)
    sessions: ClassVar[Any] = Bundle("sessions", draw_references=False)
    secrets: ClassVar[Any] = Bundle("secrets", draw_references=False)
    privates: ClassVar[Any] = Bundle("privates", draw_references=False)
    publics: ClassVar[Any] = Bundle("publics", draw_references=False)
    refs: ClassVar[Any] = Bundle("refs", draw_references=False)
    streams: ClassVar[Any] = Bundle("streams", draw_references=False)

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.tokens, self.callers)
        real = self.tokens.all
        self.model = Model([Token(token.user_pin, token.so_pin) for token in real])
        self.journal: list[str] = []
        self._numbers = itertools.count(1)
        self._epochs: dict[str, tuple[int, int]] = {}
        self._failed = False

    # -- Making steps -------------------------------------------------------------

    def new(self, letter: str) -> str:
        """A name that nothing has had."""
        return f"{letter}{next(self._numbers)}"

    def step(self, who: int, step: Step) -> bool:
        """Make one; whether it came to a result and not to an error."""
        self._begin(f"{self._name(who)}: {step}")
        running = self.callers.run(who, lambda: step.act(self.world))
        self._note(running)
        before = copy.deepcopy(self.model)
        problem = _judge(step, running, self.model)
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

    # -- Lives --------------------------------------------------------------------

    @initialize(target=lives, sizes=st.tuples(_SIZE, _SIZE), reused=st.booleans())
    def begin(self, sizes: tuple[int, int], reused: bool) -> MultipleResults[str]:  # noqa: FBT001
        """A pool on each token. The module may hand out freed numbers at once."""
        self.world.fault.reuse_numbers(sessions=reused, objects=reused)
        self.journal.append(f"numbers of sessions and objects are reused: {reused}")
        return multiple(
            *(self._open(0, token, PINS[0], size) for token, size in enumerate(sizes))
        )

    def _open(self, who: int, token: int, pin: str | None, size: int) -> str:
        name = self.new("pool")
        self.step(who, steps.OpenPool(name, token, pin, size))
        return name if name in self.model.lives else self.model.life_of(token)

    @rule(who=_WHO, token=_TOKEN, pin=_PIN, size=_SIZE, target=lives)
    def open_pool(
        self, who: int, token: int, pin: str | None, size: int
    ) -> str:
        """One after the other; a second one at the same time is refused."""
        closed = self._closed()
        # Mostly where there is none.
        token = next(iter(closed), token)
        if not closed and size != 2:
            self.step(who, steps.Digest(self.model.life_of(token), "pool"))
            return self.model.life_of(token)
        name = self._open(who, token, pin, size)
        return name

    def _closed(self) -> list[int]:
        """Tokens without an open pool."""
        taken = {life.token for life in self.model.lives.values() if life.open}
        return [number for number in range(2) if number not in taken]

    @rule(who=_WHO, life=lives, sure=st.integers(0, 3))
    def close_pool(self, who: int, life: str, sure: int) -> None:
        """Now and then, or there would be nothing to do."""
        if sure == 0:
            self.step(who, steps.ClosePool(life))
            self._again(life)
        else:
            self.step(who, steps.Digest(life, "pool"))

    def _again(self, life: str) -> None:
        """What is kept of a pool that is closed is refused; a new one may come."""
        self.step(0, steps.Digest(life, "pool"))

    # -- Login --------------------------------------------------------------------

    @rule(who=_WHO, life=lives, pin=_PIN, force=st.booleans())
    def login(self, who: int, life: str, pin: str | None, force: bool) -> None:  # noqa: FBT001
        """With the pool's own PIN, the right one, or a wrong one."""
        self.step(who, steps.Login(life, self._now(life, pin), force))

    @rule(who=_WHO, life=lives)
    def login_again(self, who: int, life: str) -> None:
        """With the PIN that is right just now."""
        self.step(who, steps.Login(life, self.model.token_of(life).pin))

    @rule(who=_WHO, life=lives)
    def logout(self, who: int, life: str) -> None:
        """Every session is logged out."""
        self.step(who, steps.Logout(life))

    def _now(self, life: str, pin: str | None) -> str | None:
        """The right PIN may have been changed."""
        return self.model.token_of(life).pin if pin == PINS[0] else pin

    @rule(who=_WHO, life=lives, old=_PIN, new=st.sampled_from(PINS))
    def set_pin(self, who: int, life: str, old: str | None, new: str) -> None:
        """With the old one, or with a wrong one."""
        known = self._now(life, old) or self.model.token_of(life).pin
        self.step(who, steps.SetPin(life, known, new))

    @rule(
        who=_WHO,
        life=lives,
        wrong=st.integers(0, 5),
        init_pin=st.none() | st.sampled_from(PINS),
        make=st.booleans(),
    )
    def officer(
        self,
        who: int,
        life: str,
        wrong: int,
        init_pin: str | None,
        make: bool,  # noqa: FBT001
    ) -> None:
        """A period of the SO; open sessions keep him out."""
        token = self.model.token_of(life)
        pin = "wrong-so" if wrong == 0 else token.so_pin
        new = self.new("so") if make else None
        waits = not self.model.held(life)
        self.step(who, steps.Officer(life, pin, init_pin, new, waits))

    # -- Sessions -----------------------------------------------------------------

    @rule(who=_LOOP, life=lives, rw=st.booleans(), target=sessions)
    def open_session(self, who: int, life: str, rw: bool) -> str:  # noqa: FBT001
        """Borrow one, if there is one to be lent."""
        name = self.new("s")
        self.step(who, steps.OpenSession(life, name, rw))
        return name

    @rule(who=_WHO, where=sessions)
    def close_session(self, who: int, where: str) -> None:
        """Its session objects die with it."""
        if where in self.model.sessions:
            self.step(who, steps.CloseSession(where))

    @rule(who=_WHO, where=sessions)
    def info(self, who: int, where: str) -> None:
        """The token tells the state that the model has."""
        if where in self.model.sessions:
            self.step(who, steps.Info(where))

    @rule(who=_LOOP, life=lives, rw=st.booleans(), private=st.booleans())
    def visit(self, who: int, life: str, rw: bool, private: bool) -> None:  # noqa: FBT001
        """Open, make, use, close."""
        self.step(who, steps.Visit(life, self.new("v"), rw, private))

    # -- Objects ------------------------------------------------------------------

    def place(self, life: str, where: int) -> str:
        """The pool, or one of its last sessions, open or not."""
        mine = [n for n, s in self.model.sessions.items() if s.life == life]
        return mine[-where] if 0 < where <= len(mine) else "pool"

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

    @rule(
        who=_WHO,
        life=lives,
        where=_PLACE,
        label=_LABEL,
        token=st.booleans(),
        private=st.booleans(),
        targets=(secrets, refs),
    )
    def create(
        self,
        who: int,
        life: str,
        where: int,
        label: str,
        token: bool,  # noqa: FBT001
        private: bool,  # noqa: FBT001
    ) -> str:
        """A secret key from its value."""
        name = self.new("k")
        self.step(who, steps.Create(life, self.place(life, where), name, label, token, private))
        return name

    @rule(
        who=_WHO,
        life=lives,
        where=_PLACE,
        token=st.booleans(),
        targets=(privates, refs),
    )
    def generate(
        self,
        who: int,
        life: str,
        where: int,
        token: bool,  # noqa: FBT001
    ) -> str:
        """A key pair."""
        name = self.new("pair")
        self.step(who, steps.Generate(life, self.place(life, where), name, "x", token))
        return name

    @rule(ref=privates, targets=(publics, refs))
    def other_half(self, ref: str) -> str:
        """The public key of a pair."""
        self.counts["free"] += 1
        return f"{ref}.pub"

    @rule(
        who=_WHO,
        ref=secrets,
        where=_PLACE,
        token=st.booleans(),
        private=st.booleans(),
        targets=(secrets, refs),
    )
    def unwrap(
        self,
        who: int,
        ref: str,
        where: int,
        token: bool,  # noqa: FBT001
        private: bool,  # noqa: FBT001
    ) -> str:
        """A secret key unwraps another."""
        name = self.new("u")
        if not self._knows(who, ref):
            return name
        value = self._value(ref)
        self.step(who, steps.Unwrap(ref, self.at(ref, where), name, value, token, private))
        return name

    def _word(self, ref: str, label: str) -> str:
        """Key pairs have other labels than secret keys."""
        secret = self.model.refs[ref].kind is Kind.SECRET
        return label if secret else {"a": "x", "b": "y"}[label]

    def _value(self, ref: str) -> bytes:
        known = self.model.refs[ref]
        thing = self.model.token_of(known.life).things.get(known.thing)
        return bytes(16) if thing is None else thing.value

    @rule(
        who=_WHO,
        ref=secrets,
        where=_PLACE,
        token=st.booleans(),
        targets=(secrets, refs),
    )
    def copy(self, who: int, ref: str, where: int, token: bool) -> str:  # noqa: FBT001
        """A copy is an object of its own."""
        name = self.new("c")
        if not self._knows(who, ref):
            return name
        self.step(who, steps.Copy(ref, self.at(ref, where), name, token))
        return name

    @rule(who=_WHO, ref=refs, where=_PLACE)
    def destroy(self, who: int, ref: str, where: int) -> None:
        """The reference is kept, and used again."""
        if self._knows(who, ref):
            self.step(who, steps.Destroy(ref, self.at(ref, where)))

    @rule(
        who=_WHO,
        ref=refs,
        where=_PLACE,
        label=_LABEL,
    )
    def relabel(self, who: int, ref: str, where: int, label: str) -> None:
        """Write an attribute."""
        if self._knows(who, ref):
            self.step(who, steps.Relabel(ref, self.at(ref, where), self._word(ref, label)))

    @rule(
        who=_WHO,
        life=lives,
        where=_PLACE,
        label=st.none() | _LABEL,
    )
    def find(self, who: int, life: str, where: int, label: str | None) -> None:
        """All that is to be seen."""
        self.step(who, steps.Find(life, self.place(life, where), label))

    @rule(who=_WHO, life=lives, where=_PLACE, repeat=st.booleans())
    def look(self, who: int, life: str, where: int, repeat: bool) -> None:  # noqa: FBT001
        """The same by python-pkcs11; what it gave is kept too long."""
        self.step(who, steps.Look(life, self.place(life, where), repeat))

    @rule(who=_WHO, life=lives, rw=st.booleans(), private=st.booleans())
    def make(self, who: int, life: str, rw: bool, private: bool) -> None:  # noqa: FBT001
        """Other code makes an object."""
        self.step(who, steps.Make(life, self.new("m"), rw, private))

    # -- Use ----------------------------------------------------------------------

    @rule(who=_WHO, ref=secrets, where=_PLACE)
    def encrypt(self, who: int, ref: str, where: int) -> None:
        """By whichever session."""
        if self._knows(who, ref):
            self.step(who, steps.Encrypt(ref, self.at(ref, where)))

    @rule(who=_WHO, ref=privates, where=_PLACE)
    def sign(self, who: int, ref: str, where: int) -> None:
        """By whichever session."""
        if self._knows(who, ref):
            self.step(who, steps.Sign(ref, self.at(ref, where)))

    @rule(who=_WHO, ref=privates, items=st.integers(1, 20))
    def sign_many(self, who: int, ref: str, items: int) -> None:
        """Many at once, in order."""
        if self._knows(who, ref):
            self.step(who % 2, steps.SignMany(ref, items))

    @rule(who=_WHO, ref=publics, where=_PLACE)
    def verify(self, who: int, ref: str, where: int) -> None:
        """It needs no login."""
        if self._knows(who, ref):
            self.step(who, steps.Verify(ref, self.at(ref, where)))

    @rule(who=_WHO, life=lives, where=_PLACE, label=_LABEL)
    def encrypt_by(self, who: int, life: str, where: int, label: str) -> None:
        """By its label."""
        self.step(who, steps.EncryptBy(life, self.place(life, where), label))

    # -- Data in parts ------------------------------------------------------------

    @rule(who=_LOOP, ref=secrets, target=streams)
    def begin_stream(self, who: int, ref: str) -> str:
        """Begin, and go away."""
        name = self.new("stream")
        if not self._knows(who, ref):
            return name
        life = self.model.refs[ref].life
        lend = max(1, self.model.lives[life].max_sessions - 1)
        if self.model.lives[life].open and self.model.leased(life) >= lend:
            # It would wait for a session, and nobody gives one back.
            self.step(who, steps.Digest(life, "pool"))
            return name
        self.step(who, steps.BeginStream(ref, name))
        return name

    @rule(who=_WHO, stream=streams)
    def feed_stream(self, who: int, stream: str) -> None:
        """One more output."""
        if stream in self.world.streams:
            self.step(who, steps.FeedStream(stream))

    @rule(who=_WHO, stream=streams, forget=st.integers(0, 3))
    def end_stream(self, who: int, stream: str, forget: int) -> None:
        """Break off, or forget it."""
        if stream in self.world.streams:
            self.step(who, steps.EndStream(stream, forget == 0))

    # -- Several at once ----------------------------------------------------------

    @rule(
        life=lives,
        picks=st.lists(
            st.tuples(
                st.sampled_from(KINDS),
                _WHO,
                st.integers(0, 5),
                st.booleans(),
                st.booleans(),
                st.integers(0, 3),
            ),
            min_size=2,
            max_size=4,
        ),
    )
    def batch(self, life: str, picks: list[Pick]) -> None:
        """Steps made at once come to what they come to in some order."""
        made = [self._part(life, pick) for pick in picks]
        for step in made:
            if isinstance(step, steps.Copy):
                # Known by its number, it is not searched for beside its copy.
                self.step(0, steps.Encrypt(step.ref, "pool"))
        cancel = [pick[5] == 0 and pick[1] < 2 for pick in picks]
        parts = [
            Part(replace(step, keep=False) if gone and hasattr(step, "keep") else step)
            for step, gone in zip(_peaceful(life, made), cancel, strict=False)
        ]
        self._begin("at once:")
        self.counts["calls"] += len(parts) - 1
        for part, pick in zip(parts, picks, strict=False):
            part.start(self.callers, pick[1], self.world)
        for part, gone in zip(parts, cancel, strict=False):
            if gone and part.running.cancel is not None:
                part.running.cancel()
        for part, pick in zip(parts, picks, strict=False):
            part.running.wait()
            self.journal.append(f"    {self._name(pick[1])}: {part.step}")
            self._note(part.running)
        self._explain(parts)
        self._finish()

    def _part(self, life: str, pick: Pick) -> Step:
        """One of them, for what is there just now."""
        kind, _, number, one, other, _ = pick
        known = [name for name, ref in self.model.refs.items() if ref.life == life]
        ref = known[-1 - number] if number < len(known) else None
        where = self.place(life, number)
        new = self.new(kind[:1])
        token = self.model.token_of(life)
        if ref is not None:
            secret = self.model.refs[ref].kind is Kind.SECRET
            private = self.model.refs[ref].kind is Kind.PRIVATE
            if kind == "use" and secret:
                return steps.Encrypt(ref, where)
            if kind == "use" and private:
                return steps.Sign(ref, where)
            if kind == "use":
                return steps.Verify(ref, where)
            if kind == "destroy":
                return steps.Destroy(ref, where)
            if kind == "relabel":
                return steps.Relabel(ref, where, self._word(ref, "b" if one else "a"))
            if kind == "copy" and secret:
                return steps.Copy(ref, where, new, one)
            if kind == "unwrap" and secret:
                return steps.Unwrap(ref, where, new, self._value(ref), one, other)
        if kind == "login":
            return steps.Login(life, WRONG[0] if number == 0 else token.pin)
        if kind == "logout":
            return steps.Logout(life)
        if kind == "officer":
            pin = token.so_pin if number else "wrong-so"
            waits = not self.model.held(life)
            return steps.Officer(life, pin, None, new if one else None, waits)
        if kind == "close" and where != "pool":
            return steps.CloseSession(where)
        if kind == "visit" and self._has_room(life):
            return steps.Visit(life, new, one, private=False, timeout=10)
        if kind == "make":
            return steps.Make(life, new, one, other)
        if kind == "label":
            return steps.EncryptBy(life, where, "b" if one else "a")
        if kind == "digest":
            return steps.Digest(life, where)
        return steps.Create(life, where, new, "a", one, other)

    def _has_room(self, life: str) -> bool:
        """Whether sessions can be lent, one after the other at least."""
        pool = self.model.lives[life]
        return self.model.leased(life) < max(1, pool.max_sessions - 1)

    def _explain(self, parts: list[Part]) -> None:
        """Find the order that explains the results, and what is there afterwards."""
        self._settle()
        seen = {name: self._observe(name) for name in self.model.lives}
        for order in itertools.permutations(parts):
            # Of a cancelled one nobody knows whether it happened.
            doubts = [[True, False] if p.is_in_doubt else [True] for p in order]
            for happened in itertools.product(*doubts):
                model = copy.deepcopy(self.model)
                if not all(
                    p.explains(model, happened=h)
                    for p, h in zip(order, happened, strict=True)
                ):
                    continue
                if all(seen[name] == self._expected(model, name) for name in seen):
                    self.model = model
                    self._epochs.clear()
                    return
        shown = "\n".join(f"{name}: {what}" for name, what in seen.items())
        self.fail(f"No order explains these results. There is now:\n{shown}")

    def _settle(self) -> None:
        try:
            self.world.quiet()
            self.world.ledger.lent = self.world.visited | self.world.lent()
            self.world.ledger.read()
        except AssertionError as error:
            self._disagree(f"{type(error).__name__}: {error}", error)

    def _observe(self, life: str) -> Seen:
        """Who is logged in, how many logins there were, and what is to be seen."""
        pool = self.world.pools[life]
        token = self.model.lives[life].token
        sent = self.world.ledger.logins(self.world.slots[token])
        if pool.state is not PoolState.READY:
            return None, sent, ()
        step = steps.Look(life, "pool", repeat=False)
        running = self.callers.run(0, lambda: step.act(self.world))
        return _STATES[pool.login_state], sent, running.value

    def _expected(self, model: Model, life: str) -> Seen:
        token = model.token_of(life)
        if not model.lives[life].open:
            return None, token.logins, ()
        ids = tuple(model.visible(life, "pool", None))
        return token.user, token.logins, ids

    # -- After each step ----------------------------------------------------------

    def _finish(self) -> None:
        """Wait until all is tidied up, and compare everything that can be counted."""
        try:
            self.world.quiet()
            self._look()
        except AssertionError as error:
            self._disagree(f"{type(error).__name__}: {error}", error)

    def _look(self) -> None:
        world, model = self.world, self.model
        world.ledger.lent = world.visited | world.lent()
        world.ledger.read()
        for name, life in model.lives.items():
            pool = world.pools[name]
            world.audits[name].check()
            if not life.open:
                assert pool.state.value == "closed", pool
                continue
            token = model.token_of(name)
            assert _STATES[pool.login_state] is token.user, pool.login_state
            self._check_epoch(name, pool.login_epoch, token.epoch)
            stats = pool.stats()
            assert stats.sessions_leased == model.leased(name), stats
            assert stats.operations_total == world.audits[name].operations, stats
            assert stats.calls_lost == 0, stats
            self._check_sessions(name)
        for number, token in enumerate(model.tokens):
            if number in world.slots:
                sent = world.ledger.logins(world.slots[number])
                assert sent == token.logins, f"{sent} C_Login, not {token.logins}"

    def _check_epoch(self, life: str, real: int, expected: int) -> None:
        """The number moves with every change of the login, and never without one."""
        before_real, before = self._epochs.get(life, (real, expected))
        assert (real != before_real) is (expected != before), "the epoch's number"
        assert real >= before_real, "the epoch's number went back"
        self._epochs[life] = real, expected

    def _check_sessions(self, life: str) -> None:
        """Sessions are those running, ahead, and leased; and the anchor."""
        world, pool = self.world, self.world.pools[life]
        slot = pool.token.slot_id

        def agree() -> bool:
            # What is opened ahead goes away by itself meanwhile.
            here = [s for s in world.fault.sessions() if s.slot == slot]
            stats = pool.stats()
            return (
                len(here) == stats.sessions_open + 1
                and stats.sessions_open == stats.sessions_ahead + stats.sessions_leased
                and sum(s.rw for s in here) == len(self._held_rw(life))
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
            self.world.close()
        self.counts["runs"] += 1
        self.counts["module calls"] += self.world.ledger.calls


    def _end(self) -> None:
        for name, life in self.model.lives.items():
            if life.open:
                self.step(0, steps.ClosePool(name))
        self.world.streams.clear()
        try:
            wait_until(lambda: not left_over()[0], lambda: str(left_over()))
            assert self.world.fault.sessions() == [], "sessions are left over"
        except AssertionError as error:
            self._disagree(f"At the end: {type(error).__name__}: {error}", error)


def _judge(step: Step, running: Running, model: Model) -> str | None:
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


