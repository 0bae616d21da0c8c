"""How the code in the pages and docstrings is run: as a reader would, in order.

All blocks of a page share their names, and a token that is thrown away:

- ``python``: run as it stands. One that awaits runs on an event loop (trio where the
  page imports trio, else asyncio), another one on a plain thread.
- ``text``, right behind it: what it printed; ``...`` stands for anything.
- ``console``: lines with ``$`` are run in a shell, the others are what comes back.
  What one command exports, the next ones have. One that ends with ``&`` is a server:
  it is waited for, and goes on until the page or another server comes. Its port 8000
  stands for one that is free.
- ``<!-- save: NAME -->`` right before a block: a file that later commands use.
- ``<!-- invisible-code-block: python`` up to ``-->``: runs, and does not show.
- ``<!-- skip: next "reason" -->``: is not run; the tests count these.
- any other language: is not run; the tests count these, too.
- ``<!-- page: keys=signer,p256 cwd=checkout -->``: which keys the page finds on the
  token, and that its commands are for the root of a checkout. ``pool=new``: its pool
  is not open yet.

Names that are there: ``token`` (label, PINs, module), ``module`` (its path) and, where
a block uses it without making it, ``pool``: open and logged in. A block that makes a
pool has the token for itself.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import inspect
import io
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest import SkipTest

import anyio.from_thread
import pkcs11
import pytest
import uvicorn
from pkcs11 import KeyType
from sybil.document import Document, PythonDocStringDocument
from sybil.parsers import myst, rest

from pkcs11_pool import PoolState, TokenPool, softhsm
from poolkit import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.from_thread import BlockingPortal
    from sybil import Example

    from pkcs11_pool.softhsm import ThrowawayToken

ROOT: Final = Path(__file__).parents[1]
MODULE: Final = "/usr/lib/softhsm/libsofthsm2.so"
"""Debian's, as the pages write it; the real one takes its place."""

README: Final = ROOT / "README.md"

_README_SETTINGS: Final = "keys=signer pool=new"
_DOCSTRING_SETTINGS: Final = "keys=signer,p256,master"
_SETTINGS: Final = re.compile(r"<!-- page:(.*?)-->")
_SAVE: Final = re.compile(r"<!-- save: (\S+) -->\s*\Z")
_MAKES_A_POOL: Final = re.compile(r"\b(TokenPool\(|from_uri\(|asyncio\.run\(main)")
_CHECKER: Final = doctest.OutputChecker()
_RUN: Final = {"console", "python", "text"}
_BLOCK: Final = re.compile(
    r"(?m)^( *)\.\. code-block::.*\n(?:(?:\1 +.*)?\n)*(?=\1\S|\S|\Z)"
)
_CODE: Final = (
    ast.Assign,
    ast.AsyncFunctionDef,
    ast.Await,
    ast.FunctionDef,
    ast.Import,
    ast.ImportFrom,
)
_LOOSE: Final = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def pages() -> list[Path]:
    """All pages that are written for users or contributors."""
    found = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if "_build" not in page.parts]


def sources() -> list[Path]:
    """The Python modules whose docstrings have examples."""
    found = sorted((ROOT / "src").rglob("*.py"))
    return [path for path in found if ".. code-block::" in path.read_text()]


def spy() -> str | None:
    """OpenSC's module that writes down what is called, where it is installed."""
    found = sorted(Path("/usr/lib").glob("**/pkcs11-spy.so"))
    return str(found[0]) if found else None


def skipped(page: Path) -> int:
    """How many blocks of a page are not run."""
    return len(re.findall(r"<!-- skip: ", page.read_text()))


def foreign(page: Path) -> dict[str, int]:
    """How many blocks of a page are in a language that is not run, by language."""
    found = re.findall(r"(?m)^ *```(\w+)$", page.read_text())
    return dict(Counter(kind for kind in found if kind not in _RUN))


def unmarked(source: Path) -> list[str]:
    """Code in the docstrings of a file that is not in a block, so does not run."""
    tree = ast.parse(source.read_text())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds)]
    found = []
    for doc in docs:
        prose = _BLOCK.sub("\n\n", (doc or "") + "\n")
        found += [part for part in re.split(r"\n\s*\n", prose) if _is_code(part)]
    return found


