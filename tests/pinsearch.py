"""Looks for a PIN wherever it could show: a table of spellings, a table of places.

A new place is one line of ``PLACES``. A place is a function of a :class:`Scene` that
gives what can be seen there, as text or bytes. The PIN is long and random, so that a
hit is a hit; what is cut short shows a part of it, so every part counts.

Frames of the tests are looked at like all others: they have the PIN as a
:class:`Hidden`, and take it out only inside of an expression.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import ctypes
import dataclasses
import faulthandler
import functools
import gc
import hashlib
import html
import io
import itertools
import json
import logging
import os
import pickle
import pprint
import re
import secrets
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Self
from urllib.parse import quote

import httpx
import structlog
from pkcs11 import exceptions as p11
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import SecretStr
from rich.traceback import Traceback as RichTraceback
from structlog.dev import ConsoleRenderer, RichTracebackFormatter, plain_traceback
from structlog.tracebacks import ExceptionDictTransformer

from pkcs11_pool import PoolError, PoolState, TokenPool, pins
from pkcs11_pool.asgi import StatusApp
from pkcs11_pool.integrations.prometheus import PoolCollector
from pkcs11_pool.softhsm import ThrowawayToken

Seen = Iterable["str | bytes"]

_PART: Final = 11
"""Letters of a PIN that no place may show together."""
_HERE: Final = os.path.dirname(__file__)  # noqa: PTH120  # frames have text
_WRAPPING: Final = re.compile(r"\x1b\[[0-9;]*m|[\s│]")
_OURS: Final = "pkcs11_pool"


class Hidden:
    """A PIN of a test, which its frames may hold: it has no text of its own."""

    __slots__ = ("_letters",)

    def __init__(self, text: str) -> None:
        # Neither a str nor bytes, so that a search of memory does not find the search.
        self._letters = tuple(ord(letter) ^ 0x5A5A for letter in text)

    @property
    def text(self) -> str:
        """The PIN, for the argument of a call and no variable."""
        return "".join(chr(number ^ 0x5A5A) for number in self._letters)


def make() -> Hidden:
    """A PIN as no other: with letters that are escaped, quoted and encoded."""
    # Hexadecimal, so a part of it is no word of anything.
    return Hidden(f"{secrets.token_hex(8)}'%&ü\"{secrets.token_hex(8)}")


# -- How it may be spelt ----------------------------------------------------------


def _parts(text: str) -> set[str]:
    return {text[i : i + _PART] for i in range(len(text) - _PART + 1)}


def _in_base64(data: bytes) -> set[str]:
    found = set()
    for shift in range(3):
        # What stands before it shifts its bits; the ends belong to both.
        encoded = base64.b64encode(bytes(shift) + data).decode()
        found.add(encoded[4:-4])
        found.add(encoded[4:-4].translate(str.maketrans("+/", "-_")))
    return found


def _numbers(data: bytes, joint: str) -> str:
    return joint.join(map(str, data[:16]))


SPELLINGS: Final[dict[str, Callable[[str], Iterable[str]]]] = {
    "text": _parts,
    "backwards": lambda pin: _parts(pin[::-1]),
    "repr": lambda pin: [repr(pin)[1:-1], ascii(pin)[1:-1]],
    "repr of bytes": lambda pin: [repr(pin.encode())[2:-1]],
    "JSON": lambda pin: [json.dumps(pin)[1:-1]],
    "HTML": lambda pin: [html.escape(pin)],
    "percent-encoded": lambda pin: [
        quote(pin, ""),
        "".join(f"%{one:02x}" for one in pin.encode()),
        "".join(f"%{one:02X}" for one in pin.encode()),
    ],
    "hexadecimal": lambda pin: [pin.encode().hex(), pin.encode().hex().upper()],
    "hexadecimal, apart": lambda pin: [pin.encode().hex(j) for j in (":", "-", ",")],
    "escaped": lambda pin: ["".join(f"\\x{one:02x}" for one in pin.encode())],
    "base64": lambda pin: _in_base64(pin.encode()),
    "UTF-16": lambda pin: [pin.encode("utf-16-le").decode("latin-1")],
    "numbers": lambda pin: [
        _numbers(pin.encode(), joint) for joint in (",", ", ", " ", ";")
    ],
    "hash without a key": lambda pin: [
        hashlib.new(name, pin.encode()).hexdigest()
        for name in ("md5", "sha1", "sha256", "sha512", "blake2b")
    ],
}
"""How a PIN could be written, by name."""


class Searcher:
    """Finds PINs, by every spelling at once."""

    def __init__(self, *hidden: Hidden) -> None:
        self._spelt = [
            (name, sorted({one for pin in hidden for one in spell(pin.text)}))
            for name, spell in SPELLINGS.items()
        ]

    def __call__(self, seen: str | bytes) -> list[str]:
        """How a PIN is spelt in there; empty: it is not."""
        if isinstance(seen, bytes):
            seen = _as_text(seen)
        # Also what a console broke into lines.
        seen += "\n" + _WRAPPING.sub("", seen)
        return [
            name for name, spelt in self._spelt if any(one in seen for one in spelt)
        ]


def _as_text(seen: str | bytes) -> str:
    if isinstance(seen, str):
        return seen
    # Byte by byte, and as the text that it may be.
    return seen.decode("latin-1") + "\n" + seen.decode("utf-8", "replace")


# -- The scene --------------------------------------------------------------------


class Log:
    """Takes in all that is logged, at DEBUG, as different programs would write it."""

    def __init__(self) -> None:
        self.written = io.StringIO()
        self.events = 0
        self._handler = logging.StreamHandler(self.written)
        self._handler.setFormatter(
            logging.Formatter("%(name)s %(threadName)s %(message)s %(args)s")
        )

    def __enter__(self) -> Self:
        """Configure structlog and the standard library, for this block."""
        root = logging.getLogger()
        self._level = root.level
        root.addHandler(self._handler)
        root.setLevel(logging.DEBUG)
        structlog.configure(
            processors=[structlog.contextvars.merge_contextvars, self._take]
        )
        return self

    def __exit__(self, *_error: object) -> None:
        """Put it back."""
        root = logging.getLogger()
        root.removeHandler(self._handler)
        root.setLevel(self._level)
        structlog.reset_defaults()

    def _take(self, logger: object, name: str, event: Any) -> Any:
        self.events += 1
        renderers: list[Any] = [
            ConsoleRenderer(colors=False),
            structlog.processors.JSONRenderer(),
            structlog.processors.KeyValueRenderer(),
        ]
        for render in renderers:
            self.written.write(f"{render(logger, name, dict(event))}\n")
        self.written.write(f"{event!r}\n")
        raise structlog.DropEvent


@dataclass
class Scene:
    """What there is to be looked at, at one moment.

    Attributes:
        find: The searcher.
        objects: Public objects, from which the rest is reached.
        errors: What was raised, by what was done.
        log: What was logged.
        more: Whatever else was seen, by name.
        printed: The error that is really printed, with colours, which takes long.
        accidents: What was refused, and not by an error of ours.
        rendered: Names of the errors that were looked at once.
        clean: Hashes of what showed no PIN at an earlier moment: it is not read again.
        moments: At how many moments there was a look.
    """

    find: Searcher
    objects: list[Any] = field(default_factory=list)
    errors: dict[str, BaseException] = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    more: dict[str, Callable[[], Seen]] = field(default_factory=dict)
    printed: str | None = None
    accidents: list[str] = field(default_factory=list)
    rendered: set[str] = field(default_factory=set)
    clean: set[int] = field(default_factory=set, repr=False)
    moments: int = 0

    @property
    def pools(self) -> list[TokenPool]:
        """Those of the objects that are pools."""
        return [one for one in self.objects if isinstance(one, TokenPool)]


async def look(scene: Scene, when: str) -> list[str]:
    """Where a PIN shows just now; each place with the way in which it is spelt."""
    scene.moments += 1
    found = []
    shown: dict[str, set[str]] = {}
    for name, seen in _everywhere(scene):
        shown.setdefault(name, set()).add(_as_text(seen))
    for name, texts in shown.items():
        new = [text for text in texts if hash(text) not in scene.clean]
        spelt = scene.find("\n".join(new))
        found += [f"{when}: {name}: {how}" for how in spelt]
        if not spelt:
            scene.clean.update(map(hash, new))
    for path in ("/", "/status.json", "/metrics", "/livez", "/readyz"):
        for how in scene.find(await _asked(scene, path)):
            found.append(f"{when}: status app, {path}: {how}")
    accidents, scene.accidents = scene.accidents, []
    return found + [f"{when}: {one}" for one in accidents]


def _everywhere(scene: Scene) -> Iterator[tuple[str, str | bytes]]:
    for name, place in PLACES.items():
        for seen in place(scene):
            yield name, seen
    for name, further in scene.more.items():
        for seen in further():
            yield name, seen
    for name, error in scene.errors.items():
        if name not in scene.rendered:
            scene.rendered.add(name)
            for way, render in RENDERERS.items():
                if way != "structlog, rich" or name == scene.printed:
                    yield f"error of {name!r}, {way}", render(error)
        # What it hangs on goes on changing.
        for seen in _texts(*_chain(error)):
            yield f"held by the error of {name!r}", seen


async def _asked(scene: Scene, path: str) -> bytes:
    app: Any = StatusApp(scene.pools, allow_anonymous=True)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as c:
        answer = await c.get(path)
    return answer.content + repr(answer.headers).encode()


# -- What is reached from an object -----------------------------------------------

_NOT_ENTERED: Final = (type, types.ModuleType, Hidden, ThrowawayToken, Searcher, Scene)


# The last is pydantic's, for what a program gets its settings in.
_WHERE_A_PIN_LIVES: Final = (pins.Secret, pins.Source, SecretStr)


def reached(*start: Any) -> Iterator[Any]:
    """All that the garbage collector sees from there.

    Attributes, slots, closures, partials, queues, suspended frames: whatever one
    object holds of another. Not what other programs' modules hold, nor the frames
    that called a test.
    """
    seen: set[int] = {id(start)}
    kept = list(start)  # an id is one object's only as long as it lives
    line = list(start)
    while line:
        item = line.pop()
        if id(item) in seen or isinstance(item, _NOT_ENTERED):
            continue
        seen.add(id(item))
        kept.append(item)
        yield item
        if not isinstance(item, _WHERE_A_PIN_LIVES):
            line += _held(item)


def _held(item: Any) -> list[Any]:
    if isinstance(item, types.FrameType):
        return [] if _is_foreign(item) else list(item.f_locals.values())
    if isinstance(item, dict) and "__builtins__" in item:
        return []  # the names of a module
    return [one for one in gc.get_referents(item) if one is not os.environ]


def _is_foreign(frame: types.FrameType) -> bool:
    """A frame of neither the library, python-pkcs11, nor this directory."""
    name = frame.f_code.co_filename
    return not name.startswith(_HERE) and not {_OURS, "pkcs11"} & {*name.split("/")}


@functools.cache
def _is_ours(kind: type) -> bool:
    return str(getattr(kind, "__module__", "")).startswith("pkcs11")


def _texts(*start: Any) -> Seen:
    for item in reached(*start):
        if isinstance(item, str):
            yield item
        elif isinstance(item, bytes | bytearray | ctypes.Array | ctypes.Structure):
            yield bytes(item)


def _in_reach(scene: Scene) -> Seen:
    """Text and bytes that hang on a public object, in no :class:`Secret`."""
    yield from _texts(*scene.objects)


def _shown(scene: Scene) -> Seen:
    """As people print things: each object of ours that hangs on a public one."""
    for item in reached(*scene.objects):
        if _is_ours(type(item)):  # type: ignore[arg-type]  # classes can be hashed
            yield f"{item!r} {item!s} {item!a} {format(item)}"
            yield repr(getattr(item, "__dict__", None))
            yield repr([getattr(item, name, None) for name in _slots(item)])
            if dataclasses.is_dataclass(item):
                yield pprint.pformat(item, width=1000)


def _slots(item: Any) -> list[str]:
    names: list[str] = []
    for base in type(item).__mro__:
        slots = base.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    # A name with two underscores is mangled: not to be had by accident.
    return names


def _alive(_scene: Scene) -> Seen:
    """Each object of ours in the process, whoever holds it."""
    everything = gc.get_objects()
    # By class first: there are hundreds of thousands, and few are of a class of ours.
    kinds = {kind for kind in set(map(type, everything)) if _is_ours(kind)}
    ours = itertools.compress(
        everything, map(kinds.__contains__, map(type, everything))
    )
    for item in ours:
        try:
            yield repr(item)
        except p11.PKCS11Error:
            # python-pkcs11's keys ask the token, and another test's has ended.
            continue


def _copied(scene: Scene) -> Seen:
    """What pickle and copy make of it: nothing, by an error of our own, or no PIN."""
    spoil: list[Callable[[Any], Any]] = [
        *(functools.partial(pickle.dumps, protocol=p) for p in (2, 5)),
        copy.copy,
        copy.deepcopy,
    ]
    for item in scene.objects:
        for make_one in spoil:
            try:
                made = make_one(item)
            except PoolError as error:
                yield _by_hand(error)
            except Exception as error:  # noqa: BLE001  # the accident of an inner lock
                scene.accidents.append(f"{type(item).__name__}: {error!r}")
            else:
                yield from _texts(made)
                yield repr(made)


# -- Errors, as people and programs write them ------------------------------------


def _by_logging(error: BaseException) -> str:
    out = io.StringIO()
    logger = logging.Logger("app", logging.DEBUG)  # noqa: LOG001  # nobody else's
    logger.addHandler(logging.StreamHandler(out))
    # As logging.exception() does, which takes the error from the except clause.
    logger.error("failed: %s", error, exc_info=error, stack_info=True)
    return out.getvalue()


def _by_rich(error: BaseException) -> str:
    # What it would print; the printing itself, with colours for every line, is slow.
    return repr(
        RichTraceback.extract(
            type(error),
            error,
            error.__traceback__,
            show_locals=True,
            locals_max_length=100_000,
            locals_max_string=100_000,
            locals_hide_dunder=False,
        )
    )


def _by_structlog(error: BaseException, *, formatter: Any) -> str:
    render = ConsoleRenderer(colors=False, exception_formatter=formatter)
    info = (type(error), error, error.__traceback__)
    return str(render(None, "error", {"event": "failed", "exc_info": info}))


def _as_data(error: BaseException, *, rich: bool) -> str:
    to_data = ExceptionDictTransformer(
        show_locals=True, locals_max_length=100_000, max_frames=500, use_rich=rich
    )
    return json.dumps(to_data((type(error), error, error.__traceback__)), default=repr)


def _by_traceback(error: BaseException) -> str:
    seen = traceback.TracebackException.from_exception(error, capture_locals=True)
    return "".join(seen.format())


def _chain(error: BaseException) -> list[BaseException]:
    """The error, and all that hang on it."""
    found: list[BaseException] = []
    line: list[BaseException | None] = [error]
    while line:
        one = line.pop()
        if one is not None and one not in found:
            found.append(one)
            line += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return found


def _by_hand(error: BaseException) -> str:
    """As ``cgitb`` and Sentry do: arguments, notes, attributes, each frame's locals."""
    told = []
    for one in _chain(error):
        told += [repr(one), str(one), repr(one.args), repr(vars(one))]
        told += [repr(getattr(one, "__notes__", None))]
        for frame, line in traceback.walk_tb(one.__traceback__):
            told.append(f"{frame.f_code.co_qualname}:{line} {frame.f_locals}")
    return "\n".join(told)


