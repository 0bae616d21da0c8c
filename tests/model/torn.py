"""Data in parts, with faults between any two calls: the result, or none of it.

A stream that a fault hits may be interrupted, then or at its next piece. What comes
out of it until then is right, and so is the whole of one that comes to its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from model import steps
from model.bench import LOOP, SECRETS, WHO, judge
from model.faults import KINDS, Faults, fault_of
from model.misfortune import Misfortune

if TYPE_CHECKING:
    from model.steps import Step

Part = tuple[str, int, tuple[str, int, int, int]]
_PART = st.tuples(
    st.sampled_from(["feed", "feed", "feed", "break", "forget", "digest"]),
    WHO,
    fault_of(KINDS),
)


class Torn(Faults):
    """Makes streams."""

    @rule(
        who=LOOP,
        ref=SECRETS,
        begin=st.none() | fault_of(KINDS),
        parts=st.lists(_PART, min_size=1, max_size=4),
    )
    def torn(self, who: int, ref: str, begin: Any, parts: list[Part]) -> None:
        """Begin, feed, break off, until a fault hits it; then look what is left."""
        if not self._knows(who, ref) or not self._may_begin(ref):
            self.step(who, steps.Digest(self.model.life_of(who % 2), "pool"))
            return
        self._end_streams()
        life, name = self.model.refs[ref].life, self.new("stream")
        struck = self._made(who, steps.BeginStream(ref, name), begin)
        for word, other, fault in parts:
            if struck or name not in self.world.streams:
                break
            made: dict[str, Step] = {
                "feed": steps.FeedStream(name),
                "break": steps.EndStream(name, forget=False),
                "forget": steps.EndStream(name, forget=True),
                "digest": steps.Digest(life, "pool"),
            }
            struck = self._made(other, made[word], fault)
        self._drain(who, name, shaken=struck)

    def _may_begin(self, ref: str) -> bool:
        life = self.model.refs[ref].life
        left_behind = any(token.debris for token in self.model.tokens)
        well = self.model.lives[life].open and not left_behind
        return well and not self.model.held(life)

    def _end_streams(self) -> None:
        for stream in list(self.world.streams):
            self.step(0, steps.EndStream(stream, forget=False))

    def _made(self, who: int, step: Step, fault: Any) -> bool:
        if fault is None:
            self.step(who, step)
            return False
        return self.play(who, step, Misfortune(*fault))

    def _drain(self, who: int, name: str, *, shaken: bool) -> None:
        """Feed it to its end, which a fault before may bring sooner."""
        while name in self.world.streams and self.model.streams[name].cut != "over":
            step = steps.FeedStream(name)
            self._begin(f"{self._name(who)}: {step}, shaken: {shaken}")
            running = self.callers.run(who, lambda s=step: s.act(self.world))  # type: ignore[misc]
            self._note(running)
            if shaken and running.outcome == "StreamInterrupted":
                self.model.end_stream(name)
            elif problem := judge(step, running, self.model):
                self.fail(problem, running)
            self._finish()
