"""PINs on the command line: the same words for each, and what a wrong one tells."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

import pkcs11
import pytest

from pkcs11_pool import pins
from pkcs11_pool.cli.pin_options import SOURCES
from test_cli import Run, Typed, bare, no_terminal, no_variables, run, typed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import ThrowawayToken

__all__ = ["bare", "no_terminal", "no_variables", "run", "typed"]


class Sources:
    """A PIN at each of the places that words name."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        self._patch = monkeypatch
        self._rings: dict[tuple[str, str], str] = {}
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(path))
        monkeypatch.setattr(pins, "keyring", lambda *names: lambda: self._rings[names])

    def words(self, which: str, kind: str, pin: str, typed: Typed) -> list[str]:
        """Put a PIN there; the words that name the place."""
        word, name = f"--{which}-{kind}", f"{which}-{kind}"
        if kind == "env":
            variable = name.replace("-", "_").upper()
            self._patch.setenv(variable, pin)
            return [word, variable]
        if kind == "keyring":
            self._rings["hsm", name] = pin
            return [word, "hsm", name]
        if kind == "prompt":
            # New PINs are typed twice.
            typed.answers += [pin] if which == "so-pin" else [pin, pin]
            return [word]
        (self._path / name).write_text(f"{pin}\n")
        (self._path / name).chmod(0o600)
        return [word, str(self._path / name) if kind == "file" else name]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """Places for PINs."""
    return Sources(tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", SOURCES)
def test_each_pin_has_the_same_sources(
    run: Run, token: ThrowawayToken, sources: Sources, typed: Typed, kind: str
) -> None:
    """The user's, the officer's and the new one: only the name in front differs."""
    officer = sources.words("so-pin", kind, token.so_pin, typed)
    new = sources.words("new-pin", kind, "97531", typed)
    run("set-pin", "--by-officer", *officer, *new)
    assert typed.answers == []
    user = sources.words("pin", kind, "97531", typed)
    del typed.answers[1:]
    run("random", "8", *user)
    assert typed.answers == []


@pytest.mark.parametrize("kind", SOURCES)
def test_a_token_is_initialised_from_the_same_sources(
    run: Run, sources: Sources, typed: Typed, kind: str, monkeypatch: Any
) -> None:
    """Its user's first PIN and its officer's."""
    officer = sources.words("so-pin", kind, "87654321", typed)
    if kind == "prompt":
        typed.answers += ["87654321"]  # a new one, so twice
    user = sources.words("pin", kind, "97531", typed)
    run("init-token", "mine", *officer, *user)
    assert typed.answers == []
    monkeypatch.setenv("PKCS11_PIN", "97531")
    run("random", "8", "--token", "mine")


def test_a_used_token_takes_its_officers_present_pin(
    run: Run, token: ThrowawayToken, typed: Typed
) -> None:
    """Which is typed once: the token knows it."""
    slot = str(next(t["slot"] for t in run("tokens", "--json").json if t["label"]))
    typed.answers = [token.so_pin]
    run("init-token", token.label, "--slot", slot, "--wipe", "--no-user-pin")
    assert typed.asked == ["PIN of the security officer: "]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init-token", "x"], "no PIN of the security officer: give one of --so-pin-"),
        (["init-token", "x", "--so-pin-env", "SO"], "no PIN: give one of --pin-env"),
        (["set-pin", "--by-officer"], "no PIN of the security officer: give one of"),
        (["set-pin"], "no PIN: give one of --pin-env, --pin-file, --pin-credential"),
        (["set-pin", "--pin-env", "SO"], "no new PIN: give one of --new-pin-env, "),
    ],
)
def test_a_pin_that_nothing_names_is_told_by_its_own_words(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    """Where there is no terminal to ask on."""
    monkeypatch.delenv("PKCS11_PIN")
    monkeypatch.setenv("SO", "87654321")
    assert said in run(*words, status=4).err


@pytest.mark.parametrize("word", ["--pin", "--so-pin", "--new-pin"])
def test_no_pin_is_a_word(run: Run, word: str) -> None:
    """And its own words are told, never the PIN."""
    told = run("set-pin", f"{word}=4711", status=2).err
    assert f"{word}-env" in told
    assert "4711" not in told
    officer = ["--by-officer"] if word == "--so-pin" else []
    told = run("set-pin", *officer, f"{word}-env", "4711", status=2).err
    assert told == f"{word}-env takes the name of a variable, not the PIN\n"


@pytest.mark.parametrize("command", ["tokens", "random 8", "set-pin", "doctor"])
def test_no_pin_stands_in_the_uri(run: Run, command: str) -> None:
    """It would be a word, too; and it is not shown."""
    told = run(*command.split(), "--uri", "pkcs11:?pin-value=4711", status=2).err
    assert "take it out, and give pin-source" in told
    assert "4711" not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("set-pin --so-pin-env SO --new-pin-env N", "unless --by-officer is there"),
        ("set-pin --by-officer --pin-env N", "--new-pin-… is new"),
        ("init-token x --no-user-pin --pin-env N", "--no-user-pin leaves it unset"),
    ],
)
def test_a_source_that_is_not_used_is_refused(run: Run, words: str, said: str) -> None:
    """Else somebody waits for a PIN that was never set."""
    assert said in run(*words.split(), status=2).err


