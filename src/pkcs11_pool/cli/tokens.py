"""Commands on tokens as a whole: list them and what they hold, initialise, set PINs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
from cyclopts import Parameter
from pkcs11.constants import Attribute, ObjectClass, TokenFlag
from pkcs11.mechanisms import KeyType, Mechanism

from pkcs11_pool import pins
from pkcs11_pool.cli import output
from pkcs11_pool.cli.exits import CommandError
from pkcs11_pool.cli.options import (
    PIN_VARIABLE,
    ModuleOptions,
    PinOptions,
    TokenOptions,
    asked,
    asked_twice,
    by_default,
    chosen,
)
from pkcs11_pool.faces.administration import init_token, list_tokens
from pkcs11_pool.state import TokenInfo

_ABOUT_PINS: Final = {
    TokenFlag.USER_PIN_LOCKED: "locked",
    TokenFlag.USER_PIN_FINAL_TRY: "final try",
    TokenFlag.USER_PIN_COUNT_LOW: "wrong before",
    TokenFlag.USER_PIN_TO_BE_CHANGED: "to be changed",
}
_SHOWN: Final = {
    "private": Attribute.PRIVATE,
    "extractable": Attribute.EXTRACTABLE,
    "modifiable": Attribute.MODIFIABLE,
    "sign": Attribute.SIGN,
    "verify": Attribute.VERIFY,
    "encrypt": Attribute.ENCRYPT,
    "decrypt": Attribute.DECRYPT,
    "wrap": Attribute.WRAP,
    "unwrap": Attribute.UNWRAP,
    "derive": Attribute.DERIVE,
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OfficerOptions:
    """Where the PIN of the security officer comes from; else it is asked for.

    Attributes:
        so_pin_env: Variable that holds the PIN of the security officer.
        so_pin_file: File whose first line is the PIN of the security officer.
    """

    so_pin_env: str | None = None
    so_pin_file: Path | None = None

    def secret(self) -> pins.Secret:
        """The PIN of the security officer."""
        source = chosen(
            {
                "--so-pin-env": self.so_pin_env and pins.env(self.so_pin_env),
                "--so-pin-file": self.so_pin_file
                and pins.file(self.so_pin_file, pipe=True),
            }
        )
        if source is None:
            return asked("PIN of the security officer: ")
        return pins.literal(source())


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NewPinOptions:
    """Where a new PIN comes from; else it is asked for twice.

    Attributes:
        new_pin_env: Variable that holds the new PIN.
        new_pin_file: File whose first line is the new PIN.
    """

    new_pin_env: str | None = None
    new_pin_file: Path | None = None

    def secret(self) -> pins.Secret:
        """The new PIN."""
        source = chosen(
            {
                "--new-pin-env": self.new_pin_env and pins.env(self.new_pin_env),
                "--new-pin-file": self.new_pin_file
                and pins.file(self.new_pin_file, pipe=True),
            }
        )
        return asked_twice("the user") if source is None else pins.literal(source())


def tokens(*, where: ModuleOptions = ModuleOptions(), json: bool = False) -> None:
    """List the tokens of a module.

    Args:
        where: Which module.
        json: Print JSON, with the mechanisms of each token.
    """
    found = anyio.run(list_tokens, where.module_path())
    if json:
        output.as_json([described(info) for info in found])
        return
    if not found:
        output.note("the module has no token; `pkcs11-pool doctor` may say why")
        return
    columns = ["slot", "label", "serial", "model", "manufacturer", "state"]
    output.table(columns, (_row(info) for info in found))


def objects(
    *,
    where: TokenOptions = TokenOptions(),
    no_login: bool = False,
    json: bool = False,
) -> None:
    """List the objects of a token; their values stay there.

    Args:
        where: Which token.
        no_login: Do not log in: only public objects are seen.
        json: Print JSON.
    """
    found = anyio.run(_objects, where, not no_login)
    if json:
        output.as_json(found)
        return
    rows = (
        (
            item["class"],
            item["key_type"] or "",
            item["label"] or "",
            (item["id"] or b"").hex(),
            ", ".join(name for name in _SHOWN if item.get(name)),
        )
        for item in found
    )
    output.table(["class", "type", "label", "id", "may"], rows)


async def _objects(where: TokenOptions, login: bool) -> list[dict[str, Any]]:  # noqa: FBT001
    wanted = (Attribute.CLASS, Attribute.KEY_TYPE, Attribute.LABEL, Attribute.ID)
    async with where.pool(login=login) as pool:
        made = []
        for ref in await pool.find():
            told = await ref.attributes((*wanted, *_SHOWN.values()))
            made.append(_object(told))
    return sorted(made, key=lambda item: (item["label"] or "", item["class"]))


def _object(told: dict[Attribute, Any]) -> dict[str, Any]:
    made = {
        "class": _name(ObjectClass, told.get(Attribute.CLASS)),
        "key_type": _name(KeyType, told.get(Attribute.KEY_TYPE)),
        "label": told.get(Attribute.LABEL),
        "id": told.get(Attribute.ID),
    }
    more = {name: told[kind] for name, kind in _SHOWN.items() if kind in told}
    return {**made, **more}


def _name(kind: Any, value: Any) -> str | None:
    """The name of a constant, or a vendor's number; None for none."""
    if value is None or (isinstance(value, int) and value >= (1 << 32) - 1):
        return None
    try:
        return str(kind(value).name)
    except ValueError:
        return f"{int(value):#x}"


