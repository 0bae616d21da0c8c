"""The command that sets everything up: what it installs, when, and what it says."""

import importlib.util
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"(?m)^([a-z0-9-]+)==(\S+)([^#]*?)(?=\n[a-z]|\Z|\n    #)")


def requirements(value: object) -> Iterator[str]:
    """Yield the requirements below a table of pyproject.toml."""
    if isinstance(value, str):
        yield re.split(r"[<>=!~;\[ ]", value)[0].lower()
    elif isinstance(value, list):
        for one in value:
            yield from requirements(one)
    elif isinstance(value, dict) and "include-group" not in value:
        yield from requirements(list(value.values()))


@pytest.fixture
def dev(tmp_path: Path) -> ModuleType:
    """Return dev.py as a module whose repository is a copy in a temporary directory."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in (module.ALL_PINS, module.DEMO_PINS, "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    vars(module)["ROOT"] = tmp_path
    return module


@pytest.fixture
def steps(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what dev.py would make and install, instead of doing it."""
    done: list[str] = []

    def create(home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        done.append("create")

    def install(_python: Path, pins: str, *, project: bool) -> None:
        done.append(f"{pins} and the project" if project else pins)

    monkeypatch.setattr(dev, "create", create)
    monkeypatch.setattr(dev, "install", install)
    return done


def test_every_requirement_is_pinned_with_hashes() -> None:
    """What pyproject.toml asks for, the pin file holds, and each pin has a hash."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = set(requirements(project["project"]["dependencies"]))
    asked |= set(requirements(project["project"]["optional-dependencies"]))
    asked |= set(requirements(project["dependency-groups"]))
    asked |= set(requirements(project["build-system"]["requires"]))
    pins = PIN.findall((ROOT / "constraints.txt").read_text())
    assert asked <= {name for name, _, _ in pins}
    assert [name for name, _, rest in pins if "--hash=sha256:" not in rest] == []


def test_the_demo_runs_on_pins_that_the_tests_run_on() -> None:
    """The demo's pins are a subset: same packages, same versions, same hashes."""
    every = set(PIN.findall((ROOT / "constraints.txt").read_text()))
    versions = {(name, version) for name, version, _ in every}
    demo = PIN.findall((ROOT / "constraints-demo.txt").read_text())
    assert demo
    assert {(name, version) for name, version, _ in demo} <= versions


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-demo.txt"])
def test_pin_files_name_no_place(name: str) -> None:
    """Where the packages come from is the business of each machine."""
    assert not re.search(r"://|--(extra-)?index-url|--find", (ROOT / name).read_text())


def test_installs_once_and_then_starts_at_once(
    dev: ModuleType, steps: list[str]
) -> None:
    """A second run with the same pins makes and installs nothing."""
    first = dev.environment(dev.DEMO_PINS)
    assert dev.environment(dev.DEMO_PINS) == first
    assert steps == ["create", "constraints-demo.txt and the project"]


def test_the_tests_add_to_what_the_demo_installed(
    dev: ModuleType, steps: list[str]
) -> None:
    """One environment serves both."""
    dev.environment(dev.DEMO_PINS)
    dev.environment(dev.ALL_PINS)
    assert steps[2:] == ["constraints.txt"]


def test_the_demo_needs_nothing_after_the_tests(
    dev: ModuleType, steps: list[str]
) -> None:
    """What the tests installed is more than it needs."""
    dev.environment(dev.ALL_PINS)
    dev.environment(dev.DEMO_PINS)
    assert steps == ["create", "constraints.txt and the project"]


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_changed_pins_make_the_environment_anew(
    dev: ModuleType, steps: list[str], tmp_path: Path, name: str
) -> None:
    """What a branch with other pins left there is not used."""
    dev.environment(dev.ALL_PINS)
    with (tmp_path / name).open("a") as file:
        file.write("# changed\n")
    dev.environment(dev.ALL_PINS)
    assert steps == ["create", "constraints.txt and the project"] * 2


def test_an_interrupted_installation_counts_as_none(
    dev: ModuleType, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run begins again, it does not find half of the packages."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dev, "install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dev.environment(dev.ALL_PINS)
    dev.environment(dev.ALL_PINS)
    assert steps == ["create", "create", "constraints.txt and the project"]


def test_a_stamp_that_cannot_be_read_counts_as_none(
    dev: ModuleType, tmp_path: Path
) -> None:
    """A file cut short by a full disk is no reason to fail."""
    stamp = tmp_path / "installed.json"
    stamp.write_text(json.dumps({"fingerprint": "f", "pins": ["p"]}))
    assert dev.installed_pins(stamp, "f") == {"p"}
    assert dev.installed_pins(stamp, "g") == set()
    stamp.write_text("{")
    assert dev.installed_pins(stamp, "f") == set()


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        (
            "connection broken by 'NewConnectionError(...)'\nNo matching distribution",
            "index cannot be reached",
        ),
        ("ERROR: No matching distribution found for uvloop==0.23.0", "ready-made"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "not the one"),
        ("no such option: --python", "pip is too old"),
    ],
)
def test_a_failure_says_what_to_do(dev: ModuleType, output: str, advice: str) -> None:
    """The text ends with advice; pip's own words stand before it."""
    text = dev.explain(output.splitlines())
    assert advice in text
    assert output.splitlines()[-1] in text


def test_without_pip_it_says_how_to_get_it(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Debian's python3 comes without pip."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert dev.main(["test"]) == 2
    assert "apt-get install python3-pip" in capsys.readouterr().err


def test_an_old_python_is_refused_with_a_reason(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the interpreter, because there may be several."""
    monkeypatch.setattr(dev, "MINIMUM", (99, 0))
    assert dev.main(["demo"]) == 2
    assert sys.executable in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["tests"], ["check", "src"], ["docs", "--shut"]])
def test_words_it_does_not_know_are_refused(dev: ModuleType, words: list[str]) -> None:
    """Nothing is installed for a command that does not exist."""
    assert dev.main(words) == 2


def test_every_extra_that_an_error_names_is_one_of_the_project() -> None:
    """Who lacks a package is told what to install, and can."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    source = ROOT / "src" / "pkcs11_pool"
    told = {
        name
        for path in source.rglob("*.py")
        for name in re.findall(r'missing\("(\w+)"', path.read_text())
    }
    assert "starlette" in told
    assert told <= set(project["optional-dependencies"])
