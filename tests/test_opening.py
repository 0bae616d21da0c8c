"""Opening a token that others write at the same time: it may be misread, and is not."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import anyio
import pytest
from pkcs11 import exceptions as p11

from faultmodule import CKR
from pkcs11_pool import (
    ModuleError,
    PoolClosed,
    PoolState,
    TokenNotFound,
    TokenUnavailable,
)
from pkcs11_pool.login import opening
from poolkit import digest, eventually, hangs

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import ThrowawayToken, TokenDirectory

_SLOTS = 2
"""What SoftHSM2 shows of one token: its slot, and a free one."""
_LISTS = 4
"""Calls of ``C_GetSlotList`` for one try: are there slots, and which have a token."""
_NOBODY = {"token_label": "nobody"}


@pytest.fixture
def rested(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it rested between its tries: for an opening, no other time passes.

    On a machine that stands still, a second is over before the second try.
    """
    rests: list[float] = []
    began, rest = time.monotonic(), opening.Tries.rest

    def rest_as_always(self: opening.Tries, error: Exception, *, shared: bool) -> float:
        rests.append(rest(self, error, shared=shared))
        return rests[-1]

    clock = SimpleNamespace(monotonic=lambda: began + sum(rests), sleep=time.sleep)
    monkeypatch.setattr(opening, "time", clock)
    monkeypatch.setattr(opening.Tries, "rest", rest_as_always)
    return rests


def _hide(fault: FaultModule, tries: int) -> None:
    """Let the token not be seen, by so many who look for it one after the other."""
    fault.on("C_GetTokenInfo", answer=CKR.TOKEN_NOT_PRESENT, times=_SLOTS * tries)


