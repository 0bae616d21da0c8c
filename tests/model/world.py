"""The real side: pools on two real tokens, and what the test holds of them."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from pkcs11 import Attribute, ObjectClass
from pkcs11.util.ec import encode_ec_public_key

import leftovers
from keykit import is_signature
from model.ledger import Ledger
from pkcs11_pool import PoolTimeout, TokenPool
from pkcs11_pool.login import pin_guard

if TYPE_CHECKING:
    from collections.abc import Callable

    from faultmodule import FaultModule
    from model.callers import Callers
    from pkcs11_pool.softhsm import ThrowawayToken

_PREHASHED = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
SOON = 10.0
"""Seconds for what is done behind the callers' backs."""


class Tokens:
    """Two tokens on disk, as good as new at the beginning of each life."""

    def __init__(self, tokens: list[ThrowawayToken], fault: FaultModule) -> None:
        self.all = tokens
        self.fault = fault
        self._home = tokens[0].directory / "tokens"
        self._fresh = tokens[0].directory / "fresh"
        shutil.copytree(self._home, self._fresh)
        # SoftHSM2 calls a token's directory by a UUID, of which the serial is the end.
        self._places = [
            next(
                place
                for place in self._home.iterdir()
                if place.name.replace("-", "").endswith(token.serial.decode())
            )
            for token in tokens
        ]

    def objects(self, token: int) -> int:
        """How many objects are on a token, private ones too, whoever is logged in."""
        files = [path.name for path in self._places[token].glob("*.object")]
        return len(files) - files.count("token.object")

    def renew(self) -> None:
        """Bring back what they were at first. The module is not initialised."""
        for fresh in self._fresh.iterdir():
            home = self._home / fresh.name
            for file in home.iterdir():
                file.unlink()
            for file in fresh.iterdir():
                shutil.copyfile(file, home / file.name)


class Audit:
    """Counts what goes into a pool's engine and what comes out, on its own."""

    def __init__(self, pool: TokenPool) -> None:
        self.operations = 0
        self._jobs: list[tuple[Any, _Wakes]] = []
        engine: Any = pool._engine  # noqa: SLF001  # to be counted independently
        submit, request, counted = engine.submit, engine.request, engine.counted

        def submitting(job: Any) -> None:
            self._follow(job)
            try:
                submit(job)
            except PoolTimeout:
                # Refused at the door, and counted there.
                self.operations += job.is_operation
                raise
            self.operations += job.is_operation

        def requesting(job: Any, post: Any) -> None:
            self._follow(job)
            request(job, post)

        def counting(**counts: int) -> None:
            self.operations += counts.get("operations_total", 0)
            counted(**counts)

        engine.submit, engine.request = submitting, requesting
        engine.counted = counting

    def _follow(self, job: Any) -> None:
        job.waiter = _Wakes(job.waiter)
        self._jobs.append((job, job.waiter))

    def check(self) -> None:
        """Every waiter ended, and was woken once at most."""
        jobs, self._jobs = self._jobs, []
        for job, waiter in jobs:
            assert job.phase.value in {"settled", "new"} or job.dropped, job.phase
            assert waiter.count <= 1, f"a caller was woken {waiter.count} times"


class _Wakes:
    """A waiter that is counted."""

    def __init__(self, waiter: Any) -> None:
        self._waiter = waiter
        self.count = 0

    def wake(self) -> bool:
        self.count += 1
        woken: bool = self._waiter.wake()
        return woken

    def line_up(self) -> Any:
        self.count += 1
        return self._waiter.line_up()


