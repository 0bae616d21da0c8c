"""Faults between any two calls of a step: what the pool must make good, it does.

Something happens at the module while a step is made: calls are answered as by a token
that is away, or their answers lost; sessions die, the login is lost, the module
finalised. Then the pools must be well again, by themselves. What is known by then is
compared with what ``misfortune`` excuses.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import rule
from pkcs11.exceptions import SessionHandleInvalid

from faultmodule import CKR
from model import steps
from model.bench import LIVES, PINS, STATES, WHO, WRONG, WRONG_SO, judge
from model.ledger import Blow
from model.machine import Machine
from model.misfortune import CODES, Misfortune, Trouble
from model.spec import Model, Refused, User
from model.together import KINDS as STEPS
from model.world import wait_until
from pkcs11_pool import KeyNotFound, LoginState, PinRefused
from pkcs11_pool.login import pin_guard
from pkcs11_pool.pins import literal

if TYPE_CHECKING:
    from model.callers import Running
    from model.steps import Step
    from pkcs11_pool.login.pin_guard import PinGuard

_ANSWERS = ("answer", "replace")
_LOSSES = ("sessions", "login", "finalize")
KINDS = (*_ANSWERS, *_LOSSES)
_SET_PIN = "set_pin"
_USERS = {User.USER: pin_guard.USER, User.SO: pin_guard.SO}
Pick = tuple[str, int, int, bool, bool]
Fault = tuple[str, int, int, int]


def fault_of(kinds: tuple[str, ...]) -> Any:
    """Faults, as ``Misfortune`` has them."""
    return st.tuples(
        st.sampled_from(kinds),
        st.sampled_from(sorted(CODES)),
        # Most steps make few calls.
        st.sampled_from([1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 8, 12]),
        st.sampled_from([1, 1, 1, 2, 3, 6]),
    )


def _picks(kinds: tuple[str, ...]) -> Any:
    """Steps, each with the fault that is played in it."""
    step = st.tuples(
        st.sampled_from((*STEPS, _SET_PIN)),
        WHO,
        st.integers(0, 5),
        st.booleans(),
        st.booleans(),
    )
    return st.lists(st.tuples(step, fault_of(kinds)), min_size=1, max_size=4)


class Faults(Machine):
    """All the steps that there are, and faults in some of them."""

    # A session that the token closes while its worker is about to close it may give
    # its number to the next one, which is closed in its place. Nobody can tell.
    may_reuse_sessions = False

    @rule(life=LIVES, picks=_picks(_ANSWERS))
    def failing(self, life: str, picks: list[tuple[Pick, Fault]]) -> None:
        """The token says that it is away, or that it failed."""
        self._misfortunes(life, picks)

    @rule(life=LIVES, picks=_picks(("replace",)))
    def half_done(self, life: str, picks: list[tuple[Pick, Fault]]) -> None:
        """It has done it, and its answer is lost."""
        self._misfortunes(life, picks)

    @rule(life=LIVES, picks=_picks(_LOSSES))
    def losing(self, life: str, picks: list[tuple[Pick, Fault]]) -> None:
        """Sessions, the login or the whole module are lost."""
        self._misfortunes(life, picks)

    def _misfortunes(self, life: str, picks: list[tuple[Pick, Fault]]) -> None:
        for (word, who, *more), (kind, rv, after, times) in picks:
            life = self.now(life)  # the one that is there now
            # SoftHSM2 2.6.1 shows the file of an object that it failed to make, as one
            # without a name, when it is initialised anew: no faults beside that.
            left_behind = any(token.debris for token in self.model.tokens)
            if left_behind or not self.model.lives[life].open:
                self.step(who, steps.Digest(life, "pool"))
                return
            for stream in list(self.world.streams):
                self.step(0, steps.EndStream(stream, forget=False))
            number, one, other = more
            if word == _SET_PIN:
                self._play_set_pin(
                    life, who, number, Misfortune(kind, rv, after, times)
                )
                continue
            step = self._part(life, (word, who, int(number), bool(one), bool(other), 1))
            if not getattr(step, "token", True):
                # Nobody would know whose session object it is, if its maker did not
                # hear of it.
                changed: Any = step
                step = replace(changed, token=True)
            at = who % 2 if isinstance(step, steps.Officer) else who
            self.play(at, step, Misfortune(kind, rv, after, times))

    def _play_set_pin(
        self, life: str, who: int, number: int, fault: Misfortune
    ) -> None:
        """Change the PIN; where nobody heard of it, look which one it is now."""
        token = self.model.token_of(life)
        old = token.pin if number else WRONG[1]
        new = PINS[token.pin == PINS[0]]
        if fault.is_answer and fault.trouble in {Trouble.CALLER, Trouble.LOGIN}:
            # To say that it refused what it did would be a lie, and no fault.
            fault = replace(fault, kind="answer")
        self.play(who, steps.SetPin(life, old, new), fault)
        if self.model.lives[life].in_doubt:
            self.step(who, steps.Logout(life))
            self.step(who, steps.Login(life, None))
            self.step(who, steps.Login(life, self.model.token_of(life).pin))

    def play(self, who: int, step: Step, fault: Misfortune) -> bool:
        """Make a step in which it is played; whether it hit anything."""
        if not fault.is_answer:
            fault = replace(fault, times=1)
        self._begin(f"{self._name(who)}: {step} with {fault}")
        recoveries = self._recoveries()
        self._were = {n: self.world.pools[n].login_epoch for n in self._open_lives()}
        module: Any = self.world.fault
        module.strike(fault.kind, fault.rv, after=fault.after, times=fault.times)
        running = self.callers.run(who, lambda: step.act(self.world))
        self._note(running)
        blow = self._blow(fault)
        self._reconcile(step, running, fault, blow, recoveries)
        self._finish()
        return bool(blow.struck)

    def _blow(self, fault: Misfortune) -> Blow:
        """What was hit, when all have recovered from it."""
        # What is only tidied behind the callers' backs may be hit, too.
        struck, first = self.world.fault.call_off()
        blow = Blow(fault.kind, first, struck)
        if struck:
            self.world.ledger.strike = blow
            self.counts[f"fault {fault.kind}"] += 1
            self.journal[-1] += f" (struck {struck}, first {first})"
        self._recover()
        self._settle()
        return blow

    def _open_lives(self) -> list[str]:
        return [name for name, life in self.model.lives.items() if life.open]

    def _recoveries(self) -> dict[str, int]:
        pools = self.world.pools
        return {n: pools[n].stats().recoveries_total for n in self._open_lives()}

    def _recover(self) -> None:
        """Every pool comes back by itself, and notices a login that is lost."""
        for name in self._open_lives():
            pool = self.world.pools[name]
            wait_until(lambda p=pool: p.state.value == "ready", lambda p=pool: str(p))  # type: ignore[misc]
            self.callers.run(0, lambda p=pool: self._probe(p))  # type: ignore[misc]
            if pool.login_state is LoginState.PUBLIC:
                # Where nobody is logged in, nothing that is lost is missed before the
                # next login: have it looked at.
                pool._engine.doubt(SessionHandleInvalid())  # noqa: SLF001
            wait_until(lambda p=pool: p.state.value == "ready", lambda p=pool: str(p))  # type: ignore[misc]

    async def _probe(self, pool: Any) -> None:
        """What is not found shows a login that is lost, and nothing else does."""
        with suppress(KeyNotFound):
            await pool.key(label="nobody").sign(b"", mechanism=None)

    # -- What has become of it ----------------------------------------------------

    def _reconcile(
        self,
        step: Step,
        running: Running,
        fault: Misfortune,
        blow: Blow,
        recoveries: dict[str, int],
    ) -> None:
        """Find what has happened that was excused, and what is there afterwards."""
        if fault.kind == "login" and isinstance(step, steps.Officer) and running.value:
            # His session tells what is so: that he is out.
            rw, who, *others = running.value
            who = User.SO if who is User.NOBODY else who
            running.value = (rw, who, *others)
        if not blow.struck:
            problem = judge(step, running, self.model)
            if problem:
                self.fail(problem, running)
            # How many C_Login there were is compared as after any other step.
            return
        over = self._over()
        self._check_loss([step], fault, blow, over, recoveries)
        self._check_logins(step, blow)
        self._calls = self.world.ledger.recent
        called = self.world.ledger.shown()
        accepted = self.world.ledger.accepted.copy()
        seen = {name: self._observe(name) for name in self.model.lives}
        told = []
        for model in self._candidates(step, running, fault, blow, over):
            self._adopt_logins(model)
            expected = {name: self._expected(model, name) for name in seen}
            if expected == seen:
                self._adopt_books(model, step, accepted, called)
                self.model = model
                self._epochs.clear()
                return
            told.append(expected)
        shown = [f"There is now: {seen}"]
        shown += [f"Or there would be: {one}" for one in told]
        shown += [f"Hit: {blow}", f"Over: {over}", "Called:", *called]
        self.fail("\n".join(["No misfortune explains this.", *shown]), running)

    def _check_loss(
        self,
        made: list[Step],
        fault: Misfortune,
        blow: Blow,
        over: list[str],
        recoveries: dict[str, int],
    ) -> None:
        """No session is over, and no pool recovered, without a reason."""
        mine = {step.where for step in made if isinstance(step, steps.CloseSession)}
        # Where an answer about the login was lost, only a new beginning makes it sure.
        doubt = not {"C_Login", "C_Logout"}.isdisjoint(blow.functions)
        out = any(isinstance(step, steps.Logout) for step in made)
        if not (mine.issuperset(over) or fault.may_end_sessions or out or doubt):
            self.fail(f"These sessions are over: {over}")
        # To be sure that he is out, the pool begins anew whatever the token says.
        out |= any(isinstance(step, steps.Officer) for step in made)
        recovered = self._recoveries() != recoveries
        if recovered and not (fault.may_end_login or out or doubt):
            self.fail("A pool recovered, and nothing was lost")

    def _over(self) -> list[str]:
        """What is over and was not ended by its holder: sessions, and streams."""
        over = [
            name
            for name, session in self.model.sessions.items()
            if session.open and self.world.sessions[name]._lease.closing  # noqa: SLF001
        ]
        for name, stream in self.world.streams.items():
            lease = stream._feed._lease  # noqa: SLF001  # it has a session to itself
            known = self.model.streams.get(name)
            holds = known is None or known.holds  # it may have begun just now
            if holds and lease is not None and lease.closing:
                over.append(name)
        return over

    def _candidates(
        self,
        step: Step,
        running: Running,
        fault: Misfortune,
        blow: Blow,
        over: list[str],
    ) -> list[Model]:
        """What there may be afterwards."""
        found = []
        for before in self._times(fault, over):
            model = copy.deepcopy(before)
            if judge(step, running, model) is None:
                found.append(self._after(model, over))
        if running.error is None or found:
            return found
        if isinstance(step, steps.SetPin) and running.outcome == "OutcomeUnknown":
            model = copy.deepcopy(self.model)
            model.lose_pin(step.life, step.new, made=self._has_set_pin(step, blow))
            return [self._after(model, over)] if blow.changed else []
        if fault.excuses(step, running.outcome, blow, is_public=self._is_public(step)):
            found.append(self._after(copy.deepcopy(self.model), over))
            if step.changes and fault.may_have_happened(running.outcome, blow):
                found += [
                    self._after(done_unheard(self.model, done), over)
                    for done in self._done(step)
                ]
            for model in found:
                if isinstance(step, (steps.FeedStream, steps.EndStream)):
                    model.end_stream(step.stream)
        return found

    def _is_public(self, step: Step) -> bool:
        """Whether nobody is logged in where a reference is used."""
        ref = getattr(step, "ref", None)
        if ref is None:
            return False
        return self.model.token_of(self.model.refs[ref].life).user is User.NOBODY

    def _has_set_pin(self, step: steps.SetPin, blow: Blow) -> bool:
        """Whether the token did it, and only its answer was lost."""
        right = step.old == self.model.token_of(step.life).pin
        return right and any(
            call.function == "C_SetPIN" and blow.has_lost_answer_to(call)
            for call in self._calls
        )

    def _done(self, step: Step) -> list[Step]:
        """A step that nobody has heard of."""
        changed: Any = step
        if isinstance(step, steps.Relabel):
            return [replace(step, heard=False)]
        if hasattr(step, "keep"):
            return [replace(changed, keep=False)]
        if isinstance(step, steps.Officer):
            return [step, replace(step, init_pin=None, new=None)]
        return [step]

    def _times(self, fault: Misfortune, over: list[str]) -> list[Model]:
        """When it came: after the step, before it, or in a moment without a login."""
        models = [self.model]
        if fault.may_end_login:
            models.append(self._after(copy.deepcopy(self.model), over))
        if fault.is_loss:
            out = copy.deepcopy(self.model)
            for token in out.tokens:
                token.user = User.NOBODY
            models.append(out)
        return models

    def _after(self, model: Model, over: list[str]) -> Model:
        """Sessions that are over, and logins that are others."""
        for name in over:
            if name in model.sessions:
                model.close_session(name)
            elif name in model.streams:
                stream = model.streams[name]
                stream.holds, stream.cut = False, stream.cut or "StreamInterrupted"
        for name, life in model.lives.items():
            moved = self.world.pools[name].login_epoch != self._were.get(name)
            if not life.open or not moved:
                continue
            token = model.token_of(name)
            token.epoch += 1
            restored = token.user is User.NOBODY and life.pin == token.pin
            if life.wants_user and (restored or life.in_doubt):
                # In doubt no PIN is sent, and what is lost is not restored.
                token.user = STATES[self.world.pools[name].login_state]
        return model

    def _adopt_books(
        self, model: Model, step: Step, accepted: set[int], called: Any
    ) -> None:
        """Which PINs are not sent again.

        What the step came to does not tell whether the token refused its PIN, nor
        that a recovery logged in, which strikes the page. But nothing else does, and
        none is in the book that was not tried.
        """
        tried = {getattr(step, name, None) for name in ("pin", "so_pin", "old")}
        for number, token in enumerate(model.tokens):
            life = model.life_of(number)
            guard = self.world.pools[life]._engine.actor.guard  # noqa: SLF001
            pins = {*WRONG, *PINS, WRONG_SO, token.so_pin}
            for user, who in _USERS.items():
                before = self.model.tokens[number].refused[user]
                now = {pin for pin in pins if _is_refused(guard, who, pin)}
                if not now <= before | tried | {model.lives[life].pin}:
                    self.fail(f"These were not tried: {now - before}")
                if not now >= before and self.world.slots.get(number) not in accepted:
                    self.fail(
                        "\n".join([f"Forgotten: {before - now}, {who} {life}", *called])
                    )
                token.refused[user] = now

    def _check_logins(self, step: Step, blow: Blow) -> None:
        """Each C_Login was needed: one for each login, and for each wrong PIN.

        Those that were hit are no one's: nobody heard what came of them.
        """
        for number, slot in self.world.slots.items():
            life = self.model.life_of(number)
            calls = [c for c in self.world.ledger.recent if c.slot == slot]
            sent = [c for c in calls if c.function == "C_Login"]
            heard = [c for c in sent if c.sequence not in blow.hits]
            refused = sum(c.rv == CKR.PIN_INCORRECT for c in heard)
            moves = self.world.pools[life].login_epoch - self._were.get(life, 0)
            # Between two logins there is an end of the first.
            if len(heard) - refused > (moves + 1) // 2:
                self.fail(f"{len(heard)} C_Login, and {moves} other logins on {life}")
            if refused > self._wrong_pins(step, life):
                self.fail(f"{refused} times a wrong PIN was sent on {life}")

    def _wrong_pins(self, step: Step, life: str) -> int:
        """How many there are in a step."""
        token = self.model.token_of(life)
        if getattr(step, "life", None) != life:
            return 0
        if isinstance(step, steps.Officer):
            return step.so_pin != token.so_pin
        return isinstance(step, steps.Login) and step.pin not in (None, token.pin)

    def _adopt_logins(self, model: Model) -> None:
        """How many C_Login there were; that each was needed was looked at before."""
        for number, token in enumerate(model.tokens):
            if number in self.world.slots:
                token.logins = self.world.ledger.logins(self.world.slots[number])


def done_unheard(before: Model, step: Step) -> Model:
    """What there is when it was done, and nobody has heard of it."""
    model = copy.deepcopy(before)
    with suppress(Refused):
        step.expect(model)
    if isinstance(step, steps.Relabel):
        # What it looks like now was not learnt: the old name is gone.
        model.refs[step.ref].follows = None
    if isinstance(step, steps.Destroy):
        # Nor was it told to who has the reference.
        model.refs[step.ref].destroyed = False
    return model


def _is_refused(guard: PinGuard, who: str, pin: str) -> bool:
    try:
        guard.check_refused(who, literal(pin))
    except PinRefused:
        return True
    return False
