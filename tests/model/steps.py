"""The steps that can be made, each in two halves: what must come of it, and the act.

``expect`` changes the model and gives the results that are right (None: any), or
raises ``Refused``. ``act`` does it with the real pool and gives the real result.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from keykit import IV, sha256
from model.spec import Kind, Model, Refused, Thing, User
from pkcs11_pool import LoginRequired, PoolClosed

if TYPE_CHECKING:
    from collections.abc import Hashable

    from model.world import World

_PIECE: Final = 64 * 1024
PIECES: Final = 4
LONG: Final = bytes(range(256)) * (_PIECE * PIECES // 256)
"""Data that goes to the token in parts."""


class Error(str):
    """Among the results that are right: an error, by the name of its class."""

    __slots__ = ()


Right = frozenset[Any] | Callable[[Any], bool] | None
"""What is right: one of these; what this says yes to; or anything."""


class Step:
    """Something that somebody does with the pool."""

    #: Whether its caller waits for its outcome when cancelled.
    changes: ClassVar[bool] = False

    def expect(self, model: Model) -> Right:
        """Change the model; the results that are right.

        Raises:
            Refused: It comes to an error.
        """
        raise NotImplementedError

    async def act(self, world: World) -> Hashable:
        """Do it; the result."""
        raise NotImplementedError


def value_of(name: str) -> bytes:
    """The value of a secret key that the test makes: another one for each."""
    return sha256(name.encode())[:16]


def sealed(value: bytes, data: bytes) -> bytes:
    """What AES-CBC with padding makes of data, by ``cryptography``."""
    padder = padding.PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(value), modes.CBC(IV)).encryptor()
    return encryptor.update(padder.update(data) + padder.finalize())


# -- Lives ------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenPool(Step):
    """Open a pool on a token."""

    new: str
    token: int
    pin: str | None
    max_sessions: int

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.open_pool(self.new, self.token, self.pin, self.max_sessions)
        return None

    async def act(self, world: World) -> None:
        """``await pool.open()``."""
        pool = world.make_pool(self.new, self.token, self.pin, self.max_sessions)
        await pool.open()
        world.slots[self.token] = pool.token.slot_id


@dataclass(frozen=True)
class ClosePool(Step):
    """Close one; perhaps again."""

    life: str

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.close_pool(self.life)
        return None

    async def act(self, world: World) -> None:
        """``await pool.close()``."""
        await world.pools[self.life].close()


# -- Login ------------------------------------------------------------------------


@dataclass(frozen=True)
class Login(Step):
    """Log the user in."""

    life: str
    pin: str | None
    force: bool = False

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.login(self.life, self.pin, force=self.force)
        return None

    async def act(self, world: World) -> None:
        """``await pool.login()``."""
        await world.pools[self.life].login(self.pin, force=self.force)


@dataclass(frozen=True)
class Logout(Step):
    """Log out, and stay out."""

    life: str

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.logout(self.life)
        return None

    async def act(self, world: World) -> None:
        """``await pool.logout()``."""
        await world.pools[self.life].logout()


@dataclass(frozen=True)
class SetPin(Step):
    """Change the user's PIN."""

    life: str
    old: str
    new: str
    changes = True

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.set_pin(self.life, self.old, self.new)
        return None

    async def act(self, world: World) -> None:
        """``await pool.set_pin()``."""
        await world.pools[self.life].set_pin(self.old, self.new)


@dataclass(frozen=True)
class Officer(Step):
    """A period of the security officer, in which he looks around and does things."""

    life: str
    so_pin: str
    #: The user's new PIN.
    init_pin: str | None
    #: The public token object that he makes.
    new: str | None
    waits: bool
    changes = True

    def expect(self, model: Model) -> Right:
        """He is not allowed to access private objects."""
        model.so_begin(self.life, self.so_pin)
        found = tuple(model.visible(self.life, "pool", None))
        if self.init_pin is not None:
            model.so_init_pin(self.life, self.init_pin)
        if self.new is not None:
            thing = secret(self.new, "a", private=False, token=True)
            # In his own R/W session, as the pool's fresh ones are.
            model.add(self.life, "pool", [thing], ref=None)
        model.so_end(self.life)
        return frozenset({(True, User.SO, found, True)})

    async def act(self, world: World) -> Hashable:
        """``async with pool.security_officer(so_pin) as so:``."""
        pool = world.pools[self.life]
        timeout = 10 if self.waits else 0
        async with pool.security_officer(self.so_pin, timeout=timeout) as so:
            world.visited.add(so.session.handle)
            info = await so.session.info()
            found = await _ids(await so.session.find(), so.session)
            refused = False
            try:
                await so.session.create_object(
                    template("never", "a", private=True, token=True)
                )
            except LoginRequired:
                refused = True
            if self.init_pin is not None:
                await so.init_pin(self.init_pin)
            if self.new is not None:
                await so.session.create_object(
                    template(self.new, "a", private=False, token=True)
                )
            return info.rw, _user(info.state.name), found, refused


