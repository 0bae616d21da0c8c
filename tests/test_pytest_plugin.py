"""The fixtures for users' tests: on every loop, with faults, and at no cost unasked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from pkcs11_pool import (
    InvalidOption,
    LoginState,
    ModuleInUse,
    OutcomeUnknown,
    PoolState,
    PoolTimeout,
    SessionClosed,
    TokenPool,
    softhsm,
)
from pkcs11_pool.faults import FUNCTIONS, Faults, faults_in
from poolkit import (
    blocking,
    digest,
    given_up,
    make_ec_key,
)

if TYPE_CHECKING:
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory


# -- The fixtures, here ---------------------------------------------------------------


async def test_a_pool_on_a_token_of_its_own(
    pkcs11_pool: TokenPool, pkcs11_token: ThrowawayToken
) -> None:
    """Open and logged in, and empty, on whichever event loop."""
    assert pkcs11_pool.state is PoolState.READY
    assert pkcs11_pool.login_state is LoginState.USER
    assert pkcs11_pool.token.label == pkcs11_token.label
    assert await pkcs11_pool.find() == []
    key = await make_ec_key(pkcs11_pool)
    assert await key.sign(b"data", mechanism=Mechanism.ECDSA)


def test_a_plain_test_has_it_too(pkcs11_pool: TokenPool) -> None:
    """By the blocking twins."""
    assert len(pkcs11_pool.run_sync(lambda session: session.generate_random(64))) == 8


async def test_it_can_be_asked_for_on_a_loop(request: pytest.FixtureRequest) -> None:
    """It is opened elsewhere: this thread runs an event loop."""
    pool: TokenPool = request.getfixturevalue("pkcs11_pool")
    assert await digest(pool)


class TestOptions:
    """Tests of one class with options of their own."""

    @pytest.fixture
    def pkcs11_pool_options(self) -> dict[str, Any]:
        """Two sessions, and nobody logged in."""
        return {"max_sessions": 2, "pin": None}

    def test_they_reach_the_pool(self, pkcs11_pool: TokenPool) -> None:
        """And win."""
        assert pkcs11_pool.stats().sessions_max == 2
        assert pkcs11_pool.login_state is LoginState.PUBLIC


def test_more_tokens(pkcs11_tokens: TokenDirectory) -> None:
    """As many as a test wants."""
    made = {pkcs11_tokens.add_token(label).label for label in ("one", "two")}
    assert made == {"one", "two"}


# -- Faults ---------------------------------------------------------------------------


async def test_a_call_fails_as_told(
    pkcs11_faults: Faults, pkcs11_pool: TokenPool
) -> None:
    """So often, after so many that go well; then no more."""
    pkcs11_faults.fail("C_GenerateRandom", "CKR_DEVICE_MEMORY", times=2, skip=1)
    assert len(await pkcs11_pool.generate_random(64)) == 8
    for _ in range(2):
        with pytest.raises(pkcs11.DeviceMemory):
            await pkcs11_pool.generate_random(64)
    assert len(await pkcs11_pool.generate_random(64)) == 8
    assert pkcs11_faults.count("C_GenerateRandom") == 4


async def test_orders_are_carried_out_one_after_the_other(
    pkcs11_faults: Faults, pkcs11_pool: TokenPool
) -> None:
    """And until they are called off, where no number is given."""
    pkcs11_faults.fail("C_Digest", "CKR_DEVICE_MEMORY")
    pkcs11_faults.fail("C_Digest", "CKR_FUNCTION_FAILED", times=None)
    with pytest.raises(pkcs11.DeviceMemory):
        await digest(pkcs11_pool)
    for _ in range(3):
        with pytest.raises(pkcs11.FunctionFailed):
            await digest(pkcs11_pool)
    pkcs11_faults.clear()
    await digest(pkcs11_pool)


async def test_what_python_pkcs11_calls_fails_too(
    pkcs11_pool: TokenPool, pkcs11_faults: Faults
) -> None:
    """Whichever fixture stands first among the arguments."""
    pkcs11_faults.fail("C_GenerateKeyPair", "CKR_DEVICE_MEMORY")
    with pytest.raises(pkcs11.DeviceMemory):
        await make_ec_key(pkcs11_pool)
    assert await pkcs11_pool.find() == []
    pkcs11_faults.fail("C_OpenSession", "CKR_GENERAL_ERROR", times=None)
    with pytest.raises(pkcs11.GeneralError):
        async with pkcs11_pool.session(rw=True):
            pass


async def test_an_answer_is_lost_after_the_call(
    pkcs11_faults: Faults, pkcs11_pool: TokenPool
) -> None:
    """What it made is there: the case that OutcomeUnknown is for."""
    pkcs11_faults.fail("C_GenerateKey", "CKR_DEVICE_ERROR", after=True)
    with pytest.raises((OutcomeUnknown, pkcs11.DeviceError)):
        await pkcs11_pool.generate_key(KeyType.AES, 128, label="k", store=True)
    assert pkcs11_faults.count("C_GenerateKey") == 1
    template = {Attribute.CLASS: ObjectClass.SECRET_KEY}
    assert len(await pkcs11_pool.find(template)) == 1


async def test_a_call_that_hangs(pkcs11_faults: Faults, pkcs11_pool: TokenPool) -> None:
    """Its caller gets PoolTimeout in time, and the next one its result."""
    pkcs11_faults.hang("C_Digest")
    await given_up(
        pkcs11_pool,
        lambda: digest(pkcs11_pool),
        blocking(pkcs11_faults.wait_until_hanging, "C_Digest"),
    )
    await digest(pkcs11_pool)
    pkcs11_faults.release()
    await digest(pkcs11_pool)


async def test_who_waits_for_a_call_to_hang_knows_that_it_does(
    pkcs11_faults: Faults, pkcs11_pool: TokenPool
) -> None:
    """Then goes on with it; its result is as it would have been."""
    pkcs11_faults.hang("C_Digest")
    results = []

    async def call() -> None:
        results.append(await digest(pkcs11_pool))

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        await blocking(pkcs11_faults.wait_until_hanging, "C_Digest")
        assert results == []
        pkcs11_faults.release()
    assert results == [await digest(pkcs11_pool)]


class TestOddTokens:
    """A pool that is told of what is odd about its token."""

    @pytest.fixture
    def pkcs11_pool_options(self) -> dict[str, Any]:
        """Every session is R/W."""
        return {"rw_sessions_only": True}

    async def test_one_without_ro_sessions(
        self, pkcs11_faults: Faults, pkcs11_pool: TokenPool
    ) -> None:
        """Nothing is missed with the option."""
        pkcs11_faults.no_ro_sessions()
        key = await make_ec_key(pkcs11_pool)
        assert await key.sign(b"data", mechanism=Mechanism.ECDSA)


async def test_a_token_without_ro_sessions_names_the_option(
    pkcs11_faults: Faults, pkcs11_token: ThrowawayToken
) -> None:
    """As long as it is odd."""
    options: dict[str, Any] = {
        "token_label": pkcs11_token.label,
        "pin": pkcs11_token.user_pin,
    }
    pkcs11_faults.no_ro_sessions()
    with pytest.raises(pkcs11.FunctionFailed, match="rw_sessions_only"):
        await TokenPool(pkcs11_token.module, **options).open()
    pkcs11_faults.clear()
    async with TokenPool(pkcs11_token.module, **options) as pool:
        assert await digest(pool)


async def test_a_token_that_drops_its_sessions(
    pkcs11_faults: Faults, pkcs11_pool: TokenPool
) -> None:
    """They are gone in the module, and with them the login; what was lent is over."""
    key = await make_ec_key(pkcs11_pool)
    async with pkcs11_pool.session() as session:
        await blocking(pkcs11_faults.drop_sessions)
        assert await key.sign(b"data", mechanism=Mechanism.ECDSA)
        with pytest.raises(SessionClosed):
            await digest(session)
    assert pkcs11_pool.stats().recoveries_total == 1
    assert pkcs11_pool.login_state is LoginState.USER


async def test_sessions_are_not_dropped_under_a_call(
    pkcs11_faults: Faults, pkcs11_pool: TokenPool
) -> None:
    """Modules crash so: it is waited for, and no longer than was said."""
    inside = threading.Event()
    go_on = threading.Event()

    def stays(*_arguments: int) -> int:
        inside.set()
        assert go_on.wait(10)
        return 0

    thread = threading.Thread(target=pkcs11_faults._made, args=("C_Sign", stays, (0,)))  # noqa: SLF001
    thread.start()
    inside.wait(10)
    with pytest.raises(TimeoutError, match="1 calls"):
        await blocking(pkcs11_faults.drop_sessions, 0.05)
    go_on.set()
    thread.join()
    await blocking(pkcs11_faults.drop_sessions)
    assert await digest(pkcs11_pool)


async def test_a_call_that_is_slow(
    pkcs11_faults: Faults, pkcs11_pool: TokenPool
) -> None:
    """Slower than its caller waits."""
    pkcs11_faults.delay("C_Digest", 2)
    with pytest.raises(PoolTimeout):
        await digest(pkcs11_pool, timeout=0.05)
    await digest(pkcs11_pool)


@pytest.mark.parametrize(
    "order",
    [
        lambda faults: faults.fail("C_Dance"),
        lambda faults: faults.fail("C_Sign", "CKR_DANCE"),
        lambda faults: faults.fail("C_Sign", 0),
        lambda faults: faults.fail("C_Sign", times=-1),
        lambda faults: faults.fail("C_Sign", skip="1"),
        lambda faults: faults.delay("C_Sign", -1),
        lambda faults: faults.hang("C_WaitForSlotEvent"),
        lambda faults: faults.count("C_Dance"),
    ],
)
def test_what_cannot_be_ordered_is_refused(order: Any) -> None:
    """With what can."""
    with pytest.raises(InvalidOption):
        order(Faults())


def test_a_call_that_never_hangs_is_not_waited_for_long() -> None:
    """It is a TimeoutError."""
    with pytest.raises(TimeoutError, match="0 calls of C_Sign hang"):
        Faults().wait_until_hanging("C_Sign", timeout=0.01)


async def test_the_switch_comes_before_the_pool(
    pkcs11_pool: TokenPool, pkcs11_token: ThrowawayToken
) -> None:
    """Its sessions keep the functions that they began with."""
    with (
        pytest.raises(ModuleInUse, match="pkcs11_faults"),
        faults_in(pkcs11_token.module),
    ):
        pass
    await digest(pkcs11_pool)


async def test_after_the_test_the_module_is_as_it_was(
    pkcs11_token: ThrowawayToken,
) -> None:
    """And one switch at a time stands before it."""

    async def random() -> None:
        async with TokenPool(
            pkcs11_token.module,
            token_label=pkcs11_token.label,
            pin=pkcs11_token.user_pin,
        ) as pool:
            await pool.generate_random(64)

    with faults_in(pkcs11_token.module) as faults:
        faults.fail("C_GenerateRandom", times=None)
        with (
            pytest.raises(ModuleInUse, match="already"),
            faults_in(pkcs11_token.module),
        ):
            pass
        with pytest.raises(pkcs11.PKCS11Error):
            await random()
        made = faults.count("C_GenerateRandom")
    await random()
    assert faults.count("C_GenerateRandom") == made > 0


def test_each_function_stands_where_the_header_has_it(soft_hsm: SoftHSM) -> None:
    """By the numbers of pkcs11f.h, no two the same."""
    del soft_hsm
    numbers = [number for number, _ in FUNCTIONS.values()]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < 68


# -- In the tests of others -----------------------------------------------------------

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
THEIRS = """\
import pytest
from pkcs11 import Mechanism

