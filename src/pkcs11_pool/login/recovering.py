"""Brings a lost token back: sessions, login, module, whatever slot it is in.

A thin loop over :mod:`pkcs11_pool.login.steps`, on the login actor's thread. It
takes one round of steps at a time and rests in between, so that the actor goes on
taking messages. Callers wait in the engine meanwhile, and not for ever.

Source: PKCS#11 v3.1, "C_Finalize", "C_GetSlotList", "Session handles".
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from pkcs11 import exceptions as p11

from pkcs11_pool import events
from pkcs11_pool.cryptoki import module as modules
from pkcs11_pool.cryptoki import recovery, renewal, rv
from pkcs11_pool.errors import TokenUnavailable
from pkcs11_pool.login import steps
from pkcs11_pool.login.attachment import who_is_in
from pkcs11_pool.login.steps import Backoff, Step
from pkcs11_pool.state import LoginEvent, LoginState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pkcs11

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.keys import HandleCache
    from pkcs11_pool.cryptoki.module import Module
    from pkcs11_pool.cryptoki.renewal import Renewal
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.login.attachment import Attachment
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.login.mailbox import Mailbox
    from pkcs11_pool.state import Generation, TokenInfo

_PATIENCE: Final = 1.0
"""Seconds that a round waits for calls inside the module, or for its turn."""


class _Blocked(TokenUnavailable):
    """The module takes one call at a time, and that one does not come back."""


class _Way:
    """One recovery, from the first doubt to the end.

    Attributes:
        step: What comes next.
        error: What went wrong last.
        since: When it began.
        round: How often it was tried.
        lost: Whether it is more than a doubt.
        sessions: Those that are lost and not closed.
        generation: Of the module, when the token was looked for last.
        until: When the next round begins.
    """

    def __init__(self, error: BaseException, generation: Generation) -> None:
        self.step = Step.LOOK
        self.error = error
        self.since = time.monotonic()
        self.round = 1
        self.lost = False
        self.sessions: list[Session] = []
        self.generation = generation
        self.until = 0.0
        self.backoff = Backoff()


def blocked(module: Module) -> str:
    """What to say of a module that takes one call at a time, and has one inside."""
    return (
        f"a call hangs in {module.path}, which takes one at a time: if it does not "
        "come back, only a new process can help"
    )


@contextmanager
def in_turn(module: Module) -> Iterator[Module]:
    """The module, where it takes one call at a time; but not behind a hung one."""
    if not module.wait_turn(_PATIENCE):
        raise _Blocked(blocked(module))
    try:
        yield module
    finally:
        module.turn.__exit__()


class Recovery:
    """Whether the token may be lost, and how it comes back.

    Args:
        attachment: What is lost, and comes back.
        options: The pool's.
        gate: Where callers wait.
        cache: What is found anew afterwards.
        mail: What came meanwhile is done afterwards.
        period_lost: A period of the security officer ends with the token.
        log_in_again: Log the user in, if he should be; a PIN that is refused is no
            failure.
    """

    def __init__(
        self,
        attachment: Attachment,
        options: PoolOptions,
        gate: Gate,
        cache: HandleCache,
        mail: Mailbox,
        *,
        period_lost: Callable[[], None],
        log_in_again: Callable[[], None],
    ) -> None:
        self._attachment = attachment
        self._standing = attachment.standing
        self._options = options
        self._gate = gate
        self._cache = cache
        self._mail = mail
        self._period_lost = period_lost
        self._log_in_again = log_in_again
        self._way: _Way | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is being recovered."""
        return self._way is None

    def give_up(self) -> None:
        """The pool closes: nothing is looked for any more."""
        self._way = None

    # -- How it begins ------------------------------------------------------------

    def suspect(self, error: BaseException) -> None:
        """The token may be lost: the engine lets nothing start, until this says."""
        if self._way is None:
            self._way = _Way(error, self._standing.attached.generation)
            self._go_on()

    def gone(self, error: BaseException) -> bool:
        """Whether an error that the actor got tells of a lost token, known or not.

        Nothing starts then, until whoever asked calls :meth:`suspect`.
        """
        return recovery.classify(error).tells_of_outage and (
            self._gate.hold_off(error) or self._gate.is_held_off()
        )

    def start_over(self, error: BaseException) -> None:
        """Nobody knows who is logged in: close all, which logs out, and begin anew."""
        self._gate.hold_off(error)
        self._way = way = _Way(error, self._standing.attached.generation)
        self._lose(way)
        way.step = Step.FIND
        self._go_on()

    def stand_back(self, asked: Renewal) -> None:
        """Another pool wants to initialise the module: keep out, then look."""
        if self._standing.login.state is LoginState.SO:
            asked.answer(ready=False)  # no officer is thrown out for another's sake
            return
        error = TokenUnavailable("another pool had to initialise the module anew")
        self._gate.hold_off(error)
        ready = self._gate.wait_quiet(asked.deadline)
        asked.answer(ready=ready)
        if ready:
            asked.done.wait()
        if self._way is None:
            self.suspect(error)
        elif self._way.step is Step.REST:
            self.next_round()

    # -- The loop -----------------------------------------------------------------

    def rests(self) -> float | None:
        """Seconds until the next round; None when nothing is to be recovered."""
        if self._way is None:
            return None
        return max(0.0, self._way.until - time.monotonic())

    def next_round(self) -> None:
        """The rest is over."""
        way = self._way
        if way is not None:
            way.round += 1
            way.step = steps.first(lost=way.lost)
            self._go_on()

    def _go_on(self) -> None:
        """Take steps until all is done, or there is nothing to do at present."""
        way = self._way
        assert way is not None  # noqa: S101  # whoever calls has looked
        initialized = False
        while way.step not in steps.ENDS:
            step, well = way.step, self._take(way)
            if isinstance(way.error, _Blocked) and not well:
                # Nobody can say what is lost, before the call inside is back.
                way.step = Step.REST
                break
            if step is Step.LOOK and not well:
                self._lose(way)
            initialize = not initialized and self._may_initialize(way)
            way.step = steps.after(step, well=well, initialize=initialize)
            initialized |= way.step is Step.INITIALIZE
        if way.step is Step.REST:
            self._rest(way)
        else:
            self._end(way)

    def _take(self, way: _Way) -> bool:
        if way.lost:
            events.info(
                events.RECOVERY_STEP, token=self._standing.label, step=way.step.value
            )
        try:
            match way.step:
                case Step.LOOK:
                    self._look()
                case Step.FIND:
                    self._find_again(way)
                case Step.INITIALIZE:
                    self._initialize_again(way)
                case Step.LOG_IN:
                    self._log_in_again()
        except Exception as error:  # noqa: BLE001  # told to those who wait too long
            way.error = error
            self._gate.still_down(error)
            return False
        return True

    def _may_initialize(self, way: _Way) -> bool:
        if recovery.classify(way.error) is recovery.Fault.MODULE:
            return True
        others = any(other.is_well for other in self._attachment.others)
        return steps.may_initialize(way.round, others=others)

    def _rest(self, way: _Way) -> None:
        rest = way.backoff.rest()
        way.until = time.monotonic() + rest
        events.warning(
            events.RECOVERY_FAILED,
            token=self._standing.label,
            round=way.round,
            error=rv.text_of(way.error),
            retry_in=round(rest, 3),
        )

    def _end(self, way: _Way) -> None:
        self._way = None
        if way.lost:
            self._gate.counted(recoveries_total=1)
            events.info(
                events.RECOVERY_COMPLETED,
                token=self._standing.label,
                slot=self._standing.known.slot_id,
                rounds=way.round,
                seconds=round(time.monotonic() - way.since, 3),
            )
        self._gate.token_back(lost=way.lost)
        self._mail.repost()

    # -- The steps ----------------------------------------------------------------

    def _look(self) -> None:
        """Raise what is wrong with the anchor or the token, if anything is."""
        standing = self._standing
        with in_turn(standing.attached) as module:
            anchor = self._attachment.anchor
            if anchor is None or anchor.generation != module.generation:
                message = f"{module.path} was initialised anew"
                raise TokenUnavailable(message)
            who, known = who_is_in(anchor), standing.login.state
            if self._options.login_ignored and known is not LoginState.SO:
                who = known  # what sessions tell means nothing there
            if who is LoginState.PUBLIC and known is not who:
                raise p11.UserNotLoggedIn("the anchor is logged out")
            if who is not known:
                # The answer to a login or a logout was lost, or is somebody else's.
                message = f"the token has {who.value} logged in, the pool {known.value}"
                raise TokenUnavailable(message)
            standing.same_token()

    def _lose(self, way: _Way) -> None:
        """It is more than a doubt: what was open is no more."""
        way.lost = True
        events.warning(
            events.RECOVERY_STARTED,
            token=self._standing.label,
            error=rv.text_of(way.error),
        )
        way.sessions = self._gate.token_lost(way.error)
        if self._attachment.anchor is not None:
            # The last: closing the last one logs out, where there is still a login.
            way.sessions.append(self._attachment.anchor)
        self._attachment.anchor = None
        self._period_lost()
        self._cache.clear()
        self._attachment.change(LoginEvent.LOST)

    def _find_again(self, way: _Way) -> None:
        """Close what is lost, find the token, open the anchor."""
        attachment, standing = self._attachment, self._standing
        with in_turn(standing.attached) as module:
            way.generation = module.generation
            # Before anything is opened: their numbers may be handed out again.
            while way.sessions:
                way.sessions.pop(0).close()
            if attachment.anchor is not None:
                attachment.anchor.close()
                attachment.anchor = None
        if standing.known.slot_id in module.leftovers:
            # They are closed with all others, and those in workers' hands are at work.
            self._gate.wait_quiet(time.monotonic() + _PATIENCE)
        with in_turn(module):
            module.close_leftovers(standing.known.slot_id)
            standing.token, standing.info = _whereabouts(module, standing.known)
            attachment.anchor = attachment.new_session(rw=False)

    def _initialize_again(self, way: _Way) -> None:
        """``C_Finalize``, ``C_Initialize``, while nobody is inside.

        Raises:
            TokenUnavailable: Somebody is.
        """
        module = self._standing.attached
        deadline = time.monotonic() + _PATIENCE
        others = self._attachment.others
        with renewal.renewing(module, others, deadline):
            if module.generation != way.generation:
                return  # another pool has done it
            if not self._gate.wait_quiet(deadline) and not module.lost_calls:
                message = f"a call is still inside {module.path}"
                raise TokenUnavailable(message)
            with in_turn(module):
                modules.renew(module)


def _whereabouts(module: Module, known: TokenInfo) -> tuple[pkcs11.Token, TokenInfo]:
    """The pool's token: in its slot, or in another one.

    Raises:
        TokenUnavailable: It is in none. The text says what is there.
    """
    there = []
    trouble: p11.PKCS11Error | None = None
    slots = module.library.get_slots()
    for slot in sorted(slots, key=lambda slot: slot.slot_id != known.slot_id):
        try:
            info = module.info(slot.slot_id)
            if info.identity == known.identity:
                return slot.get_token(), info
        except (p11.TokenNotPresent, p11.TokenNotRecognised):
            continue
        except p11.PKCS11Error as error:
            trouble = trouble or error
        else:
            there.append(str(info))
    listed = "; ".join(there) or ("no token at all" if slots else "no slots")
    message = f"token {known} is in no slot; {module.path} has {listed}"
    raise TokenUnavailable(message) from trouble