class World:
    """Pools, sessions, references and streams, by the names the model has for them."""

    def __init__(self, tokens: Tokens, callers: Callers) -> None:
        tokens.renew()
        # As in a new process: what was refused in the run before is forgotten.
        pin_guard._guards.clear()  # noqa: SLF001
        self.tokens = tokens
        self.fault = tokens.fault
        self.ledger = Ledger(self.fault, lambda: callers.idents)
        self.ledger.skip()
        self.pools: dict[str, TokenPool] = {}
        self.audits: dict[str, Audit] = {}
        self.blocks: dict[str, Any] = {}
        self.sessions: dict[str, Any] = {}
        self.refs: dict[str, Any] = {}
        self.streams: dict[str, Any] = {}
        #: What came out of a stream so far.
        self.outputs: dict[str, bytes] = {}
        self.slots: dict[int, int] = {}
        #: Public keys, by CKA_ID.
        self._publics: dict[str, bytes] = {}
        #: Numbers of sessions that were lent for a moment, during a step.
        self.visited: set[int] = set()
        #: Calls that hang and were given up on, by pool; and the sessions that they
        #: have in the module, by slot.
        self.stuck: Counter[str] = Counter()
        self._kept: Counter[int] = Counter()
        self._swept = 0

    # -- Pools --------------------------------------------------------------------

    def make_pool(
        self, name: str, token: int, pin: str | None, max_sessions: int
    ) -> TokenPool:
        """A pool that is not open."""
        real = self.tokens.all[token]
        pool = TokenPool(
            self.fault.path,
            token_label=real.label,
            pin=pin,
            max_sessions=max_sessions,
            timeout=SOON,
            name=name,
        )
        self.pools[name] = pool
        self.audits[name] = Audit(pool)
        return pool

    def calls(self, life: str, where: str) -> Any:
        """The pool, or one of its sessions."""
        return self.pools[life] if where == "pool" else self.sessions[where]

    def ref(self, name: str, where: str) -> Any:
        """A reference, bound to a session if it is to be used there."""
        ref = self.refs[name]
        return ref if where == "pool" else ref.on(self.sessions[where])

    def forget(self, stream: str) -> TokenPool:
        """Let go of a stream without a word; the pool that it was of."""
        pool: TokenPool = self.streams.pop(stream)._task.calls  # noqa: SLF001
        return pool

    # -- Whose signature is it ----------------------------------------------------

    async def signer(self, digest: bytes, raw: bytes) -> str:
        """The CKA_ID of the key pair that made a signature; or ``none``."""
        half = len(raw) // 2
        r, s = (int.from_bytes(part, "big") for part in (raw[:half], raw[half:]))
        der = utils.encode_dss_signature(r, s)
        for name, public in self._publics.items():
            if is_signature(public, der, digest, _PREHASHED):
                return name
        return "none"

    async def learn_publics(self, life: str) -> None:
        """Keep the public keys that are there."""

        def look(session: Any) -> dict[str, bytes]:
            wanted = {Attribute.CLASS: ObjectClass.PUBLIC_KEY}
            return {
                key[Attribute.ID].decode(): encode_ec_public_key(key)
                for key in session.get_objects(wanted)
            }

        self._publics |= await self.pools[life].run(look)

    # -- Calls that hang ------------------------------------------------------------

    def hangs(self, life: str, *, kept: bool) -> None:
        """One more was given up on. It may have a session."""
        self.stuck[life] += 1
        self._kept[self.pools[life].token.slot_id] += kept
        self._swept = self.fault.count("C_CloseAllSessions")

    def all_back(self) -> None:
        """None hangs any more."""
        self.stuck.clear()
        self._kept.clear()

    def kept_by_hung(self, slot: int) -> int:
        """How many sessions they have, unless all were closed meanwhile."""
        swept = self.fault.count("C_CloseAllSessions") != self._swept
        return 0 if swept else self._kept[slot]

    # -- Quiet --------------------------------------------------------------------

    def quiet(self) -> None:
        """Wait until nothing is under way any more, tidying included."""
        for pool in self.pools.values():
            if pool.state.value != "ready":
                continue
            done = threading.Event()
            actor: Any = pool._engine.actor  # noqa: SLF001  # it has no public mark
            actor.later(partial(done.set))
            assert done.wait(SOON), "the login actor does not come to its end"
            stuck = self.stuck[pool._engine.name]  # noqa: SLF001
            wait_until(partial(is_quiet, pool, stuck), partial(_stats, pool))

    def lent(self) -> set[int]:
        """The numbers of the sessions that are lent, to callers and to streams."""
        return {
            lease.handle
            for pool in self.pools.values()
            for lease in pool._engine._room.leases  # noqa: SLF001  # streams', too
        }

    def number_of(self, ref: str) -> int:
        """The number of a session object. It has it as long as it lives."""
        number: int = self.refs[ref]._target.entry.handle  # noqa: SLF001
        return number

    def close(self) -> list[str]:
        """Close what a failure left open; what does not close, or was left."""
        self.fault.call_off()
        self.fault.clear()
        return leftovers.close(self.pools.values()) + leftovers.free_modules()


def is_quiet(pool: TokenPool, stuck: int = 0) -> bool:
    """Whether nothing is under way, but for so many calls that hang."""
    s = pool.stats()
    idle = not (s.operations_running or s.operations_waiting)
    return (
        idle
        and s.calls_stuck == stuck
        and s.sessions_open == s.sessions_ahead + s.sessions_leased
    )


def _stats(pool: TokenPool) -> str:
    return str(pool.stats())


def wait_until(predicate: Callable[[], object], why: Callable[[], str]) -> None:
    """Wait for what no event tells of."""
    deadline = time.monotonic() + SOON
    pause = 0.0001
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not come to this: {why()}")
        time.sleep(pause)
        pause = min(0.01, pause * 2)


def left_over() -> list[str]:
    """Threads of pools that are still there."""
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith("pkcs11-pool")]


def open_files() -> int:
    """How many files, pipes and sockets are open."""
    here = Path("/proc/self/fd")
    return len(list(here.iterdir())) if here.exists() else 0
