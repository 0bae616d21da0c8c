"""The list of mistakes that the tests must find does not rot."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutations.catalogue import CATALOGUE, Mutation

_TESTS = Path(__file__).resolve().parent
_SOURCE = _TESTS.parent / "src" / "pkcs11_pool"


@pytest.mark.parametrize("mutation", CATALOGUE, ids=lambda mutation: mutation.name)
def test_each_mutation_applies_to_the_source(mutation: Mutation) -> None:
    """Its text stands in its file, once, and what is made of it compiles."""
    text = (_SOURCE / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    changed = text.replace(mutation.old, mutation.new)
    assert changed != text
    compile(changed, mutation.file, "exec")


@pytest.mark.parametrize("mutation", CATALOGUE, ids=lambda mutation: mutation.name)
def test_the_tests_that_must_notice_are_there(mutation: Mutation) -> None:
    """A test that was renamed would notice nothing any more."""
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (_TESTS / file).read_text()


def test_there_are_enough_and_each_has_a_name() -> None:
    """At least fifteen, and no two of one name."""
    names = [mutation.name for mutation in CATALOGUE]
    assert len(names) == len(set(names)) >= 15
