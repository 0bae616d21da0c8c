"""Where a PIN can come from: the environment, a file, systemd, a prompt, a keyring.

Each source is a function that gives the PIN as text when it is called, at each login,
and keeps nothing. All of them block; the pool calls them on a thread of its own. A
frame that raises holds no PIN: what was read is decoded where nothing can fail.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from pkcs11_pool.errors import InvalidOption, InvalidType, PinSourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MOST: Final = 4096
"""Bytes of a line that may be a PIN. Longer than any token takes."""

_CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"
_NO_TERMINAL: Final = (
    "there is no terminal to ask for the PIN on: use pins.env, pins.file, "
    "pins.systemd_credential or pins.keyring"
)


def env(name: str) -> Callable[[], str]:
    """The PIN from an environment variable, read at each login."""
    _check_word("name", name)

    def read() -> str:
        try:
            return os.environ[name]
        except KeyError:
            message = f"the environment variable {name} is not set"
            raise PinSourceError(message) from None

    return read


def file(
    path: str | os.PathLike[str], *, check: bool = True, pipe: bool = False
) -> Callable[[], str]:
    """The PIN from the first line of a file, read at each login.

    The file is opened once, and what is checked is what was opened: it belongs to this
    user or to root, its group cannot write it, and others cannot read it.

    Args:
        path: The file.
        check: False: whoever owns it and whatever its mode. For places that are
            guarded otherwise, such as a volume of secrets with the mode 0644.
        pipe: Also read from a pipe, such as a shell's ``<(…)``. Without it nothing
            that could wait for ever is read.
    """
    name = _path(path)

    def read() -> str:
        return _first_line(name, check=check, pipe=pipe)

    return read


def systemd_credential(name: str) -> Callable[[], str]:
    """The PIN from a credential of the systemd service that this process is.

    The unit has ``LoadCredential=NAME:/path`` or ``LoadCredentialEncrypted=``; systemd
    puts it where only the service can read it, and names the place in
    ``$CREDENTIALS_DIRECTORY``. Source: systemd.exec(5), "Credentials".
    """
    _check_word("name", name)
    if "/" in name or name in (".", ".."):
        message = f"a systemd credential is named without a path, not {name!r}"
        raise InvalidOption(message)

    def read() -> str:
        directory = os.environ.get(_CREDENTIALS)
        if not directory:
            raise PinSourceError(
                f"${_CREDENTIALS} is not set: run this as a systemd service whose unit "
                f"has LoadCredential={name}:/path/to/the/pin"
            )
        # The manager vouches for who can read it; its own modes differ by version.
        return _first_line(os.path.join(directory, name), check=False, pipe=False)  # noqa: PTH118

    return read


def prompt(text: str = "PIN of the token: ") -> Callable[[], str]:
    """Ask for the PIN on the terminal, without showing it, at each login.

    So a login that got lost asks again, as one who has taken the smart card out
    expects; operations wait meanwhile, inside their deadlines. To be asked once and no
    more, ask before: ``pin=pins.literal(pins.prompt()())``.
    """
    _check_word("text", text)

    def read() -> str:
        if not can_prompt():
            raise PinSourceError(_NO_TERMINAL)
        import getpass  # noqa: PLC0415  # for those who are asked

        try:
            return getpass.getpass(text)
        except EOFError:
            raise PinSourceError("no PIN was typed") from None

    return read


def keyring(service: str, username: str) -> Callable[[], str]:
    """The PIN from the keyring of the desktop, read at each login.

    Set it by ``keyring set SERVICE USERNAME``. Needs ``pkcs11-pool[keyring]``.

    Raises:
        InvalidOption: The package ``keyring`` is not installed.
    """
    _check_word("service", service)
    _check_word("username", username)
    import importlib.util  # noqa: PLC0415  # for those who have one

    if importlib.util.find_spec("keyring") is None:
        raise InvalidOption(
            "pins.keyring needs the package: pip install 'pkcs11-pool[keyring]'"
        )

    def read() -> str:
        # Only now: it looks for the desktop's services when it is imported.
        ring = importlib.import_module("keyring")
        given: str | None = ring.get_password(service, username)
        if given is None:
            import shlex  # noqa: PLC0415  # for this text alone

            where = shlex.join([service, username])
            message = f"the keyring has no such PIN; set it by: keyring set {where}"
            raise PinSourceError(message)
        return given

    return read


def command(arguments: Sequence[str], *, timeout: float = 30.0) -> Callable[[], str]:
    """The PIN from the first line that a program writes, run at each login.

    Args:
        arguments: The program and its arguments. There is no shell.
        timeout: Seconds that it may take.
    """
    if isinstance(arguments, str) or not all(isinstance(a, str) for a in arguments):
        message = 'a command is a list of words, such as ["pass", "show", "hsm"]'
        raise InvalidType(message)
    words = list(arguments)
    if not words:
        raise InvalidOption("a command has at least the name of a program")

    def read() -> str:
        given = _said(words, timeout)
        if isinstance(given, PinSourceError):
            raise given
        return given

    return read


def _said(words: list[str], timeout: float) -> str | PinSourceError:
    """The first line that a program writes. Raises nothing that would hold it."""
    program = words[0]
    try:
        done = subprocess.run(  # noqa: S603  # the caller's own words, and no shell
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=timeout,
            check=False,
        )
    except OSError as error:
        return PinSourceError(f"cannot run {program} for the PIN: {error.strerror}")
    except subprocess.TimeoutExpired:
        return PinSourceError(f"{program} gave no PIN within {timeout:g} s")
    if done.returncode:
        return PinSourceError(f"{program} gave no PIN: its status is {done.returncode}")
    line = _decoded(done.stdout.split(b"\n", 1)[0])
    if line is None:
        return PinSourceError(f"the PIN of {program} is not UTF-8")
    return line


def _first_line(path: str, *, check: bool, pipe: bool) -> str:
    # Not to wait for a pipe's other end before it is known to be one.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | (0 if pipe else os.O_NONBLOCK)
    try:
        descriptor = os.open(path, flags)
        try:
            wrong = _objection(path, os.fstat(descriptor), check=check, pipe=pipe)
            if not wrong:
                with open(descriptor, "rb", closefd=False) as lines:
                    line = _decoded(lines.readline(_MOST))
        finally:
            os.close(descriptor)
    except OSError as error:
        # Its own text has the path, too.
        message = f"cannot read a PIN from {path}: {error.strerror}"
        raise PinSourceError(message) from error
    if wrong:
        raise PinSourceError(wrong)
    if line is None:
        raise PinSourceError(f"the PIN in {path} is not UTF-8")
    if not line:
        raise PinSourceError(f"the first line of {path} is empty; the PIN stands there")
    return line


def _objection(
    path: str, told: os.stat_result, *, check: bool, pipe: bool
) -> str | None:
    """Why a PIN is not read from what was opened, and what to do about it."""
    if stat.S_ISFIFO(told.st_mode):
        # A pipe is read once by whoever has it: its mode says nothing.
        refused = f"{path} is a pipe: pins.file(path, pipe=True) reads it"
        return None if pipe else refused
    if not stat.S_ISREG(told.st_mode):
        return f"{path} is no file that a PIN could stand in"
    if not check:
        return None
    import shlex  # noqa: PLC0415  # for what this says

    quoted, user = shlex.quote(path), os.geteuid()
    if told.st_uid not in (user, 0):
        return (
            f"{path} belongs to the user {told.st_uid}, who could change it: "
            f"chown {user} {quoted}"
        )
    mode = stat.S_IMODE(told.st_mode)
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        return (
            f"others can use the PIN in {path} (mode {mode:04o}): chmod 600 {quoted}, "
            "or pins.file(path, check=False) where something else guards it"
        )
    return None


def can_prompt() -> bool:
    """Whether there is a terminal to ask on without showing what is typed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return sys.stdin is not None and sys.stdin.isatty()
    return True


def _decoded(line: bytes) -> str | None:
    """A line as text, or None. A decoder's own error would show the line."""
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return None


def _path(value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidType(
            f"path must be str or os.PathLike, not {type(value).__name__}"
        )
    path = os.fspath(value)
    if not isinstance(path, str) or not path or "\0" in path:
        raise InvalidOption("path must be the path of a file, as text")
    return path


def _check_word(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidType(f"{name} must be str, not {type(value).__name__}")
    if not value or "\0" in value:
        raise InvalidOption(f"{name} must be text that is not empty")
