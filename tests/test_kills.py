"""Real kills: a token behind a server, and the server killed or stopped under load.

Needs ``p11-kit`` and its modules. ``PKCS11_POOL_KILLS=10`` kills it ten times over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pkcs11_pool.chaos.server import ServerUnavailable, client_module
from poolkit import SLACK

_PROGRAM = Path(__file__).with_name("kills.py")
_KILLS = int(os.environ.get("PKCS11_POOL_KILLS", "2"))
_PROMISED = 2.0
"""Seconds from the token's return to the first result."""


@pytest.fixture(autouse=True)
def server(soft_hsm: object) -> None:
    """Skip where there is no server to be killed."""
    del soft_hsm
    try:
        client_module()
    except ServerUnavailable as error:
        pytest.skip(str(error))


def _run(tmp_path: Path, *arguments: str, limit: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), *arguments],
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("backend", "last"), [("asyncio", "kill:3"), ("trio", "stop:5")]
)
@pytest.mark.timeout(100 + 10 * _KILLS)
def test_a_server_that_is_killed_under_load_costs_no_result(
    tmp_path: Path, backend: str, last: str
) -> None:
    """64 tasks: each result is right, none is lost, and it goes on by itself."""
    plan = ["kill:3"] * (_KILLS - 1) + [last]
    found = _run(
        tmp_path, "under_load", backend, ",".join(plan), limit=90 + 10 * _KILLS
    )
    assert (found["wrong"], found["lost"], found["strange"]) == ([], [], [])
    assert found["recoveries"] == plan.count("kill:3")
    assert found["calls_lost"] == 0
    # What changes the token or was in an open session, and nothing else.
    assert set(found["refused"]) <= {
        "OutcomeUnknown",
        "SessionClosed",
        "SessionObjectDestroyed",
    }
    assert len(found["returns"]) == len(plan)
    assert max(found["returns"]) < 3 * _PROMISED + SLACK


@pytest.mark.timeout(100)
def test_a_server_that_is_down_at_opening_is_waited_for(tmp_path: Path) -> None:
    """Its client has no slots then, and has them when it is initialised anew."""
    found = _run(tmp_path, "opening", "asyncio", limit=80)
    assert "no slots" in found["refused"]
    assert found["gave_up"] < 3 * 2.0 + SLACK
    assert len(bytes.fromhex(found["random"])) == 8


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.timeout(100)
def test_neither_the_pool_nor_the_process_waits_for_a_call_that_hangs(
    tmp_path: Path, backend: str
) -> None:
    """The server is stopped and stays so: deadlines hold, and all comes to its end."""
    began = time.monotonic()
    found = _run(tmp_path, "hanging", backend, limit=80)
    took = time.monotonic() - began
    with suppress(ProcessLookupError):
        os.killpg(found["server"], signal.SIGKILL)
    running, waiting, refused = found["phases"]
    assert (running, waiting) == ("running", "waiting")
    assert "only a new process can help" in refused
    assert (found["calls_lost"], found["calls_stuck"]) == (1, 1)
    assert found["state"] == "closed"
    assert found["closing"] < 3 * 1.0 + SLACK
    assert took < 60
