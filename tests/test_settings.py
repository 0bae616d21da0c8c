"""A pool's options from the environment, by pydantic-settings."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsConfigDict

from pkcs11_pool import InvalidOption, LoginState, TokenPool
from pkcs11_pool.integrations.settings import PoolSettings

if TYPE_CHECKING:
    from pathlib import Path

    from pkcs11_pool.softhsm import ThrowawayToken

SECRET = "tOpsEcret"  # noqa: S105  # that it does not show is tested


class Environment:
    """Sets the variables of the pool."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, **variables: object) -> None:
        """Each under the prefix."""
        for name, value in variables.items():
            self._monkeypatch.setenv(f"PKCS11_POOL_{name}", str(value))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Variables for one test."""
    return Environment(monkeypatch)


async def test_a_pool_by_its_parts(
    environment: Environment, token: ThrowawayToken
) -> None:
    """Module, token and PIN, each in a variable."""
    environment(MODULE=token.module, TOKEN_LABEL=token.label, PIN=token.user_pin)
    environment(TOKEN_SERIAL=token.serial.decode(), MAX_SESSIONS=3, TIMEOUT="none")
    async with PoolSettings().pool() as pool:
        assert pool.token.serial == token.serial
        assert pool.login_state is LoginState.USER
        assert pool.stats().sessions_max == 3


async def test_a_pool_by_its_uri(
    environment: Environment, token: ThrowawayToken, tmp_path: Path
) -> None:
    """What stands beside it wins."""
    path = tmp_path / "pin"
    path.write_text(token.user_pin)
    path.chmod(0o600)
    environment(
        URI=f"pkcs11:token=demo?module-path={quote(str(token.module))}&pin-value=x",
        PIN_FILE=path,
    )
    async with PoolSettings().pool(max_sessions=2) as pool:
        assert pool.login_state is LoginState.USER
        assert pool.stats().sessions_max == 2


async def test_a_pin_from_a_credential(
    environment: Environment,
    token: ThrowawayToken,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the systemd service."""
    (tmp_path / "hsm").write_text(token.user_pin)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    environment(MODULE=token.module, TOKEN_LABEL=token.label, PIN_CREDENTIAL="hsm")
    async with PoolSettings().pool() as pool:
        assert pool.login_state is LoginState.USER


def test_every_option_of_the_pool_can_be_set() -> None:
    """With the same default."""
    fields = PoolSettings.model_fields
    for name, parameter in inspect.signature(TokenPool).parameters.items():
        assert name in fields
        if parameter.default is not inspect.Parameter.empty:
            assert fields[name].default == parameter.default


def test_a_subclass_has_a_prefix_of_its_own(
    monkeypatch: pytest.MonkeyPatch, environment: Environment
) -> None:
    """And the pool of it its options."""
    environment(MODULE="/theirs")

    class Ours(PoolSettings):
        model_config = SettingsConfigDict(env_prefix="SIGNER_")

    monkeypatch.setenv("SIGNER_MODULE", "/ours")
    monkeypatch.setenv("SIGNER_SLOT_ID", "7")
    assert "slot_id=7" in repr(Ours().pool())


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "PKCS11_POOL_MODULE"),
        ({"MODULE": "/m", "PIN": SECRET, "PIN_FILE": "/p"}, "one of pin, pin_file"),
        ({"MODULE": "/m", "MAX_SESSIONS": SECRET}, "max_sessions"),
        ({"MODULE": "/m", "PIN": SECRET, "SLOT_ID": "x"}, "slot_id"),
    ],
)
def test_what_is_wrong_is_named_and_not_shown(
    environment: Environment, variables: dict[str, Any], said: str
) -> None:
    """A variable in the wrong place may be a PIN."""
    environment(**variables)
    with pytest.raises(ValidationError, match=said) as caught:
        PoolSettings()
    assert SECRET not in str(caught.value)


def test_a_wrong_option_is_refused_as_by_the_pool(environment: Environment) -> None:
    """When the pool is made."""
    environment(MODULE="/m", MAX_SESSIONS="0", SLOT_ID="1", PIN=SECRET)
    settings = PoolSettings()
    with pytest.raises(InvalidOption, match="max_sessions"):
        settings.pool()
    shown = [repr(settings), str(settings), repr(vars(settings)), str(settings.uri)]
    assert [text for text in shown if SECRET in text] == []


def test_a_missing_extra_is_named() -> None:
    """With the command that installs it."""
    code = (
        "import sys\nsys.modules['pydantic_settings'] = None\n"
        "import pkcs11_pool.integrations.settings"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "pip install 'pkcs11-pool[settings]'" in done.stderr
