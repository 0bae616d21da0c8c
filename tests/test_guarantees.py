"""The page of guarantees: each promise has a test, and each test is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "explanation" / "guarantees.md"
SECURITY: Final = ROOT / "SECURITY.md"
TOPICS: Final = (
    "Sessions",
    "Login",
    "Session objects",
    "Recovery",
    "PINs",
    "Hangs",
    "Fork",
    "Cancellation",
    "Backpressure",
    "Ordering",
    "Memory",
)
_NODE: Final = re.compile(r"`([\w/]+\.py::\w+)`")
_TEXT: Final = re.compile(r"\"([^\"]+)\"")


class Promise(NamedTuple):
    """A row of the page."""

    topic: str
    promise: str
    source: str
    tests: tuple[str, ...]


def promises() -> list[Promise]:
    """All rows of all tables of the page."""
    found, topic = [], ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            topic = line[3:]
        if not line.startswith("| ") or line.startswith(("| ---", "| promise")):
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert len(cells) == 3, line
        found.append(Promise(topic, cells[0], cells[1], tuple(_NODE.findall(cells[2]))))
    return found


PROMISES: Final = promises()


def named() -> list[str]:
    """Every test that the page names, in a table or below it."""
    return sorted(set(_NODE.findall(PAGE.read_text())))


def collected(file: str) -> set[str]:
    """The tests of a file, as pytest collects them: functions at its top."""
    # Those for opencryptoki are run by name, in a namespace of their own.
    prefix = "check_" if file.startswith("opencryptoki/") else "test_"
    path = ROOT / "tests" / file
    if not path.name.startswith(prefix) or not path.exists():
        return set()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, functions) and node.name.startswith("test_")
    }


def test_every_promise_has_a_test_and_a_source() -> None:
    """No row without either, and no promise twice."""
    assert [row.promise for row in PROMISES if not row.tests] == []
    sources = ("ours", "text: ", "v3.1, ", "usage guide, ")
    assert [r.promise for r in PROMISES if not r.source.startswith(sources)] == []
    assert len({row.promise for row in PROMISES}) == len(PROMISES) >= 40


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_has_promises(topic: str) -> None:
    """What a user of an HSM asks about."""
    assert len([row for row in PROMISES if row.topic == topic]) >= 3


@pytest.mark.parametrize("file", sorted({node.partition("::")[0] for node in named()}))
def test_every_test_that_is_named_is_there(file: str) -> None:
    """In a file that pytest looks into, under the name on the page."""
    wanted = {node.partition("::")[2] for node in named() if node.startswith(file)}
    assert wanted
    assert wanted - collected(file) == set()


def test_a_test_that_is_not_there_is_noticed() -> None:
    """Neither a file nor a name is made up."""
    assert collected("test_nowhere.py") == set()
    assert collected("conftest.py") == set()
    assert "test_a_test_that_is_not_there_is_noticed" in collected("test_guarantees.py")


def test_what_is_quoted_of_the_users_text_is_in_it() -> None:
    """Word by word; a gap is three dots."""
    text = " ".join((ROOT / "tests" / "test_user_text.py").read_text().split())
    quoted = [
        part.strip(" ,")
        for row in PROMISES
        if row.source.startswith("text: ")
        for sentence in _TEXT.findall(row.source.split("; v3.1")[0])
        for part in sentence.split("…")
    ]
    assert len(quoted) >= 5
    assert [part for part in quoted if part not in text] == []


def test_what_cannot_be_is_said() -> None:
    """A C call that hangs, a text in memory, other processes, a module that lies."""
    said = PAGE.read_text().split("## What cannot be")[1]
    points = re.findall(r"(?m)^- \*\*(.+?)\*\*", said)
    assert {
        "A C call cannot be stopped.",
        "Python cannot wipe a `str`.",
        "Guards are per process.",
        "A module may lie.",
    } <= set(points)


def test_the_threat_model_is_linked_both_ways() -> None:
    """And says of each boundary what we do and what the user must."""
    text = SECURITY.read_text()
    assert "docs/explanation/guarantees.md" in text
    assert "SECURITY.md" in PAGE.read_text()
    assert "SECURITY.md" in (ROOT / "docs" / "index.md").read_text()
    rows = re.findall(r"(?m)^\| .*\*\*.* \|$", text.split("## Attackers")[0])
    assert len(rows) >= 10
    assert [row for row in rows if len(row.strip("| ").split(" | ")) != 4] == []
    for title in ("To report something", "Attackers", "What you must do"):
        assert f"## {title}" in text
