"""Steps of pools, logins and sessions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.spec import Model, User
from model.step import (
    CBC,
    Right,
    Step,
    ids_of,
    sealed,
    secret,
    template,
    value_of,
)
from pkcs11_pool import LoginRequired

if TYPE_CHECKING:
    from collections.abc import Hashable

    from model.world import World


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
            found = await ids_of(await so.session.find(), so.session)
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
            result: bytes = await key.encrypt(b"visit", **CBC)
            return result
