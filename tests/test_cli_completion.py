"""Completion, as real shells do it with the scripts that the command prints."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from pkcs11_pool.cli import app
from test_cli import Run, bare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["bare"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_knows_every_command(shell: str, bare: Run) -> None:
    """And the words of one."""
    script = bare("completion", shell).out
    for command in app.COMMANDS:
        assert command in script
    assert "token-serial" in script


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_by_it(bare: Run, tmp_path: Path) -> None:
    """Sourced by a real one, and asked as the TAB key asks."""
    script = tmp_path / "completion.bash"
    script.write_text(bare("completion", "bash").out)
    ask = (
        f"source {script}; COMP_WORDS=(pkcs11-pool ke); COMP_CWORD=1; "
        'COMP_LINE="pkcs11-pool ke"; COMP_POINT=14; '
        "$(complete -p pkcs11-pool | sed -E 's/.*-F ([^ ]+).*/\\1/'); "
        'echo "${COMPREPLY[@]}"'
    )
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "--norc", "-c", ask], capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("keygen", "")


@pytest.mark.skipif(not shutil.which("fish"), reason="there is no fish")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("ke", "keygen"),
        ("random --token-se", "--token-serial"),
        ("bench --ur", "--uri"),
        ("completion z", "zsh"),
    ],
)
def test_fish_completes_by_it(
    typed: str, found: str, bare: Run, tmp_path: Path
) -> None:
    """From the place that the help names."""
    place = tmp_path / "fish/completions"
    place.mkdir(parents=True)
    (place / "pkcs11-pool.fish").write_text(bare("completion", "fish").out)
    # It looks for completions of commands that it finds only.
    command = tmp_path / "pkcs11-pool"
    command.touch(0o700)
    fish = shutil.which("fish")
    assert fish is not None
    done = subprocess.run(
        [fish, "-c", f"complete -C 'pkcs11-pool {typed}'"],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "XDG_CONFIG_HOME": str(tmp_path),
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [found]


@contextlib.contextmanager
def zsh(home: Path) -> Iterator[int]:
    """One that somebody types into; gives the terminal."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    program = shutil.which("zsh")
    if program is None:
        pytest.skip("there is no zsh")
    try:
        child, terminal = pty.fork()
    except OSError as error:
        pytest.skip(f"no pseudo-terminal can be had here: {error}")
    if child == 0:  # pragma: no cover  # another process
        variables = {"PATH": os.environ["PATH"], "TERM": "xterm", "HOME": str(home)}
        os.execve(program, [program, "-f", "-i"], variables)  # noqa: S606
    try:
        yield terminal
    finally:
        os.close(terminal)  # hangs up
        os.waitpid(child, 0)


def types(terminal: int, text: str, until: str) -> None:
    """Type, and wait for what comes of it."""
    os.write(terminal, text.encode())
    shown, ends = b"", time.monotonic() + 20
    while until.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], ends - time.monotonic())
        assert ready, shown
        shown += os.read(terminal, 4096)


@pytest.mark.parametrize("how", ["fpath=({0} $fpath); {1}", "{1}; source {0}/*"])
def test_zsh_completes_by_it(how: str, bare: Run, tmp_path: Path) -> None:
    """In a directory of fpath under the name that the help gives, and sourced."""
    place = tmp_path / "functions"
    place.mkdir()
    (place / "_pkcs11-pool").write_text(bare("completion", "zsh").out)
    begin = how.format(place, "autoload -Uz compinit; compinit -u -D")
    with zsh(tmp_path) as terminal:
        types(terminal, f"{begin}; echo rea''dy\n", "ready")
        types(terminal, "pkcs11-pool ke\t", "keygen")
        types(terminal, " x --publi\t", "--public-key")