@pytest.mark.usefixtures("rested")
async def test_a_token_that_was_not_read_is_found_when_it_is_read_anew(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The module reads its tokens when it is initialised, so that is done again."""
    _hide(fault, 2)
    async with make_pool(module=fault.path) as pool:
        assert await digest(pool)
        assert (fault.count("C_Initialize"), fault.count("C_Finalize")) == (3, 2)


@pytest.mark.usefixtures("rested")
async def test_a_token_that_cannot_be_read_is_tried_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """C_GetTokenInfo answers CKR_GENERAL_ERROR for a moment."""
    fault.on("C_GetTokenInfo", answer=CKR.GENERAL_ERROR, times=3)
    async with make_pool(module=fault.path) as pool:
        assert await digest(pool)


async def test_a_token_that_cannot_be_read_at_all_is_told_by_its_own_error(
    make_pool: MakePool, fault: FaultModule, rested: list[float]
) -> None:
    """In about a second."""
    fault.on("C_GetTokenInfo", answer=CKR.GENERAL_ERROR, every=True)
    with pytest.raises(p11.GeneralError):
        await _in_a_second(make_pool, fault, rested)
    assert fault.count("C_Initialize") == fault.count("C_Finalize") > 1


async def test_a_token_that_is_not_there_is_told_in_about_a_second(
    make_pool: MakePool, fault: FaultModule, rested: list[float]
) -> None:
    """After some tries, in the words of the first."""
    with pytest.raises(TokenNotFound, match=r"'nobody'.*has 'demo'"):
        await _in_a_second(make_pool, fault, rested, **_NOBODY)
    assert fault.count("C_Initialize") == fault.count("C_Finalize") > 1


async def _in_a_second(
    make_pool: MakePool, fault: FaultModule, rested: list[float], **options: object
) -> None:
    pool = make_pool(module=fault.path, **options)
    try:
        await pool.open()
    finally:
        assert 0.3 < sum(rested) <= 1
        assert pool.state is PoolState.CLOSED


@pytest.mark.parametrize("left", [0.0, 0.01])
def test_who_has_no_time_for_a_rest_has_one_try(left: float) -> None:
    """His own open_timeout bounds the tries, too."""
    tries = opening.Tries("module", time.monotonic() + left)
    tries.begin()
    with pytest.raises(TokenNotFound):
        tries.rest(TokenNotFound("it has another"), shared=False)


async def test_a_module_in_use_is_not_initialised_anew_for_a_token_it_has_not(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The other pool is not disturbed; so nothing new can be seen, and it is told."""
    async with make_pool(module=fault.path) as first:
        fault.reset_counts()
        with pytest.raises(TokenNotFound):
            await make_pool(module=fault.path, **_NOBODY).open()
        assert fault.count("C_GetSlotList") == _LISTS
        assert await digest(first)
        assert fault.count("C_Initialize") == fault.count("C_Finalize") == 0


@pytest.mark.usefixtures("rested")
async def test_a_module_in_use_is_asked_again_for_a_token_it_cannot_read(
    make_pool: MakePool, fault: FaultModule, token_directory: TokenDirectory
) -> None:
    """It need not be initialised anew for that."""
    other = token_directory.add_token("other")
    async with make_pool(module=fault.path):
        fault.reset_counts()
        fault.on("C_GetTokenInfo", answer=CKR.GENERAL_ERROR, times=2)
        second = make_pool(
            module=fault.path, token_label=other.label, pin=other.user_pin
        )
        async with second:
            assert await digest(second)
        assert fault.count("C_Initialize") == fault.count("C_Finalize") == 0


async def test_what_was_misread_of_a_token_is_not_taken_for_its_own(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """It would never be found again under that serial; so it is read twice."""
    fault.token_info(serial="")
    fault.on("C_OpenSession", hang="before")
    pool = make_pool(module=fault.path, pin=None)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.open)
        await hangs(fault, "C_OpenSession")
        fault.token_info()
        fault.release()
    assert pool.token.serial == token.serial
    await pool.close()


async def test_a_token_that_cannot_be_read_before_the_login_is_looked_at_again(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """The PIN is here and not yet sent: neither is it asked for again."""
    asked = []

    def source() -> str:
        asked.append(fault.on("C_GetTokenInfo", answer=CKR.GENERAL_ERROR, times=2))
        return token.user_pin

    async with make_pool(module=fault.path, pin=source) as pool:
        assert await digest(pool)
    assert len(asked) == fault.count("C_Login") == 1


async def test_a_module_that_cannot_be_initialised_for_an_outage_is_waited_for(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its server is down: ``C_Initialize`` says so, and a moment later it is there."""
    fault.on("C_Initialize", times=2, answer=CKR.DEVICE_ERROR)
    async with make_pool(module=fault.path) as pool:
        assert await digest(pool)
    assert fault.count("C_Initialize") == 3


async def test_a_module_whose_server_goes_while_it_is_initialised_is_waited_for(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``C_Initialize`` went well: it is ours, and not for another's to finalise."""
    fault.on("C_GetInfo", answer=CKR.DEVICE_ERROR)
    async with make_pool(module=fault.path) as pool:
        assert await digest(pool)
    assert fault.count("C_Initialize") == fault.count("C_Finalize") == 2


async def test_a_module_that_stays_down_is_told_with_what_it_answers(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """When the time for opening is over."""
    fault.on("C_Initialize", every=True, answer=CKR.TOKEN_NOT_PRESENT)
    with pytest.raises(TokenUnavailable, match="CKR_TOKEN_NOT_PRESENT") as caught:
        await make_pool(module=fault.path, open_timeout=0.5).open()
    assert isinstance(caught.value.__cause__, ModuleError)


async def test_a_module_that_refuses_for_another_reason_is_told_at_once(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """As one that has no configuration."""
    fault.on("C_Initialize", answer=CKR.GENERAL_ERROR)
    with pytest.raises(ModuleError, match="CKR_GENERAL_ERROR"):
        await make_pool(module=fault.path).open()
    assert fault.count("C_Initialize") == 1


async def test_a_pin_is_sent_once_whatever_is_answered(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Nobody knows whether the token counted it; so that is no reason to try again."""
    fault.on("C_Login", answer=CKR.GENERAL_ERROR)
    with pytest.raises(p11.GeneralError, match="C_Login"):
        await make_pool(module=fault.path).open()
    assert fault.count("C_Login") == 1


@pytest.mark.usefixtures("rested")
async def test_a_pool_that_is_closed_while_it_tries_does_not_go_on(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The one who opens it is told."""
    _hide(fault, 10)
    fault.on("C_Initialize", nth=2, hang="before")
    pool = make_pool(module=fault.path, close_timeout=0.2)

    async def opens() -> None:
        with pytest.raises(PoolClosed, match="while it opened"):
            await pool.open()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(opens)
        await hangs(fault, "C_Initialize")
        tasks.start_soon(pool.close)
        await eventually(pool._engine.actor._stopping.is_set)  # noqa: SLF001
        fault.release()
    assert fault.count("C_Initialize") == 2


def test_a_slow_module_is_not_tried_for_longer_than_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next try takes as long as the last: behind a network, there is none."""
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("pkcs11_pool.login.opening.time", clock)
    error = TokenNotFound("it has another")
    tries = opening.Tries("module", None)
    tries.begin()
    now[0] += 0.3
    assert tries.rest(error, shared=False) > 0
    tries.begin()
    now[0] += 0.5
    with pytest.raises(TokenNotFound):
        tries.rest(error, shared=False)


# -- For real ---------------------------------------------------------------------

_OPENS = """
import sys
import anyio
from pkcs11_pool import TokenPool
from pkcs11_pool.login import opening

MODULE, LABEL, PIN = sys.argv[1:]
# On a machine that stands still, a second is over before the second try.
opening._PATIENCE = 20.0


async def main():
    async with TokenPool(MODULE, token_label=LABEL, pin=PIN):
        pass


print("here", flush=True)
for _ in sys.stdin:
    try:
        anyio.run(main)
        print("ok", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""
_PROCESSES, _ROUNDS = 6, 3
_ITS_OWN = "GeneralError C_Login returned CKR_GENERAL_ERROR"
"""What SoftHSM2 may answer to the PIN then, which is not sent again."""


def test_processes_that_open_at_once_all_find_the_token(
    token: ThrowawayToken, tmp_path: Path
) -> None:
    """Each login writes the token's file, while others read it."""
    script = tmp_path / "opens.py"
    script.write_text(_OPENS)
    command = [sys.executable, str(script), str(token.module)]
    processes = [
        subprocess.Popen(
            [*command, token.label, token.user_pin],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(_PROCESSES)
    ]
    told = [_line(process) for process in processes]
    for _ in range(_ROUNDS):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        told += [_line(process) for process in processes]
    for process in processes:
        process.communicate()
    assert set(told) - {_ITS_OWN} == {"here", "ok"}


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
