"""Steps made at once amid a fault: each as in some order, or as the fault excuses.

The fault comes at one moment of that order. What was acknowledged has happened; what
failed in a way that the fault excuses, happened where that error leaves it open.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from model import steps
from model.bench import LIVES, WHO, judge
from model.faults import KINDS, Faults, done_unheard, fault_of
from model.misfortune import Misfortune
from model.spec import Model, User
from model.together import KINDS as STEPS
from model.together import LeftBehind, Part, peaceful

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.ledger import Blow
    from model.steps import Step

_KINDS = tuple(k for k in STEPS if k not in {"login", "logout", "officer"})
"""What is done in sessions. That a login comes or goes is for steps of their own."""
Pick = tuple[str, int, int, bool, bool, int]


@dataclass
class _Struck:
    """What is known of the fault."""

    fault: Misfortune
    blow: Blow
    over: list[str]


class Amid(Faults):
    """Makes them."""

    @rule(
        life=LIVES,
        picks=st.lists(
            st.tuples(
                st.sampled_from(_KINDS),
                WHO,
                st.integers(0, 5),
                st.booleans(),
                st.booleans(),
                st.just(1),
            ),
            min_size=2,
            max_size=3,
        ),
        fault=fault_of(KINDS),
    )
    def amid(self, life: str, picks: list[Pick], fault: Any) -> None:
        """Several callers at once, and something happens between two calls."""
        life = self.now(life)
        left_behind = any(token.debris for token in self.model.tokens)
        if left_behind or not self.model.lives[life].open:
            self.step(picks[0][1], steps.Digest(life, "pool"))
            return
        for stream in list(self.world.streams):
            self.step(0, steps.EndStream(stream, forget=False))
        parts = [Part(step) for step in self._to_make(life, picks)]
        played = Misfortune(*fault)
        if not played.is_answer:
            played = replace(played, times=1)
        self._begin(f"at once with {played}:")
        self.counts["calls"] += len(parts) - 1
        recoveries = self._recoveries()
        self._were = {n: self.world.pools[n].login_epoch for n in self._open_lives()}
        module: Any = self.world.fault
        module.strike(played.kind, played.rv, after=played.after, times=played.times)
        for part, pick in zip(parts, picks, strict=True):
            part.start(self.callers, pick[1], self.world)
        for part, pick in zip(parts, picks, strict=True):
            part.running.wait()
            self.journal.append(f"    {self._name(pick[1])}: {part.step}")
            self._note(part.running)
        blow = self._blow(played)
        if not blow.struck:
            self._explain(parts)
        else:
            self._explain_struck(parts, _Struck(played, blow, self._over()), recoveries)
        self._finish()

    def _to_make(self, life: str, picks: list[Pick]) -> list[Step]:
        made = []
        for pick in picks:
            step = self._part(life, pick)
            if not getattr(step, "token", True):
                # Nobody would know whose session object it is.
                changed: Any = step
                step = replace(changed, token=True)
            if isinstance(step, steps.Copy):
                # Known by its number, it is not searched for beside its copy.
                self.step(0, steps.Encrypt(step.ref, "pool"))
            made.append(step)
        return peaceful(life, made)

    # -- What explains it -----------------------------------------------------------

    def _explain_struck(
        self, parts: list[Part], struck: _Struck, recoveries: dict[str, int]
    ) -> None:
        """Find the order, and the moment of the fault in it."""
        fault, blow = struck.fault, struck.blow
        made = [part.step for part in parts]
        self._check_loss(made, fault, blow, struck.over, recoveries)
        self._check_logins(made[0], blow)
        called = self.world.ledger.shown()
        accepted = self.world.ledger.accepted.copy()
        seen = {name: self._observe(name) for name in self.model.lives}
        told = []
        for model in self._stories(parts, struck):
            self._adopt_logins(model)
            expected = {name: self._expected(model, name) for name in seen}
            if expected == seen:
                self._adopt_books(model, made[0], accepted, called)
                self.model = model
                self._epochs.clear()
                return
            if expected not in told:
                told.append(expected)
        shown = [f"There is now: {seen}"]
        shown += [f"Or there would be: {one}" for one in told]
        shown += [f"Hit: {blow}", f"Over: {struck.over}", "Called:", *called]
        self.fail("\n".join(["No order and no moment explain this.", *shown]))

    def _stories(self, parts: list[Part], struck: _Struck) -> Iterator[Model]:
        """What there may be afterwards."""
        for order in itertools.permutations(parts):
            for moment in range(len(order) + 1):
                models = [copy.deepcopy(self.model)]
                for place, part in enumerate(order):
                    if place == moment:
                        models = [self._after(m, struck.over) for m in models]
                    models = [
                        found for m in models for found in self._one(m, part, struck)
                    ]
                for model in models:
                    if moment == len(order):
                        self._after(model, struck.over)
                    for part in parts:
                        if isinstance(part.step, steps.Destroy) and _went_well(part):
                            model.refs[part.step.ref].destroyed = True
                    yield model

    def _one(self, before: Model, part: Part, struck: _Struck) -> list[Model]:
        """What there may be after one of them, if its result is possible then."""
        fault, blow, step = struck.fault, struck.blow, part.step
        found = []
        for model in self._moments(before, fault):
            users = [token.user for token in before.tokens]
            if judge(step, part.running, model) is None:
                for token, user in zip(model.tokens, users, strict=True):
                    token.user = user
                if isinstance(step, steps.Destroy):
                    # The token has done it before the reference knows of it.
                    model.refs[step.ref].destroyed = False
                found.append(model)
        if _went_well(part):
            return found
        public = self._is_public(step)
        excused = fault.excuses(step, part.running.outcome, blow, is_public=public)
        if not excused and not part.has_failed_vaguely:
            return found
        found.append(copy.deepcopy(before))
        if step.changes and fault.may_have_happened(part.running.outcome, blow):
            found += [done_unheard(before, one) for one in self._done(step)]
        if part.has_failed_vaguely and self.world.ledger.failed_to_make:
            left = copy.deepcopy(before)
            LeftBehind(step).expect(left)
            found.append(left)
        return found

    def _moments(self, before: Model, fault: Misfortune) -> list[Model]:
        """With the login that there is, or in a moment without one."""
        models = [copy.deepcopy(before)]
        if fault.is_loss:
            out = copy.deepcopy(before)
            for token in out.tokens:
                token.user = User.NOBODY
            models.append(out)
        return models


def _went_well(part: Part) -> bool:
    return part.running.error is None
