"""The command that makes keys, and says which ones the token can make."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import anyio
from cyclopts import Parameter
from pkcs11 import PKCS11Error
from pkcs11 import exceptions as p11
from pkcs11.constants import Attribute
from pkcs11.mechanisms import KeyType, Mechanism

from pkcs11_pool.cli import output
from pkcs11_pool.cli.exits import CommandError, Exit, explained
from pkcs11_pool.cli.options import TokenOptions, octets_id
from pkcs11_pool.errors import PoolError

if TYPE_CHECKING:
    import pkcs11

    from pkcs11_pool.faces.pool import TokenPool

Kind = Literal["ec", "ed25519", "rsa", "aes"]

_CURVE: Final = "secp256r1"
_RSA_BITS: Final = 2048
_AES_BITS: Final = 256
_AES_SIZES: Final = (128, 192, 256)
_MECHANISMS: Final = {
    "ec": Mechanism.EC_KEY_PAIR_GEN,
    "ed25519": Mechanism.EC_EDWARDS_KEY_PAIR_GEN,
    "rsa": Mechanism.RSA_PKCS_KEY_PAIR_GEN,
    "aes": Mechanism.AES_KEY_GEN,
}
_NAMES: Final = {"ec": "EC", "ed25519": "Ed25519", "rsa": "RSA", "aes": "AES"}


def keygen(
    label: str,
    /,
    *,
    where: TokenOptions = TokenOptions(),
    kind: Annotated[Kind, Parameter(name="--type")] = "ec",
    curve: str | None = None,
    bits: int | None = None,
    id: Annotated[bytes | None, Parameter(converter=octets_id)] = None,  # noqa: A002
    public_key: Path | None = None,
    json: bool = False,
) -> None:
    """Make a key, or a pair of keys, on the token; the public half is printed.

    Args:
        label: Label of the key, of both halves of a pair.
        where: Which token.
        kind: What kind of key.
        curve: Of an EC key (secp256r1).
        bits: Size of an RSA key (2048) or an AES key (256).
        id: Id of the key, in hexadecimal digits.
        public_key: Write the public key there, as PEM, and not to standard output.
        json: Print JSON.
    """
    order = Order(label, id, kind, curve, bits)
    if public_key is not None and kind == "aes":
        raise CommandError("an AES key has no public half: take --public-key out")
    # The PIN is asked for here, before anything moves on the terminal.
    pool = where.pool()
    with output.working(f"making a key of type {kind}"):
        der = anyio.run(_make, pool, order)
    pem = None if der is None else _pem(der)
    if pem is not None and public_key is not None:
        public_key.write_text(pem)
    if json:
        output.as_json({"label": label, "id": id, "type": kind, "public_key": pem})
    elif pem is None or public_key is not None:
        output.say(f"made {label!r}")
    else:
        sys.stdout.write(pem)


@dataclass(frozen=True)
class Order:
    """The key that is wanted. What does not go with its kind is refused, not ignored.

    Raises:
        CommandError: A curve or a size does not go with the kind.
    """

    label: str
    id: bytes | None
    kind: Kind
    curve: str | None
    bits: int | None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.curve is not None and self.kind != "ec":
            raise CommandError(f"--curve is of --type ec, not of --type {self.kind}")
        if self.bits is None:
            return
        if self.kind not in ("rsa", "aes"):
            raise CommandError(
                f"--bits is of --type rsa and aes, not of --type {self.kind}"
                + (": --curve is its size" if self.kind == "ec" else "")
            )
        if self.bits < 1:
            raise CommandError(f"--bits is a size, such as 2048, not {self.bits}")

    def options(self) -> dict[str, Any]:
        """What to ask for, as the pool takes it."""
        named = {"label": self.label, "id": self.id, "store": True}
        if self.kind == "ec":
            return {**named, "key_type": KeyType.EC, "curve": self.curve or _CURVE}
        if self.kind == "ed25519":
            return {**named, "key_type": KeyType.EC_EDWARDS, "curve": "ed25519"}
        if self.kind == "rsa":
            kind, usual = KeyType.RSA, _RSA_BITS
        else:
            kind, usual = KeyType.AES, _AES_BITS
        return {**named, "key_type": kind, "key_length": self.bits or usual}


async def _make(pool: TokenPool, order: Order) -> bytes | None:
    async with pool:
        if await pool.find({Attribute.LABEL: order.label, Attribute.TOKEN: True}):
            raise CommandError(
                f"there is an object {order.label!r} already: another label, or "
                "nobody will know which one is meant",
                Exit.KEY,
            )
        can = await pool.run(_can_make, order.kind)
        can.check(order)
        try:
            if order.kind == "aes":
                await pool.generate_key(**order.options())
                return None
            public, _ = await pool.generate_keypair(**order.options())
        except PKCS11Error as error:
            if isinstance(error, PoolError):
                raise
            raise can.advised(error) from error
        return await public.public_key_der()


@dataclass(frozen=True)
class CanMake:
    """What a token says of the keys of one kind that it makes.

    Attributes:
        kind: Which kind.
        sizes: Smallest and largest size in bits; None: it does not say.
    """

    kind: Kind
    sizes: tuple[int, int] | None

    def check(self, order: Order) -> None:
        """Refuse a size that the token does not take: it may only say that it failed.

        Raises:
            CommandError: The size is none of the token's.
        """
        if order.bits is None or self.sizes is None:
            return
        least, most = self.sizes
        fits = least <= order.bits <= most
        if not fits or (self.kind == "aes" and order.bits not in _AES_SIZES):
            raise CommandError(f"--bits {order.bits}: {self}")

    def advised(self, error: PKCS11Error) -> CommandError:
        """An answer of the token, with what it says that it makes."""
        told = explained(error)
        return CommandError(f"{told[0] if told else error}; {self}", Exit.REFUSED)

    def __str__(self) -> str:
        """What it makes, for people."""
        name = _NAMES[self.kind]
        if self.sizes is None:
            return f"the token does not say which sizes of {name} keys it makes"
        least, most = self.sizes
        if self.kind == "aes":
            known = [str(size) for size in _AES_SIZES if least <= size <= most]
            return f"the token makes {name} keys of {', '.join(known)} bits"
        return f"the token makes {name} keys of {least} to {most} bits"


def _can_make(session: pkcs11.Session, kind: Kind) -> CanMake:
    """Ask the token for the sizes of a kind of key (``C_GetMechanismInfo``).

    Raises:
        CommandError: It makes none of that kind.
    """
    mechanism = _MECHANISMS[kind]
    try:
        info = session.token.slot.get_mechanism_info(mechanism)
    except p11.MechanismInvalid as error:
        raise CommandError(
            f"the token makes no {_NAMES[kind]} keys: it has no CKM_{mechanism.name}; "
            "`pkcs11-pool tokens --json` shows what it has",
            Exit.REFUSED,
        ) from error
    except PKCS11Error:
        return CanMake(kind, None)
    least, most = info.min_key_length or 0, info.max_key_length or 0
    # Of AES they are bytes, by the standard; not every token reads it so.
    unit = 8 if kind == "aes" and most <= max(_AES_SIZES) // 8 else 1
    return CanMake(kind, (unit * least, unit * most) if most else None)


def _pem(der: bytes) -> str:
    text = base64.encodebytes(der).decode().replace("\n", "")
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    edge = "-----{} PUBLIC KEY-----"
    return "\n".join([edge.format("BEGIN"), *lines, edge.format("END"), ""])
