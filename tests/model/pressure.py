"""More callers than sessions, callers who go, and calls that stay inside."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from hypothesis import strategies as st
from hypothesis.stateful import rule
from pkcs11 import Mechanism

from model import steps
from model.bench import LIVES, LOOP, Bench
from model.callers import LAST_RESORT
from model.spec import Refused
from model.world import wait_until

if TYPE_CHECKING:
    from model.callers import Running
    from pkcs11_pool import TokenPool

_RW_SESSION: Final = 2
"""``CKF_RW_SESSION``."""
_LATE: Final = {"PoolTimeout running", "PoolTimeout waiting"}
"""On a busy machine the time may be over before the module was reached."""


class Inside:
    """A function for ``run`` that stays inside until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, _session: object) -> None:
        """Stay."""
        self.entered.set()
        assert self.let_go.wait(2 * LAST_RESORT)


def _append(came: list[int], number: int, _session: object) -> None:
    came.append(number)


def _nothing(_session: object) -> None:
    pass


class Pressure(Bench):
    """Makes what does not go smoothly."""

    # -- Full, late and cancelled -------------------------------------------------

    @rule(life=LIVES, size=st.integers(1, 4), late=st.booleans(), gone=st.booleans())
    def crowd(self, life: str, size: int, late: bool, gone: bool) -> None:  # noqa: FBT001
        """More callers than sessions: first come, first served."""
        life = self.now(life)
        if not self.model.lives[life].open:
            self.step(0, steps.Digest(life, "pool"))
            return
        self._begin(f"{size} wait on {life}, one more is late: {late}, goes: {gone}")
        pool = self.world.pools[life]
        free = self.model.lives[life].max_sessions - self.model.leased(life)
        inside = [Inside() for _ in range(free)]
        came: list[int] = []
        held = [self._run_on(life, n, one) for n, one in enumerate(inside)]
        try:
            for one in inside:
                assert one.entered.wait(LAST_RESORT), "a free session was not used"
            self.check_sessions(life, running=free)
            waiting = []
            for number in range(size):
                waiting.append(
                    self._run_on(life, number, partial(_append, came, number))
                )
                self._until_waiting(pool, number + 1)
            if late:
                running = self._run_on(life, 0, _nothing, timeout=0.02)
                running.wait()
                assert running.outcome == "PoolTimeout waiting", running.outcome
            if gone:
                running = self._run_on(life, 1, partial(_append, came, -1))
                self._until_waiting(pool, size + 1)
                assert running.cancel is not None
                running.cancel()
                running.wait()
                assert running.outcome == "cancelled", running.outcome
            self._until_waiting(pool, size)
            inside[0].let_go.set()
            for running in waiting:
                running.wait()
                assert running.outcome == "ok", running.error
            assert came == list(range(size)), f"served in the order {came}"
        except (AssertionError, TimeoutError) as error:
            self._disagree(f"{type(error).__name__}: {error}", error)
        finally:
            for one in inside:
                one.let_go.set()
        for running in held:
            running.wait()
        self.counts["calls"] += size + free
        self._finish()

    def _run_on(
        self, life: str, who: int, func: Any, timeout: float = LAST_RESORT
    ) -> Running:
        """A call of a function, by a task of a loop."""
        pool = self.world.pools[life]
        return self.callers.start(who % 2, lambda: pool.run(func, timeout=timeout))

    def _until_waiting(self, pool: TokenPool, count: int) -> None:
        wait_until(
            lambda: pool.stats().operations_waiting == count,
            lambda: f"not {count} wait: {pool.stats()}",
        )

    @rule(
        life=LIVES,
        who=LOOP,
        what=st.sampled_from(["digest", "create", "session"]),
        end=st.sampled_from(["cancel", "cancel", "deadline"]),
    )
    def inside(self, life: str, who: int, what: str, end: str) -> None:
        """The caller goes, or his time is over, while the module has the call."""
        life = self.now(life)
        if not self.model.lives[life].open:
            self.step(who, steps.Digest(life, "pool"))
            return
        self._begin(f"{self._name(who)}: {end} inside of {what} on {life}")
        new = self.new("i")
        step, function, flags = self._held_step(life, what, new)
        fault, pool = self.world.fault, self.world.pools[life]
        lost = what == "digest" and end == "deadline"
        limit = 0.2 if lost else LAST_RESORT
        fault.on(function, hang="before", when_flags_set=flags)
        running = self.callers.start(who, lambda: step(pool, limit))
        try:
            wait_until(
                lambda: fault.inside(function) or running.is_over,
                lambda: f"{function} was not called: {fault.counts()}",
            )
            if limit == LAST_RESORT:
                assert running.cancel is not None
                running.cancel()
            if what != "create":
                # He goes at once.
                running.wait()
                right = _LATE if limit != LAST_RESORT else {"cancelled"}
                assert running.outcome in right, running.outcome
            else:
                assert not running.is_over, "it did not wait for the outcome"
            # Not release(): a call that is inside may not hang yet, and would miss it.
            fault.clear()
            running.wait()
            assert what != "create" or running.outcome == "cancelled", running.outcome
            lost = running.outcome == "PoolTimeout running"
        except (AssertionError, TimeoutError) as error:
            self._disagree(f"{type(error).__name__}: {error}", error)
        finally:
            fault.clear()
        self.lost[life] = self.lost.get(life, 0) + lost
        if what == "create":
            with suppress(Refused):
                thing = steps.secret(new, "a", private=False, token=True)
                self.model.create(life, "pool", [thing], ref=None)
        self._finish()

    def _held_step(self, life: str, what: str, new: str) -> tuple[Any, str, int]:
        """A call, the function of the module that it hangs in, and flags of that."""
        if what == "create":
            template = steps.template(new, "a", private=False, token=True)
            return (
                lambda pool, limit: pool.create_object(template, timeout=limit),
                "C_CreateObject",
                0,
            )
        has_room = self.model.leased(life) < max(
            1, self.model.lives[life].max_sessions - 1
        )
        if what == "session" and has_room:
            return (
                lambda pool, limit: pool.session(rw=True, timeout=limit).__aenter__(),
                "C_OpenSession",
                _RW_SESSION,
            )
        return (
            lambda pool, limit: pool.digest(
                b"", mechanism=Mechanism.SHA256, timeout=limit
            ),
            "C_DigestInit",
            0,
        )