def init(
    label: str,
    /,
    *,
    where: ModuleOptions = ModuleOptions(),
    slot: int | None = None,
    officer: OfficerOptions = OfficerOptions(),
    user: PinOptions = PinOptions(),
    no_user_pin: bool = False,
    wipe: bool = False,
    json: bool = False,
) -> None:
    """Initialise a token, with the PINs of its security officer and its user.

    Args:
        label: Its label from now on.
        where: Which module.
        slot: Its slot; without, the only one whose token is not initialised.
        officer: PIN of the security officer: new, or the present one of a used token.
        user: The user's first PIN.
        no_user_pin: Leave the user's PIN unset.
        wipe: Initialise a used token anew: all its objects are destroyed.
        json: Print JSON.
    """
    module = where.module_path()
    chosen_slot = _free_slot(module) if slot is None else slot
    so_pin = officer.secret()
    first = None if no_user_pin else _first_pin(user)

    async def work() -> TokenInfo:
        return await init_token(
            module,
            slot_id=chosen_slot,
            label=label,
            so_pin=so_pin,
            user_pin=first,
            wipe=wipe,
        )

    info = anyio.run(work)
    if json:
        output.as_json(described(info))
    else:
        output.say(f"initialised {info}")


def _first_pin(user: PinOptions) -> pins.Secret:
    source = user.source("First PIN of the user: ")
    if source is None:
        source = by_default("First PIN of the user: ")
    return source if isinstance(source, pins.Secret) else pins.literal(source())


def _free_slot(module: str) -> int:
    fresh = [
        info.slot_id
        for info in anyio.run(list_tokens, module)
        if not info.flags & TokenFlag.TOKEN_INITIALIZED
    ]
    if len(fresh) != 1:
        raise CommandError(
            f"which slot? {len(fresh)} tokens are not initialised: give --slot; "
            "`pkcs11-pool tokens` shows them"
        )
    return fresh[0]


def set_pin(
    *,
    where: TokenOptions = TokenOptions(),
    new: NewPinOptions = NewPinOptions(),
    by_officer: bool = False,
    officer: OfficerOptions = OfficerOptions(),
    json: bool = False,
) -> None:
    """Change the user's PIN; or set it as the security officer, who can unlock it.

    Args:
        where: Which token; its PIN is the present one.
        new: The new PIN.
        by_officer: Set it as the security officer. The present PIN is not needed.
        officer: PIN of the security officer.
        json: Print JSON.
    """
    if by_officer:
        so_pin = officer.secret()
        anyio.run(_reset, where, so_pin, new.secret())
    else:
        anyio.run(_change, where, new)
    if json:
        output.as_json({"changed": True})
    else:
        output.say("the user's PIN is changed")


async def _reset(where: TokenOptions, so_pin: pins.Secret, new: pins.Secret) -> None:
    async with where.pool(so=True) as pool, pool.security_officer(so_pin) as so:
        await so.init_pin(new)  # type: ignore[arg-type]  # hidden already


async def _change(where: TokenOptions, new: NewPinOptions) -> None:
    source = where.pin(where.parsed())
    if source is None:
        raise CommandError(
            "the present PIN comes from a word such as --pin-prompt here, or from "
            f"{PIN_VARIABLE}: not from the URI"
        )
    old = source if isinstance(source, pins.Secret) else pins.literal(source())
    # Both are known before the token is asked for anything.
    wanted = new.secret()
    async with where.pool(login=False) as pool:
        await pool.login(old)  # type: ignore[arg-type]  # hidden already
        await pool.set_pin(old, wanted)  # type: ignore[arg-type]


def described(info: TokenInfo) -> dict[str, Any]:
    """A token as JSON has it."""
    return {
        "label": info.label,
        "serial": info.serial.decode(errors="replace"),
        "model": info.model,
        "manufacturer": info.manufacturer,
        "slot": info.slot_id,
        "flags": sorted(flag.name for flag in TokenFlag if flag in info.flags),
        "max_sessions": info.max_sessions,
        "max_rw_sessions": info.max_rw_sessions,
        "pin_length": [info.min_pin_len, info.max_pin_len],
        "mechanisms": sorted(filter(None, (_mechanism(n) for n in info.mechanisms))),
    }


def _mechanism(number: int) -> str | None:
    return _name(Mechanism, number)


def _row(info: TokenInfo) -> tuple[str, ...]:
    return (
        str(info.slot_id),
        info.label,
        info.serial.decode(errors="replace"),
        info.model,
        info.manufacturer,
        _state(info.flags),
    )


def _state(flags: TokenFlag) -> str:
    if not flags & TokenFlag.TOKEN_INITIALIZED:
        return "not initialised"
    if not flags & TokenFlag.USER_PIN_INITIALIZED:
        return "no user PIN"
    about = [text for flag, text in _ABOUT_PINS.items() if flags & flag]
    return f"PIN {', '.join(about)}" if about else "ready"
