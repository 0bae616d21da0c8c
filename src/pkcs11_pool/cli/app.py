"""The words of the command line, and how it ends.

Each command's Python module is imported when that command runs: ``--help`` is quick,
and what one command needs, others may lack.
"""

from __future__ import annotations

import difflib
import os
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from cyclopts import (
    App,
    CycloptsError,
    Parameter,
    UnknownCommandError,
    UnusedCliTokensError,
)

from pkcs11_pool.cli.exits import Exit, explained

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME: Final = "pkcs11-pool"
_HERE: Final = "pkcs11_pool.cli"

COMMANDS: Final = {
    "tokens": (f"{_HERE}.tokens:tokens", "List the tokens of a module."),
    "objects": (f"{_HERE}.tokens:objects", "List the objects of a token."),
    "init-token": (f"{_HERE}.tokens:init", "Initialise a token."),
    "set-pin": (f"{_HERE}.tokens:set_pin", "Change or reset the user's PIN."),
    "keygen": (f"{_HERE}.keygen:keygen", "Make a key on the token."),
    "sign": (f"{_HERE}.keys:sign", "Sign a file with a key of the token."),
    "verify": (f"{_HERE}.keys:verify", "Verify a signature on the token."),
    "random": (f"{_HERE}.keys:random", "Random octets from the token."),
    "doctor": (f"{_HERE}.doctor:doctor", "Find what is wrong with a set-up."),
    "top": (f"{_HERE}.top:top", "Watch a running service."),
    "softhsm": (f"{_HERE}.softhsm:command", "Have SoftHSM2 at hand, without root."),
    "demo": (f"{_HERE}.running:demo", "Real signatures on a throwaway token."),
    "bench": (f"{_HERE}.running:bench", "Measure the pool on a token."),
    "chaos": (f"{_HERE}.running:chaos", "Kill a token's server under load."),
    "completion": (f"{_HERE}.completion:completion", "Completion for a shell."),
}
"""Each command: where it is, and what it does in a line."""

_BAD: Final = Exit.USAGE
_PINS: Final = ("--pin", "--so-pin", "--new-pin")
_NO_PINS: Final = (
    "a PIN is no word of a command, because others see it: {0}-env, {0}-file, "
    "{0}-credential, {0}-keyring or {0}-prompt"
)


def app(asked: str | None = None) -> App:
    """The command line, without its commands' Python modules.

    Args:
        asked: The command that will run: its own docstring is its help. The others
            have their line of the table, for which nothing is imported.
    """
    whole = App(
        name=NAME,
        help="An async session pool for PKCS#11.",
        version=lambda: version("pkcs11-pool"),
        # Markdown in help costs as much time again as all the rest.
        help_format="plaintext",
        default_parameter=Parameter(negative=()),
        # Ctrl-C is answered below, in one place.
        suppress_keyboard_interrupt=False,
        help_epilogue=(
            "Exit status: 0 done, 1 the answer is no, 2 wrong words, 3 token or "
            "module, 4 PIN, 5 key, 6 refused by the token, 7 unavailable, 8 file, "
            "130 Ctrl-C."
        ),
    )
    for name, (place, text) in COMMANDS.items():
        whole.command(place, name=name, help=None if name == asked else text)
    return whole


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = _with_values(sys.argv[1:] if words is None else list(words))
    try:
        status = _run(given)
        # Now, not at the interpreter's end: there nothing can be done about it.
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _say("stopped", Exit.INTERRUPTED)
    except BrokenPipeError:
        return _reader_gone()
    except Exception as error:
        told = explained(error)
        if told is None:
            raise
        return _say(*told)
    return status


def _run(given: list[str]) -> int:
    for word in given:
        if (name := word.partition("=")[0]) in _PINS:
            return _say(_NO_PINS.format(name), _BAD)
    if not given:
        app()(["--help"], result_action="return_value")
        return _BAD
    try:
        status = app(given[0])(
            given,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except UnknownCommandError:
        # Its own text would import every command.
        near = difflib.get_close_matches(given[0], COMMANDS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Commands: {_commands()}."
        return _say(f"{given[0]!r} is no command. {hint}", _BAD)
    except UnusedCliTokensError as error:
        more = " ".join(map(repr, error.unused_tokens or ()))
        return _say(f"{more}: more words than {given[0]} takes. {_help(given)}", _BAD)
    except CycloptsError as error:
        text = " ".join(str(error).split())
        end = "" if text.endswith((".", "?")) else "."
        return _say(f"{text}{end} {_help(given)}", _BAD)
    return Exit.OK if status is None else int(status)


def _help(given: list[str]) -> str:
    return f"`{NAME} {given[0]} --help` has the words."


def _with_values(words: list[str]) -> list[str]:
    """``--soak`` may stand alone: then it has its usual number."""
    if words[:1] != ["bench"] or "--soak" not in words:
        return words
    at = words.index("--soak") + 1
    alone = at == len(words) or words[at].startswith("-")
    return [*words[:at], "1000000", *words[at:]] if alone else words


def _commands() -> str:
    return ", ".join(COMMANDS)


def _say(text: str, status: Exit) -> Exit:
    sys.stderr.write(f"{text}\n")
    return status


def _reader_gone() -> Exit:
    """Who read our output has seen enough: as a pipe's other programs end."""
    # Python flushes standard output at its end, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.OK
