"""The examples run; what stands in the pages is in ``test_docs``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SAID = {
    "asyncio_sign.py": "100 of 100 signatures verify, after 1 login",
    "trio_sign.py": "the signature verifies",
}


def test_every_example_is_run_here() -> None:
    """One that is added must say below what it prints."""
    assert set(SAID) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.usefixtures("soft_hsm")
@pytest.mark.parametrize("name", sorted(SAID))
def test_an_example_runs_as_it_stands(name: str) -> None:
    """It ends well and says what it should, without a warning."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert SAID[name] in done.stdout.splitlines()


@pytest.mark.parametrize("name", sorted(SAID))
def test_an_example_is_short(name: str) -> None:
    """Long ones are not read."""
    assert len((EXAMPLES / name).read_text().splitlines()) <= 30
