"""Several steps at once: their results must be those of some order."""

from __future__ import annotations

import copy
import itertools
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from model import steps
from model.bench import LIVES, STATES, WHO, WRONG, WRONG_SO, Bench, judge
from model.spec import Kind, Model, Refused, User
from pkcs11_pool import PoolState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.callers import Callers, Running
    from model.steps import Step
    from model.world import World


Pick = tuple[str, int, int, bool, bool, int]
Seen = tuple[User | None, int, int, tuple[str, ...], int]
KINDS = (
    *("use", "use", "use", "label", "digest", "create", "copy", "unwrap", "make"),
    *("destroy", "destroy", "relabel", "login", "logout", "officer", "close", "visit"),
)


_RELOGIN = (steps.Login, steps.Logout, steps.Officer)
_VAGUE = frozenset({"GeneralError", "TemplateInconsistent"})


class LeftBehind:
    """SoftHSM2 2.6.1 failed to make an object, and left a file that nobody sees."""

    def __init__(self, step: Step) -> None:
        self.step: Any = step

    def expect(self, model: Model) -> None:
        """One file more."""
        life = getattr(self.step, "life", None) or model.refs[self.step.ref].life
        model.token_of(life).debris += 1


class Part:
    """One of several steps that are made at once."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.running: Running

    def start(self, callers: Callers, who: int, world: World) -> None:
        """Let somebody make it."""
        self.running = callers.start(who, lambda: self.step.act(world))

    @property
    def has_failed_vaguely(self) -> bool:
        """Whether the token's answer to a change says nothing.

        SoftHSM2 2.6.1 sometimes says so of an object that it makes while another
        session searches; of a template that was good, too. With another login since
        then, the pool tells of it as of an outcome that is not known.
        """
        outcome, error = self.running.outcome, str(self.running.error)
        unknown = outcome == "OutcomeUnknown" and "CKR_GENERAL_ERROR" in error
        return self.step.changes and (outcome in _VAGUE or unknown)

    @property
    def is_in_doubt(self) -> bool:
        """Whether nobody knows if it happened."""
        return self.running.cancelled or self.has_failed_vaguely

    @property
    def choices(self) -> list[Step | LeftBehind | None]:
        """What may have happened."""
        if not self.is_in_doubt:
            return [self.step]
        if self.running.cancelled and isinstance(self.step, steps.Officer):
            # His period may have begun and ended, and he did nothing in it.
            return [None, self.step, replace(self.step, init_pin=None, new=None)]
        if self.running.cancelled and isinstance(self.step, steps.Relabel):
            return [None, replace(self.step, heard=False)]
        # Whoever is cancelled does not hear how it failed.
        failed = [LeftBehind(self.step)] if self.step.changes else []
        return [None, self.step, *failed]

    def explains(self, model: Model, chosen: Step | LeftBehind | None) -> bool:
        """Whether its result is right, if it is its turn now."""
        if not self.is_in_doubt:
            return judge(self.step, self.running, model) is None
        if chosen is not None:
            with suppress(Refused):
                chosen.expect(model)
        return True


Told = tuple[tuple[Part, "Step | LeftBehind | None"], ...]


def stories(parts: list[Part], failed: int) -> Iterator[Told]:
    """What may have happened, in every order.

    Args:
        parts: The steps that were made at once.
        failed: How many objects the module failed to make meanwhile, by its log: no
            more than so many were left behind.
    """
    for order in itertools.permutations(parts):
        for chosen in itertools.product(*(part.choices for part in order)):
            if sum(isinstance(one, LeftBehind) for one in chosen) <= failed:
                yield tuple(zip(order, chosen, strict=True))


def _unkept(step: Step) -> Step:
    """The same, without a reference to what it makes."""
    changed: Any = step
    return replace(changed, keep=False) if hasattr(step, "keep") else step


def peaceful(life: str, parts: list[Step]) -> list[Step]:
    """Without what may come to other errors at once than one after the other.

    A session that closes tells those in its line that it is closed, also where their
    object dies with it. A reference is not what it was while its object gets another
    label. The SO does not wait for sessions that are opened or closed meanwhile.
    SoftHSM2 shows a copy under the name of its original before it has its own, so
    there are two of that name for a moment.
    """
    refs = [getattr(part, "ref", None) for part in parts]
    closed = {part.where for part in parts if isinstance(part, steps.CloseSession)}
    copied = {part.ref for part in parts if isinstance(part, steps.Copy)}
    officer = any(isinstance(part, steps.Officer) for part in parts)
    kept: list[Step] = []
    relogin = any(isinstance(part, _RELOGIN) for part in parts)
    for place, (part, ref) in enumerate(zip(parts, refs, strict=True)):
        if isinstance(part, steps.Relabel) and refs.count(ref) > 1:
            kept.append(steps.Digest(life, "pool"))
        elif copied and isinstance(part, steps.EncryptBy):
            kept.append(steps.Digest(part.life, part.where))
        elif (
            ref in copied
            and refs.index(ref) != place
            and not (isinstance(part, steps.Destroy) and not relogin)
        ):
            kept.append(steps.Digest(life, "pool"))
        elif isinstance(part, steps.CloseSession) and officer:
            kept.append(steps.Info(part.where))
        elif ref is not None and getattr(part, "where", "") in closed:
            kept.append(replace(part, where="pool"))  # type: ignore[type-var]
        else:
            kept.append(part)
    return kept


class Together(Bench):
    """Makes steps at once."""

    # -- Several at once ----------------------------------------------------------

    @rule(
        life=LIVES,
        picks=st.lists(
            st.tuples(
                st.sampled_from(KINDS),
                WHO,
                st.integers(0, 5),
                st.booleans(),
                st.booleans(),
                st.integers(0, 3),
            ),
            min_size=2,
            max_size=4,
        ),
    )
    def batch(self, life: str, picks: list[Pick]) -> None:
        """Steps made at once come to what they come to in some order."""
        life = self.now(life)
        made = [self._part(life, pick) for pick in picks]
        for step in made:
            if isinstance(step, steps.Copy):
                # Known by its number, it is not searched for beside its copy.
                self.step(0, steps.Encrypt(step.ref, "pool"))
        # A session object whose maker was cancelled has no reference, and the pool
        # does not know whose it is: that is for tests of their own.
        cancel = [
            pick[5] == 0 and pick[1] < 2 and getattr(step, "token", True)
            for pick, step in zip(picks, made, strict=True)
        ]
        parts = [
            Part(_unkept(step) if gone else step)
            for step, gone in zip(peaceful(life, made), cancel, strict=False)
        ]
        self._begin("at once:")
        self.counts["calls"] += len(parts) - 1
        for part, pick in zip(parts, picks, strict=False):
            # A period is a block, and that is for tasks.
            officer = isinstance(part.step, steps.Officer)
            part.start(self.callers, pick[1] % (2 if officer else 4), self.world)
        for part, gone in zip(parts, cancel, strict=False):
            if gone and part.running.cancel is not None:
                part.running.cancel()
        for part, pick in zip(parts, picks, strict=False):
            part.running.wait()
            self.counts["general errors"] += part.has_failed_vaguely
            self.journal.append(f"    {self._name(pick[1])}: {part.step}")
            self._note(part.running)
        self._explain(parts)
        self._finish()

    def _part(self, life: str, pick: Pick) -> Step:
        """One of them, for what is there just now."""
        kind, _, number, one, other, _ = pick
        known = [name for name, ref in self.model.refs.items() if ref.life == life]
        where, new = self.place(life, number), self.new(kind[:1])
        token = self.model.token_of(life)
        waits = not self.model.held(life)
        so_pin = token.so_pin if number else WRONG_SO
        word = "b" if one else "a"
        made: dict[str, Step] = {
            "login": steps.Login(life, WRONG[0] if number == 0 else token.pin),
            "logout": steps.Logout(life),
            "officer": steps.Officer(life, so_pin, None, new if one else None, waits),
            "make": steps.Make(life, new, one, other),
            "label": steps.EncryptBy(life, where, word),
            "digest": steps.Digest(life, where),
        }
        if number < len(known):
            made |= self._with_ref(known[-1 - number], where, new, one=one, other=other)
        if where != "pool":
            made["close"] = steps.CloseSession(where)
        if self._has_room(life):
            made["visit"] = steps.Visit(life, new, one, private=False, timeout=10)
        return made.get(kind) or steps.Create(life, where, new, "a", one, other)

    def _with_ref(
        self, ref: str, where: str, new: str, *, one: bool, other: bool
    ) -> dict[str, Step]:
        """What can be done with one reference."""
        use: dict[Kind, Step] = {
            Kind.AES: steps.Encrypt(ref, where),
            Kind.PRIVATE: steps.Sign(ref, where),
            Kind.PUBLIC: steps.Verify(ref, where),
        }
        kind = self.model.refs[ref].kind
        made: dict[str, Step] = {
            "use": use[kind],
            "destroy": steps.Destroy(ref, where),
            "relabel": steps.Relabel(ref, where, self._word(ref, "b" if one else "a")),
        }
        if kind is Kind.AES:
            made["copy"] = steps.Copy(ref, where, new, one)
            made["unwrap"] = steps.Unwrap(ref, where, new, self._value(ref), one, other)
        return made

    def _explain(self, parts: list[Part]) -> None:
        """Find the order that explains the results, and what is there afterwards."""
        self._settle()
        seen = {name: self._observe(name) for name in self.model.lives}
        failed = self.world.ledger.failed_to_make
        for told in stories(parts, failed):
            model = copy.deepcopy(self.model)
            if not self._is_explained(model, told):
                continue
            if all(seen[name] == self._expected(model, name) for name in seen):
                self.model = model
                self._epochs.clear()
                return
        shown = [f"{name}: {what}" for name, what in seen.items()]
        shown += [f"Before, and {failed} objects that the module failed to make:"]
        shown += [f"{name}: {self._expected(self.model, name)}" for name in seen]
        self.fail("\n".join(["No order explains these results. There is now:", *shown]))

    def _is_explained(self, model: Model, told: Told) -> bool:
        """Whether each result is right, in this order."""
        destroyed = []
        for part, chosen in told:
            if not part.explains(model, chosen):
                return False
            if isinstance(chosen, steps.Destroy):
                ref, before = model.refs[chosen.ref], self.model.refs[chosen.ref]
                if ref.destroyed and not before.destroyed:
                    # The token has done it a moment before the reference knows of it:
                    # to others the object is only not to be seen meanwhile.
                    ref.destroyed = False
                    destroyed.append(ref)
        for ref in destroyed:
            ref.destroyed = True
        return True

    def _settle(self) -> None:
        try:
            self.world.quiet()
            self._read()
        except AssertionError as error:
            self._disagree(f"{type(error).__name__}: {error}", error)

    def _observe(self, life: str) -> Seen:
        """Who is logged in, after how many logins; what is there, and to be seen.

        With the labels, and how many sessions are lent: a cancelled step may have
        written the one, or closed the other.
        """
        pool = self.world.pools[life]
        token = self.model.lives[life].token
        sent = self.world.ledger.logins(self.world.slots[token])
        if pool.state is not PoolState.READY:
            return None, sent, self.world.tokens.objects(token), (), 0
        step = steps.Look(life, "pool", repeat=False, labels=True)
        running = self.callers.run(0, lambda: step.act(self.world))
        there = self.world.tokens.objects(token)
        lent = pool.stats().sessions_leased
        return STATES[pool.login_state], sent, there, running.value, lent

    def _expected(self, model: Model, life: str) -> Seen:
        token = model.token_of(life)
        if not model.lives[life].open:
            return None, token.logins, token.stored, (), 0
        there = tuple(model.visible(life, "pool", None, labels=True))
        lent = model.leased(life)
        return token.user, token.logins, token.stored, there, lent