# -- Sessions ---------------------------------------------------------------------


@dataclass(frozen=True)
class OpenSession(Step):
    """Borrow a session; without waiting, so that the answer is sure."""

    life: str
    new: str
    rw: bool

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.open_session(self.life, self.new, rw=self.rw)
        return None

    async def act(self, world: World) -> None:
        """``async with pool.session()``, its beginning."""
        block = world.pools[self.life].session(rw=self.rw, timeout=0)
        session = await block.__aenter__()
        world.blocks[self.new], world.sessions[self.new] = block, session
        world.visited.add(session.handle)


@dataclass(frozen=True)
class CloseSession(Step):
    """Give it back."""

    where: str

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.close_session(self.where)
        return None

    async def act(self, world: World) -> None:
        """``async with pool.session()``, its end."""
        block = world.blocks.pop(self.where, None)
        if block is not None:
            await block.__aexit__(None, None, None)


@dataclass(frozen=True)
class Info(Step):
    """Ask the token for a session's state."""

    where: str

    def expect(self, model: Model) -> Right:
        """See the model."""
        return frozenset({model.state(self.where)})

    async def act(self, world: World) -> Hashable:
        """``await session.info()``."""
        info = await world.sessions[self.where].info()
        return info.rw, _user(info.state.name)


def _user(state: str) -> User:
    kind = state.split("_", 1)[1]
    return {"PUBLIC_SESSION": User.NOBODY, "USER_FUNCTIONS": User.USER}.get(
        kind, User.SO
    )


@dataclass(frozen=True)
class Visit(Step):
    """A session for one block, with a session object of its own that is used."""

    life: str
    new: str
    rw: bool
    private: bool
    timeout: float = 0

    def expect(self, model: Model) -> Right:
        """The object dies with the session."""
        model.open_session(self.life, self.new, rw=self.rw)
        try:
            model.check_write(self.life, self.new, token=False, private=self.private)
        finally:
            del model.sessions[self.new]
        return frozenset({sealed(value_of(self.new), b"visit")})

    async def act(self, world: World) -> bytes:
        """``async with pool.session() as session:``."""
        pool = world.pools[self.life]
        async with pool.session(rw=self.rw, timeout=self.timeout) as session:
            world.visited.add(session.handle)
            key: Any = await session.create_object(
                template(self.new, "a", private=self.private, token=False)
            )
            result: bytes = await key.on(session).encrypt(b"visit", **_CBC)
            return result


# -- Objects ----------------------------------------------------------------------

_CBC: Final[dict[str, Any]] = {
    "mechanism": Mechanism.AES_CBC_PAD,
    "mechanism_param": IV,
}


def template(name: str, label: str, *, private: bool, token: bool) -> Any:
    """The attributes of a secret key that the test makes."""
    return {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.AES,
        Attribute.VALUE: value_of(name),
        **_common(name, label),
        Attribute.TOKEN: token,
        Attribute.PRIVATE: private,
    }


def _common(name: str, label: str) -> Any:
    return {
        Attribute.LABEL: label,
        Attribute.ID: name.encode(),
        Attribute.SENSITIVE: False,
        Attribute.EXTRACTABLE: True,
        Attribute.ENCRYPT: True,
        Attribute.UNWRAP: True,
    }


def secret(name: str, label: str, *, private: bool, token: bool) -> Thing:
    """The same for the model."""
    value = value_of(name)
    return Thing(name, Kind.AES, label, private, token, None, 0, value)


@dataclass(frozen=True)
class Create(Step):
    """Make a secret key from its value: a token object, or a session's."""

    life: str
    where: str
    new: str
    label: str
    token: bool
    private: bool
    keep: bool = True
    changes = True

    def expect(self, model: Model) -> Right:
        """See the model."""
        thing = secret(self.new, self.label, private=self.private, token=self.token)
        ref = self.new if self.keep else None
        model.create(self.life, self.where, [thing], ref=ref)
        return None

    async def act(self, world: World) -> None:
        """``await calls.create_object()``."""
        world.refs[self.new] = await world.calls(self.life, self.where).create_object(
            template(self.new, self.label, private=self.private, token=self.token)
        )