def _is_code(part: str) -> bool:
    """Whether it assigns, defines, imports or awaits: words of prose do not."""
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        tree: Any = compile(textwrap.dedent(part).strip(), "docstring", "exec", flags)
    except SyntaxError:
        return False
    return any(isinstance(node, _CODE) for node in ast.walk(tree))


class Page:
    """A page or Python module that is being run.

    Args:
        path: Where it is.
        token: The token that it has for itself.
        home: An empty directory for its commands.

    Attributes:
        names: What the blocks share.
        after: What it was after each block that ran.
    """

    def __init__(self, path: Path, token: ThrowawayToken, home: Path) -> None:
        self.path = path
        self.token = token
        text = path.read_text()
        found = _SETTINGS.search(text)
        given = found[1] if found else ""
        if path == README:
            given = _README_SETTINGS
        elif path.suffix == ".py":
            given = _DOCSTRING_SETTINGS
        settings = dict(word.split("=") for word in given.split())
        self.keys = [name for name in settings.get("keys", "").split(",") if name]
        self.home = ROOT if settings.get("cwd") == "checkout" else home
        self.backend = "trio" if re.search(r"(?m)^import trio$", text) else "asyncio"
        self.names: dict[str, Any] = {
            "__name__": "page",
            "asyncio": asyncio,
            # Docstrings stand where these are imported.
            **{name: getattr(pkcs11, name) for name in ("KeyType", "Mechanism")},
            "TokenPool": TokenPool,
            "serving": serving,
            "token": token,
            "module": str(token.module),
        }
        self.after: list[dict[str, Any]] = []
        self._new = settings.get("pool") == "new"
        self._pool: TokenPool | None = None
        self._portal: BlockingPortal
        self._shell = _shell(home.with_name(home.name + "-bin"), token)
        self._server: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self._printed = ""
        self._end = 0

    def run(self) -> None:
        """Run all blocks, in order."""
        kind: type[Document] = Document
        dialect: Any = myst
        if self.path.suffix == ".py":
            kind, dialect = PythonDocStringDocument, rest
        parsers: list[Any] = [
            dialect.CodeBlockParser("python", self._python),
            dialect.CodeBlockParser("text", self._text),
            dialect.CodeBlockParser("console", self._console),
            dialect.SkipParser(),
        ]
        document = kind.parse(str(self.path), *parsers)
        document.namespace["spy"] = spy()  # for conditions of skip
        with (
            anyio.from_thread.start_blocking_portal(self.backend) as self._portal,
            contextlib.ExitStack() as at_end,
        ):
            # What a page sets for its commands is nothing to the tests behind it.
            at_end.callback(_restore, dict(os.environ))
            at_end.callback(self._close)
            at_end.callback(self._stop_server)
            if self.keys:
                self._portal.call(self._make_keys)
            for example in document.examples():
                with contextlib.suppress(SkipTest):  # with a reason, and counted
                    example.evaluate()

    # -- Kinds of block -----------------------------------------------------------

    def _python(self, example: Example) -> None:
        text = str(example.parsed)
        saved = _SAVE.search(example.document.text[: example.region.start])
        if saved:
            (self.home / saved[1]).write_text(self._real(text))
            return
        if _MAKES_A_POOL.search(text):
            self._close()
        elif _uses(text, "pool") and not self._has_pool():
            self._portal.call(self._open)
        source = "\n" * example.line + text.replace(MODULE, self._module)
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, str(self.path), "exec", flags=flags, dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.chdir(self.home):
            if code.co_flags & inspect.CO_COROUTINE:
                self._portal.call(self._await, code)
            else:
                exec(code, self.names)  # noqa: S102  # it is ours
        self._printed, self._end = printed.getvalue(), example.region.end
        self.after.append(dict(self.names))

    def _text(self, example: Example) -> None:
        between = example.document.text[self._end : example.region.start]
        if self._end and not between.strip():
            _compare(str(example.parsed), self._printed)

    def _console(self, example: Example) -> None:
        self._close()
        steps = re.split(r"(?m)^\$ ", str(example.parsed))
        assert not steps[0], "a console block begins with a command"
        for step in steps[1:]:
            command, _, expected = _command(step)
            words = self._real(command)
            if words.startswith("curl ") and shutil.which("curl") is None:
                pytest.skip("curl is not here")
            if words.endswith("&"):
                self._serve(words.removesuffix("&"))
                continue
            done = subprocess.run(
                ["/bin/bash", "-c", f'. "$STATE"\n{words}\nexport -p > "$STATE"'],
                cwd=self.home,
                env=os.environ | self._shell,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=100,
            )
            _compare(self._real(expected), done.stdout)

    def _serve(self, words: str) -> None:
        """Start a server, and wait until it listens."""
        self._stop_server()
        log = self.home.parent / "server.log"
        with log.open("w") as output:
            self._server = subprocess.Popen(
                ["/bin/bash", "-c", f'. "$STATE"\nexec {words}'],
                cwd=self.home,
                env=os.environ | self._shell,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

        def listens() -> bool:
            assert self._server is not None
            why = f"{words} has ended:\n"
            assert self._server.poll() is None, why + log.read_text(errors="replace")
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", self._port)) == 0

        wait_for(listens)

    def _stop_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.send_signal(signal.SIGINT)  # as a reader does, who then has a prompt
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
                raise

    # -- What they find -----------------------------------------------------------

    def _real(self, text: str) -> str:
        """What stands in a page, with what is there in the place of it."""
        text = text.replace(MODULE, self._module)
        return re.sub(r"\b8000\b", str(self._port), text)

    @property
    def _module(self) -> str:
        return str(self.token.module)

    def _make_pool(self) -> TokenPool:
        token = self.token
        return TokenPool(token.module, token_label=token.label, pin=token.user_pin)

    def _has_pool(self) -> bool:
        pool = self.names.get("pool")
        return pool is not None and pool.state is not PoolState.CLOSED

    async def _await(self, code: Any) -> None:
        await eval(code, self.names)  # noqa: S307  # it is ours

    async def _open(self) -> None:
        self._pool = self.names["pool"] = self._make_pool()
        if not self._new:
            await self._pool.open()

    def _close(self) -> None:
        if self._pool is not None:
            self._portal.call(self._pool.close)
            self._pool = None

    async def _make_keys(self) -> None:
        async with self._make_pool() as pool:
            for name in self.keys:
                await _make_key(pool, name)


def _free_port() -> int:
    """One that stays free: those that the system gives, it gives to others as well."""
    while True:
        port = random.randrange(20_000, 30_000)  # noqa: S311  # no secret
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _restore(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _shell(private: Path, token: ThrowawayToken) -> dict[str, str]:
    """What the commands of a page have: our Python and SoftHSM2's program first."""
    private.mkdir()
    state, program = private / "state", private / "softhsm2-util"
    state.touch()
    util = softhsm.ensure().util
    program.write_text(f'#!/bin/sh\nexec "{util}" --module "{token.module}" "$@"\n')
    program.chmod(0o755)
    path = f"{private}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "COLUMNS": "80", "STATE": str(state)}


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an ASGI application, as a user's server does; give its address."""
    options: dict[str, Any] = {"port": 0, "log_level": "warning", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


async def _make_key(pool: TokenPool, name: str) -> None:
    """Make one of the keys that pages speak of."""
    if name == "signer":
        await pool.generate_keypair(KeyType.RSA, 2048, label=name, store=True)
    elif name == "p256":
        kind = KeyType.EC
        await pool.generate_keypair(kind, curve="secp256r1", label=name, store=True)
    elif name == "master":
        await pool.generate_key(KeyType.AES, 256, label=name, store=True)
    else:
        raise ValueError(f"pages know no key {name!r}: add it here")


def _uses(text: str, name: str) -> bool:
    """Whether code needs a name that it does not give itself."""
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    tree: Any = compile(text, "page", "exec", flags)
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name]
    return bool(found) and all(isinstance(node.ctx, ast.Load) for node in found)


def _command(step: str) -> tuple[str, str, str]:
    """A command, which may go on behind a backslash, and what it prints."""
    lines: Iterator[str] = iter(step.splitlines())
    command = [next(lines)]
    while command[-1].endswith("\\"):
        command.append(next(lines))
    return "\n".join(command), "\n", "\n".join(lines)


def _compare(expected: str, got: str) -> None:
    """What a page shows is what came; ``...`` is anything."""
    expected, got = expected.strip() + "\n", got.strip() + "\n"
    if not _CHECKER.check_output(expected, got, _LOOSE):
        raise AssertionError(f"the page says:\n{expected}\nwhat came:\n{got}")
