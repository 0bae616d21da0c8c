"""The real pool never disagrees with the model.

More steps, and other ones: ``pytest tests/model --long --model-seed 7``. A failure
shows all the steps of its run. With the same options they are made again, though
threads may do them in another order.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.internal.conjecture.providers import (
    AVAILABLE_PROVIDERS,
    HypothesisProvider,
)
from hypothesis.stateful import run_state_machine_as_test

from faultmodule import FaultModule
from model.callers import LOOPS, Callers
from model.machine import Machine
from model.unlucky import KINDS as _FAULTS
from model.unlucky import FaultMachine
from model.world import Tokens
from pkcs11_pool.login import steps as recovery

if TYPE_CHECKING:
    from pathlib import Path

    from model.bench import Disagreement
    from pkcs11_pool.softhsm import SoftHSM, TokenDirectory

PARTS = range(2)
"""Each backend's steps are made by so many tests, for the sake of parallel ones."""
FAULT_PARTS = range(4)
"""And those with faults by so many."""
_RUN = 60
"""Steps from the first pool to the last one's end."""
_MANY_RUNS = 1_000
"""More than one test can make for one seed; so no two tests have the same seed."""
_WITH_FAULTS = 5, 6
"""So many steps are made with faults for so many without: 10,000 for 12,000."""
_STRUCK = 0.02
"""The least share of the steps in which a fault was really played."""
_A_FEW_RUNS = 200
"""In so many steps; in fewer, chance may have played none."""
_EACH_KIND = 1_000
"""In so many steps each kind of fault is played; in fewer, chance may leave one out."""
_LONG = 100_000
"""Steps in all, with ``--long``."""
# hypothesis' own way would make much the same run again and again: what begins at
# random and ends as the simplest, then copies of what was made before, with little
# changed. What it takes for another's backend makes each run at random.
_BACKEND = "each-at-random"
AVAILABLE_PROVIDERS[_BACKEND] = HypothesisProvider


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


@pytest.mark.timeout(0)  # a call that does not end is found by the machine itself
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("backend", LOOPS)
def test_the_pool_and_the_model_agree(
    tokens: Tokens, backend: str, part: int, request: pytest.FixtureRequest
) -> None:
    """Whatever hypothesis does to them, from tasks of two loops and from threads."""
    steps, first = _share(request, backend, part, len(PARTS))
    counts = _run(Machine, tokens, backend, steps, first)
    text = f"{counts['steps']} steps (at least {steps}), "
    text += f"{counts['calls']} calls of the pool, {counts['module calls']} of the "
    text += f"module, {counts['runs']} runs, {counts['general errors']} steps that the "
    text += "token answered with CKR_GENERAL_ERROR and that may have happened or not"
    request.node.user_properties.append(("model machine", text))
    assert counts["steps"] >= steps


@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", FAULT_PARTS)
@pytest.mark.parametrize("backend", LOOPS)
def test_the_pool_and_the_model_agree_when_the_token_fails(
    tokens: Tokens,
    backend: str,
    part: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same with faults between any two calls of the module."""
    # A token that is back is found soon; how long the rests are is not what is tested.
    monkeypatch.setattr(recovery, "FIRST_REST", 0.002)
    monkeypatch.setattr(recovery, "LONGEST_REST", 0.05)
    steps, first = _share(request, backend, part, len(FAULT_PARTS), _WITH_FAULTS)
    counts = _run(FaultMachine, tokens, backend, steps, first)
    kinds = {name: n for name, n in counts.items() if name.startswith("fault ")}
    text = f"{counts['steps']} steps (at least {steps}), {counts['runs']} runs, "
    text += f"{counts['module calls']} calls of the module; "
    text += ", ".join(f"{n} times {name}" for name, n in sorted(kinds.items()))
    request.node.user_properties.append(("model machine", text))
    assert counts["steps"] >= steps
    if steps >= _A_FEW_RUNS:
        assert sum(kinds.values()) >= steps * _STRUCK
    if steps >= _EACH_KIND:
        assert len(kinds) == len(set(_FAULTS))


def _share(
    request: pytest.FixtureRequest,
    backend: str,
    part: int,
    parts: int,
    rate: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    """How many steps one of the tests makes, and where its choices begin."""
    wanted = request.config.getoption("--model-steps")
    if request.config.getoption("--long"):
        wanted = max(_LONG, wanted)
    made, of = rate
    steps = -(-wanted * made // (of * len(LOOPS) * parts))
    place = list(LOOPS).index(backend) * parts + part
    return steps, (request.config.getoption("--model-seed") * 10 + place) * _MANY_RUNS


def _run(
    kind: type[Machine], tokens: Tokens, backend: str, steps: int, first: int
) -> Counter[str]:
    """Let the machine make so many steps at least; how many it made of what.

    Raises:
        Disagreement: The pool did what the model rules out.
    """
    counts: Counter[str] = Counter()
    problems: list[Disagreement] = []
    with Callers(backend) as callers:
        given: dict[str, Any] = {"tokens": tokens, "callers": callers}
        given |= {"counts": counts, "problems": problems}
        for number in itertools.count(first):
            left = steps - counts["steps"]
            if left <= 0:
                return counts
            own = given | {"simplest": [True]}
            machine: Any = seed(number)(type("Machine", (kind,), own))
            try:
                run_state_machine_as_test(machine, settings=_settings(left))
            except Exception:
                if problems:
                    raise problems[0] from problems[0].__cause__
                raise
    raise AssertionError


def _settings(steps: int) -> settings:
    return settings(
        max_examples=max(1, steps // _RUN),
        backend=_BACKEND,
        stateful_step_count=_RUN,
        deadline=None,
        database=None,
        # Threads do not make the same steps twice in the same order: a shorter way to
        # a failure is looked for by reading.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
