"""SoftHSM2 found or fetched, and tokens that are gone afterwards.

What sets ``SOFTHSM2_CONF`` or initialises the module runs in a process of its own:
both belong to a whole process, and other tests use them.
"""

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from pkcs11_pool import softhsm

# Programs that do as apt-get and dpkg do, as far as it matters: the machine's own
# package lists are empty, and an update fills the ones that it is pointed at.
FAKE_APT = """\
#!/bin/sh
echo "$*" >> "$FAKE_LOG"
lists=
for word in "$@"; do
    case $word in
        Dir::State::lists=*) lists=${word#*=} ;;
        update) touch "${lists:-$FAKE_ROOT}/some" "$FAKE_LOG.updated" ;;
        install)
            [ -e "$FAKE_LOG.updated" ] || { echo "E: Unable to locate"; exit 100; }
            dpkg -x softhsm2.deb "$FAKE_ROOT" ;;
        download)
            [ -e "$lists/some" ] || { echo "E: Unable to locate package"; exit 100; }
            touch softhsm2.deb ;;
    esac
done
"""
FAKE_DPKG = """\
#!/bin/sh
mkdir -p "$3/usr/bin" "$3/usr/lib/softhsm"
printf '#!/bin/sh\\n' > "$3/usr/bin/softhsm2-util"
chmod +x "$3/usr/bin/softhsm2-util"
touch "$3/usr/lib/softhsm/libsofthsm2.so"
"""