RENDERERS: Final[dict[str, Callable[[BaseException], str]]] = {
    "repr and str": lambda error: f"{error!r} {error}",
    "format_exception": lambda e: "".join(traceback.format_exception(e)),
    "logging.exception": _by_logging,
    "traceback with locals": _by_traceback,
    "rich": _by_rich,
    "structlog, rich": functools.partial(
        _by_structlog,
        formatter=RichTracebackFormatter(
            show_locals=True, width=10_000, color_system=None, extra_lines=0
        ),
    ),
    "structlog, plain": functools.partial(_by_structlog, formatter=plain_traceback),
    "structlog, data": functools.partial(_as_data, rich=False),
    "structlog, data by rich": functools.partial(_as_data, rich=True),
    "each frame": _by_hand,
}
"""How an error is written down, by name."""


# -- Tasks and threads ------------------------------------------------------------


def _asyncio_tasks() -> list[asyncio.Task[Any]]:
    try:
        return list(asyncio.all_tasks())
    except RuntimeError:
        return []


def _trio_tasks() -> list[Any]:
    trio: Any = sys.modules.get("trio")
    try:
        line = [trio.lowlevel.current_root_task()]
    except (AttributeError, RuntimeError):
        return []
    found = []
    while line:
        task = line.pop()
        found.append(task)
        for nursery in task.child_nurseries:
            line += nursery.child_tasks
    return found


