"""Each source of a PIN gives it, or says what to do; and shows it nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pkcs11_pool import InvalidOption, InvalidType, PinSourceError, pins
from test_uri import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import MakePool
    from pkcs11_pool.softhsm import ThrowawayToken

SECRET = "tOpsEcret"  # noqa: S105  # that it does not show is tested


@pytest.fixture
def pin_file(tmp_path: Path) -> Path:
    """A file with a PIN that only this user can read."""
    path = tmp_path / "pin"
    path.write_text(f"{SECRET}\nnot this\n")
    path.chmod(0o600)
    return path


def refused(source: Callable[[], str]) -> str:
    """Why a source gives no PIN; and there is none in the error."""
    with pytest.raises(PinSourceError) as caught:
        source()
    assert SECRET not in shown(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_file_of_ones_own_gives_its_first_line(pin_file: Path, mode: int) -> None:
    """Also where a group may read it: that takes a decision."""
    pin_file.chmod(mode)
    assert pins.file(pin_file)() == SECRET


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o620, 0o660, 0o601])
def test_a_file_that_others_can_use_is_refused(pin_file: Path, mode: int) -> None:
    """With the command that mends it, and the way around."""
    pin_file.chmod(mode)
    said = refused(pins.file(pin_file))
    assert f"(mode {mode:04o})" in said
    assert f"chmod 600 {pin_file}" in said
    assert pins.file(pin_file, check=False)() == SECRET


def test_a_file_of_another_user_is_refused(
    pin_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That user could put another PIN there, and so lock the token."""
    if os.geteuid() == 0:
        os.chown(pin_file, 12345, -1)
    theirs, ours = pin_file.stat().st_uid, 4711
    # Only root can give a file away: who is not root is somebody else now.
    monkeypatch.setattr(os, "geteuid", lambda: ours)
    said = refused(pins.file(pin_file))
    assert f"belongs to the user {theirs}" in said
    assert f"chown {ours} {pin_file}" in said
    assert pins.file(pin_file, check=False)() == SECRET


def test_what_is_checked_is_what_was_opened(
    pin_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is put in the place of the one looked at is not read."""
    opened = os.open

    def swap(path: str, flags: int) -> int:
        descriptor = opened(path, flags)
        pin_file.unlink()
        pin_file.write_text("another")
        return descriptor

    monkeypatch.setattr(os, "open", swap)
    assert pins.file(pin_file)() == SECRET


def test_a_pipe_is_read_only_where_that_is_allowed(tmp_path: Path) -> None:
    """Nobody waits for one that nobody writes to."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "pipe=True" in refused(pins.file(pipe))
    writer = threading.Thread(target=pipe.write_text, args=(f"{SECRET}\n",))
    writer.start()
    assert pins.file(pipe, pipe=True)() == SECRET
    writer.join()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\nPIN\n", "is empty"),
        (SECRET.encode() + b"\xff\n", "is not UTF-8"),
    ],
)
def test_a_file_without_a_pin_is_named(
    pin_file: Path, content: bytes, said: str
) -> None:
    """And what is there instead is not shown."""
    pin_file.write_bytes(content)
    assert said in refused(pins.file(pin_file))
    assert str(pin_file) in refused(pins.file(pin_file))


def test_no_file_is_no_pin(tmp_path: Path) -> None:
    """Missing, a directory, a device."""
    assert "No such file" in refused(pins.file(tmp_path / "none"))
    assert str(tmp_path) in refused(pins.file(tmp_path))
    assert "no file that" in refused(pins.file("/dev/zero"))


def test_a_line_without_an_end_is_not_read_for_ever(pin_file: Path) -> None:
    """No token takes a PIN of that length."""
    pin_file.write_bytes(b"1" * 1_000_000)
    assert len(pins.file(pin_file)()) == 4096


def test_a_systemd_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where systemd puts it; outside of a service it says what the unit lacks."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    source = pins.systemd_credential("hsm-pin")
    assert "LoadCredential=hsm-pin:" in refused(source)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert "No such file" in refused(source)
    # As systemd 252 leaves it for the user of a service, by its ACL mask.
    (tmp_path / "hsm-pin").write_text(SECRET)
    (tmp_path / "hsm-pin").chmod(0o440)
    assert source() == SECRET


@pytest.mark.parametrize("name", ["../pin", "a/b", "..", ""])
def test_a_credential_has_no_path(name: str) -> None:
    """It stands in one directory."""
    with pytest.raises(InvalidOption):
        pins.systemd_credential(name)


ASK = """\
import sys
from pkcs11_pool import PinSourceError, pins
try:
    print("got", pins.prompt("PIN, please: ")())
except PinSourceError as error:
    print(error)
"""


def test_a_prompt_without_a_terminal_says_what_to_use() -> None:
    """It neither reads standard input nor shows what is typed there."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK],
        input=f"{SECRET}\n",
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no terminal" in done.stdout
    assert "pins.file" in done.stdout


def test_a_prompt_does_not_show_what_is_typed() -> None:
    """On a real terminal, with its echo switched off."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    try:
        child, terminal = pty.fork()
    except OSError as error:
        pytest.skip(f"no pseudo-terminal can be had here: {error}")
    if child == 0:  # pragma: no cover  # another process
        os.execv(sys.executable, [sys.executable, "-c", ASK])  # noqa: S606
    told = b""
    while b"please: " not in told:
        told += os.read(terminal, 1000)
    os.write(terminal, SECRET.encode() + b"\n")
    while b"got" not in told:
        told += os.read(terminal, 1000)
    while SECRET.encode() not in told:
        told += os.read(terminal, 1000)
    os.waitpid(child, 0)
    os.close(terminal)
    # Once: printed by the program, and not by the terminal as it was typed.
    assert told.count(SECRET.encode()) == 1


