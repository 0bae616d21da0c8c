"""The demo tells the truth: what is right, what is wrong, what was counted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pkcs11 import DeviceError

from pkcs11_pool import KeyRef, PooledSession, SessionState, TokenPool, demo
from pkcs11_pool.demo import load
from pkcs11_pool.demo.calls import counting
from pkcs11_pool.demo.work import KINDS, Bench, holds, make_keys, plan, random_bytes
from poolkit import settled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from conftest import MakePool
    from faultmodule import FaultModule


# Warnings are errors in the program too, not only in the tests.
COMMAND = [sys.executable, "-W", "error", "-m", "pkcs11_pool", "demo"]
SMALL = ["--operations", "60", "--tasks", "8"]

# The demo fetches SoftHSM2 where it is missing: let the fixture do so, once.
pytestmark = pytest.mark.usefixtures("soft_hsm")


def demonstrate(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the demo as its users do."""
    return subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, check=False, timeout=100
    )


def test_the_last_line_says_that_all_results_are_right() -> None:
    """The status is 0, and a file gets plain lines."""
    done = demonstrate(*SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "verified 120 of 120"
    assert not {"\x1b", "\r"} & set(done.stdout)


def test_login_logout_and_a_session_object_are_told() -> None:
    """The story is in the output, in its order, and nothing in it is wrong."""
    lines = demonstrate(*SMALL).stdout.splitlines()
    told = [line for line in lines if line.startswith(("  ok", "  log"))]
    expected = [
        "login.completed",
        "a session object",
        "cannot find its key",
        "SessionObjectDestroyed",
        "CKS_RO_USER_FUNCTIONS",
        "logout.completed",
        "CKS_RO_PUBLIC_SESSION",
        "LoginRequired",
        "login.completed",
        "CKS_RO_USER_FUNCTIONS",
        "verifies the signature",
    ]
    rest = iter(told)
    assert [text for text in expected if any(text in line for line in rest)] == expected
    assert "WRONG" not in "\n".join(lines)


def test_json_is_one_object_and_nothing_else_on_standard_output() -> None:
    """Programs read the figures; people still see on stderr what happens."""
    done = demonstrate("--json", *SMALL)
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert (told["verified"], told["expected"], told["wrong"]) == (120, 120, [])
    loops = told["event_loops"]
    assert [loop["event_loop"] for loop in loops] == ["asyncio", "trio"]
    for loop in loops:
        assert (loop["operations"], loop["verified"], loop["errors"]) == (60, 60, [])
        assert sum(kind["verified"] for kind in loop["kinds"].values()) == 60
        assert loop["calls_per_operation"] == round(sum(loop["calls"].values()) / 60, 3)
        assert loop["sessions_opened"] == loop["calls"]["C_OpenSession"] >= 60
        assert loop["latency_ms"]["p50"] <= loop["latency_ms"]["p99"]
        assert loop["logins"] == 1
    assert done.stderr.splitlines()[-1] == "verified 120 of 120"


def flipped(result: bytes) -> bytes:
    """The same with one bit of the last byte turned over."""
    return result[:-1] + bytes([result[-1] ^ 1])


@pytest.mark.parametrize(
    ("owner", "operation", "nth"),
    [
        (KeyRef, "sign", 2),
        (KeyRef, "sign", 40),
        (KeyRef, "encrypt", 4),
        (TokenPool, "digest", 1),
    ],
)
def test_one_wrong_bit_is_noticed(
    owner: type,
    operation: str,
    nth: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One result of many is not what the token gave: the status is 1."""
    spoil(monkeypatch, owner, operation, nth, flipped)
    assert demo.run(operations=60, tasks=8, as_json=False) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    # What goes there and back is two operations, and one of them spoils both.
    assert last in {"verified 119 of 120", "verified 118 of 120"}


def test_random_bytes_that_come_twice_are_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of two is right: it was new then."""
    spoil(monkeypatch, TokenPool, "generate_random", 1, lambda _: bytes(32))
    spoil(monkeypatch, TokenPool, "generate_random", 2, lambda _: bytes(32))
    assert demo.run(operations=60, tasks=8, as_json=False) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "verified 119 of 120"


def test_a_result_that_is_missing_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operation that fails is named, and the others go on."""

    def fail(_: bytes) -> bytes:
        raise DeviceError

    spoil(monkeypatch, KeyRef, "sign", 7, fail)
    assert demo.run(operations=60, tasks=8, as_json=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verified 119 of 120"
    assert any(": DeviceError: " in line for line in lines)


def test_a_story_that_goes_otherwise_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All results are right, but a session does not show the logout."""
    info = PooledSession.info

    async def stuck(session: PooledSession) -> Any:
        seen = await info(session)
        return type(seen)(
            state=SessionState.RO_USER_FUNCTIONS,
            rw=seen.rw,
            device_error=seen.device_error,
            slot_id=seen.slot_id,
        )

    monkeypatch.setattr(PooledSession, "info", stuck)
    assert demo.run(operations=10, tasks=2, as_json=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verified 20 of 20"
    assert lines[-2].startswith("not as it should be: logout()")


async def test_each_kind_of_work_is_checked(pool: TokenPool) -> None:
    """What the token gave convinces; the same with one bit turned over does not."""
    bench = Bench(pool, await make_keys(pool))
    for kind in KINDS:
        results: list[bytes] = []

        async def true(operation: Awaitable[bytes], seen: Any = results) -> bytes:
            seen.append(await operation)
            return bytes(seen[-1])

        async def spoilt(operation: Awaitable[bytes], seen: Any = results) -> bytes:
            # The last result of those that the work takes.
            seen.pop()
            result = await operation
            return result if seen else flipped(result)

        assert holds(await kind.work(bench, true, b"message"))
        assert len(results) == kind.operations
        wrong = holds(await kind.work(bench, spoilt, b"message"))
        # Nobody can tell wrong random bytes from right ones, if they are new.
        assert wrong is (kind.work is random_bytes)


def spoil(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    operation: str,
    nth: int,
    how: Callable[[bytes], bytes],
) -> None:
    """Let the nth result of an operation reach the caller otherwise than it was."""
    real: Callable[..., Awaitable[bytes]] = getattr(owner, operation)
    count = 0

    async def spoilt(*arguments: Any, **options: Any) -> bytes:
        nonlocal count
        result = await real(*arguments, **options)
        count += 1
        return how(result) if count == nth else result

    monkeypatch.setattr(owner, operation, spoilt)


@pytest.mark.usefixtures("never_idle")
async def test_calls_are_counted_as_the_module_counts_them(
    make_pool: MakePool, fault: FaultModule, anyio_backend_name: str
) -> None:
    """What the demo says of ``C_`` calls is what reached the module."""
    async with make_pool(module=fault.path) as pool:
        material, library = await make_keys(pool), pool.lib
    with counting(library) as functions:
        async with make_pool(module=fault.path) as pool:
            fault.reset_counts()
            orders = load.Orders(anyio_backend_name, 200, 8, functions)
            outcome = await load.run(pool, material, orders, (ignore, ignore))
            # A call that is counted here comes to the module a moment later.
            await settled(pool)
            counted = {name: count for name, count in fault.counts().items() if count}
    assert outcome.total_verified == 200
    told = dict(outcome.calls)
    # Sessions are closed behind the results, and opened ahead: some are under way.
    for name in ("C_CloseSession", "C_OpenSession"):
        assert 0 <= counted.pop(name) - told.pop(name) <= 8
    assert told == counted


def ignore(_steps: int) -> None:
    """There is no bar to move."""


@pytest.mark.parametrize("operations", range(1, 40))
def test_a_plan_takes_as_many_operations_as_asked(operations: int) -> None:
    """Also where the last one would take two."""
    assert sum(kind.operations for kind in plan(operations)) == operations


def test_a_machine_without_softhsm_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No traceback, and a status of its own."""
    monkeypatch.setenv("SOFTHSM2_MODULE", str(tmp_path / "none.so"))
    done = demonstrate(*SMALL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("SOFTHSM2_MODULE names ")


def test_an_interrupted_demo_leaves_nothing_behind() -> None:
    """Ctrl-C ends it at once; the token is gone."""
    command = [*COMMAND, "--operations", "1000000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().split()[-1])
        assert directory.is_dir()
        for line in process.stdout:
            if line.startswith("asyncio: "):
                break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "stopped\n")
    assert not directory.exists()
