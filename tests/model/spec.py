"""What PKCS#11 sessions are, and what the pool promises of them: a pure model.

To be read as a specification. It holds no session and calls nothing: it says what
each step must come to. The first half is the text "Quick Introduction to PKCS#11
Sessions", the second the contract of the pool.

It shares no code with the pool: both would be wrong together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

# -- The text ---------------------------------------------------------------------


class User(Enum):
    """Who is logged in to a token: for all sessions of the application alike."""

    NOBODY = "public"
    USER = "user"
    SO = "so"


_NONE, _READ, _WRITE = 0, 1, 2
_ACCESS = {
    # R/W, who: session public, session private, token public, token private.
    (False, User.NOBODY): (_WRITE, _NONE, _READ, _NONE),
    (False, User.USER): (_WRITE, _WRITE, _READ, _READ),
    (True, User.NOBODY): (_WRITE, _NONE, _WRITE, _NONE),
    (True, User.USER): (_WRITE, _WRITE, _WRITE, _WRITE),
    (True, User.SO): (_WRITE, _NONE, _WRITE, _NONE),
}


def access(user: User, *, rw: bool, token: bool, private: bool) -> int:
    """The table of the text. A R/O session of the SO does not exist."""
    return _ACCESS[rw, user][2 * token + private]


class Refused(Exception):
    """A step comes to an error, by the name of its class; or to one of several."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.names = frozenset(names)


class Kind(Enum):
    """What an object is."""

    AES = "AES key"
    PRIVATE = "private key"
    PUBLIC = "public key"


@dataclass
class Thing:
    """An object: on the token, or a session's own.

    Attributes:
        name: Never used for another one; it is the object's CKA_ID, too.
        owner: The session that made it, for a session object.
        epoch: The login that it was made in.
        value: The key's value, where the model knows it.
    """

    name: str
    kind: Kind
    label: str
    private: bool
    token: bool
    owner: str | None
    epoch: int
    value: bytes = b""

    @property
    def id(self) -> str:
        """Both halves of a pair have the same."""
        return self.name.removesuffix(".pub")


# -- The contract -----------------------------------------------------------------


@dataclass
class Token:
    """A token, and what the process knows of its PINs."""

    pin: str
    so_pin: str
    user: User = User.NOBODY
    #: Moves with everything that ends or begins a login.
    epoch: int = 1
    things: dict[str, Thing] = field(default_factory=dict)
    #: PINs that the token refused, by user: not sent again.
    refused: dict[User, set[str]] = field(
        default_factory=lambda: {User.USER: set(), User.SO: set()}
    )
    #: How many C_Login calls there were.
    logins: int = 0
    #: Files of objects that were not made after all.
    debris: int = 0

    @property
    def stored(self) -> int:
        """How many objects are on it, for whoever may see them; with the debris."""
        return self.debris + sum(thing.token for thing in self.things.values())


@dataclass
class Life:
    """One pool, from its opening to its end."""

    token: int
    max_sessions: int
    open: bool = True
    #: The PIN that it has, or None.
    pin: str | None = None
    #: The user said ``login`` last, not ``logout``.
    wants_user: bool = False
    #: Its PIN was being changed, and nobody heard whether it was.
    in_doubt: bool = False


@dataclass
class Session:
    """An open ``PooledSession``, or one that was."""

    life: str
    rw: bool
    open: bool = True


@dataclass
class Ref:
    """A reference that an operation gave. It knows the object by its label, too."""

    life: str
    thing: str
    kind: Kind
    label: str
    token: bool
    #: The object was destroyed through it.
    destroyed: bool = False
    #: The login in which the object got a name through it that its holder did not
    #: hear of: until its end it is known by its number.
    follows: int | None = None


@dataclass
class Stream:
    """Data in parts, half-way. It has a session to itself."""

    life: str
    thing: str
    label: str
    token: bool
    private: bool
    value: bytes
    #: How many pieces of the data were not given yet.
    left: int
    holds: bool = True
    #: What the next step comes to, whatever else.
    cut: str | None = None