def run(script: str) -> str:
    """Run a script in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def no_softhsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this a machine of an ordinary user, without SoftHSM2; return its cache."""
    monkeypatch.delenv("SOFTHSM2_MODULE", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (tmp_path / "root").mkdir()
    monkeypatch.setattr(softhsm, "ROOT", tmp_path / "root")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_apt(no_softhsm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give that machine an apt-get that logs its words; return the log."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("apt-get", FAKE_APT), ("dpkg", FAKE_DPKG)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in ("chmod", "mkdir", "touch"):
        (programs / name).symlink_to(shutil.which(name, path="/usr/bin:/bin") or "")
    assert not no_softhsm.exists()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_ROOT", str(softhsm.ROOT))
    return tmp_path / "log"


def test_a_token_is_made_and_listed(tmp_path: Path) -> None:
    """``softhsm2-util`` lists the token with the label and the serial we were given."""
    directory = softhsm.TokenDirectory(softhsm.ensure(), tmp_path)
    token = directory.add_token("mine")
    listed = directory.softhsm.run_util(directory.configuration, "--show-slots")
    assert f"Serial number:    {token.serial.decode()}\n" in listed
    assert f"Label:            {token.label} " in listed
    assert token.directory == tmp_path


def test_one_directory_holds_several_tokens(tmp_path: Path) -> None:
    """Labels may repeat: each token is known by its own serial number."""
    directory = softhsm.TokenDirectory(softhsm.ensure(), tmp_path)
    tokens = [directory.add_token(label) for label in ("a", "b", "a")]
    listed = directory.softhsm.run_util(directory.configuration, "--show-slots")
    assert len({token.serial for token in tokens}) == 3
    assert all(token.serial.decode() in listed for token in tokens)


def test_a_refused_pin_is_not_shown(tmp_path: Path) -> None:
    """The error says what the program said, not what it was told."""
    directory = softhsm.TokenDirectory(softhsm.ensure(), tmp_path)
    with pytest.raises(RuntimeError, match="softhsm2-util failed") as caught:
        directory.add_token(user_pin="97")
    assert "97" not in str(caught.value)


def test_a_token_does_not_show_its_pins(tmp_path: Path) -> None:
    """A repr may reach a log."""
    directory = softhsm.TokenDirectory(softhsm.ensure(), tmp_path)
    shown = repr(directory.add_token(user_pin="135791", so_pin="24680246"))
    assert "135791" not in shown
    assert "24680246" not in shown


def test_the_block_has_a_token_that_opens_with_its_pin() -> None:
    """The module, loaded in the block, sees the token and accepts the PIN."""
    printed = run("""
        import pkcs11
        from pkcs11_pool.softhsm import throwaway_token

        with throwaway_token("mine", user_pin="2468") as made:
            token = pkcs11.lib(str(made.module)).get_token(token_label="mine")
            token.open(user_pin="2468").close()
            print(token.serial == made.serial)
    """)
    assert printed == "True\n"


def test_nothing_is_left_when_the_block_ends() -> None:
    """Also after an error: no directory, and the variable is as it was."""
    printed = run("""
        import os, stat
        from pkcs11_pool.softhsm import throwaway_token

        for before in (None, "/theirs"):
            if before:
                os.environ["SOFTHSM2_CONF"] = before
            try:
                with throwaway_token() as token:
                    print(oct(stat.S_IMODE(token.directory.stat().st_mode)))
                    print(os.environ["SOFTHSM2_CONF"].startswith(str(token.directory)))
                    raise KeyError
            except KeyError:
                print(token.directory.exists(), os.environ.get("SOFTHSM2_CONF"))
    """)
    assert printed == "0o700\nTrue\nFalse None\n0o700\nTrue\nFalse /theirs\n"


def test_a_module_in_use_is_refused() -> None:
    """It has read its configuration, so it would never see the new token.

    Loaded is not in use, and finalised is not either.
    """
    printed = run("""
        import ctypes
        from pkcs11_pool.softhsm import ensure, throwaway_token

        module = ctypes.CDLL(str(ensure().module))
        with throwaway_token():
            module.C_Initialize(None)
            try:
                with throwaway_token():
                    print("not refused")
            except RuntimeError as error:
                print("in use" in str(error))
            module.C_Finalize(None)
        with throwaway_token():
            print("again")
    """)
    assert printed == "True\nagain\n"


def test_a_module_named_by_hand_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not replaced by another one: the user said which."""
    monkeypatch.setenv("SOFTHSM2_MODULE", "/nowhere/libsofthsm2.so")
    with pytest.raises(softhsm.SoftHSMUnavailable, match=r"/nowhere/libsofthsm2\.so"):
        softhsm.ensure()


def test_a_module_named_by_hand_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may stand anywhere."""
    mine = tmp_path / "mine.so"
    mine.symlink_to(softhsm.ensure().module)
    monkeypatch.setenv("SOFTHSM2_MODULE", str(mine))
    assert softhsm.ensure().module == mine


def test_a_module_named_by_hand_needs_only_the_program(
    fake_apt: Path, no_softhsm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ``softhsm2-util`` is missing, it is fetched; its module is not taken."""
    mine = tmp_path / "mine.so"
    mine.touch()
    monkeypatch.setenv("SOFTHSM2_MODULE", str(mine))
    found = softhsm.ensure()
    assert found.module == mine
    assert found.util.is_relative_to(no_softhsm)
    assert fake_apt.exists()


@pytest.mark.usefixtures("no_softhsm")
def test_where_there_is_none_it_says_how_to_get_it() -> None:
    """Without apt there is nothing to fetch with."""
    with pytest.raises(softhsm.SoftHSMUnavailable, match="Install it"):
        softhsm.ensure()


def test_root_installs_the_package(
    fake_apt: Path, no_softhsm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package lists are renewed only when they do not lead to it."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    found = softhsm.ensure()
    assert found.module.is_relative_to(softhsm.ROOT)
    assert [line.split()[-1] for line in fake_apt.read_text().splitlines()] == [
        "softhsm2",
        "update",
        "softhsm2",
    ]
    assert not no_softhsm.exists()


def test_without_root_it_is_unpacked_into_the_cache(
    fake_apt: Path, no_softhsm: Path
) -> None:
    """With package lists of its own, in one piece, and only once."""
    told: list[str] = []
    found = softhsm.ensure(told.append)
    assert found.module.is_relative_to(no_softhsm)
    assert found.util.is_relative_to(no_softhsm)
    assert len(told) == 2
    asked = fake_apt.read_text()
    assert softhsm.ensure(told.append) == found
    assert fake_apt.read_text() == asked
    left = list((no_softhsm / "pkcs11-pool" / "softhsm2").iterdir())
    assert len(left) == 1
    assert found.module.is_relative_to(left[0])


@pytest.mark.usefixtures("fake_apt")
def test_two_who_unpack_at_once_get_the_same() -> None:
    """Neither fails, and neither finds half of it."""
    found: list[softhsm.SoftHSM] = []
    both = threading.Barrier(2)

    def meet(_step: str) -> None:
        both.wait(timeout=30)

    def fetch() -> None:
        found.append(softhsm.ensure(meet))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [softhsm.ensure()] * 2


def test_a_cache_that_cannot_be_written_is_said(
    fake_apt: Path, no_softhsm: Path
) -> None:
    """The text has both what failed and what to do."""
    no_softhsm.write_text("a file where a directory should be")
    with pytest.raises(softhsm.SoftHSMUnavailable, match=f"(?s)Install.*{os.sep}cache"):
        softhsm.ensure()
    assert not fake_apt.exists()
