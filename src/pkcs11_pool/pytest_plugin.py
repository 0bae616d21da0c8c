"""pytest fixtures for those who use the pool: a throwaway token, a pool, its faults.

pytest imports this in every run where the package is installed, so it imports nothing
of it: that is for the fixtures, when they are asked for. They are plain fixtures. One
open pool serves every event loop and thread, so tests may be plain functions, or run by
the plugins of AnyIO, asyncio or trio; no plugin is needed here.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pkcs11_pool.faces.pool import TokenPool
    from pkcs11_pool.faults import Faults
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory

_MISSING = "pkcs11_missing"
_COME_BACK = 10.0
"""Seconds after a test until a call that was given up is given up by us, too."""
_CHOICES = ("fail", "skip", "fetch")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What happens where there is no SoftHSM2."""
    parser.addini(
        _MISSING,
        "where SoftHSM2 is missing: 'fail' (default), 'skip' the tests that need it, "
        "or 'fetch' it with apt-get",
        default="fail",
    )


@pytest.fixture(scope="session")
def pkcs11_softhsm(pytestconfig: pytest.Config) -> SoftHSM:
    """SoftHSM2 on this machine."""
    from pkcs11_pool import softhsm  # noqa: PLC0415  # only where it is asked for

    missing = pytestconfig.getini(_MISSING)
    if missing not in _CHOICES:
        message = f"{_MISSING} is one of {', '.join(_CHOICES)}, not {missing!r}"
        raise pytest.UsageError(message)
    try:
        return softhsm.ensure() if missing == "fetch" else softhsm.find()
    except softhsm.SoftHSMUnavailable as error:
        if missing == "skip":
            pytest.skip(str(error))
        pytest.fail(
            f"{error}\n(pkcs11_missing = skip or fetch in pytest's configuration does "
            "otherwise)",
            pytrace=False,
        )


@pytest.fixture
def pkcs11_tokens(pkcs11_softhsm: SoftHSM, tmp_path: Path) -> Iterator[TokenDirectory]:
    """A place for tokens of this test: ``pkcs11_tokens.add_token("label")``.

    Make them before anything opens the module: it looks for tokens then.
    """
    from pkcs11_pool import softhsm  # noqa: PLC0415

    with softhsm.token_directory(tmp_path, softhsm=pkcs11_softhsm) as directory:
        yield directory


@pytest.fixture
def pkcs11_token(pkcs11_tokens: TokenDirectory) -> ThrowawayToken:
    """A fresh token, gone after the test: ``label``, ``user_pin``, ``module``."""
    return pkcs11_tokens.add_token("test")


@pytest.fixture
def pkcs11_pool_options() -> dict[str, Any]:
    """Options of ``pkcs11_pool``: override this fixture to give others."""
    return {}


@pytest.fixture
def pkcs11_pool(
    request: pytest.FixtureRequest,
    pkcs11_token: ThrowawayToken,
    pkcs11_pool_options: dict[str, Any],
) -> Iterator[TokenPool]:
    """A pool on ``pkcs11_token``: open, and its user logged in."""
    from pkcs11_pool.faces.pool import TokenPool  # noqa: PLC0415

    faults: Faults | None = None
    if "pkcs11_faults" in request.fixturenames:
        # Whoever stands first among a test's arguments: the switch comes before.
        faults = request.getfixturevalue("pkcs11_faults")
    options: dict[str, Any] = {
        "token_label": pkcs11_token.label,
        "pin": pkcs11_token.user_pin,
    }
    pool = TokenPool(pkcs11_token.module, **(options | pkcs11_pool_options))
    _elsewhere(pool.open)
    yield pool
    if faults is not None:
        faults.clear()
        _wait_for_lost_calls(pool)
    _elsewhere(pool.close)


@pytest.fixture
def pkcs11_faults(pkcs11_token: ThrowawayToken) -> Iterator[Faults]:
    """A switch that makes the module fail, hang or be slow; off after the test.

    Where a fixture of yours opens the pool, let it take ``pkcs11_faults`` too: the
    switch comes before the pool.
    """
    from pkcs11_pool.faults import faults_in  # noqa: PLC0415

    with faults_in(pkcs11_token.module) as faults:
        yield faults


def _wait_for_lost_calls(pool: TokenPool) -> None:
    """Let what hung or was slow come back: with a call inside no module is finalised.

    It would be in use in the next test, which makes tokens that it does not see.
    """
    deadline = time.monotonic() + _COME_BACK
    while pool.stats().calls_stuck and time.monotonic() < deadline:
        time.sleep(0.002)


def _elsewhere(what: Callable[[], Any]) -> None:
    """Open or close on a thread of its own: this one may run an event loop."""
    from pkcs11_pool.faces.waiting import blocking  # noqa: PLC0415

    errors: list[BaseException] = []

    def run() -> None:
        try:
            blocking(what())
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)

    thread = threading.Thread(target=run, name="pkcs11_pool fixture")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
