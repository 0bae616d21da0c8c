"""Calls that stay inside the module: given up on, replaced, and tidied up at their end.

Any call of a step may hang, before the token did it or after. Then the time passes,
and what is left is counted, with the call inside; more steps are made beside it; the
pool may be closed around it, and another one opened. At last the call comes back.

Time passes when nothing else is under way: no deadline is waited for.
"""

from __future__ import annotations

import copy
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from hypothesis import strategies as st
from hypothesis.stateful import rule
from pkcs11 import Mechanism

from model import steps
from model.bench import LIVES, WHO, judge
from model.ledger import CHANGES
from model.pressure import Pressure
from model.spec import Model, Ref, Refused
from model.together import KINDS as STEPS
from model.together import Together
from model.world import is_quiet, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from faultmodule import Call
    from model.callers import Running
    from model.steps import Step
    from pkcs11_pool import TokenPool

KINDS: Final = ("hang before", "hang after", "flood")
"""What may happen: a call hangs on its way in or back, or more do than there are
sessions."""
_FAR: Final = 100.0
"""Seconds after which all deadlines have passed."""
_ACTORS: Final = {"login", "logout", "officer"}
_HUNG: Final = tuple(kind for kind in STEPS if kind not in _ACTORS)
"""What a worker does."""
_BESIDE: Final = ("use", "label", "digest", "create", "login", "logout", "crowd")
"""What is done beside a hung call. Nothing is destroyed: one call that destroys waits
for the other, and no session is closed whose object a hung call may be using."""
_PICK: Final = (WHO, st.integers(0, 5), st.booleans(), st.booleans())
_RUNNING: Final = "PoolTimeout running"


@dataclass
class Hung:
    """A call that hangs.

    Attributes:
        life: The pool whose call it is.
        call: As the log has it: it has not ended.
        worker: Its thread.
        in_front: Its caller waits for it: it is not only tidying.
        in_lane: It is in a session that was lent.
        done: It hangs on its way back.
        began: The last call before its step.
    """

    life: str
    call: Call
    worker: Any
    in_front: bool
    in_lane: bool
    done: bool
    began: int

    @property
    def keeps_session(self) -> bool:
        """Whether it has a session in the module."""
        opens = self.call.function == "C_OpenSession"
        closes = self.call.function == "C_CloseSession"
        return self.done if opens else not (closes and self.done)


