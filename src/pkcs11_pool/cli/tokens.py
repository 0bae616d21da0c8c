"""Commands on tokens as a whole: list them and what they hold, initialise, set PINs."""

from __future__ import annotations

from typing import Any, Final

import anyio
from pkcs11.constants import Attribute, ObjectClass, TokenFlag
from pkcs11.mechanisms import KeyType, Mechanism

from pkcs11_pool.cli import output
from pkcs11_pool.cli.exits import CommandError
from pkcs11_pool.cli.options import (
    ModuleOptions,
    TokenOptions,
)
from pkcs11_pool.cli.pin_options import (
    NewPinOptions,
    OfficerOptions,
    PinOptions,
    refused,
)
from pkcs11_pool.faces.administration import init_token, list_tokens
from pkcs11_pool.pins import Secret
from pkcs11_pool.state import TokenInfo
from pkcs11_pool.uri import Pkcs11URI

_ABOUT_PINS: Final = {
    TokenFlag.USER_PIN_LOCKED: "locked",
    TokenFlag.USER_PIN_FINAL_TRY: "final try",
    TokenFlag.USER_PIN_COUNT_LOW: "wrong before",
    TokenFlag.USER_PIN_TO_BE_CHANGED: "to be changed",
}
_CLASSES: Final = {
    "public": ObjectClass.PUBLIC_KEY,
    "private": ObjectClass.PRIVATE_KEY,
    "cert": ObjectClass.CERTIFICATE,
    "secret-key": ObjectClass.SECRET_KEY,
    "data": ObjectClass.DATA,
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
    """List the objects of a token, or those that the URI names; values stay there.

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
    named = _template(where.parsed())
    async with where.pool(login=login) as pool:
        made = []
        for ref in await pool.find(named):
            told = await ref.attributes((*wanted, *_SHOWN.values()))
            made.append(_object(told))
    return sorted(made, key=lambda item: (item["label"] or "", item["class"]))


def _template(uri: Pkcs11URI) -> dict[Attribute, Any]:
    """What an object has that a URI names."""
    kind = None if uri.type is None else _CLASSES[uri.type]
    named = {
        Attribute.LABEL: uri.object,
        Attribute.ID: uri.id,
        Attribute.CLASS: kind,
    }
    return {name: value for name, value in named.items() if value is not None}


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
    allow_same_label: bool = False,
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
        allow_same_label: Also with a label that another token of the module has.
        json: Print JSON.
    """
    module = where.module_path()
    if no_user_pin:
        refused("pin", user, "--no-user-pin leaves it unset")
    found = anyio.run(list_tokens, module)
    chosen = where.parsed().slot_id if slot is None else slot
    if chosen is None:
        chosen = _free_slot(found)
    if not allow_same_label:
        _check_label(label, [info for info in found if info.slot_id != chosen])
    here = [info for info in found if info.slot_id == chosen]
    used = any(info.flags & TokenFlag.TOKEN_INITIALIZED for info in here)
    if used and not wipe:
        raise CommandError(
            f"token {here[0]} is initialised already: --wipe initialises it anew and "
            "destroys all its objects"
        )
    so_pin = officer.secret(new=not used)
    first = None if no_user_pin else user.first()

    async def work() -> TokenInfo:
        return await init_token(
            module,
            slot_id=chosen,
            label=label,
            so_pin=so_pin,
            user_pin=first,
            wipe=wipe,
        )

    with output.working(f"initialising {label!r}"):
        info = anyio.run(work)
    if json:
        output.as_json(described(info))
    else:
        output.say(f"initialised {info}")


def _free_slot(found: list[TokenInfo]) -> int:
    fresh = [
        info.slot_id for info in found if not info.flags & TokenFlag.TOKEN_INITIALIZED
    ]
    if len(fresh) == 1:
        return fresh[0]
    how_many = f"{len(fresh)} tokens are" if fresh else "no token is one that is"
    raise CommandError(
        f"which slot? {how_many} not initialised: give --slot; `pkcs11-pool tokens` "
        "shows them"
    )


def _check_label(label: str, others: list[TokenInfo]) -> None:
    """Refuse a label that another token has: it would name neither of them any more.

    Raises:
        CommandError: Another token has it.
    """
    same = [info for info in others if info.label == label]
    if same:
        raise CommandError(
            f"there is a token {same[0]} already, and a label that two have names "
            "neither of them. Give another label, or --allow-same-label"
        )


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
        refused("pin", where, "the officer needs no present one; --new-pin-… is new")
        so_pin = officer.secret()
        anyio.run(_reset, where, so_pin, new.secret())
    else:
        refused("so_pin", officer, "the user changes it, unless --by-officer is there")
        anyio.run(_change, where, new)
    if json:
        output.as_json({"changed": True})
    else:
        output.say("the user's PIN is changed")


async def _reset(where: TokenOptions, so_pin: Secret, new: Secret) -> None:
    async with where.pool(so=True) as pool, pool.security_officer(so_pin) as so:
        await so.init_pin(new)  # type: ignore[arg-type]  # hidden already


async def _change(where: TokenOptions, new: NewPinOptions) -> None:
    old = where.secret()
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
