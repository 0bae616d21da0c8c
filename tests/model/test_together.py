"""What may be said of steps that were made at once, and no more."""

from __future__ import annotations

from model import steps
from model.callers import Running
from model.together import LeftBehind, Part, stories


def _create(outcome: BaseException | None, *, cancelled: bool = False) -> Part:
    part = Part(steps.Create("pool1", "pool", "c1", "a", token=True, private=False))
    part.running = Running()
    part.running.error, part.running.cancelled = outcome, cancelled
    return part


def _left_behind(parts: list[Part], failed: int) -> int:
    """The most files that a story says were left behind."""
    return max(
        sum(isinstance(chosen, LeftBehind) for _, chosen in told)
        for told in stories(parts, failed)
    )


def test_a_cancelled_create_may_leave_a_file_where_the_module_failed_to_make_one() -> (
    None
):
    """SoftHSM2's error of it goes to nobody: only the log of the module has it."""
    assert _left_behind([_create(None, cancelled=True)], 1) == 1


def test_nothing_is_left_behind_where_the_module_failed_at_nothing() -> None:
    """Or a create that the pool loses would look like one that SoftHSM2 spoilt."""
    gone = [_create(None, cancelled=True), _create(None, cancelled=True)]
    assert _left_behind(gone, 0) == 0
    assert _left_behind(gone, 1) == 1


def test_what_was_acknowledged_happened() -> None:
    """No story leaves it out, whatever the module failed at."""
    part = _create(None)
    assert list(stories([part], 3)) == [((part, part.step),)]
