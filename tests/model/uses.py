"""Steps that use keys, on data whole and in parts."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Mechanism

from keykit import sha256
from model.spec import Kind, Model
from model.step import (
    CBC,
    Error,
    Right,
    Step,
    sealed,
)
from pkcs11_pool import PoolClosed

if TYPE_CHECKING:
    from collections.abc import Hashable

    from model.world import World

_PIECE: Final = 64 * 1024
PIECES: Final = 4
LONG: Final = bytes(range(256)) * (_PIECE * PIECES // 256)
"""Data that goes to the token in parts."""


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
        result: bytes = await key.encrypt(b"data", **CBC)
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
        return await key.encrypt(b"data", **CBC)


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
        stream = key.encrypt_stream(pieces, timeout=self.timeout, **CBC)
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