@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param

@pytest.mark.anyio
async def test_async(pkcs11_pool, pkcs11_faults):
    assert await pkcs11_pool.digest(b"data", mechanism=Mechanism.SHA256)
    pkcs11_faults.fail("C_Digest", "CKR_DEVICE_MEMORY")
    with pytest.raises(Exception, match="CKR_DEVICE_MEMORY"):
        await pkcs11_pool.digest(b"data", mechanism=Mechanism.SHA256)

def test_plain(pkcs11_pool, pkcs11_token):
    assert pkcs11_pool.token.label == pkcs11_token.label
"""


def test_it_works_in_the_tests_of_others(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AnyIO's plugin and no other; warnings are errors."""
    pytester.makepyfile(THEIRS)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    # pytester has a home of its own, and SoftHSM2 may be in our cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    ours = ("-p", "pkcs11_pool.pytest_plugin", "-p", "anyio")
    result = pytester.runpytest_subprocess("-W", "error", *ours)
    result.assert_outcomes(passed=3)


def test_it_is_harmless_beside_pytest_asyncio(pytester: pytest.Pytester) -> None:
    """In both of its modes: the fixtures are plain ones."""
    pytest.importorskip("pytest_asyncio", reason="pytest-asyncio is not installed")
    pytester.makepyfile(
        "import pytest\n"
        "@pytest.mark.asyncio\n"
        "async def test_one(pkcs11_pool):\n"
        "    assert await pkcs11_pool.generate_random(64)\n"
    )
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    for mode in ("strict", "auto"):
        done = pytester.runpytest_subprocess("-W", "error", f"--asyncio-mode={mode}")
        done.assert_outcomes(passed=1)