@dataclass(frozen=True)
class Generate(Step):
    """Make a key pair. Its private half is a private object, its public one is not."""

    life: str
    where: str
    new: str
    label: str
    token: bool
    keep: bool = True
    changes = True

    def expect(self, model: Model) -> Right:
        """See the model."""
        halves = [
            Thing(name, kind, self.label, private, self.token, None, 0)
            for name, kind, private in (
                (self.new, Kind.PRIVATE, True),
                (f"{self.new}.pub", Kind.PUBLIC, False),
            )
        ]
        ref = self.new if self.keep else None
        model.create(self.life, self.where, halves, ref=ref)
        if self.keep:
            model.refer(self.life, halves[1], f"{self.new}.pub")
        return None

    async def act(self, world: World) -> None:
        """``await calls.generate_keypair()``."""
        public, private = await world.calls(self.life, self.where).generate_keypair(
            KeyType.EC,
            curve="secp256r1",
            label=self.label,
            id=self.new.encode(),
            store=self.token,
        )
        world.refs[self.new], world.refs[f"{self.new}.pub"] = private, public
        await world.learn_publics(self.life)


@dataclass(frozen=True)
class Unwrap(Step):
    """Unwrap a key with a secret key: into the token, or into a session."""

    ref: str
    where: str
    new: str
    value: bytes
    token: bool
    private: bool
    keep: bool = True
    changes = True

    def expect(self, model: Model) -> Right:
        """See the model."""
        if not self.token and self.where == "pool":
            raise Refused("SessionObjectNeedsSession")
        ref = model.refs[self.ref]
        model.resolve(ref, self.where)
        thing = secret(self.new, "b", private=self.private, token=self.token)
        kept = self.new if self.keep else None
        model.add(ref.life, self.where, [thing], ref=kept)
        return None

    async def act(self, world: World) -> None:
        """``await key.unwrap_key()``."""
        common = _common(self.new, "b") | {Attribute.PRIVATE: self.private}
        world.refs[self.new] = await world.ref(self.ref, self.where).unwrap_key(
            ObjectClass.SECRET_KEY,
            KeyType.AES,
            aes_key_wrap(self.value, value_of(self.new)),
            label=common.pop(Attribute.LABEL),
            id=common.pop(Attribute.ID),
            mechanism=Mechanism.AES_KEY_WRAP,
            store=self.token,
            template=common,
        )


@dataclass(frozen=True)
class Copy(Step):
    """Copy a secret key, under another label and id."""

    ref: str
    where: str
    new: str
    token: bool
    keep: bool = True
    changes = True

    def expect(self, model: Model) -> Right:
        """The copy is as private as the original."""
        if not self.token and self.where == "pool":
            raise Refused("SessionObjectNeedsSession")
        ref = model.refs[self.ref]
        thing = model.resolve(ref, self.where)
        made = secret(self.new, "c", private=thing.private, token=self.token)
        made.value = thing.value
        kept = self.new if self.keep else None
        model.add(ref.life, self.where, [made], ref=kept)
        return None

    async def act(self, world: World) -> None:
        """``await key.copy()``."""
        world.refs[self.new] = await world.ref(self.ref, self.where).copy(
            {
                Attribute.LABEL: "c",
                Attribute.ID: self.new.encode(),
                Attribute.TOKEN: self.token,
            }
        )


@dataclass(frozen=True)
class Destroy(Step):
    """Destroy an object."""

    ref: str
    where: str
    changes = True

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.destroy(model.refs[self.ref], self.where)
        return None

    async def act(self, world: World) -> None:
        """``await ref.destroy()``."""
        await world.ref(self.ref, self.where).destroy()


@dataclass(frozen=True)
class Relabel(Step):
    """Write an attribute of an object: its label."""

    ref: str
    where: str
    label: str
    changes = True

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.relabel(model.refs[self.ref], self.where, self.label)
        return None

    async def act(self, world: World) -> None:
        """``await ref.set_attributes()``; the reference that it gives takes over."""
        changed = await world.ref(self.ref, self.where).set_attributes(
            {Attribute.LABEL: self.label}
        )
        # Bound to the session, if it was made there: bind it to the pool again.
        bound = world.refs[self.ref]._calls  # noqa: SLF001  # where it was made
        world.refs[self.ref] = type(changed)(bound, changed._target)  # noqa: SLF001