class Hangs(Together, Pressure):
    """Makes steps in which a call hangs."""

    def __init__(self) -> None:
        super().__init__()
        #: References to what may yet be changed by a call that hangs.
        self._forgotten: dict[str, Ref] = {}
        #: What was made from another object, and is taken back by its thread where that
        #: was not sure any more.
        self._derived: tuple[str, str] | None = None

    @rule(
        life=LIVES,
        pick=st.tuples(st.sampled_from(_HUNG), *_PICK),
        # Which call, and whether on its way back.
        where=st.tuples(
            st.sampled_from([1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 8]), st.booleans()
        ),
        beside=st.lists(st.tuples(st.sampled_from(_BESIDE), *_PICK), max_size=2),
        end=st.sampled_from(["back", "back", "closed", "closed and opened"]),
    )
    def hang(
        self,
        life: str,
        pick: tuple[str, int, int, bool, bool],
        where: tuple[int, bool],
        beside: list[tuple[str, int, int, bool, bool]],
        end: str,
    ) -> None:
        """One call hangs; life goes on beside it, and may end and begin anew."""
        life = self.now(life)
        if not self._may_hang(life):
            self.step(pick[1], steps.Digest(life, "pool"))
            return
        step = self._to_hang(life, pick)
        hung, running = self._until_hung(pick[1], step, *where)
        if hung is None:
            self._come_to_nothing(step, running)
            return
        self.counts[f"fault hang {'after' if hung.done else 'before'}"] += 1
        late = self._give_up(step, running, hung)
        self._finish()
        if not hung.in_lane:
            # The session objects of one that is lent are there as long as it hangs.
            for word, who, *more in beside:
                self._beside(hung.life, word, who, more)
        if end != "back" and late is None and hung.life == life:
            self._close_around(hung.life, end)
        self._come_back(late)

    def _may_hang(self, life: str) -> bool:
        # See the other faults.
        left_behind = any(token.debris for token in self.model.tokens)
        if left_behind or not self.model.lives[life].open:
            return False
        for stream in list(self.world.streams):
            self.step(0, steps.EndStream(stream, forget=False))
        return True

    def _to_hang(self, life: str, pick: tuple[str, int, int, bool, bool]) -> Step:
        step = self._part(life, (*pick, 1))
        changed: Any = step
        if not getattr(step, "token", True):
            # Nobody would know whose session object it is.
            step = replace(changed, token=True)
        return step

    # -- Until it hangs -----------------------------------------------------------

    def _until_hung(
        self,
        who: int,
        step: Step,
        after: int,
        done: bool,  # noqa: FBT001
    ) -> tuple[Hung | None, Running]:
        """Make the step until a call hangs, or it is over."""
        kind = "after" if done else "before"
        self._begin(f"{self._name(who)}: {step}, call {after} hangs {kind}")
        fault = self.world.fault
        began = self.world.ledger.last
        fault.strike("hang after" if done else "hang before", after=after)
        running = self.callers.start(who, lambda: step.act(self.world))
        try:
            wait_until(
                lambda: fault.hanging() or (running.is_over and self._is_quiet()),
                lambda: f"neither hung nor over: {fault.calls()[-5:]}",
            )
            struck, first = fault.call_off()
            if not struck:
                return None, running
            fault.wait_until_hanging()
            hung = self._find(first, began, done=done)
            if hung is None:
                return None, running
            wait_until(
                lambda: self._only_that(hung, running),
                lambda: f"more than {hung} is under way: {self._stats(hung.life)}",
            )
        except (AssertionError, TimeoutError) as error:
            self._disagree(f"{type(error).__name__}: {error}", error)
        hung.in_front = hung.worker.job is not None
        return hung, running

    def _is_quiet(self) -> bool:
        pools = [self.world.pools[name] for name in self.world.pools]
        return all(is_quiet(p) for p in pools if p.state.value == "ready")

    def _stats(self, life: str) -> str:
        return str(self.world.pools[life].stats())

    def _find(self, number: int, began: int, *, done: bool) -> Hung | None:
        """Whose call it is; None where no worker made it."""
        call = next(c for c in self.world.fault.calls() if c.sequence == number)
        for name, pool in self.world.pools.items():
            engine: Any = pool._engine  # noqa: SLF001  # its threads have no public way
            for worker in list(engine._staff.workers):  # noqa: SLF001
                if worker._thread.ident == call.thread:  # noqa: SLF001
                    job = worker.job
                    lane = job is not None and (job.lane is not None)
                    return Hung(name, call, worker, job is not None, lane, done, began)
        return None

    def _only_that(self, hung: Hung, running: Running) -> bool:
        """Whether time may pass: nothing else would be late."""
        engine: Any = self.world.pools[hung.life]._engine  # noqa: SLF001
        waits = engine.stats().operations_waiting > 0
        heard = running.is_over or hung.worker.job is not None or waits
        return engine._staff.busy == 1 and heard  # noqa: SLF001

    def _come_to_nothing(self, step: Step, running: Running) -> None:
        """No worker hung: what hung else is back in time, and all is as ever."""
        self.world.fault.clear()
        running.wait()
        self._note(running)
        problem = judge(step, running, self.model)
        if problem:
            self.fail(problem, running)
        self._finish()

    # -- It is given up on --------------------------------------------------------

    def _give_up(self, step: Step, running: Running, hung: Hung) -> Step | None:
        """Time passes. What may yet happen when the call comes back."""
        mine = hung.in_front and not running.is_over
        waits = not hung.in_front and not running.is_over
        self._pass_time(hung.life)
        running.wait()
        self._note(running)
        self.journal[-1] += f" (hung: {hung.call.function}, in front: {hung.in_front})"
        self._count_lost(hung)
        if waits and running.outcome == "PoolTimeout waiting":
            # All other sessions are lent, and it waited for that one.
            return None
        if not mine or running.outcome != _RUNNING:
            problem = judge(step, running, self.model)
            if problem:
                self.fail(problem, running)
            return None
        late = None
        if step.changes and self._has_happened(hung):
            self._has_been(self.model, step)
            if isinstance(step, (steps.Copy, steps.Unwrap)):
                self._derived = self.model.refs[step.ref].life, step.new
        elif step.changes:
            late = step
        self._forget(self.model, step)
        where = getattr(step, "where", "pool")
        if where != "pool":
            self.model.close_session(where)
            if late is not None:
                changed: Any = late
                late = replace(changed, where="pool")
        return late

    def _pass_time(self, life: str) -> None:
        engine: Any = self.world.pools[life]._engine  # noqa: SLF001
        engine.sweep(time.monotonic() + _FAR)

    def _count_lost(self, hung: Hung) -> None:
        if not hung.worker.lost:
            self.fail(f"{hung} was not given up on")
        # A worker that began to tidy just now, behind the back of everybody, was given
        # up on as well, and is back.
        lost = self.world.pools[hung.life].stats().calls_lost
        if not lost > self.lost.get(hung.life, 0):
            self.fail(f"{hung} was not counted")
        self.lost[hung.life] = lost
        self.world.hangs(hung.life, kept=hung.keeps_session)
        self.world.ledger.hung.add(hung.call.sequence)
        if hung.done:
            self.world.ledger.hung_after.add(hung.call.sequence)

    def _has_happened(self, hung: Hung) -> bool:
        """Whether the token has done it, and nobody heard of it."""
        if hung.done and hung.call.function in CHANGES:
            return True
        return any(
            call.thread == hung.call.thread and call.rv == 0
            for call in self.world.fault.calls(after=hung.began)
            if call.function in CHANGES and call.sequence < hung.call.sequence
        )

    def _has_been(self, model: Model, step: Step) -> None:
        """It was done, and nobody heard of it."""
        changed: Any = step
        with suppress(Refused):
            (replace(changed, keep=False) if hasattr(step, "keep") else step).expect(
                model
            )

    def _forget(self, model: Model, step: Step) -> None:
        """What a reference names that was changed unheard, is not sure.

        The thread that changes it may yet learn of it.
        """
        if isinstance(step, (steps.Relabel, steps.Destroy)):
            self._forgotten[step.ref] = model.refs.pop(step.ref)

    # -- Beside it, and after it --------------------------------------------------

    def _beside(self, life: str, word: str, who: int, more: list[Any]) -> None:
        number, one, other = more
        if word == "crowd":
            # As many run at once as before: thread and session were replaced.
            self.crowd(life, 1 + number % 3, late=False, gone=one)
            return
        self.step(who, self._part(life, (word, who, number, one, other, 1)))

    def _close_around(self, life: str, end: str) -> None:
        """The pool ends with the call inside; another begins beside it, or later."""
        before = self.world.fault.count("C_Finalize")
        self.step(0, steps.ClosePool(life))
        if self.world.fault.count("C_Finalize") != before:
            self.fail("The module was finalised under a call.")
        if end == "closed":
            self._come_back(None)
        token = self.model.lives[life].token
        pin, size = self.model.tokens[token].pin, self.model.lives[life].max_sessions
        self.step(0, steps.OpenPool(self.new("pool"), token, pin, size))

    def _come_back(self, late: Step | None) -> None:
        """The call returns, and its thread tidies up."""
        if not self.world.stuck:
            return
        self._begin("it comes back")
        self.world.fault.clear()
        stuck = [self.world.pools[name] for name in self.world.stuck]
        self.world.all_back()
        self.world.ledger.hung.clear()
        try:
            wait_until(
                lambda: not any(pool.stats().calls_stuck for pool in stuck),
                lambda: "\n".join(str(pool.stats()) for pool in stuck),
            )
        except AssertionError as error:
            self._disagree(f"a call is back, and counted as stuck: {error}", error)
        self._settle()
        if late is not None:
            self._may_have_happened(late)
        if self._derived is not None:
            self._may_be_undone(*self._derived)
            self._derived = None
        self._forgotten.clear()
        self._finish()

    def _may_have_happened(self, late: Step) -> None:
        """Look which it is: what hung may have been done in the end."""
        done = copy.deepcopy(self.model)
        done.refs |= self._forgotten
        self._has_been(done, late)
        for name in self._forgotten:
            del done.refs[name]
        self._is_one_of(done, self.model)

    def _may_be_undone(self, life: str, new: str) -> None:
        undone = copy.deepcopy(self.model)
        undone.token_of(life).things.pop(new, None)
        self._is_one_of(self.model, undone)

    def _is_one_of(self, *models: Model) -> None:
        seen = {name: self._observe(name) for name in self.model.lives}
        for model in models:
            if all(seen[name] == self._expected(model, name) for name in seen):
                self.model = model
                return
        self.fail(f"Neither done nor not: {seen}")

    # -- Past the limit -----------------------------------------------------------

    @rule(life=LIVES, who=WHO, closes=st.integers(0, 2))
    def flood(self, life: str, who: int, closes: int) -> None:
        """So many calls hang that nobody waits for one more."""
        life = self.now(life)
        if not self._may_hang(life):
            self.step(who, steps.Digest(life, "pool"))
            return
        pool, fault = self.world.pools[life], self.world.fault
        most = self.model.lives[life].max_sessions + 1
        self._begin(f"{most} calls hang on {life}")
        self.counts["fault flood"] += 1
        began = self.world.ledger.last
        fault.on("C_DigestInit", hang="before", every=True)
        try:
            for number in range(most):
                running = self._digest(who + number, pool)
                fault.wait_until_hanging("C_DigestInit", number + 1)
                hung = self._last_hung(began)
                wait_until(
                    lambda h=hung, r=running: self._only_that(h, r),  # type: ignore[misc]
                    lambda: self._stats(life),
                )
                self._pass_time(life)
                running.wait()
                assert running.outcome == _RUNNING, running.outcome
                self._count_lost(hung)
            self._settle()
            before = fault.count("C_OpenSession"), fault.count("C_DigestInit")
            self._is_refused(lambda: self._digest(who, pool))
            self._is_refused(
                lambda: self.callers.start(who % 2, pool.session().__aenter__)
            )
            after = fault.count("C_OpenSession"), fault.count("C_DigestInit")
            assert before == after, "something was sent all the same"
        except (AssertionError, TimeoutError) as error:
            self._disagree(f"{type(error).__name__}: {error}", error)
        self._look()
        if closes == 0:
            self._close_around(life, "closed and opened")
        self._come_back(None)

    def _digest(self, who: int, pool: TokenPool) -> Running:
        return self.callers.start(
            who, lambda: pool.digest(b"", mechanism=Mechanism.SHA256)
        )

    def _last_hung(self, began: int) -> Hung:
        calls = self.world.fault.calls("C_DigestInit", after=began)
        hung = self._find(calls[-1].sequence, began, done=False)
        assert hung is not None, "it is no worker's call"
        return hung

    def _is_refused(self, call: Callable[[], Running]) -> None:
        running = call()
        running.wait()
        assert running.outcome == "TokenUnavailable", running.outcome