def _tasks(_scene: Scene) -> Seen:
    """Their names, reprs and stacks; what each coroutine in them has as locals."""
    for task in _asyncio_tasks():
        out = io.StringIO()
        task.print_stack(file=out)
        yield f"{task!r} {task.get_name()} {task.get_stack()} {out.getvalue()}"
        for frame in task.get_stack():
            yield repr(frame.f_locals)
        yield from _awaited(task.get_coro())
    for task in _trio_tasks():
        yield f"{task!r} {task.name} {task.context!r}"
        yield from _awaited(task.coro)


def _awaited(coroutine: Any) -> Seen:
    while coroutine is not None:
        yield repr(coroutine)
        for name in ("cr_frame", "gi_frame", "ag_frame"):
            frame = getattr(coroutine, name, None)
            if frame is not None:
                yield repr(frame.f_locals)
        coroutine = getattr(
            coroutine, "cr_await", getattr(coroutine, "gi_yieldfrom", None)
        )


def _threads(_scene: Scene) -> Seen:
    """Their names, and the locals of each frame of each, as a debugger shows them."""
    for thread in threading.enumerate():
        yield f"{thread!r} {thread.name}"
    for frame in sys._current_frames().values():  # noqa: SLF001  # what it is for
        for one, _ in traceback.walk_stack(frame):
            if one.f_code.co_filename != __file__ and not _is_foreign(one):
                yield repr(one.f_locals)