@dataclass(frozen=True)
class Find(Step):
    """Search, with a label or for all."""

    life: str
    where: str
    label: str | None

    def expect(self, model: Model) -> Right:
        """See the model."""
        return frozenset(
            {tuple(sorted(model.visible(self.life, self.where, self.label)))}
        )

    async def act(self, world: World) -> Hashable:
        """``await calls.find()``."""
        calls = world.calls(self.life, self.where)
        wanted = None if self.label is None else {Attribute.LABEL: self.label}
        return await _ids(await calls.find(wanted), calls)


async def _ids(found: list[Any], calls: Any) -> tuple[str, ...]:
    ids = []
    for ref in found:
        seen = await ref.on(calls).attributes([Attribute.ID])
        ids.append(seen[Attribute.ID].decode())
    return tuple(sorted(ids))


@dataclass(frozen=True)
class Look(Step):
    """Search with python-pkcs11, inside of ``run``; the session is kept after it."""

    life: str
    where: str
    repeat: bool

    def expect(self, model: Model) -> Right:
        """It sees what every session sees."""
        return frozenset({tuple(model.visible(self.life, self.where, None))})

    async def act(self, world: World) -> Hashable:
        """``await calls.run(func)``."""
        calls = world.calls(self.life, self.where)
        session, objects, ids = await calls.run(_look, repeat=self.repeat)
        if self.where == "pool":
            _check_harmless(session, objects)
        return tuple(sorted(ids))


def _look(session: Any) -> Any:
    objects = list(session.get_objects())
    return session, objects, [item[Attribute.ID].decode() for item in objects]


def _check_harmless(session: Any, objects: list[Any]) -> None:
    """What was kept beyond the call raises, and reaches nobody's session."""
    for use in (
        lambda: session.generate_random(64),
        session.close,
        *(item.destroy for item in objects[:1]),
    ):
        try:
            use()
        except Exception:  # noqa: BLE001, S112  # as it should be, whatever it says
            continue
        assert use == session.close, "a session was of use after its call"


@dataclass(frozen=True)
class Make(Step):
    """Make a token object with python-pkcs11, inside of ``run``."""

    life: str
    new: str
    rw: bool
    private: bool

    @property
    def changes(self) -> bool:  # type: ignore[override]
        """With ``rw=True`` it counts as changing the token."""
        return self.rw

    def expect(self, model: Model) -> Right:
        """A R/O session makes none."""
        model.door(self.life)
        if not self.rw:
            raise Refused("SessionReadOnly")
        thing = secret(self.new, "c", private=self.private, token=True)
        model.add(self.life, "pool", [thing], ref=None)
        return None

    async def act(self, world: World) -> None:
        """``await pool.run(func, rw=True)``."""
        made = template(self.new, "c", private=self.private, token=True)
        await world.pools[self.life].run(_make, made, rw=self.rw)


def _make(session: Any, template: Any) -> None:
    session.create_object(template)


# -- Use --------------------------------------------------------------------------


@dataclass(frozen=True)
class Encrypt(Step):
    """Encrypt with a secret key that a reference names."""

    ref: str
    where: str

    def expect(self, model: Model) -> Right:
        """By the value of that key and no other."""
        thing = model.resolve(model.refs[self.ref], self.where)
        return frozenset({sealed(thing.value, b"data")})

    async def act(self, world: World) -> bytes:
        """``await key.encrypt()``."""
        key = world.ref(self.ref, self.where)
        result: bytes = await key.encrypt(b"data", **_CBC)
        return result


@dataclass(frozen=True)
class Sign(Step):
    """Sign with a private key that a reference names."""

    ref: str
    where: str

    def expect(self, model: Model) -> Right:
        """Its own public key verifies it."""
        return frozenset({model.resolve(model.refs[self.ref], self.where).id})

    async def act(self, world: World) -> str:
        """``await key.sign()``."""
        key = world.ref(self.ref, self.where)
        raw = await key.sign(sha256(b"data"), mechanism=Mechanism.ECDSA)
        return await world.signer(sha256(b"data"), raw)


@dataclass(frozen=True)
class SignMany(Step):
    """Sign many items: the signatures come in the order of the items."""

    ref: str
    items: int

    def expect(self, model: Model) -> Right:
        """Each is of this key."""
        thing = model.resolve(model.refs[self.ref])
        return frozenset({(thing.id,) * self.items})

    async def act(self, world: World) -> Hashable:
        """``async for signature in key.sign_many(items)``."""
        key = world.refs[self.ref]
        items = [sha256(f"item {n}".encode()) for n in range(self.items)]
        signers = []
        made = [raw async for raw in key.sign_many(items, mechanism=Mechanism.ECDSA)]
        for item, raw in zip(items, made, strict=True):
            signers.append(await world.signer(item, raw))
        return tuple(signers)


