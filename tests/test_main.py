"""The command line reads its words, and says what is wrong with them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from pkcs11_pool import __main__
from pkcs11_pool.__main__ import main
from pkcs11_pool.cli.running import DEMO_NEEDS


class FakeDemo(ModuleType):
    """Stands for the demo, and keeps what it was called with."""

    def __init__(self, status: int) -> None:
        super().__init__("pkcs11_pool.demo")
        self.status = status
        self.given: dict[str, Any] = {}

    def run(self, **given: Any) -> int:
        """Keep what was given."""
        self.given = given
        return self.status


@pytest.fixture
def fake_demo(monkeypatch: pytest.MonkeyPatch) -> FakeDemo:
    """A demo that takes no time."""
    fake = FakeDemo(status=0)
    monkeypatch.setitem(sys.modules, "pkcs11_pool.demo", fake)
    return fake


def test_the_demo_does_2000_operations_from_64_tasks(fake_demo: FakeDemo) -> None:
    """That is what the README promises."""
    assert main(["demo"]) == 0
    assert fake_demo.given == {"operations": 2000, "tasks": 64, "as_json": False}


def test_options_reach_the_demo(fake_demo: FakeDemo) -> None:
    """All three."""
    main(["demo", "--operations", "7", "--tasks", "3", "--json"])
    assert fake_demo.given == {"operations": 7, "tasks": 3, "as_json": True}


def test_the_status_of_the_demo_is_that_of_the_program(
    fake_demo: FakeDemo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong result must reach the shell."""
    fake_demo.status = 1
    monkeypatch.setattr(sys, "argv", ["pkcs11_pool", "demo"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(__main__.__file__), run_name="__main__")
    assert ended.value.code == 1


@pytest.mark.parametrize("option", ["--operations", "--tasks"])
@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many", "", "\u00b2"])
def test_a_bad_number_is_named(
    option: str, number: str, fake_demo: FakeDemo, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing has run by then."""
    assert main(["demo", f"{option}={number}"]) == 2
    said = capsys.readouterr().err
    assert f"{option}: {number!r} is not a whole number from 1 up" in said
    assert said.count("\n") == 1
    assert fake_demo.given == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dance"], "'dance' is no command. Commands: tokens, objects, "),
        (["dmeo"], "'dmeo' is no command. Did you mean demo?"),
        (["demo", "--fast"], "Unknown option: --fast"),
        (["demo", "more"], "'more': more words than demo takes. `pkcs11-pool demo"),
    ],
)
def test_words_that_are_not_known_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and nothing on standard output."""
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.err.startswith(said)
    assert (told.err.count("\n"), told.out) == (1, "")


def test_without_words_it_shows_its_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And that it was not asked for anything."""
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


WITHOUT = """\
import sys
class Finder:
    def find_spec(name, *rest):
        if name == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder)
from pkcs11_pool import __main__
from pkcs11_pool.__main__ import main
sys.exit(main(["demo", "--operations", "1"]))
"""


def demonstrate_without(name: str) -> subprocess.CompletedProcess[str]:
    """Run the demo where a package is missing."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("name", sorted(DEMO_NEEDS))
def test_a_missing_extra_is_named_with_the_command_that_installs_it(name: str) -> None:
    """The package runs without these; its demo does not."""
    done = demonstrate_without(name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"The demo needs {name}: pip install 'pkcs11-pool[demo]'\n"


def test_a_missing_command_line_is_named() -> None:
    """The package alone has none."""
    done = demonstrate_without("cyclopts")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "The command line needs cyclopts: pip install 'pkcs11-pool[cli]'\n"
    )


def test_another_missing_package_is_not_blamed_on_the_extra() -> None:
    """That is a broken installation, and the traceback says where."""
    done = demonstrate_without("pkcs11_pool.demo.calls")
    assert done.returncode == 1
    assert "No module named 'pkcs11_pool.demo.calls'" in done.stderr
    assert "pip install" not in done.stderr
