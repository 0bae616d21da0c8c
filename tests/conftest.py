"""What every test stands on: both backends, a real token, and nothing left over."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import pytest
import structlog
import uvloop
from pkcs11 import PKCS11Error

import leftovers
from faultmodule import FaultModule
from faultmodule.build import build
from pkcs11_pool import TokenPool, softhsm
from pkcs11_pool.cryptoki import module as modules
from poolkit import wait_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory

pytest_plugins = ["pytester"]

# How fast an example is says something of the machine, and nothing of the code.
hypothesis.settings.register_profile(
    "no hurry",
    parent=hypothesis.settings(),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("no hurry")

_OURS = "pkcs11-pool"


class MakePool(Protocol):
    """Makes an unopened pool on the test's token."""

    def __call__(self, **options: Any) -> TokenPool:
        """Options replace those that open the token with the user's PIN."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the model machine runs: see ``tests/model``."""
    group = parser.getgroup("model machine")
    group.addoption(
        "--model-steps",
        type=int,
        default=12_000,
        help="steps of the model machine in all, over both backends (default: 12000)",
    )
    group.addoption(
        "--long",
        action="store_true",
        help="the model machine makes 100000 steps, if --model-steps does not say "
        "more; the fuzz tests draw twenty times as much",
    )
    group.addoption(
        "--model-seed", type=int, default=0, help="where its random choices begin"
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell how many steps the model machine really made."""
    for word in ("passed", "failed"):
        for report in terminalreporter.stats.get(word, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "model machine":
                    test = report.nodeid.rpartition("::")[2]
                    terminalreporter.write_line(f"model machine, {test}: {value}")


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Every async test runs on asyncio in debug mode, on uvloop and on trio."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def warm_up() -> None:
    """What libuv opens once per process is nobody's left-over.

    And the thousands of tests that pytest found are no garbage of any of them: whoever
    collects it, or looks at all that is alive, need not go over them each time.
    """
    uvloop.run(_nothing())
    gc.collect()
    gc.freeze()


async def _nothing() -> None:
    pass


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Log events go nowhere, unless a test captures them."""
    structlog.configure(processors=[_drop])
    yield
    structlog.reset_defaults()


def _drop(_logger: object, _name: str, _event: object) -> Any:
    raise structlog.DropEvent


@pytest.fixture(scope="session")
def soft_hsm() -> SoftHSM:
    """SoftHSM2, as found or fetched."""
    return softhsm.ensure()


@pytest.fixture
def token_directory(soft_hsm: SoftHSM, tmp_path: Path) -> Iterator[TokenDirectory]:
    """A directory of tokens for one test."""
    with softhsm.token_directory(tmp_path, softhsm=soft_hsm) as directory:
        yield directory
        _finalise_kept()


def _finalise_kept() -> None:
    """A module that had a lost call inside at the end of its pool stays initialised.

    On a machine that stands still a call is lost where no test means it to be. The next
    pool would take the module over, but the next test has other tokens.
    """
    for module in modules._modules.values():  # noqa: SLF001
        if module.initialized and not module.users and not module.forked:
            wait_for(lambda module=module: not module.lost_calls)  # type: ignore[misc]
            with contextlib.suppress(PKCS11Error):
                module.library.finalize()
            module.initialized = False


@pytest.fixture
def token(token_directory: TokenDirectory) -> ThrowawayToken:
    """A fresh SoftHSM2 token with a user PIN."""
    return token_directory.add_token("demo")


@pytest.fixture
def make_pool(token: ThrowawayToken) -> MakePool:
    """Make pools on the token; the test opens them."""

    def make(**options: Any) -> TokenPool:
        given: dict[str, Any] = {
            "module": token.module,
            "token_label": token.label,
            "pin": token.user_pin,
        }
        return TokenPool(**(given | options))

    return make


@pytest.fixture
def never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions opened ahead stay, also when the machine stands still for a moment."""
    monkeypatch.setattr("pkcs11_pool.engine.lull.IDLE", 1000.0)


@pytest.fixture
async def pool(make_pool: MakePool) -> AsyncIterator[TokenPool]:
    """An open pool, logged in."""
    async with make_pool() as opened:
        yield opened


@pytest.fixture(scope="session")
def fault_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fault module, compiled once."""
    return build(tmp_path_factory.mktemp("faultmodule"))


@pytest.fixture
def fault(
    fault_library: Path, soft_hsm: SoftHSM, token: ThrowawayToken, tmp_path: Path
) -> Iterator[FaultModule]:
    """A fault module of its own in front of SoftHSM2: open it as ``fault.path``."""
    del token  # made before the module is initialised
    module = FaultModule(
        fault_library, soft_hsm.module, copy_to=tmp_path / "libfault.so"
    )
    yield module
    # Whatever still hangs must come back, or its thread outlives the test.
    module.clear()


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """No thread and no file descriptor outlives a test."""
    before = _descriptors()
    yield
    # Where a test failed in the middle, it must not be the end of all after it. Others
    # leave a module on purpose: around a call that is lost nothing is finalised.
    leftovers.free_modules()
    for thread in _threads():
        thread.join(20)
    assert _threads() == []
    # A file that another thread is just closing has a moment to go.
    deadline = time.monotonic() + 10
    while (new := _descriptors() - before) and time.monotonic() < deadline:
        gc.collect()
        threading.Event().wait(0.01)
    assert new == set()


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(_OURS)]


def _descriptors() -> set[str]:
    """The files, pipes and sockets that are open, each by what it leads to."""
    here = Path("/proc/self/fd")
    found = set()
    for entry in here.iterdir() if here.exists() else ():
        with contextlib.suppress(OSError):  # the listing's own is gone by now
            found.add(str(entry.readlink()))
    return found