class FakeRing(ModuleType):
    """A keyring that holds one PIN: a desktop's own is not there in a test."""

    def __init__(self) -> None:
        super().__init__("keyring")

    def get_password(self, service: str, username: str) -> str | None:
        """The PIN of one user."""
        return SECRET if (service, username) == ("hsm", "signer") else None


def test_a_keyring_is_asked_at_each_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says how to put the PIN there."""
    monkeypatch.setitem(sys.modules, "keyring", FakeRing())
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    assert pins.keyring("hsm", "signer")() == SECRET
    assert "keyring set hsm 'no one'" in refused(pins.keyring("hsm", "no one"))


def test_a_keyring_that_is_not_installed_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the pool is configured, not at the first login."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InvalidOption, match=r"pip install 'pkcs11-pool\[keyring\]'"):
        pins.keyring("hsm", "signer")


def test_the_real_keyring_is_called_rightly() -> None:
    """The package itself, with its back end for files of plain text."""
    keyring = pytest.importorskip("keyring")
    backend = pytest.importorskip("keyring.backend")

    class Memory(backend.KeyringBackend):  # type: ignore[misc,name-defined]
        priority = 1
        held: dict[tuple[str, str], str] = {("hsm", "signer"): SECRET}  # noqa: RUF012

        def get_password(self, service: str, username: str) -> str | None:
            return self.held.get((service, username))

        def set_password(self, service: str, username: str, password: str) -> None:
            raise NotImplementedError

    before = keyring.get_keyring()
    keyring.set_keyring(Memory())
    try:
        assert pins.keyring("hsm", "signer")() == SECRET
        assert "keyring set" in refused(pins.keyring("hsm", "other"))
    finally:
        keyring.set_keyring(before)


# Not as it is: the words of a program are no secret, what it writes is.
SAYS = f"print('{SECRET[::-1]}'[::-1], flush=True)"


def python(code: str) -> list[str]:
    """The words of a program that runs some Python."""
    return [sys.executable, "-c", code]


def test_a_command_gives_its_first_line() -> None:
    """Run without a shell, at each login."""
    code = f"{SAYS}; print('not this')"
    assert pins.command(python(code))() == SECRET
    assert pins.command(["printf", "%s", "$HOME"])() == "$HOME"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (python(f"{SAYS}; raise SystemExit(3)"), "its status is 3"),
        (["printf", r"\377"], "UTF-8"),
        (["/no/such/program"], "cannot run /no/such/program"),
    ],
)
def test_a_command_that_fails_is_named(words: list[str], said: str) -> None:
    """What it wrote is not shown."""
    assert said in refused(pins.command(words))


def test_a_command_has_its_time() -> None:
    """A program that asks somebody who is not there ends."""
    code = f"{SAYS}; import time; time.sleep(60)"
    assert "within 0.3 s" in refused(pins.command(python(code), timeout=0.3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: pins.command("pass show hsm"),
        lambda: pins.command([]),
        lambda: pins.command([b"pass"]),  # type: ignore[list-item]
        lambda: pins.env(""),
        lambda: pins.env(7),  # type: ignore[arg-type]
        lambda: pins.file(7),  # type: ignore[arg-type]
        lambda: pins.file("a\0b"),
        lambda: pins.keyring("hsm", None),  # type: ignore[arg-type]
        lambda: pins.prompt(""),
        lambda: pins.literal(""),
        lambda: pins.literal(1234),  # type: ignore[arg-type]
    ],
)
def test_what_names_no_source_is_refused(make: Any) -> None:
    """When it is made."""
    with pytest.raises(InvalidOption) as caught:
        make()
    assert isinstance(caught.value, (InvalidType, ValueError))


async def test_each_source_opens_a_pool(
    make_pool: MakePool,
    token: ThrowawayToken,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the ``pin`` of a pool, logged in with it."""
    path = tmp_path / "pin"
    path.write_text(token.user_pin)
    path.chmod(0o600)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("SOURCES_PIN", token.user_pin)
    for source in (
        pins.literal(token.user_pin),
        pins.env("SOURCES_PIN"),
        pins.file(path),
        pins.systemd_credential("pin"),
        pins.command(["cat", str(path)]),
    ):
        async with make_pool(pin=source) as pool:
            assert pool.login_state.value == "user"


@pytest.mark.parametrize("how", ["env", "callable", "literal"])
async def test_text_that_is_not_utf8_is_no_leak(
    how: str, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable may hold any bytes; the codec's error would show them."""
    text = SECRET + "\udcff"
    monkeypatch.setenv("SOURCES_PIN", text)
    with pytest.raises((PinSourceError, InvalidOption)) as caught:
        await make_pool(
            pin={
                "env": pins.env("SOURCES_PIN"),
                "callable": lambda: text,
                "literal": text,
            }[how]
        ).open()
    assert "UTF-8" in str(caught.value)
    assert SECRET not in shown(caught.value)


def test_a_literal_shows_stars_and_equals_its_like() -> None:
    """In repr, str and vars; and comparing tells nothing else."""
    one, same, other = pins.literal("1234"), pins.literal("1234"), pins.literal("123")
    assert (one, hash(one)) == (same, hash(same))
    assert one != other
    assert one != "1234"
    assert {repr(one), str(one), f"{one}"} == {"***"}
    assert not hasattr(one, "__dict__")
