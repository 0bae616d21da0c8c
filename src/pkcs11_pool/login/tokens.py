"""What is done to a token without a pool: list it, initialise it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pkcs11 import exceptions as p11
from pkcs11.constants import TokenFlag

from pkcs11_pool.cryptoki import interface, rv
from pkcs11_pool.cryptoki.module import Module, borrowed
from pkcs11_pool.cryptoki.operations import raw_login
from pkcs11_pool.cryptoki.session import Session
from pkcs11_pool.errors import (
    InvalidOption,
    PinLengthInvalid,
    PinRefused,
    TokenNotFound,
)
from pkcs11_pool.login.pin_guard import check_length
from pkcs11_pool.state import Epoch

if TYPE_CHECKING:
    import pkcs11

    from pkcs11_pool.pins import Secret
    from pkcs11_pool.state import TokenInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOrder:
    """What a token should become."""

    slot_id: int
    label: str
    so_pin: Secret
    user_pin: Secret | None
    wipe: bool


def list_all(path: str, reserved: bytes | None) -> list[TokenInfo]:
    """Every token of a module, with its mechanisms. Blocks."""
    with borrowed(path, reserved) as module:
        return [
            replace(
                info,
                mechanisms=frozenset(map(int, token.slot.get_mechanisms())),
            )
            for token, info in module.tokens()
        ]


def initialize(path: str, reserved: bytes | None, order: InitOrder) -> TokenInfo:
    """Initialise a token, and its user's PIN if there is one. Blocks."""
    made = _initialize(path, reserved, order)
    # Some modules move it to another slot, at the next C_Initialize.
    with borrowed(path, reserved) as module:
        found = [info for _, info in module.tokens() if info.identity == made.identity]
        return found[0] if len(found) == 1 else made


def _initialize(path: str, reserved: bytes | None, order: InitOrder) -> TokenInfo:
    with borrowed(path, reserved) as module:
        before = _present(module, order)
        module.check_unused(before)
        # Before anything is wiped: a token without its PINs helps nobody.
        check_length(order.so_pin, before)
        if order.user_pin is not None:
            check_length(order.user_pin, before)
        known = {info.serial for _, info in module.tokens()}
        code = _init_token(module, order)
        if code in _REFUSED:
            message = "the token refused the PIN of its security officer"
            raise PinRefused(message) from rv.error_of(code, "C_InitToken")
        if code == rv.CODES["CKR_PIN_LEN_RANGE"]:
            message = "the token takes no SO PIN of this length"
            raise PinLengthInvalid(message) from rv.error_of(code, "C_InitToken")
        rv.check(code, "C_InitToken")
        token, info = _find_again(module, order, known)
        if order.user_pin is not None:
            _init_pin(module, token, order.so_pin, order.user_pin)
        return module.info(info.slot_id)


_REFUSED = {rv.CODES["CKR_PIN_INCORRECT"], rv.CODES["CKR_PIN_LOCKED"]}


def _present(module: Module, order: InitOrder) -> TokenInfo:
    try:
        info = module.info(order.slot_id)
    except (p11.SlotIDInvalid, p11.TokenNotPresent) as error:
        slots = [slot.slot_id for slot in module.library.get_slots()]
        message = f"no token in slot {order.slot_id}; {module.path} has slots {slots}"
        raise TokenNotFound(message) from error
    if info.flags & TokenFlag.TOKEN_INITIALIZED and not order.wipe:
        message = (
            f"token {info} is initialised already: wipe=True initialises it anew and "
            "destroys all its objects"
        )
        raise InvalidOption(message)
    return info


def _init_token(module: Module, order: InitOrder) -> int:
    """``C_InitToken``; the code. Raises nothing, so no traceback holds the PIN."""
    label = order.label.encode().ljust(32)
    pin = order.so_pin
    return module.functions.C_InitToken(order.slot_id, pin.encoded(), len(pin), label)


def _find_again(
    module: Module, order: InitOrder, known: set[bytes]
) -> tuple[pkcs11.Token, TokenInfo]:
    """The token after C_InitToken: in its slot, or where the module moved it to."""
    labelled = [pair for pair in module.tokens() if pair[1].label == order.label]
    new = [pair for pair in labelled if pair[1].serial not in known]
    here = [pair for pair in labelled if pair[1].slot_id == order.slot_id]
    for pair in (*new, *here, *labelled):
        return pair
    message = f"the token {order.label!r} is nowhere to be found after C_InitToken"
    raise TokenNotFound(message)


def _init_pin(
    module: Module, token: pkcs11.Token, so_pin: Secret, user_pin: Secret
) -> None:
    session = Session(module, token, rw=True, epoch=Epoch(0))
    try:
        code = raw_login(module.functions, session.handle, interface.CKU_SO, so_pin)
        rv.check(code, "C_Login")
        code = _raw_init_pin(session, user_pin)
        if code == rv.CODES["CKR_PIN_LEN_RANGE"]:
            message = "the token takes no user PIN of this length"
            raise PinLengthInvalid(message) from rv.error_of(code, "C_InitPIN")
        rv.check(code, "C_InitPIN")
        rv.check(module.functions.C_Logout(session.handle), "C_Logout")
    finally:
        session.close()


def _raw_init_pin(session: Session, pin: Secret) -> int:
    return session.functions.C_InitPIN(session.handle, pin.encoded(), len(pin))