UNASKED = """\
import sys
def test_nothing():
    assert "pkcs11_pool.pytest_plugin" in sys.modules
    ours = {name for name in sys.modules if name.startswith("pkcs11_pool")}
    assert ours == {"pkcs11_pool", "pkcs11_pool.pytest_plugin"}
    assert {"pkcs11", "structlog", "anyio", "trio"} & set(sys.modules) == set()
"""


def test_unasked_it_imports_nothing(pytester: pytest.Pytester) -> None:
    """Who does not use its fixtures does not pay for them."""
    pytester.makepyfile(UNASKED)
    # By its entry point, beside all that is installed here but AnyIO's own and those
    # that import half the world.
    others = ("anyio", "schemathesis", "hypothesispytest", "xdist")
    without = [word for name in others for word in ("-p", f"no:{name}")]
    pytester.runpytest_subprocess(*without).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("missing", "outcome"),
    [("fail", "errors"), ("skip", "skipped"), (None, "errors"), ("x", "errors")],
)
def test_without_softhsm_it_fails_unless_told_otherwise(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    missing: str | None,
    outcome: str,
) -> None:
    """A test that is skipped unseen tests nothing."""
    monkeypatch.setenv("SOFTHSM2_MODULE", "/none.so")
    pytester.makepyfile("def test_one(pkcs11_pool): pass")
    if missing is not None:
        pytester.makeini(f"[pytest]\npkcs11_missing = {missing}")
    result = pytester.runpytest_inprocess("-rs")
    result.assert_outcomes(**{outcome: 1})
    said = "is one of fail, skip, fetch" if missing == "x" else "/none.so"
    assert said in result.stdout.str()


def test_softhsm_is_found_and_not_fetched(
    soft_hsm: SoftHSM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`find` runs no program of the system's packages."""
    assert softhsm.find() == soft_hsm

    def spoil(*_words: object, **_more: object) -> Any:
        raise AssertionError("nothing may be run")

    monkeypatch.setattr(softhsm, "ROOT", tmp_path)
    monkeypatch.setattr(softhsm, "_run", spoil)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SOFTHSM2_MODULE", raising=False)
    with pytest.raises(softhsm.SoftHSMUnavailable, match="Install it"):
        softhsm.find()


def test_the_plugin_is_registered_by_its_entry_point() -> None:
    """A user installs it, and it is there."""
    code = (
        "from importlib.metadata import entry_points as e\n"
        "print([p.value for p in e(group='pytest11') if 'pkcs11' in p.name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert done.stdout.strip() == "['pkcs11_pool.pytest_plugin']"
