"""What is done to tokens without a pool, awaited: list them, initialise one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pkcs11_pool import config, pins
from pkcs11_pool.faces import arguments
from pkcs11_pool.faces.aside import aside
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.login import tokens

if TYPE_CHECKING:
    import os

    from pkcs11_pool.state import TokenInfo


async def list_tokens(
    module: str | os.PathLike[str], init_reserved: str | bytes | None = None
) -> list[TokenInfo]:
    """All tokens that a module has, with their mechanisms.

    Args:
        module: Path of the Cryptoki module.
        init_reserved: Module parameters for ``C_Initialize``.

    Returns:
        One for each token that is present, in the module's order of slots.

    Raises:
        ModuleError, ModuleInUse: The file cannot be used.

    Cancellation:
        Waits for the answer first.

    Cryptoki:
        ``C_GetSlotList``, ``C_GetTokenInfo``, ``C_GetMechanismList``.

    Source:
        PKCS#11 v3.1, "Slot and token management functions".
    """
    path, reserved = config.module_path(module), config.reserved_bytes(init_reserved)
    return await aside(tokens.list_all, path, reserved)


@hides_pins
async def init_token(  # all by name
    module: str | os.PathLike[str],
    *,
    slot_id: int,
    label: str,
    so_pin: Any,
    user_pin: Any = None,
    wipe: bool = False,
    init_reserved: str | bytes | None = None,
) -> TokenInfo:
    """Initialise a token, and its user's PIN; what it says of itself afterwards.

    Args:
        module: Path of the Cryptoki module.
        slot_id: The slot of the token. Some modules move it to another one.
        label: At most 32 bytes of UTF-8.
        so_pin: The security officer's PIN; that of a used token must be its present.
        user_pin: The user's first PIN, or None to leave it unset.
        wipe: Allow it on a used token, whose objects are all destroyed.
        init_reserved: Module parameters for ``C_Initialize``.

    Returns:
        What the token says of itself afterwards.

    Raises:
        InvalidOption: The token is initialised already, and ``wipe`` is false.
        TokenInUse: A pool of this process is open on it.
        PinRefused: The token refused the SO's PIN.

    Cancellation:
        Waits for the outcome first.

    Cryptoki:
        ``C_InitToken``; with ``user_pin`` also ``C_OpenSession``, ``C_Login``,
        ``C_InitPIN``, ``C_Logout``, ``C_CloseSession``.

    Source:
        PKCS#11 v3.1, "Slot and token management functions".
    """
    path, reserved = config.module_path(module), config.reserved_bytes(init_reserved)
    arguments.text(label, "label")
    config.check_label("label", label)
    config.check_flag("wipe", wipe)
    arguments.slot(slot_id)
    order = tokens.InitOrder(
        slot_id=slot_id,
        label=label,
        so_pin=pins.secret(so_pin),
        user_pin=None if user_pin is None else pins.secret(user_pin),
        wipe=wipe,
    )
    return await aside(tokens.initialize, path, reserved, order)
