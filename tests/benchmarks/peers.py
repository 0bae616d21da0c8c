"""The clients that the pool is compared with, those whose tool chain is here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pkcs11_pool.bench import contenders, options, programs
from pkcs11_pool.bench.measure import Contender

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pkcs11_pool.bench.measure import Scenario

HERE: Final = Path(__file__).resolve().parent
#: Where Debian's packages put the sources of Go libraries.
GO_SOURCES: Final = Path("/usr/share/gocode")

#: What the peers can do.
SIGNATURES: Final = frozenset({"p256", "rsa2048"})

JAVA: Final = "java"
GO: Final = "go"
PYKCS11: Final = "pykcs11"
HANDS: Final = {
    "hand-lock-asyncio": ("by hand, lock, asyncio", "lock", "asyncio"),
    "hand-lock-trio": ("by hand, lock, trio", "lock", "trio"),
    "hand-os-locks": ("by hand, OS locks", "os-locks", "asyncio"),
}
POOLS: Final = tuple(f"pool-{backend}" for backend in ("asyncio", "uvloop", "trio"))
#: The pool in a process that is bound to one core.
ONE_CORE: Final = {f"one-core-{backend}": backend for backend in ("asyncio", "trio")}
BARE: Final = ("bare", "kept", "handed")
#: All names, in the order of the tables.
NAMES: Final = (*BARE, *POOLS, *ONE_CORE, JAVA, GO, *HANDS, PYKCS11)


class MissingError(RuntimeError):
    """What a peer needs is not here. The text says what."""


class Peers:
    """Builds clients in a directory, those that are wanted and can be had.

    Attributes:
        found: The clients.
        notes: A line for each that is left out, with the reason.
    """

    def __init__(self, directory: Path, wanted: Sequence[str]) -> None:
        self._directory = directory
        self._wanted = wanted
        self.found: list[Contender] = []
        self.notes: list[str] = []
        self._try("the bare module", BARE, self._bare)
        self._try("the pool", POOLS, self._pools)
        self._try("the pool on one core", ONE_CORE, self._one_core)
        self._try("Java SunPKCS11", (JAVA,), self._java)
        self._try("Go crypto11", (GO,), self._go)
        self._try("python-pkcs11 by hand", HANDS, self._by_hand)
        self._try("PyKCS11", (PYKCS11,), self._pykcs11)

    def _try(
        self,
        title: str,
        names: Sequence[str] | Mapping[str, object],
        make: Callable[[], list[Contender]],
    ) -> None:
        if not any(name in self._wanted for name in names):
            return
        try:
            made = make()
        except (MissingError, programs.NoCompilerError) as error:
            self.notes.append(f"{title} is left out: {error}")
            return
        self.found += [one for one in made if one.name in self._wanted]
        missing = [n for n in names if n in self._wanted and n not in self._names()]
        self.notes += [f"{name} is left out: it is not installed" for name in missing]

    def _names(self) -> list[str]:
        return [one.name for one in self.found]

    def _bare(self) -> list[Contender]:
        program = programs.compile_c(programs.BARE, self._directory)
        return [*contenders.bare(program), contenders.handed(program)]

    def _pools(self) -> list[Contender]:
        return [contenders.pool(backend) for backend in options.backends(None)]

    def _one_core(self) -> list[Contender]:
        if not hasattr(os, "sched_setaffinity"):
            raise MissingError("this system binds no process to a core")
        return [
            _python(name, f"pkcs11_pool, {backend}, one core", "one_core.py", backend)
            for name, backend in ONE_CORE.items()
        ]

    def _java(self) -> list[Contender]:
        java, javac = tool("java", "openjdk-17-jdk-headless"), tool("javac", "a JDK")
        source = HERE / "SunPkcs11.java"
        compiled([javac, "-d", str(self._directory), str(source)])
        program = [java, "-cp", str(self._directory), source.stem]

        def command(scenario: Scenario) -> Sequence[str]:
            prefix = scenario.material.prefix
            return [*program, scenario.module, str(scenario.slot_id), prefix]

        return [Contender(JAVA, "Java SunPKCS11", command, SIGNATURES)]

    def _go(self) -> list[Contender]:
        go = tool("go", "golang-go")
        if not (GO_SOURCES / "src/github.com/ThalesIgnite/crypto11").is_dir():
            raise MissingError("install golang-github-thalesignite-crypto11-dev")
        program = str(self._directory / "crypto11")
        environment = {
            "GO111MODULE": "off",
            "GOPATH": str(GO_SOURCES),
            "GOCACHE": str(self._directory / "go-cache"),
            "CGO_ENABLED": "1",
        }
        source = str(HERE / "crypto11" / "main.go")
        compiled([go, "build", "-o", program, source], environment)
        return [
            Contender(
                GO,
                "Go crypto11",
                lambda scenario: [program, *contenders.arguments(scenario)],
                SIGNATURES,
            )
        ]

    def _by_hand(self) -> list[Contender]:
        return [
            _python(name, title, "by_hand.py", how, backend)
            for name, (title, how, backend) in HANDS.items()
        ]

    def _pykcs11(self) -> list[Contender]:
        if importlib.util.find_spec("PyKCS11") is None:
            raise MissingError("pip install PyKCS11")
        return [_python(PYKCS11, "PyKCS11", "pykcs11_threads.py", "asyncio")]


def _python(name: str, title: str, script: str, *words: str) -> Contender:
    program = [sys.executable, str(HERE / script)]
    return Contender(
        name,
        title,
        lambda scenario: [*program, *contenders.arguments(scenario), *words],
        SIGNATURES,
    )


def tool(name: str, package: str) -> str:
    """The path of a program.

    Raises:
        MissingError: It is not on the path.
    """
    if found := shutil.which(name):
        return found
    raise MissingError(f"there is no {name}: install {package}")


def compiled(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> None:
    """Run a compiler.

    Raises:
        MissingError: It refused. That may be an old tool chain, and is told in full.
    """
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MissingError(f"{command[0]} refused:\n{done.stdout}{done.stderr}")


def chosen(words: Sequence[str]) -> list[str]:
    """The names that words stand for: a word is a name, or how some names begin.

    Raises:
        KeyError: A word stands for none.
    """
    found: list[str] = []
    for word in words:
        meant = [n for n in NAMES if n == word or n.startswith(f"{word}-")]
        if not meant:
            raise KeyError(word)
        found += meant
    return list(dict.fromkeys(found))