def _held_by_threads(_scene: Scene) -> Seen:
    """What hangs on the locals of our own threads."""
    yield from _texts(
        *(
            held
            for frame in sys._current_frames().values()  # noqa: SLF001
            for one, _ in traceback.walk_stack(frame)
            if f"/{_OURS}/" in one.f_code.co_filename
            for held in one.f_locals.values()
        )
    )


def _dumped(_scene: Scene) -> Seen:
    """What ``faulthandler`` writes when the process is dying."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        yield file.read()


# -- What the pool tells of itself ------------------------------------------------


def _told(scene: Scene) -> Seen:
    for pool in scene.pools:
        stats = pool.stats()
        yield f"{pool!r} {pool.name} {pool.state!r} {pool.login_state!r} {stats!r}"
        yield repr(dataclasses.asdict(stats))
        if pool.state is PoolState.READY:
            yield f"{pool.token!r} {pool.token}"
        registry = CollectorRegistry()
        registry.register(PoolCollector(pool))
        yield generate_latest(registry)


PLACES: Final[dict[str, Callable[[Scene], Seen]]] = {
    "log": lambda scene: [scene.log.written.getvalue()],
    "repr, str, vars and slots": _shown,
    "held by a public object": _in_reach,
    "repr of anything alive": _alive,
    "pickle and copy": _copied,
    "task": _tasks,
    "thread": _threads,
    "held by a thread": _held_by_threads,
    "faulthandler": _dumped,
    "stats, metrics, token": _told,
    "words of the process": lambda _scene: [repr(sys.argv), repr(sys.orig_argv)],
}
"""Where a PIN could show, by name."""
