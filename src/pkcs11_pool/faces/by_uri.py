"""What a PKCS#11 URI says of a pool, and of a key on the pool's token.

Whoever is given a URI as text reads it first, in its own place: it may hold a PIN.

Source: RFC 7512, "PKCS #11 URI Scheme Definition".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pkcs11_pool import config, pins
from pkcs11_pool.errors import InvalidURI

if TYPE_CHECKING:
    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.uri import Pkcs11URI

# Options of the pool, and where an open token tells the same of itself.
_TOLD: Final = {
    "token_label": "label",
    "token_serial": "serial",
    "token_model": "model",
    "token_manufacturer": "manufacturer",
    "slot_id": "slot_id",
}


def read(given: object) -> Pkcs11URI | InvalidURI:
    """As :func:`pkcs11_pool.uri.read`, which is imported for those who have a URI."""
    from pkcs11_pool import uri  # noqa: PLC0415

    return uri.read(given)


def pool_options(
    parsed: Pkcs11URI | InvalidURI, options: dict[str, Any], *, allow_pin_command: bool
) -> dict[str, Any]:
    """The options of a pool by a URI, and by ``options``, which win.

    Raises:
        InvalidURI: It is malformed, names no module, or says something of the token
            that the pool cannot look at.
    """
    if "pin" in options:
        # In the caller's own place, before anything can fail.
        options["pin"] = pins.hide_source(options["pin"])
    if isinstance(parsed, InvalidURI):
        raise parsed
    config.check_flag("allow_pin_command", allow_pin_command)
    given = config.uri_options(
        parsed, with_pin="pin" not in options, allow_command=allow_pin_command
    )
    given |= options
    if given["module"] is None:
        raise InvalidURI(config.NO_MODULE_PATH)
    return given


def key_options(parsed: Pkcs11URI | InvalidURI, engine: TokenEngine) -> dict[str, Any]:
    """The key that a URI names, as ``pool.key`` takes it.

    Raises:
        InvalidURI: It is malformed, names no key, or names another token than the
            pool's.
    """
    if isinstance(parsed, InvalidURI):
        raise parsed
    named = config.uri_options(parsed, with_pin=False, allow_command=False)
    info, asked = engine.actor.info, engine.options
    for name, wanted in named.items():
        ours = getattr(asked, name)
        if info is not None and name in _TOLD:
            ours = getattr(info, _TOLD[name])
        if None not in (wanted, ours) and wanted != ours:
            message = (
                f"the PKCS#11 URI names another token than this pool's: "
                f"{name} is {ours!r} here, not {wanted!r}"
            )
            raise InvalidURI(message)
    return config.uri_key(parsed)
