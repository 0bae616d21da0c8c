"""The options of a pool from the environment, by pydantic-settings.

    PKCS11_POOL_MODULE=/usr/lib/softhsm/libsofthsm2.so
    PKCS11_POOL_TOKEN_LABEL=demo
    PKCS11_POOL_PIN_FILE=/run/secrets/hsm-pin

    async with PoolSettings().pool() as pool: ...

Needs ``pkcs11-pool[settings]``.
"""

from __future__ import annotations

import inspect

# pydantic reads the annotations when the class is made.
from pathlib import Path  # noqa: TC003
from typing import Any, Self

from pkcs11_pool import pins
from pkcs11_pool.faces.pool import TokenPool
from pkcs11_pool.integrations.extras import missing

try:
    from pydantic import Field, SecretStr, model_validator
    from pydantic_settings import BaseSettings, SettingsConfigDict
except ModuleNotFoundError as error:
    raise missing("settings", error) from error

__all__ = ["PoolSettings"]

_DEFAULTS = inspect.signature(TokenPool).parameters
_PINS = ("pin", "pin_file", "pin_credential")


def _default(name: str) -> Any:
    """The pool's own default of an option: it stands in one place."""
    return Field(default=_DEFAULTS[name].default)


class PoolSettings(BaseSettings):
    """Where a pool's options come from, under the prefix ``PKCS11_POOL_``.

    A subclass may set another prefix, a ``.env`` file or a ``secrets_dir`` in its
    ``model_config``. The text ``none`` in a variable is None: no limit, or unset.

    Attributes:
        module: Path of the Cryptoki module; with ``token_label``, ``token_serial`` or
            ``slot_id``. Or, for all of it,
        uri: A PKCS#11 URI (RFC 7512). What is set beside it wins.
        pin: The PIN itself, which does not show; or
        pin_file: a file that has it (:func:`pkcs11_pool.pins.file`); or
        pin_credential: the name of a systemd credential.
        token_serial: As text.

    Raises:
        pydantic.ValidationError: Something is wrong, or contradicts itself. What was
            given is not in the message.
    """

    model_config = SettingsConfigDict(
        env_prefix="PKCS11_POOL_", env_parse_none_str="none", hide_input_in_errors=True
    )

    uri: SecretStr | None = None
    module: Path | None = None
    token_label: str | None = None
    token_serial: str | None = None
    token_model: str | None = None
    token_manufacturer: str | None = None
    slot_id: int | None = None
    pin: SecretStr | None = None
    pin_file: Path | None = None
    pin_credential: str | None = None
    max_sessions: int = _default("max_sessions")
    timeout: float | None = _default("timeout")
    max_waiting: int | None = _default("max_waiting")
    open_timeout: float | None = _default("open_timeout")
    close_timeout: float = _default("close_timeout")
    recovery_timeout: float = _default("recovery_timeout")
    handle_max_age: float | None = _default("handle_max_age")
    init_reserved: str | None = None
    serialize: bool | None = None
    rw_sessions_only: bool = _default("rw_sessions_only")
    login_per_session: bool = _default("login_per_session")
    login_ignored: bool = _default("login_ignored")
    session_max_idle: float | None = _default("session_max_idle")
    name: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.module is None and self.uri is None:
            message = "give module (PKCS11_POOL_MODULE) or uri (PKCS11_POOL_URI)"
            raise ValueError(message)
        if sum(getattr(self, name) is not None for name in _PINS) > 1:
            message = f"give one of {', '.join(_PINS)}, not several"
            raise ValueError(message)
        return self

    def pool(self, **options: Any) -> TokenPool:
        """An unopened pool with these options; those given here win.

        Raises:
            InvalidOption: An option is wrong.
        """
        if "pin" in options:
            options["pin"] = pins.hide_source(options["pin"])
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in self.model_fields_set - {"uri", *_PINS}
            if name in _DEFAULTS
        }
        if self.token_serial is not None:
            given["token_serial"] = self.token_serial.encode()
        if self.pin is not None:
            given["pin"] = pins.literal(self.pin.get_secret_value())
        elif self.pin_file is not None:
            given["pin"] = pins.file(self.pin_file)
        elif self.pin_credential is not None:
            given["pin"] = pins.systemd_credential(self.pin_credential)
        given |= options
        if self.uri is None:
            return TokenPool(**given)
        return TokenPool.from_uri(self.uri.get_secret_value(), **given)
