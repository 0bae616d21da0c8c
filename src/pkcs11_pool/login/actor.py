"""The login state of one token, owned by one thread.

Cryptoki keeps the login per application *and token*, not per session: one
``C_Login`` logs in every session that we have open there, one ``C_Logout`` ends
them all. So no session logs in for itself. This thread alone logs the user and
the SO in and out, and it holds the *anchor*: the session that keeps the
application from having none, because closing the last one logs out.

It takes one message after the other, and works when all workers hang.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import exceptions as p11

from pkcs11_pool import events
from pkcs11_pool.cryptoki import interface, recovery, rv
from pkcs11_pool.cryptoki.operations import raw_login, touch
from pkcs11_pool.errors import (
    LoginRequired,
    PinRefused,
    PoolClosed,
)
from pkcs11_pool.jobs import Job, Phase
from pkcs11_pool.login.attachment import came_to, who_is_in
from pkcs11_pool.login.opening import Tries, is_down, surely
from pkcs11_pool.login.pin_guard import SO, USER
from pkcs11_pool.login.question import Question
from pkcs11_pool.login.recovering import Recovering
from pkcs11_pool.pins import Source
from pkcs11_pool.state import Epoch, LoginEvent, LoginState

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.keys import HandleCache
    from pkcs11_pool.cryptoki.renewal import Renewal
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.pins import Pin

_LOOK: Final = 0.05
"""Seconds between two looks at a request that waits for quiet, during a login."""
_OFTEN: Final = 3
"""How often an idle session is used before the token would drop it."""
_SOON: Final = 1.0
"""Seconds that a recovery waits for a plain PIN source."""
_IN: Final = frozenset({0, rv.CODES["CKR_USER_ALREADY_LOGGED_IN"]})


class LoginActor(Recovering):
    """Logs in and out on one token, and holds the anchor."""

    def __init__(
        self, options: PoolOptions, gate: Gate, cache: HandleCache, name: str | None
    ) -> None:
        super().__init__(options, gate, cache, name)
        self._pin = options.pin
        # Whether the PIN was being changed, and nobody knows if it was: neither the
        # old nor the new one is sent then. Set by the worker that changes it.
        self._in_doubt = False
        self._mail: queue.SimpleQueue[partial[None]] = queue.SimpleQueue()
        # Held while something is posted: nothing is left in the box at the end.
        self._mailbox = threading.Lock()
        self._ended = False
        self._stopping = threading.Event()
        # Requests that wait for the login under way, or for its PIN.
        self._logins: list[Job] = []
        self._wanted_by_operations = False
        # Whether a caller was sent for the PIN and is not back.
        self._asking = False
        # Whether the last PIN was sent. With its answer lost it is not sent again.
        self._sent = False
        # A plain PIN source that was asked and has not answered.
        self._question: Question | None = None
        # Whether one of the requests said force=True.
        self._insisted = False
        self._so: Session | None = None
        # When the sessions that stay open are used next.
        self._alive_until = 0.0
        # What came during a SO period or a recovery and can only be done after it.
        self._postponed: list[partial[None]] = []

    def start(self) -> None:
        """Start the thread."""
        # Made here: one that was made before a fork cannot be started after it.
        name = "pkcs11-pool login actor"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    # -- Messages: called by any thread, never block ------------------------------

    def open(self, job: Job) -> None:
        """Find the token, open the anchor, log in."""
        self._post(job, self._open)

    def log_in(self, job: Job, pin: Pin | None, *, force: bool) -> None:
        """Log the user in."""
        self._post(job, self._log_in, pin, force)

    def log_out(self, job: Job) -> None:
        """Log out, and stay out."""
        self._post(job, self._log_out)

    def so_begin(self, job: Job, so_pin: Pin) -> None:
        """Begin a period of the security officer; gives the R/W session."""
        self._post(job, self._so_begin, so_pin)

    def so_end(self, job: Job) -> None:
        """End it, and log in again whoever was logged in before."""
        self._post(job, self._so_end)

    def close(self, job: Job, deadline: float) -> None:
        """Let running calls finish until ``deadline``, log out, close all, end."""
        self._stopping.set()
        self._post(job, self._close, deadline)

    def need_login(self, epoch: Epoch) -> None:
        """An operation of this epoch found the token logged out."""
        self._mail.put(partial(self._need_login, epoch))

    def suspect(self, error: BaseException) -> None:
        """An operation got an error that tells of a lost token, or session."""
        self._mail.put(partial(self._suspect, error))

    def stand_back(self, renewal: Renewal) -> None:
        """Another pool has the module initialised anew: keep out meanwhile."""
        with self._mailbox:
            if not self._ended:
                self._mail.put(partial(self._stand_back, renewal))
                return
        renewal.answer(ready=True)

    def pin_came(self, pin: Pin | None, error: BaseException | None) -> None:
        """The caller who was sent for the PIN has it, or not."""
        self._mail.put(partial(self._pin_came, pin, error))

    def pin_in_doubt(self) -> None:
        """The PIN is being changed: until the token answers, none is known."""
        self._in_doubt = True

    @property
    def is_pin_in_doubt(self) -> bool:
        """Whether the PIN may have been changed, and nobody knows."""
        return self._in_doubt

    def pin_kept(self) -> None:
        """The token refused to change it."""
        self._in_doubt = False

    def pin_changed(self, pin: Pin) -> None:
        """The user's PIN on the token is another now."""
        self._in_doubt = False
        if self.session_pin is not None:
            self.session_pin = pin
        self._mail.put(partial(self._pin_changed, pin))

    def later(self, call: partial[Any]) -> None:
        """Make a call on this thread. Takes no lock, and holds up nobody."""
        # put() of this queue, and of no other, may be called by the collector.
        self._mail.put(call)

    def _post(self, job: Job, handle: Callable[..., None], *arguments: Any) -> None:
        with self._mailbox:
            if not self._ended:
                self._mail.put(partial(self._handle, job, handle, *arguments))
                return
        self._gate.settle(job, None, PoolClosed("the pool is closed"))

    # -- The thread ---------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended:
            try:
                message = self._mail.get(timeout=self._wakes_in())
            except queue.Empty:
                if self._rests() == 0.0:
                    self._next_round()
                self._keep_alive()
                continue
            message()
            self._keep_alive()
            # A request and its error live in the frame of the handler, not here.
            del message
        # Nothing is posted any more: see _post().
        while not self._mail.empty():
            self._mail.get()()

    def _wakes_in(self) -> float | None:
        """Seconds until there is something to do without a message; None: nothing."""
        rests, idle = self._rests(), self._options.session_max_idle
        if idle is None or self._anchor is None:
            return rests
        left = max(0.0, self._alive_until - time.monotonic())
        return left if rests is None else min(left, rests)

    def _keep_alive(self) -> None:
        """Use the sessions that stay open, where the token drops those that idle."""
        idle, now = self._options.session_max_idle, time.monotonic()
        if idle is None or now < self._alive_until or self._anchor is None:
            return
        self._alive_until = now + idle / _OFTEN
        if not self.is_well:
            return
        try:
            # The officer's session is the workers', as are all that are lent.
            if self._so is None:
                with self._in_turn():
                    touch(self._anchor)
        except Exception as error:  # noqa: BLE001  # whatever it is, the next look tells
            if self._gone(error):
                self._suspect(error)
        else:
            self._gate.keep_alive(idle)

    def _handle(self, job: Job, handle: Callable[..., None], *arguments: Any) -> None:
        ends = handle in (self._so_end, self._close)
        if not ends and (self._so is not None or not self.is_well):
            self._postponed.append(partial(self._handle, job, handle, *arguments))
            return
        if not self._gate.begin(job):
            return
        try:
            handle(job, *arguments)
        except Exception as error:  # noqa: BLE001  # it is the caller's, raised there
            later = handle == self._log_in and not self._sent and is_down(error)
            lost = self._gone(error)
            later = later and lost and self._gate.put_off(job)
            if later:
                # Nobody knew that the token was away.
                self._postponed.append(partial(self._handle, job, handle, *arguments))
            if lost:
                # First of all: whoever hears of it must not meet what it left behind.
                self._suspect(error)
            if not later:
                self._gate.settle(job, None, error)

    def _quiet(self, job: Job, *, leases: bool) -> bool:
        """Pause the queue for a request; whether it succeeded.

        Logins go on meanwhile: those who are waited for may need one. Every other
        request is kept for later.
        """
        while (quiet := self._gate.pause(job, leases=leases)) is None:
            while self._gate.login_awaited() and job.phase is not Phase.SETTLED:
                with suppress(queue.Empty):
                    message = self._mail.get(timeout=_LOOK)
                    request = message.func == self._handle
                    if request and self._log_in not in message.args:
                        self._postponed.append(message)
                    else:
                        message()
        return quiet

    def _repost(self) -> None:
        """What came during a pause or a SO period can be done now."""
        postponed, self._postponed = self._postponed, []
        for message in postponed:
            self._mail.put(message)

    # -- Opening and closing ------------------------------------------------------

    def _open(self, job: Job) -> None:
        tries = Tries(self._options.module, job.deadline)
        while True:
            try:
                tries.begin()
                self._attach()
                break
            except Exception as error:
                self._detach()
                if self._stopping.wait(tries.rest(error, shared=self.is_shared)):
                    message = "the pool was closed while it opened"
                    raise PoolClosed(message) from error
        try:
            if self._pin is None and not self._options.login_ignored:
                self._gate.settle(job, None, None)
            else:
                self._log_in(job, None, force=False)
        except Exception:
            self._detach()
            raise

    def _close(self, job: Job, deadline: float) -> None:
        self._way = None
        self._fail_logins(PoolClosed("the pool is closing"))
        for message in self._postponed:
            if message.func == self._handle:
                self._gate.settle(
                    message.args[0], None, PoolClosed("the pool is closing")
                )
        try:
            if self._is_attached:
                self._gate.drain(deadline)
                self._detach()
                self._so = None
                self._change(LoginEvent.OUT)
            self._gate.end_threads()
        finally:
            with self._mailbox:
                self._ended = True
        self._gate.settle(job, None, None)

    # -- The user's login ---------------------------------------------------------

    def _log_in(self, job: Job, pin: Pin | None, force: bool) -> None:  # noqa: FBT001
        if self.login.state is LoginState.USER:
            self._gate.settle(job, None, None)
            return
        if self._options.login_ignored:
            self._user_in()
            self._gate.settle(job, None, None)
            return
        given = pin is not None
        source = self._own_pin if pin is None else pin
        if isinstance(source, Source):
            self._insisted |= force
            self._ask(source, job)
            return
        self._try_login(source, force=force)
        if given:
            self._pin, self._in_doubt = source, False
        self._gate.settle(job, None, None)
        self._settle_logins(None)

    def _need_login(self, epoch: Epoch) -> None:
        if self._so is not None:
            self._postponed.append(partial(self._need_login, epoch))
            return
        if not self.is_well:
            # It is restored with the rest: nobody waits for it alone.
            self._gate.login_settled(None)
            return
        if self.login.epoch == epoch and self.login.state is LoginState.USER:
            events.warning(events.LOGIN_LOST, token=self._label, epoch=epoch)
            self._change(LoginEvent.LOST)
        if self.login.state is LoginState.USER:
            self._gate.login_settled(None)
            return
        if self._restored_unasked():
            self._gate.login_settled(None)
            return
        if self.login.wanted is not LoginState.USER or self._pin is None:
            self._gate.login_settled(
                LoginRequired("nobody is logged in: await pool.login(pin)")
            )
            return
        self._wanted_by_operations = True
        try:
            source = self._own_pin
            if isinstance(source, Source):
                self._ask(source, None)
                return
            self._try_login(source, force=False)
        except Exception as error:  # noqa: BLE001  # raised at those who wait for it
            self._login_failed(error)
        else:
            self._gate.counted(recoveries_total=1)
            self._settle_logins(None)

    def _login_failed(self, error: BaseException) -> None:
        """What is lost with its token is restored with it; else all who wait fail."""
        lost = self._gone(error)
        waiting, self._logins = self._logins, []
        for job in waiting:
            # What was asked for by name waits for the token, too, then asks anew.
            later = lost and not self._sent and is_down(error)
            if later and self._gate.put_off(job):
                again = partial(self._handle, job, self._log_in, None, self._insisted)
                self._postponed.append(again)
            else:
                self._gate.settle(job, None, error)
        back = lost and recovery.classify(error).is_outage
        self._settle_logins(None if back else error)
        if lost:
            self._suspect(error)

    def _ask(self, source: Source, job: Job | None) -> None:
        """Get a PIN from a callable: here, or by a caller if it must be awaited."""
        self._logins = [waiting for waiting in self._logins if not waiting.dropped]
        if job is not None:
            self._logins.append(job)
        if self._asking:
            # Whoever was sent may have gone since, when nobody else was there.
            self._gate.send_another()
            return
        self._asking = True
        if source.is_async:
            self._gate.send_for_pin(source)
        elif self._question is None:
            # One that hangs is asked no second time: whoever comes later joins in.
            self._question = Question(source, self._mail.put, self._answered)

    def _answered(self, question: Question) -> None:
        """A plain PIN source has come back. Nobody may want its answer any more."""
        self._question = None
        if self._asking:
            # Else it is not wanted: somebody logged in by another PIN, or out.
            self._pin_came(question.pin, question.error)

    def _pin_came(self, pin: Pin | None, error: BaseException | None) -> None:
        if not self.is_well:
            self._postponed.append(partial(self._pin_came, pin, error))
            return
        if self.login.state is not LoginState.USER and pin is not None:
            try:
                self._try_login(pin, force=self._insisted)
            except Exception as failure:  # noqa: BLE001  # raised at the waiting
                self._login_failed(failure)
                return
            else:
                if self._wanted_by_operations:
                    self._gate.counted(recoveries_total=1)
        self._settle_logins(error)

    def _settle_logins(self, error: BaseException | None) -> None:
        self._fail_logins(error)
        self._wanted_by_operations = self._insisted = self._asking = False
        self._gate.login_settled(error)

    def _fail_logins(self, error: BaseException | None) -> None:
        waiting, self._logins = self._logins, []
        for job in waiting:
            self._gate.settle(job, None, error)

    def _log_in_again(self) -> None:
        if self.login.wanted is not LoginState.USER or self._restored_unasked():
            return
        with self.attached.turn:
            outlived = who_is_in(self._open_anchor) is LoginState.USER
        if outlived:
            # A call that was inside kept its session, and with it the login.
            self._change(LoginEvent.USER_IN)
            return
        try:
            source = self._own_pin
            if isinstance(source, Source):
                if source.is_async:
                    return  # the first operation that needs it is sent for it
                self._ask(source, None)
                # Used now, so that who goes on finds the login. _answered() follows.
                question = self._question
                pin = None if question is None else question.wait(_SOON)
                if pin is None:
                    return  # it hangs, and must not keep the token from coming back
                source = pin
            self._try_login(source, force=False)
        except PinRefused as error:
            events.warning(events.LOGIN_FAILED, token=self._label, error=str(error))
        except LoginRequired:
            pass  # no PIN is known: whoever needs the login is told so

    def _try_login(self, pin: Pin, *, force: bool) -> None:
        with self.attached.turn:
            self._send_pin(self._open_anchor, interface.CKU_USER, pin, force=force)
        if self._options.login_per_session:
            # Before the epoch: whoever sees that the user is in finds the PIN.
            self.session_pin = pin
        self._user_in()

    def _user_in(self) -> None:
        self._change(LoginEvent.USER_IN)
        events.info(
            events.LOGIN_COMPLETED, token=self._label, epoch=int(self.login.epoch)
        )

    def _restored_unasked(self) -> bool:
        """Whether the user is in again because the token asks for no login."""
        unasked = self._options.login_ignored and self.login.wanted is LoginState.USER
        if unasked and self.login.state is not LoginState.USER:
            self._user_in()
        return unasked

    def _send_pin(self, session: Session, user: int, pin: Pin, *, force: bool) -> None:
        """``C_GetTokenInfo`` and ``C_Login``, if this PIN may be tried."""
        who = SO if user == interface.CKU_SO else USER
        self._sent = False
        self.info = fresh = surely(self.same_token)
        self.guard.check(who, pin, fresh, force=force)
        events.info(events.LOGIN_STARTED, token=self._label, user=who)
        self._sent = True
        code = raw_login(session.functions, session.handle, user, pin)
        wanted = LoginState.SO if who is SO else LoginState.USER
        if code in _IN or came_to(session, wanted, code):
            self.guard.accepted(who)
            self._gate.counted(logins_total=1)
            return
        self._gate.counted(logins_failed_total=1)
        events.warning(
            events.LOGIN_FAILED, token=self._label, user=who, rv=rv.name_of(code)
        )
        self.guard.answered(who, pin, code, "C_Login", self.same_token)

    def _pin_changed(self, pin: Pin) -> None:
        self._pin = pin
        self.guard.accepted(USER)

    # -- Logout -------------------------------------------------------------------

    def _log_out(self, job: Job) -> None:
        if not self._quiet(job, leases=False):
            self._repost()
            return
        refused: p11.PKCS11Error | None = None
        try:
            try:
                self._user_out()
            except p11.PKCS11Error as error:
                refused = error
            # A chain of calls may be alive in the module after a logout.
            self._gate.interrupt(
                LoginRequired(
                    "logged out in the middle of the data: await pool.login(pin), then "
                    "begin again"
                )
            )
            self._change(LoginEvent.OUT)
            if refused is not None:
                # The user's word stands: closing the last session logs out, too.
                self._start_over(refused)
        finally:
            self._gate.resume()
            self._repost()
        # A login that was under way is against the user's word now.
        self._settle_logins(LoginRequired("logged out meanwhile: pool.login(pin)"))
        events.info(events.LOGOUT_COMPLETED, token=self._label)
        self._gate.settle(job, None, None)

    # -- The security officer -----------------------------------------------------

    def _so_begin(self, job: Job, so_pin: Pin) -> None:
        if not self._quiet(job, leases=True):
            self._repost()
            return
        try:
            if self.attached.leftovers:
                # One of them may be R/O, and then no SO can log in.
                self._close_anchor()
            self._swap_anchor(rw=True)
            session = self._so_login(so_pin)
        except Exception as error:
            events.warning(events.SO_FAILED, token=self._label, error=str(error))
            self._so_undo(error)
            raise
        self._so = session
        if self._gate.settle(job, session, None):
            events.info(events.SO_STARTED, token=self._label)
        else:
            # Its deadline passed inside C_Login: nobody is there to have the period.
            self._so_undo(None)

    def _so_undo(self, error: BaseException | None) -> None:
        """The period did not begin: back to what was before."""
        try:
            if error is not None and recovery.classify(error).tells_of_outage:
                self._start_over(error)
                return
            self._so_out()
            self._so_restore(None)
        except Exception as failure:  # noqa: BLE001  # the first is the one to raise
            events.warning(events.SO_FAILED, token=self._label, error=str(failure))
            if isinstance(failure, p11.PKCS11Error) or self._may_stay:
                self._start_over(failure)
        finally:
            self._gate.resume()
            self._repost()

    @property
    def _may_stay(self) -> bool:
        """Whether the SO is in, or the session that he was in is still the anchor."""
        anchor = self._anchor
        return self.login.state is LoginState.SO or (anchor is not None and anchor.rw)

    def _so_out(self) -> None:
        """Log the SO out, if in. The anchor is the period's R/W session."""
        self._so = None
        if self.login.state is LoginState.SO:
            self._raw_logout(self._open_anchor)
            self._change(LoginEvent.LOST)

    def _so_login(self, so_pin: Pin) -> Session:
        if self.login.state is LoginState.USER:
            self._user_out()
            self._change(LoginEvent.LOST)
        # Not the one from before: where each session has its own login, it is another.
        session = self._open_anchor
        with self.attached.turn:
            self._send_pin(session, interface.CKU_SO, so_pin, force=False)
        self._change(LoginEvent.SO_IN)
        return session

    def _period_lost(self) -> None:
        self._so = None

    def _so_end(self, job: Job) -> None:
        if not self.is_well:
            # It ended with the token, and the login is restored with the rest.
            self._gate.settle(job, None, None)
            return
        # Nothing of the period may be inside when the SO logs out.
        if not self._quiet(job, leases=False):
            return
        try:
            self._so_out()
            asked = self._so_restore(job)
        except Exception as error:
            if not (self._may_stay or recovery.classify(error).is_outage):
                raise
            # The login is restored with the rest.
            self._start_over(error)
            asked = False
        finally:
            self._gate.resume()
            self._repost()
        events.info(events.SO_COMPLETED, token=self._label)
        if not asked:
            self._gate.settle(job, None, None)

    def _so_restore(self, job: Job | None) -> bool:
        """A R/O anchor, and the login that was there before the period.

        True: a caller was asked for the PIN, and ``job`` is settled when it comes.
        """
        if self._anchor is not None and self._anchor.rw:
            self._swap_anchor(rw=False)
        if self._restored_unasked():
            return False
        wanted = self.login.wanted is LoginState.USER
        if not wanted or self.login.state is LoginState.USER or self._pin is None:
            return False
        source = self._own_pin
        if isinstance(source, Source):
            if job is not None:
                # The period is over; what is left is a login, and may be left alone.
                job.stays = False
            self._ask(source, job)
            return True
        self._try_login(source, force=False)
        return False

    @property
    def _own_pin(self) -> Pin | Source:
        """The pool's PIN or its source.

        Raises:
            LoginRequired: It has none; or a change of the PIN was lost, and either
                may be the wrong one.
        """
        if self._pin is None:
            message = "no PIN to log in with: await pool.login(pin)"
            raise LoginRequired(message)
        if self._in_doubt:
            message = (
                "a change of the PIN was lost, so the pool sends neither the old nor "
                "the new one: await pool.login(pin)"
            )
            raise LoginRequired(message)
        return self._pin
