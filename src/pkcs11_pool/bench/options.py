"""The words of ``python -m pkcs11_pool bench``, checked before anything is started.

It may know names only: what the extra brings may be missing here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from pkcs11_pool import config
from pkcs11_pool.bench.turns import BACKENDS, OPERATIONS
from pkcs11_pool.uri import Pkcs11URI

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pkcs11_pool import pins

CALLERS: Final = (1, 8, 64)
MOST_CALLERS: Final = 4096
SOAK: Final = 1_000_000

NO_MATPLOTLIB: Final = "{} needs matplotlib: pip install 'pkcs11-pool[bench]'"

# The name of an event loop is that of its package.
_EXTRA_LOOPS: Final = ("uvloop", "trio")
_PROC: Final = Path("/proc/self/statm")


class BadOptionError(ValueError):
    """An option is wrong, or wants what is not installed. The text says which."""


@dataclass(frozen=True)
class Depth:
    """How long is measured.

    Attributes:
        rounds: Turns of each cell.
        seconds: Seconds of a turn that count.
        warm: Seconds of a turn before that.
    """

    rounds: int
    seconds: float
    warm: float


NORMAL: Final = Depth(rounds=5, seconds=1.0, warm=0.2)
QUICK: Final = Depth(rounds=3, seconds=0.4, warm=0.1)


@dataclass(frozen=True)
class GivenToken:
    """A token that the user named.

    Attributes:
        module: The Cryptoki module.
        chosen: Which token, as options of a pool.
        pin: Gives the user's PIN. It is called once.
    """

    module: Path
    chosen: dict[str, Any]
    pin: Callable[[], pins.Secret]


@dataclass(frozen=True)
class Options:
    """What the user asked for, all of it possible.

    Attributes:
        operations: By name.
        callers: Numbers of callers.
        backends: Event loops.
        missing: Those left out because they are not installed.
        depth: How long.
        max_sessions: Of the pool; None for twice the callers.
        token: The user's own token; None for a throwaway one.
        json: Whether the figures are printed as JSON.
        output: Where to write the figures.
        plots: A directory for pictures.
        soak: How many operations of the soak test; None to measure throughput.
        import_time: Whether to measure importing instead.
    """

    operations: Sequence[str]
    callers: Sequence[int]
    backends: Sequence[str]
    missing: Sequence[str]
    depth: Depth
    max_sessions: int | None
    token: GivenToken | None
    json: bool
    output: Path | None
    plots: Path | None
    soak: int | None
    import_time: bool


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A reader of names with commas between them, all of them known."""

    def read(text: str) -> list[str]:
        given = _distinct(text.split(","))
        for name in given:
            if name not in known:
                raise BadOptionError(f"{name!r} is none of {', '.join(known)}")
        return given

    return read


def numbers(text: str) -> list[int]:
    """Read numbers of callers with commas between them."""
    found = []
    for word in _distinct(text.split(",")):
        if not (word.isascii() and word.isdecimal() and 0 < int(word) <= MOST_CALLERS):
            raise BadOptionError(
                f"{word!r} is not a number of callers, 1 to {MOST_CALLERS}"
            )
        found.append(int(word))
    return found


def count(text: str) -> int:
    """Read a whole number from 1 up."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise BadOptionError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def duration(text: str) -> float:
    """Read a number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 3600:  # noqa: PLR2004  # an hour; also refuses nan and inf
        raise BadOptionError(f"{text!r} is not a number of seconds above 0")
    return value


def _distinct(words: list[str]) -> list[str]:
    # A name given twice would be measured once and shown twice.
    return list(dict.fromkeys(words))


class Given(Protocol):
    """The words of the command, read one by one; None: not given."""

    operations: Sequence[str] | None
    callers: Sequence[int] | None
    backends: Sequence[str] | None
    max_sessions: int | None
    soak: int | None
    import_time: bool
    quick: bool
    rounds: int | None
    seconds: float | None
    json: bool
    output: Path | None
    plots: Path | None
    module: Path | None
    token_label: str | None
    uri: Pkcs11URI | None
    unquoted: str
    pin: Callable[[], pins.Secret] | None


def depth_of(given: Any) -> Depth:
    """How long is measured."""
    base = QUICK if given.quick else NORMAL
    return Depth(
        rounds=given.rounds or base.rounds,
        seconds=given.seconds or base.seconds,
        warm=base.warm,
    )


def check_output(given: Any) -> None:
    """Refuse at once what could not be written at the end.

    Raises:
        BadOptionError: It says what and why.
    """
    if given.output is not None and not given.output.resolve().parent.is_dir():
        raise BadOptionError(f"--output: there is no directory for {given.output}")
    if given.plots is not None:
        if given.plots.exists() and not given.plots.is_dir():
            raise BadOptionError(f"--plots: {given.plots} is no directory")
        if not can_plot():
            raise BadOptionError(NO_MATPLOTLIB.format("--plots"))


def can_plot() -> bool:
    """Whether there is what draws pictures."""
    return importlib.util.find_spec("matplotlib") is not None


def missing() -> list[str]:
    """The event loops that are not installed."""
    return [name for name in _EXTRA_LOOPS if importlib.util.find_spec(name) is None]


def backends(given: Sequence[str] | None) -> list[str]:
    """The event loops to measure: those given, or those installed.

    Raises:
        BadOptionError: One was given that is not installed.
    """
    absent = missing()
    for name in given or ():
        if name in absent:
            raise BadOptionError(
                f"--backends: {name} is not installed: pip install {name}"
            )
    return [name for name in given or BACKENDS if name not in absent]


def read(given: Given) -> Options:
    """Check what was parsed as a whole.

    Raises:
        BadOptionError: It does not go together, or cannot be had.
    """
    if given.soak is not None and given.import_time:
        raise BadOptionError("--soak and --import-time are two things: choose one")
    if given.soak is not None and not _PROC.exists():
        raise BadOptionError("--soak reads /proc, which this system does not have")
    check_output(given)
    return Options(
        operations=given.operations or list(OPERATIONS),
        callers=given.callers or list(CALLERS if given.soak is None else (16,)),
        backends=backends(given.backends),
        missing=[] if given.backends else missing(),
        depth=depth_of(given),
        max_sessions=given.max_sessions,
        token=_token(given),
        json=given.json,
        output=given.output,
        plots=given.plots,
        soak=given.soak,
        import_time=given.import_time,
    )


def _token(given: Given) -> GivenToken | None:
    if given.module is None and given.uri is None:
        if given.token_label is not None or given.pin is not None:
            raise BadOptionError("--token-label and a PIN go with --module or --uri")
        return None
    uri = Pkcs11URI() if given.uri is None else given.uri
    chosen = config.uri_options(uri, with_pin=False, allow_command=False)
    named = chosen.pop("module")
    module = Path(named) if given.module is None and named else given.module
    if module is None:
        raise BadOptionError(
            f"--uri: which module? Give module-path or --module{given.unquoted}"
        )
    if given.token_label is not None:
        chosen["token_label"] = given.token_label
    if all(chosen[name] is None for name in ("token_label", "token_serial", "slot_id")):
        raise BadOptionError(
            f"{'--module' if given.uri is None else '--uri'}: which token? Give "
            f"--token-label{given.unquoted}"
        )
    if not module.is_file():
        word = "module-path" if given.module is None else "--module"
        raise BadOptionError(f"{word}: {module} is no file")
    assert given.pin is not None  # noqa: S101
    return GivenToken(module, chosen, given.pin)
