"""Steps that make, change, find and destroy objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from model.spec import Kind, Model, Refused, Thing
from model.step import (
    Right,
    Step,
    common,
    ids_of,
    secret,
    template,
    value_of,
)

if TYPE_CHECKING:
    from collections.abc import Hashable

    from model.world import World


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
        given = common(self.new, "b") | {Attribute.PRIVATE: self.private}
        world.refs[self.new] = await world.ref(self.ref, self.where).unwrap_key(
            ObjectClass.SECRET_KEY,
            KeyType.AES,
            aes_key_wrap(self.value, value_of(self.new)),
            label=given.pop(Attribute.LABEL),
            id=given.pop(Attribute.ID),
            mechanism=Mechanism.AES_KEY_WRAP,
            store=self.token,
            template=given,
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
    heard: bool = True
    changes = True

    def expect(self, model: Model) -> Right:
        """See the model."""
        ref = model.refs[self.ref]
        model.relabel(ref, self.where, self.label, heard=self.heard)
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
        return await ids_of(await calls.find(wanted), calls)


@dataclass(frozen=True)
class Look(Step):
    """Search with python-pkcs11, inside of ``run``; the session is kept after it."""

    life: str
    where: str
    repeat: bool
    #: Whether it gives the labels, too.
    labels: bool = False

    def expect(self, model: Model) -> Right:
        """It sees what every session sees."""
        found = model.visible(self.life, self.where, None, labels=self.labels)
        return frozenset({tuple(found)})

    async def act(self, world: World) -> Hashable:
        """``await calls.run(func)``."""
        calls = world.calls(self.life, self.where)
        session, objects, found = await calls.run(
            _look, self.labels, repeat=self.repeat
        )
        if self.where == "pool":
            _check_harmless(session, objects)
        return tuple(sorted(found))


def _look(session: Any, labels: bool) -> Any:  # noqa: FBT001  # run() has no keywords
    objects = list(session.get_objects())
    found = [
        item[Attribute.ID].decode() + (f" {item[Attribute.LABEL]}" if labels else "")
        for item in objects
    ]
    return session, objects, found


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