@dataclass(frozen=True)
class Verify(Step):
    """Verify a signature with a public key: a wrong one."""

    ref: str
    where: str

    def expect(self, model: Model) -> Right:
        """It is false, and no error."""
        model.resolve(model.refs[self.ref], self.where)
        return frozenset({False})

    async def act(self, world: World) -> bool:
        """``await key.verify()``."""
        key = world.ref(self.ref, self.where)
        result: bool = await key.verify(
            sha256(b"data"), bytes(range(1, 65)), mechanism=Mechanism.ECDSA
        )
        return result


@dataclass(frozen=True)
class EncryptBy(Step):
    """Encrypt with the key that a label names."""

    life: str
    where: str
    label: str

    def expect(self, model: Model) -> Right:
        """Where several match, it is refused, unless one was known before."""
        found = model.named(self.life, self.where, self.label, Kind.AES)
        right: set[Any] = {sealed(thing.value, b"data") for thing in found}
        return frozenset(right | ({Error("KeyAmbiguous")} if len(found) > 1 else set()))

    async def act(self, world: World) -> bytes:
        """``await calls.key(label=).encrypt()``."""
        pool = world.pools[self.life]
        key = pool.key(label=self.label)
        if self.where != "pool":
            key = key.on(world.sessions[self.where])
        return await key.encrypt(b"data", **_CBC)


@dataclass(frozen=True)
class Digest(Step):
    """The cheapest call."""

    life: str
    where: str

    def expect(self, model: Model) -> Right:
        """It needs no login."""
        model.door(self.life, self.where)
        return frozenset({sha256(b"data")})

    async def act(self, world: World) -> bytes:
        """``await calls.digest()``."""
        calls = world.calls(self.life, self.where)
        result: bytes = await calls.digest(b"data", mechanism=Mechanism.SHA256)
        return result


# -- Data in parts ----------------------------------------------------------------


@dataclass(frozen=True)
class BeginStream(Step):
    """Begin to encrypt data in parts, and leave it there."""

    ref: str
    new: str
    #: 0 would end the whole stream's time, too: so it is not without waiting.
    timeout: float = 30

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.begin_stream(self.new, model.refs[self.ref], PIECES)
        return partial(_is_prefix, model.streams[self.new].value)

    async def act(self, world: World) -> bytes:
        """``key.encrypt_stream()``, and its first output."""
        key = world.refs[self.ref]
        pieces = [LONG[i : i + _PIECE] for i in range(0, len(LONG), _PIECE)]
        stream = key.encrypt_stream(pieces, timeout=self.timeout, **_CBC)
        world.outputs[self.new] = await stream.__anext__()
        world.streams[self.new] = stream
        return world.outputs[self.new]


def _is_prefix(value: bytes, output: bytes) -> bool:
    """Whether so much of it is right."""
    return sealed(value, LONG).startswith(output)


@dataclass(frozen=True)
class FeedStream(Step):
    """Ask for the next output."""

    stream: str

    def expect(self, model: Model) -> Right:
        """All of it is right, after the last piece."""
        if not model.feed(self.stream):
            return frozenset({b"over"})
        stream = model.streams[self.stream]
        if stream.left:
            return partial(_is_prefix, stream.value)
        return frozenset({sealed(stream.value, LONG)})

    async def act(self, world: World) -> bytes:
        """``await anext(stream)``."""
        try:
            output = await world.streams[self.stream].__anext__()
        except StopAsyncIteration:
            return b"over"
        world.outputs[self.stream] += output
        return world.outputs[self.stream]


@dataclass(frozen=True)
class EndStream(Step):
    """Break off: close it, or forget it."""

    stream: str
    forget: bool

    def expect(self, model: Model) -> Right:
        """See the model."""
        model.end_stream(self.stream)
        return None

    async def act(self, world: World) -> None:
        """``await stream.aclose()``, or nothing at all."""
        if not self.forget:
            await world.streams[self.stream].aclose()
            return
        pool = world.forget(self.stream)
        with suppress(PoolClosed):
            # The next call that comes finds it forgotten.
            await pool.digest(b"", mechanism=Mechanism.SHA256)
