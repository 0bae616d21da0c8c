"""The token that is measured: a throwaway one with SoftHSM2, or the user's own.

The keys are made there by the pool and destroyed at the end. On the user's own token
they have a label that nobody else gives.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
from pkcs11 import Attribute

from pkcs11_pool import softhsm
from pkcs11_pool.bench import work
from pkcs11_pool.bench.measure import Scenario
from pkcs11_pool.errors import PinSourceError, TokenAmbiguous
from pkcs11_pool.faces.administration import list_tokens
from pkcs11_pool.faces.pool import TokenPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkcs11_pool.bench.options import GivenToken
    from pkcs11_pool.bench.work import Material
    from pkcs11_pool.state import TokenInfo


@dataclass(frozen=True)
class Token:
    """A token and the way to it.

    Attributes:
        module: The Cryptoki module.
        chosen: Which token, as options of a pool.
        pin: The user's PIN.
        throwaway: Whether it is gone afterwards.
    """

    module: str
    chosen: dict[str, Any]
    pin: str = field(repr=False)
    throwaway: bool

    def pool(self) -> TokenPool:
        """An unopened pool on it."""
        return TokenPool(self.module, pin=self.pin, **self.chosen)


@contextlib.contextmanager
def throwaway(tell: Callable[[str], None]) -> Iterator[Token]:
    """Give a token of SoftHSM2 to the block; gone afterwards.

    Raises:
        softhsm.SoftHSMUnavailable: There is none.
    """
    hsm = softhsm.ensure(tell)
    with softhsm.throwaway_token("bench", softhsm=hsm) as made:
        chosen = {"token_label": made.label}
        yield Token(str(made.module), chosen, made.user_pin, throwaway=True)


def given(wanted: GivenToken) -> Token:
    """The user's own token. Asks for the PIN.

    Raises:
        PinSourceError: It cannot be had.
    """
    pin = wanted.pin().encoded().decode()
    # It goes to the clients as a line of text.
    if not pin or "\n" in pin:
        raise PinSourceError("a PIN must be one line of text, and not empty")
    return Token(str(wanted.module), wanted.chosen, pin, throwaway=False)


@contextlib.contextmanager
def with_keys(token: Token, name: str = "local", title: str = "") -> Iterator[Scenario]:
    """Make the keys on a token for the length of a block.

    Raises:
        PoolError, pkcs11.PKCS11Error: The token refused.
    """
    prefix = f"bench-{secrets.token_hex(4)}"
    material, info, about = anyio.run(_make, token, prefix)
    try:
        yield Scenario(
            name=name,
            title=title or about,
            module=token.module,
            label=info.label,
            slot_id=info.slot_id,
            pin=token.pin,
            material=material,
        )
    finally:
        if not token.throwaway:
            anyio.run(_destroy, token, prefix)


async def _make(token: Token, prefix: str) -> tuple[Material, TokenInfo, str]:
    async with token.pool() as pool:
        await _is_the_only_one(pool, token.module)
        try:
            material = await work.make_keys(pool, prefix)
        except BaseException:
            # Not by a second opening: a wrong PIN would be sent a second time.
            if not token.throwaway:
                with anyio.CancelScope(shield=True):
                    await _destroy_in(pool, prefix)
            raise
        major, minor = pool.lib.library_version
        about = f"{pool.lib.manufacturer_id.strip()} {major}.{minor}"
        return material, pool.token, about


async def _is_the_only_one(pool: TokenPool, module: str) -> None:
    """Clients go by the label: no other token may get the PIN, or the load.

    Raises:
        TokenAmbiguous: Another token has it, too.
    """
    label = pool.token.label
    if [info.label for info in await list_tokens(module)].count(label) > 1:
        raise TokenAmbiguous(
            f"more than one token has the label {label!r}, and the programs that are "
            "measured go by it: measure a token whose label is its own"
        )


async def _destroy(token: Token, prefix: str) -> None:
    async with token.pool() as pool:
        await _destroy_in(pool, prefix)


async def _destroy_in(pool: TokenPool, prefix: str) -> None:
    for operation in work.KEYS:
        for ref in await pool.find({Attribute.LABEL: f"{prefix}-{operation}"}):
            await ref.destroy()
