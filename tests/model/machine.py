"""The machine: hypothesis makes steps, the pool and the model make them together.

Each step is made by one of several callers: a task of one of two event loops, or a
plain thread. Steps that are made at once are in ``together``, what does not go smoothly
in ``pressure``; what is counted after each step, in ``bench``.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import MultipleResults, initialize, multiple, rule

from model import steps
from model.bench import (
    LIVES,
    LOOP,
    PINS,
    PLACE,
    PRIVATES,
    PUBLICS,
    REFS,
    SECRETS,
    SESSIONS,
    STREAMS,
    WHO,
    WRONG,
    WRONG_SO,
)
from model.pressure import Pressure
from model.together import Together

_TOKEN = st.integers(0, 1)
_SIZE = st.integers(2, 5)
_PIN = st.sampled_from([None, PINS[0], PINS[0], *WRONG])
_LABEL = st.sampled_from(["a", "b"])


class Machine(Together, Pressure):
    """All the steps that there are."""

    #: Whether the module may hand out a closed session's number at once.
    may_reuse_sessions = True

    # -- Lives --------------------------------------------------------------------

    @initialize(target=LIVES, sizes=st.tuples(_SIZE, _SIZE), reused=st.booleans())
    def begin(self, sizes: tuple[int, int], reused: bool) -> MultipleResults[str]:  # noqa: FBT001
        """A pool on each token. The module may hand out freed numbers at once."""
        self.leave_out_simplest()
        sessions = reused and self.may_reuse_sessions
        self.world.fault.reuse_numbers(sessions=sessions, objects=reused)
        self.journal.append(f"numbers of sessions and objects are reused: {reused}")
        return multiple(
            # By each loop one: what a loop opens once for itself is there from now on.
            *(self._open(n, n, PINS[0], size) for n, size in enumerate(sizes))
        )

    def _open(self, who: int, token: int, pin: str | None, size: int) -> str:
        name = self.new("pool")
        self.step(who, steps.OpenPool(name, token, pin, size))
        return name if name in self.model.lives else self.model.life_of(token)

    @rule(who=WHO, token=_TOKEN, pin=_PIN, size=_SIZE, target=LIVES)
    def open_pool(self, who: int, token: int, pin: str | None, size: int) -> str:
        """One after the other; a second one at the same time is refused."""
        closed = self._closed()
        # Mostly where there is none.
        token = next(iter(closed), token)
        if not closed and size != 2:
            self.step(who, steps.Digest(self.model.life_of(token), "pool"))
            return self.model.life_of(token)
        return self._open(who, token, pin, size)

    def _closed(self) -> list[int]:
        """Tokens without an open pool."""
        taken = {life.token for life in self.model.lives.values() if life.open}
        return [number for number in range(2) if number not in taken]

    @rule(who=WHO, life=LIVES, sure=st.integers(0, 3))
    def close_pool(self, who: int, life: str, sure: int) -> None:
        """Now and then, or there would be nothing to do."""
        if sure == 0:
            self.step(who, steps.ClosePool(life))
        self.step(who, steps.Digest(life, "pool"))

    # -- Login --------------------------------------------------------------------

    @rule(who=WHO, life=LIVES, pin=_PIN, force=st.booleans())
    def login(self, who: int, life: str, pin: str | None, force: bool) -> None:  # noqa: FBT001
        """With the pool's own PIN, the right one, or a wrong one."""
        life = self.now(life)
        self.step(who, steps.Login(life, self._now(life, pin), force))

    @rule(who=WHO, life=LIVES)
    def login_again(self, who: int, life: str) -> None:
        """With the PIN that is right just now."""
        life = self.now(life)
        self.step(who, steps.Login(life, self.model.token_of(life).pin))

    @rule(who=WHO, life=LIVES)
    def logout(self, who: int, life: str) -> None:
        """Every session is logged out."""
        life = self.now(life)
        self.step(who, steps.Logout(life))

    def _now(self, life: str, pin: str | None) -> str | None:
        """The right PIN may have been changed."""
        return self.model.token_of(life).pin if pin == PINS[0] else pin

    @rule(who=WHO, life=LIVES, old=_PIN, new=st.sampled_from(PINS))
    def set_pin(self, who: int, life: str, old: str | None, new: str) -> None:
        """With the old one, or with a wrong one."""
        life = self.now(life)
        known = self._now(life, old) or self.model.token_of(life).pin
        self.step(who, steps.SetPin(life, known, new))

    @rule(
        who=WHO,
        life=LIVES,
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
        who %= 2  # a block is for tasks
        life = self.now(life)
        if make:
            # Mostly he would only be told that sessions are open.
            for held in self.model.held(life):
                self.step(who, steps.CloseSession(held))
        token = self.model.token_of(life)
        pin = WRONG_SO if wrong == 0 else token.so_pin
        new = self.new("so") if make else None
        waits = not self.model.held(life)
        self.step(who, steps.Officer(life, pin, init_pin, new, waits))

    # -- Sessions -----------------------------------------------------------------

    @rule(who=LOOP, life=LIVES, rw=st.booleans(), target=SESSIONS)
    def open_session(self, who: int, life: str, rw: bool) -> str:  # noqa: FBT001
        """Borrow one, if there is one to be lent."""
        life = self.now(life)
        name = self.new("s")
        self.step(who, steps.OpenSession(life, name, rw))
        return name

    @rule(who=WHO, where=SESSIONS)
    def close_session(self, who: int, where: str) -> None:
        """Its session objects die with it."""
        if where in self.model.sessions:
            self.step(who, steps.CloseSession(where))

    @rule(who=WHO, where=SESSIONS)
    def info(self, who: int, where: str) -> None:
        """The token tells the state that the model has."""
        if where in self.model.sessions:
            self.step(who, steps.Info(where))

    @rule(who=LOOP, life=LIVES, rw=st.booleans(), private=st.booleans())
    def visit(self, who: int, life: str, rw: bool, private: bool) -> None:  # noqa: FBT001
        """Open, make, use, close."""
        life = self.now(life)
        self.step(who, steps.Visit(life, self.new("v"), rw, private))

    # -- Objects ------------------------------------------------------------------

    @rule(
        who=WHO,
        life=LIVES,
        where=PLACE,
        label=_LABEL,
        token=st.booleans(),
        private=st.booleans(),
        targets=(SECRETS, REFS),
    )
    def create(  # noqa: PLR0917  # hypothesis gives them by name
        self,
        who: int,
        life: str,
        where: int,
        label: str,
        token: bool,  # noqa: FBT001
        private: bool,  # noqa: FBT001
    ) -> str:
        """A secret key from its value."""
        life = self.now(life)
        name = self.new("k")
        owner = self._owner(who, life, where, token=token)
        self.step(who, steps.Create(life, owner, name, label, token, private))
        return name

    @rule(
        who=WHO,
        life=LIVES,
        where=PLACE,
        token=st.booleans(),
        targets=(PRIVATES, REFS),
    )
    def generate(
        self,
        who: int,
        life: str,
        where: int,
        token: bool,  # noqa: FBT001
    ) -> str:
        """A key pair."""
        life = self.now(life)
        name = self.new("pair")
        owner = self._owner(who, life, where, token=token)
        self.step(who, steps.Generate(life, owner, name, "x", token))
        return name

    @rule(ref=PRIVATES, targets=(PUBLICS, REFS))
    def other_half(self, ref: str) -> str:
        """The public key of a pair."""
        self.counts["free"] += 1
        return f"{ref}.pub"

    @rule(
        who=WHO,
        ref=SECRETS,
        where=PLACE,
        token=st.booleans(),
        private=st.booleans(),
        targets=(SECRETS, REFS),
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
        self.step(
            who, steps.Unwrap(ref, self.at(ref, where), name, value, token, private)
        )
        return name

    @rule(
        who=WHO,
        ref=SECRETS,
        where=PLACE,
        token=st.booleans(),
        targets=(SECRETS, REFS),
    )
    def copy(self, who: int, ref: str, where: int, token: bool) -> str:  # noqa: FBT001
        """A copy is an object of its own."""
        name = self.new("c")
        if not self._knows(who, ref):
            return name
        self.step(who, steps.Copy(ref, self.at(ref, where), name, token))
        return name

    @rule(who=WHO, ref=REFS, where=PLACE)
    def destroy(self, who: int, ref: str, where: int) -> None:
        """The reference is kept, and used again."""
        if self._knows(who, ref):
            self.step(who, steps.Destroy(ref, self.at(ref, where)))

    @rule(
        who=WHO,
        ref=REFS,
        where=PLACE,
        label=_LABEL,
    )
    def relabel(self, who: int, ref: str, where: int, label: str) -> None:
        """Write an attribute."""
        if self._knows(who, ref):
            self.step(
                who, steps.Relabel(ref, self.at(ref, where), self._word(ref, label))
            )

    @rule(
        who=WHO,
        life=LIVES,
        where=PLACE,
        label=st.none() | _LABEL,
    )
    def find(self, who: int, life: str, where: int, label: str | None) -> None:
        """All that is to be seen."""
        life = self.now(life)
        self.step(who, steps.Find(life, self.place(life, where), label))

    @rule(who=WHO, life=LIVES, where=PLACE, repeat=st.booleans())
    def look(self, who: int, life: str, where: int, repeat: bool) -> None:  # noqa: FBT001
        """The same by python-pkcs11; what it gave is kept too long."""
        life = self.now(life)
        self.step(who, steps.Look(life, self.place(life, where), repeat))

    @rule(who=WHO, life=LIVES, rw=st.booleans(), private=st.booleans())
    def make(self, who: int, life: str, rw: bool, private: bool) -> None:  # noqa: FBT001
        """Other code makes an object."""
        life = self.now(life)
        self.step(who, steps.Make(life, self.new("m"), rw, private))

    # -- Use ----------------------------------------------------------------------

    @rule(who=WHO, ref=SECRETS, where=PLACE)
    def encrypt(self, who: int, ref: str, where: int) -> None:
        """By whichever session."""
        if self._knows(who, ref):
            self.step(who, steps.Encrypt(ref, self.at(ref, where)))

    @rule(who=WHO, ref=PRIVATES, where=PLACE)
    def sign(self, who: int, ref: str, where: int) -> None:
        """By whichever session."""
        if self._knows(who, ref):
            self.step(who, steps.Sign(ref, self.at(ref, where)))

    @rule(who=WHO, ref=PRIVATES, items=st.integers(1, 20))
    def sign_many(self, who: int, ref: str, items: int) -> None:
        """Many at once, in order."""
        if self._knows(who, ref):
            self.step(who % 2, steps.SignMany(ref, items))

    @rule(who=WHO, ref=PUBLICS, where=PLACE)
    def verify(self, who: int, ref: str, where: int) -> None:
        """It needs no login."""
        if self._knows(who, ref):
            self.step(who, steps.Verify(ref, self.at(ref, where)))

    @rule(who=WHO, life=LIVES, where=PLACE, label=_LABEL)
    def encrypt_by(self, who: int, life: str, where: int, label: str) -> None:
        """By its label."""
        life = self.now(life)
        self.step(who, steps.EncryptBy(life, self.place(life, where), label))

    # -- Data in parts ------------------------------------------------------------

    @rule(who=LOOP, ref=SECRETS, target=STREAMS)
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

    @rule(who=WHO, stream=STREAMS)
    def feed_stream(self, who: int, stream: str) -> None:
        """One more output."""
        if stream in self.world.streams:
            self.step(who, steps.FeedStream(stream))

    @rule(who=WHO, stream=STREAMS, forget=st.integers(0, 3))
    def end_stream(self, who: int, stream: str, forget: int) -> None:
        """Break off, or forget it."""
        if stream in self.world.streams:
            self.step(who, steps.EndStream(stream, forget == 0))