@dataclass
class Model:
    """Two tokens of one module, and everything that the test holds of them."""

    tokens: list[Token]
    lives: dict[str, Life] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    refs: dict[str, Ref] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)

    # -- Who is where -------------------------------------------------------------

    def life_of(self, token: int) -> str:
        """The last pool on a token."""
        return [name for name, life in self.lives.items() if life.token == token][-1]

    def token_of(self, life: str) -> Token:
        """The token that a pool is on."""
        return self.tokens[self.lives[life].token]

    def leased(self, life: str) -> int:
        """How many sessions are in somebody's hands."""
        held = sum(s.open and s.life == life for s in self.sessions.values())
        return held + sum(s.holds and s.life == life for s in self.streams.values())

    def held(self, life: str) -> list[str]:
        """The open sessions of a pool."""
        return [n for n, s in self.sessions.items() if s.open and s.life == life]

    def door(self, life: str, where: str = "pool") -> None:
        """Refuse what is over."""
        if not self.lives[life].open:
            raise Refused("PoolClosed")
        if where != "pool" and not self.sessions[where].open:
            raise Refused("SessionClosed")

    # -- Lives of pools -----------------------------------------------------------

    def open_pool(
        self, life: str, token: int, pin: str | None, max_sessions: int
    ) -> None:
        """With a PIN the login happens at opening, so a bad PIN fails there."""
        if any(other.token == token and other.open for other in self.lives.values()):
            raise Refused("TokenInUse")
        self.lives[life] = made = Life(token, max_sessions, open=False, pin=pin)
        if pin is not None:
            self._log_in(self.tokens[token], User.USER, pin)
        made.open, made.wants_user = True, pin is not None

    def close_pool(self, life: str) -> None:
        """Closes every session, and with the last one nobody is logged in."""
        if not self.lives[life].open:
            return
        self.lives[life].open = False
        self._change(self.token_of(life), User.NOBODY)
        for name in self.held(life):
            self._end_session(name)
        for stream in self.streams.values():
            stream.holds &= stream.life != life

    # -- Login --------------------------------------------------------------------

    def _change(self, token: Token, user: User) -> None:
        token.user = user
        token.epoch += 1

    def _log_in(
        self, token: Token, user: User, pin: str, *, force: bool = False
    ) -> None:
        """A PIN that was refused is not sent again, unless the caller insists."""
        if pin in token.refused[user] and not force:
            raise Refused("PinRefused")
        token.logins += 1
        if pin != (token.pin if user is User.USER else token.so_pin):
            token.refused[user].add(pin)
            raise Refused("PinRefused")
        token.refused[user].clear()
        self._change(token, user)

    def login(self, life: str, pin: str | None, *, force: bool) -> None:
        """While logged in it returns at once and checks nothing."""
        self.door(life)
        pool, token = self.lives[life], self.token_of(life)
        if token.user is User.USER:
            return
        given = pool.pin if pin is None else pin
        if given is None or (pin is None and pool.in_doubt):
            raise Refused("LoginRequired")
        self._log_in(token, User.USER, given, force=force)
        pool.pin, pool.wants_user, pool.in_doubt = given, True, False

    def logout(self, life: str) -> None:
        """Every session is logged out, and private session objects are gone."""
        self.door(life)
        self.lives[life].wants_user = False
        self._change(self.token_of(life), User.NOBODY)
        for stream in self.streams.values():
            if stream.life == life and stream.private and stream.holds:
                stream.cut = stream.cut or "LoginRequired"

    def set_pin(self, life: str, old: str, new: str) -> None:
        """The new PIN becomes the pool's; who is logged in does not change."""
        self.door(life)
        token = self.token_of(life)
        if old in token.refused[User.USER]:
            raise Refused("PinRefused")
        if old != token.pin:
            token.refused[User.USER].add(old)
            raise Refused("PinRefused")
        self._new_pin(life, new)

    def lose_pin(self, life: str, new: str, *, made: bool) -> None:
        """It was being changed: the pool sends neither until it is given one."""
        self.lives[life].in_doubt = True
        if made:
            self.token_of(life).pin = new

    def _new_pin(self, life: str, pin: str) -> None:
        self.token_of(life).pin = self.lives[life].pin = pin
        self.lives[life].in_doubt = False
        self.token_of(life).refused[User.USER].clear()

    # -- The security officer -----------------------------------------------------

    def so_begin(self, life: str, so_pin: str) -> None:
        """R/O sessions and an SO login exclude each other: it waits for open ones."""
        self.door(life)
        if self.held(life):
            raise Refused("PoolTimeout waiting")
        token = self.token_of(life)
        for stream in self.streams.values():
            if stream.life == life and stream.holds:
                # It is there for one stream only: nobody waits for its end.
                stream.holds, stream.cut = False, "StreamInterrupted"
        before = token.user
        if before is User.USER:
            self._change(token, User.NOBODY)
        try:
            self._log_in(token, User.SO, so_pin)
        except Refused:
            self._restore(life)
            raise

    def so_end(self, life: str) -> None:
        """The login found before the period is restored."""
        self._change(self.token_of(life), User.NOBODY)
        self._restore(life)

    def so_init_pin(self, life: str, pin: str) -> None:
        """It becomes the pool's."""
        self._new_pin(life, pin)

    def _restore(self, life: str) -> None:
        pool = self.lives[life]
        if pool.wants_user and pool.pin is not None:
            self._log_in(self.token_of(life), User.USER, pool.pin)

    # -- Sessions -----------------------------------------------------------------

    def open_session(self, life: str, name: str, *, rw: bool) -> None:
        """Leases never take the last session, unless there is only one."""
        self.door(life)
        self.check_room(life)
        self.sessions[name] = Session(life, rw)

    def check_room(self, life: str) -> None:
        """Whether one more session can be lent at once."""
        if self.leased(life) >= max(1, self.lives[life].max_sessions - 1):
            raise Refused("PoolTimeout waiting")

    def close_session(self, name: str) -> None:
        """Closing what is closed is harmless."""
        if self.sessions[name].open:
            self._end_session(name)

    def _end_session(self, name: str) -> None:
        """When a session is closed, its session objects are destroyed."""
        session = self.sessions[name]
        session.open = False
        things = self.token_of(session.life).things
        for thing in [t for t in things.values() if t.owner == name]:
            del things[thing.name]

    def state(self, where: str) -> tuple[bool, User]:
        """What the token must say of a session: its type, and who is logged in."""
        session = self.sessions[where]
        self.door(session.life, where)
        return session.rw, self.token_of(session.life).user

    # -- Objects ------------------------------------------------------------------

    def check_write(self, life: str, where: str, *, token: bool, private: bool) -> None:
        """Whether a session may make or change such an object.

        The pool takes a R/W session for what changes the token. Where both rules
        forbid a write, SoftHSM2 names the session's type and not the login.
        """
        rw = token if where == "pool" else self.sessions[where].rw
        user = self.token_of(life).user
        if access(user, rw=rw, token=token, private=private) == _WRITE:
            return
        if token and not rw:
            raise Refused("SessionReadOnly")
        raise Refused("LoginRequired")

    def sees(self, life: str, thing: Thing) -> bool:
        """Whether a session of this pool sees an object."""
        user = self.token_of(life).user
        seen = access(user, rw=True, token=thing.token, private=thing.private) != _NONE
        return seen and self.is_alive(life, thing)

    def is_alive(self, life: str, thing: Thing) -> bool:
        """A private session object ends with the login that it was made in."""
        return thing.token or not thing.private or thing.epoch == self.epoch(life)

    def epoch(self, life: str) -> int:
        """The number of the login."""
        return self.token_of(life).epoch

    def create(
        self, life: str, where: str, things: list[Thing], *, ref: str | None
    ) -> None:
        """Make objects. What would end with the call is refused at the door."""
        if not things[0].token and where == "pool":
            raise Refused("SessionObjectNeedsSession")
        self.door(life, where)
        self.add(life, where, things, ref=ref)

    def add(
        self, life: str, where: str, things: list[Thing], *, ref: str | None
    ) -> None:
        """They are there, if they may be; the first one has a reference."""
        for thing in things:
            self.check_write(life, where, token=thing.token, private=thing.private)
        for thing in things:
            thing.epoch = self.epoch(life)
            thing.owner = None if thing.token else where
            self.token_of(life).things[thing.name] = thing
        if ref is not None:
            self.refer(life, things[0], ref)

    def refer(self, life: str, thing: Thing, name: str) -> None:
        """A reference was given."""
        self.refs[name] = Ref(life, thing.name, thing.kind, thing.label, thing.token)

    def resolve(self, ref: Ref, where: str = "pool") -> Thing:
        """The object that a reference names, if it can be used there."""
        thing = self.token_of(ref.life).things.get(ref.thing)
        if not ref.token:
            self.door(ref.life)
            gone = thing is None or not self.is_alive(ref.life, thing)
            if gone or ref.destroyed or thing is None:
                raise Refused("SessionObjectDestroyed")
            self.door(ref.life, where)
            return thing
        self.door(ref.life, where)
        if ref.destroyed:
            raise Refused("KeyNotFound")
        hidden = self.token_of(ref.life).user is not User.USER
        renamed = thing is not None and thing.label != ref.label
        if thing is None or (renamed and ref.follows != self.epoch(ref.life)):
            # Nobody can tell whether a private object is gone or not to be seen,
            # unless it was seen under this login.
            unsure = hidden and ref.kind is not Kind.PUBLIC
            raise Refused(*(["KeyNotFound"] + ["LoginRequired"] * unsure))
        if thing.private and hidden:
            raise Refused("LoginRequired")
        return thing

    def named(self, life: str, where: str, label: str, kind: Kind) -> list[Thing]:
        """The token objects that ``pool.key(label=)`` may mean, for one kind."""
        self.door(life, where)
        things = self.token_of(life).things.values()
        found = [
            t
            for t in things
            if t.token and t.kind is kind and t.label == label and self.sees(life, t)
        ]
        if not found:
            hidden = self.token_of(life).user is not User.USER
            # A public or secret key is meant, or a private or secret one: either way
            # it may be private.
            raise Refused("LoginRequired" if hidden else "KeyNotFound")
        return found

    def destroy(self, ref: Ref, where: str) -> None:
        """Destroy an object; a session object from whichever session."""
        thing = self.resolve(ref, where)
        if thing.token:
            self.check_write(ref.life, where, token=True, private=thing.private)
        del self.token_of(ref.life).things[thing.name]
        ref.destroyed = True

    def relabel(self, ref: Ref, where: str, label: str, *, heard: bool = True) -> None:
        """Change an object's label. The reference that is given knows the new one.

        Whoever was cancelled has not heard of it, and has the old reference: that
        names the object until the login changes.
        """
        thing = self.resolve(ref, where)
        if thing.token:
            self.check_write(ref.life, where, token=True, private=thing.private)
        thing.label = label
        if heard:
            ref.label = label
        else:
            ref.follows = self.epoch(ref.life)

    def visible(
        self, life: str, where: str, label: str | None, *, labels: bool = False
    ) -> list[str]:
        """What a search finds: session objects of every session, too."""
        self.door(life, where)
        return sorted(
            f"{thing.id} {thing.label}" if labels else thing.id
            for thing in self.token_of(life).things.values()
            if self.sees(life, thing) and label in (None, thing.label)
        )

    # -- Data in parts ------------------------------------------------------------

    def begin_stream(self, name: str, ref: Ref, pieces: int) -> None:
        """It takes a session to itself, until its end."""
        if not ref.token:
            self.resolve(ref)
        self.door(ref.life)
        self.check_room(ref.life)
        thing = self.resolve(ref)
        self.streams[name] = Stream(
            ref.life,
            thing.name,
            thing.label,
            thing.token,
            thing.private,
            thing.value,
            pieces - 1,
        )

    def feed(self, name: str) -> bool:
        """Give it one more piece; False: it was over before."""
        stream = self.streams[name]
        thing = self.token_of(stream.life).things.get(stream.thing)
        if stream.cut == "over":
            return False
        cut, stream.cut, stream.holds = stream.cut, "over", False
        if not self.lives[stream.life].open:
            raise Refused("PoolClosed")
        if cut is not None:
            raise Refused(cut)
        if not stream.token and (
            thing is None or not self.is_alive(stream.life, thing)
        ):
            raise Refused("SessionObjectDestroyed")
        if thing is None or (stream.token and thing.label != stream.label):
            # Its object is not there any more: nothing is given of what it made.
            raise Refused("StreamInterrupted")
        stream.left -= 1
        if stream.left:
            stream.cut, stream.holds = None, True
        return True

    def end_stream(self, name: str) -> None:
        """Its session is free."""
        self.streams[name].holds = False
        self.streams[name].cut = "over"
