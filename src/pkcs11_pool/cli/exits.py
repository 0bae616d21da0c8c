"""What the command line says when something is wrong, and the status it ends with.

The table is documented, and a test compares it with its page.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable


# The library speaks of its own calls; here they are commands and words.
_AS_WORDS: Final = {
    "pool.find()": "`pkcs11-pool objects`",
    "await list_tokens(module)": "`pkcs11-pool tokens`",
    "list_tokens()": "`pkcs11-pool tokens --json`",
    "wipe=True": "--wipe",
    "so.init_pin": "`pkcs11-pool set-pin --by-officer`",
    "by init_token()": "by `pkcs11-pool init-token LABEL`",
    "only init_token helps": "only `pkcs11-pool init-token --wipe` helps",
    "insist with force=True": "log in once with the token's own tool",
    "token_serial= or slot_id=": "--token-serial or --slot",
    "use pins.env, pins.file, pins.systemd_credential or pins.keyring": (
        "give --pin-env or --pin-file (of the officer: --so-pin-env or --so-pin-file)"
    ),
    "give another mechanism=": "give another --mechanism",
    "from_uri(…, allow_pin_command=True), or give pin=": (
        "--allow-pin-command, or name another source of the PIN"
    ),
    "pins.file(path, check=False)": "a pipe (--pin-file <(…))",
}


class Exit(IntEnum):
    """The exit statuses."""

    OK = 0
    #: The answer is no: a wrong signature, a set-up that cannot work, a wrong result.
    NO = 1
    #: The words are wrong, or want what is not installed or not there to run on.
    USAGE = 2
    #: No such token, or the module cannot be used.
    TOKEN = 3
    #: No PIN, or one that was refused or not sent.
    PIN = 4
    #: No such key or object, or more than one.
    KEY = 5
    #: The token answered an operation with an error.
    REFUSED = 6
    #: The token or a service is down, or did not answer in time.
    UNAVAILABLE = 7
    #: A file cannot be read or written.
    FILE = 8
    #: Ctrl-C.
    INTERRUPTED = 130


class CommandError(Exception):
    """A command cannot do what was asked. The text is one line, and says what to do."""

    def __init__(self, text: str, status: Exit = Exit.USAGE) -> None:
        super().__init__(text)
        self.status = status


def explained(error: Exception) -> tuple[str, Exit] | None:
    """One line for an error and the status that goes with it; None: it is a bug."""
    if isinstance(error, CommandError):
        return str(error), error.status
    for kinds, status in _table():
        if isinstance(error, tuple(kinds)):
            return _line(error), status
    return None


def _table() -> list[tuple[Iterable[type[Exception]], Exit]]:
    """The first row that fits counts. Imported late: ``--help`` needs none of it."""
    from pkcs11 import PKCS11Error  # noqa: PLC0415

    from pkcs11_pool import errors as e  # noqa: PLC0415
    from pkcs11_pool.softhsm import SoftHSMUnavailable  # noqa: PLC0415

    return [
        ((e.PinRefused, e.LoginRequired), Exit.PIN),
        ((e.KeyNotFound, e.KeyAmbiguous, e.KeyFunctionNotPermitted), Exit.KEY),
        ((e.InvalidOption, SoftHSMUnavailable), Exit.USAGE),
        (
            (
                e.TokenNotFound,
                e.TokenAmbiguous,
                e.TokenInUse,
                e.ModuleError,
                e.ModuleInUse,
            ),
            Exit.TOKEN,
        ),
        ((e.TokenUnavailable, e.PoolTimeout, e.OutcomeUnknown), Exit.UNAVAILABLE),
        ((e.PoolError, PKCS11Error), Exit.REFUSED),
        ((OSError,), Exit.FILE),
    ]


def _line(error: Exception) -> str:
    """The text of an error in one line; its kind where it has no text."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    for spoken, words in _AS_WORDS.items():
        text = text.replace(spoken, words)
    return text or type(error).__name__