def test_a_uri_may_say_where_the_present_pin_is(
    bare: Run, token: ThrowawayToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for every other command."""
    monkeypatch.setenv("OLD", token.user_pin)
    monkeypatch.setenv("NEW", "97531")
    monkeypatch.setenv("PKCS11_MODULE", str(token.module))
    uri = f"pkcs11:token={token.label}"
    bare("set-pin", "--uri", f"{uri}?pin-source=env:OLD", "--new-pin-env", "NEW")
    words = ("--pin-env", "NEW", "--new-pin-env", "OLD")
    bare("set-pin", "--uri", f"{uri}?pin-source=file:/none", *words)
    bare("random", "8", "--uri", f"{uri}?pin-source=env:OLD")
    told = bare("random", "8", "--uri", f"{uri}?pin-source=%7Ccat%20/x", status=2)
    assert "--allow-pin-command" in told.err


def test_the_user_changes_the_pin_and_the_officer_sets_it(
    run: Run, token: ThrowawayToken, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each from sources."""
    new = tmp_path / "new"
    new.write_text("5678\n")
    new.chmod(0o600)
    run("set-pin", "--new-pin-file", str(new))
    run("random", "8", status=4)
    monkeypatch.setenv("PKCS11_PIN", "5678")
    run("random", "8")
    monkeypatch.setenv("SO", token.so_pin)
    monkeypatch.setenv("NEW", "9999")
    words = ("set-pin", "--by-officer", "--so-pin-env", "SO", "--new-pin-env", "NEW")
    assert run(*words, "--json").json == {"changed": True}
    run("random", "8", "--pin-env", "NEW")


@pytest.fixture
def wrong(
    run: Run, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultModule]:
    """A module in front, and wrong PINs in variables."""
    del run
    monkeypatch.setenv("PKCS11_MODULE", str(fault.path))
    monkeypatch.setenv("WRONG", "99999999")
    monkeypatch.setenv("NEW", "97531")
    yield fault
    assert fault.count("C_Login") <= 1


@pytest.mark.parametrize("whose", ["security officer", "user"])
@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ("", "a few wrong ones may lock it"),
        ("COUNT_LOW", "a few wrong ones may lock it"),
        ("FINAL_TRY", "one more wrong one locks it"),
        ("LOCKED", "it is locked now: "),
    ],
)
def test_a_wrong_pin_is_told_with_whose_it_was_and_what_is_left(
    run: Run, wrong: FaultModule, whose: str, flags: str, left: str
) -> None:
    """Tokens tell no number of tries, but they tell the last one."""
    words = ["--pin-env", "WRONG"]
    if whose != "user":
        words = ["--by-officer", "--so-pin-env", "WRONG"]
    if flags:
        name = f"{'SO' if whose != 'user' else 'USER'}_PIN_{flags}"
        flag = int(pkcs11.TokenFlag[name])
        with flagged_by_login(wrong, flag):
            told = run("set-pin", *words, "--new-pin-env", "NEW", status=4).err
    else:
        told = run("set-pin", *words, "--new-pin-env", "NEW", status=4).err
    assert told.startswith(f"the token refused the PIN of the {whose}; {left}")
    if flags == "LOCKED":
        more = "init-token --wipe" if whose != "user" else "set-pin --by-officer"
        assert f"`pkcs11-pool {more}`" in told
    assert "99999999" not in told


@contextlib.contextmanager
def flagged_by_login(fault: FaultModule, flag: int) -> Iterator[None]:
    """The token has a flag from the next login on: before it, no PIN would be sent."""

    def answer() -> None:
        fault.wait_until_hanging("C_Login")
        fault.token_info(flags_set=flag)
        fault.release()

    fault.on("C_Login", hang="after")
    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_the_new_pin_is_not_asked_for_in_vain(
    run: Run, token: ThrowawayToken, typed: Typed
) -> None:
    """Nothing was sent when the two differ."""
    before = os.environ["PKCS11_PIN"]
    typed.answers = [token.so_pin, "1111", "2222"]
    assert "differ" in run("set-pin", "--by-officer", status=4).err
    assert os.environ["PKCS11_PIN"] == before
    run("random", "8")
