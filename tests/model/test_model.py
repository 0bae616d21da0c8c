"""The real pool never disagrees with the model."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from faultmodule import FaultModule
from model.callers import Callers
from model.machine import Disagreement, Machine
from model.world import Tokens

if TYPE_CHECKING:
    from pathlib import Path

    from pkcs11_pool.softhsm import SoftHSM, TokenDirectory

STEPS = 1_300
RUN = 60


@pytest.fixture
def tokens(
    token_directory: TokenDirectory,
    fault_library: Path,
    soft_hsm: SoftHSM,
    tmp_path: Path,
) -> Tokens:
    """Two tokens, behind the fault module."""
    real = [token_directory.add_token(label) for label in ("left", "right")]
    fault = FaultModule(fault_library, soft_hsm.module, copy_to=tmp_path / "fault.so")
    return Tokens(real, fault)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_pool_and_the_model_agree(
    tokens: Tokens, backend: str, part: int, record_property: Any
) -> None:
    """Whatever hypothesis does to them, from tasks of two loops and from threads."""
    counts: Counter[str] = Counter()
    problems: list[Disagreement] = []
    with Callers(backend) as callers:
        given: dict[str, Any] = {"tokens": tokens, "callers": callers}
        given |= {"counts": counts, "problems": problems}
        for number in itertools.count(part, 1000):
            if counts["steps"] >= STEPS:
                break
            machine: Any = seed(number)(type("Machine", (Machine,), dict(given)))
            left = STEPS - counts["steps"]
            try:
                run_state_machine_as_test(machine, settings=_settings(left))
            except Exception:
                if problems:
                    raise problems[0] from problems[0].__cause__
                raise
    record_property("steps", counts["steps"])
    print(dict(counts))


def _settings(steps: int) -> settings:
    return settings(
        max_examples=max(1, steps // RUN),
        stateful_step_count=RUN,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
