"""The login state of one token, owned by one thread.

Cryptoki keeps the login per application *and token*, not per session: one
``C_Login`` logs in every session that we have open there, one ``C_Logout`` ends
them all. So no session logs in for itself. This thread alone logs the user and
the SO in and out, and it holds the *anchor*: the session that keeps the
application from having none, because closing the last one logs out.

It takes one message after the other, and works when all workers hang. What a
message asks for is done by its parts, each in a module of its own; here is which
message waits for what.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from pkcs11_pool.errors import PoolClosed
from pkcs11_pool.login.attachment import Attachment
from pkcs11_pool.login.keeping_alive import KeepAlive
from pkcs11_pool.login.mailbox import Mailbox, Request
from pkcs11_pool.login.officer import Officer
from pkcs11_pool.login.opening import Tries, is_down
from pkcs11_pool.login.own_pin import OwnPin
from pkcs11_pool.login.pin_guard import USER
from pkcs11_pool.login.recovering import Recovery
from pkcs11_pool.login.sending import PinSender
from pkcs11_pool.login.standing import Standing
from pkcs11_pool.login.user_login import UserLogin
from pkcs11_pool.state import LoginEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.keys import HandleCache
    from pkcs11_pool.cryptoki.renewal import Renewal
    from pkcs11_pool.jobs import Job
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.pins import Pin
    from pkcs11_pool.state import Epoch


class LoginActor(Standing):
    """Logs in and out on one token, and holds the anchor.

    It is what others may know of the token, and takes their messages. It does not hold
    a standing but is one, because every operation looks there: one step less for each.
    """

    def __init__(
        self, options: PoolOptions, gate: Gate, cache: HandleCache, name: str | None
    ) -> None:
        super().__init__(options)
        self._options = options
        self._gate = gate
        self._mail = mail = Mailbox(self._take)
        self._own_pin = OwnPin(options.pin)
        self._attachment = attachment = Attachment(
            self, options, gate, cache, name=name, member=self
        )
        # Who meets a lost token tells the recovery, which brings back what he had.
        self._recovery = recovery = Recovery(
            attachment,
            options,
            gate,
            cache,
            mail,
            period_lost=self._period_lost,
            log_in_again=self._log_in_again,
        )
        self._sender = sender = PinSender(self, gate)
        self._user = user = UserLogin(
            attachment,
            options,
            gate,
            mail,
            own_pin=self._own_pin,
            sender=sender,
            recovery=recovery,
        )
        self._officer = Officer(
            attachment, gate, mail, sender=sender, user=user, recovery=recovery
        )
        self._kept_alive = KeepAlive(
            options.session_max_idle, attachment, gate, self._officer, recovery
        )
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        # Made here: one that was made before a fork cannot be started after it.
        name = "pkcs11-pool login actor"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    # -- Requests: made by any thread, never block --------------------------------

    def open(self, job: Job) -> None:
        """Find the token, open the anchor, log in."""
        self._post(job, partial(self._open, job))

    def log_in(self, job: Job, pin: Pin | None, *, force: bool) -> None:
        """Log the user in."""
        do = partial(self._user.log_in, job, pin, force=force)
        self._post(job, do, is_login=True, sends_pin=True)

    def log_out(self, job: Job) -> None:
        """Log out, and stay out."""
        self._post(job, partial(self._user.log_out, job), pauses=True)

    def so_begin(self, job: Job, so_pin: Pin) -> None:
        """Begin a period of the security officer; gives the R/W session."""
        do = partial(self._officer.begin, job, so_pin)
        self._post(job, do, pauses=True, sends_pin=True)

    def so_end(self, job: Job) -> None:
        """End it, and log in again whoever was logged in before."""
        self._post(job, partial(self._officer.end, job), ends=True)

    def close(self, job: Job, deadline: float) -> None:
        """Let running calls finish until ``deadline``, log out, close all, end."""
        self._stopping.set()
        self._post(job, partial(self._close, job, deadline), ends=True)

    def _post(self, job: Job, do: Callable[[], None], **kind: bool) -> None:
        if not self._mail.post(Request(job=job, do=do, **kind)):
            self._gate.settle(job, None, PoolClosed("the pool is closed"))

    # -- News: told by any thread, without waiting for an answer ------------------

    def need_login(self, epoch: Epoch) -> None:
        """An operation of this epoch found the token logged out."""
        self._mail.put(partial(self._need_login, epoch))

    def suspect(self, error: BaseException) -> None:
        """An operation got an error that tells of a lost token, or session."""
        self._mail.put(partial(self._recovery.suspect, error))

    def stand_back(self, renewal: Renewal) -> None:
        """Another pool has the module initialised anew: keep out meanwhile."""
        if not self._mail.post(partial(self._recovery.stand_back, renewal)):
            renewal.answer(ready=True)

    def pin_came(self, pin: Pin | None, error: BaseException | None) -> None:
        """The caller who was sent for the PIN has it, or not."""
        self._mail.put(partial(self._user.pin_came, pin, error))

    def pin_in_doubt(self) -> None:
        """The PIN is being changed: until the token answers, none is known."""
        self._own_pin.in_doubt = True

    def pin_kept(self) -> None:
        """The token refused to change it."""
        self._own_pin.in_doubt = False

    def pin_changed(self, pin: Pin) -> None:
        """The user's PIN on the token is another now."""
        self._own_pin.in_doubt = False
        if self.session_pin is not None:
            self.session_pin = pin
        self._mail.put(partial(self._pin_changed, pin))

    def later(self, call: partial[Any]) -> None:
        """Make a call on this thread. Takes no lock, and holds up nobody."""
        self._mail.put(call)

    # -- What everybody may ask ---------------------------------------------------

    @property
    def is_pin_in_doubt(self) -> bool:
        """Whether the PIN may have been changed, and nobody knows."""
        return self._own_pin.in_doubt

    @property
    def has_ended(self) -> bool:
        """Whether nobody takes requests any more."""
        return self._mail.ended

    @property
    def is_well(self) -> bool:
        """Whether nothing is being recovered."""
        return self._recovery.is_over

    # -- What the recovery brings back --------------------------------------------

    def _period_lost(self) -> None:
        self._officer.lost()

    def _log_in_again(self) -> None:
        self._user.restore_with_token()

    # -- The thread ---------------------------------------------------------------

    def _run(self) -> None:
        mail = self._mail
        while not mail.ended:
            message = mail.get(self._rests())
            if message is not None:
                mail.handle(message)
            elif self._recovery.rests() == 0.0:
                self._recovery.next_round()
            self._kept_alive.look()
            # A request and its error live in the frame of the handler, not here.
            del message
        # Nothing is posted any more.
        while (message := mail.get(0.0)) is not None:
            mail.handle(message)

    def _rests(self) -> float | None:
        """Seconds until there is something to do without a message; None: nothing."""
        rests = (self._recovery.rests(), self._kept_alive.rests())
        return min((rest for rest in rests if rest is not None), default=None)

    def _take(self, request: Request) -> None:
        if not request.ends and (self._officer.is_in or not self.is_well):
            self._mail.postpone(request)
            return
        job = request.job
        if not self._gate.begin(job, pauses=request.pauses):
            return
        try:
            request.do()
        except Exception as error:  # noqa: BLE001  # it is the caller's, raised there
            later = request.sends_pin and not self._sender.sent and is_down(error)
            lost = self._recovery.gone(error)
            later = later and lost and self._gate.put_off(job)
            if later:
                # Nobody knew that the token was away.
                self._mail.postpone(request)
            if lost:
                # First of all: whoever hears of it must not meet what it left behind.
                self._recovery.suspect(error)
            if not later:
                self._gate.settle(job, None, error)

    def _need_login(self, epoch: Epoch) -> None:
        if self._officer.is_in:
            self._mail.postpone(partial(self._need_login, epoch))
        else:
            self._user.need(epoch)

    def _pin_changed(self, pin: Pin) -> None:
        self._own_pin.becomes(pin)
        self.guard.accepted(USER)

    # -- The beginning and the end ------------------------------------------------

    def _open(self, job: Job) -> None:
        options, attachment = self._options, self._attachment
        tries = Tries(options.module, job.deadline)
        while True:
            try:
                tries.begin()
                attachment.attach()
                break
            except Exception as error:
                attachment.detach()
                rest = tries.rest(error, shared=attachment.is_shared)
                if self._stopping.wait(rest):
                    message = "the pool was closed while it opened"
                    raise PoolClosed(message) from error
        try:
            if not self._own_pin.is_given and not options.login_ignored:
                self._gate.settle(job, None, None)
            else:
                self._user.log_in(job, None, force=False, fresh=True)
        except Exception:
            attachment.detach()
            raise

    def _close(self, job: Job, deadline: float) -> None:
        gate = self._gate
        self._recovery.give_up()
        self._user.refuse_waiting(PoolClosed("the pool is closing"))
        for request in self._mail.postponed_requests():
            gate.settle(request.job, None, PoolClosed("the pool is closing"))
        try:
            if self._attachment.is_attached:
                gate.drain(deadline)
                self._attachment.detach()
                self._officer.lost()
                self._attachment.change(LoginEvent.OUT)
        finally:
            self._mail.end()
        # The last: nobody asks for a deadline after it, see `has_ended`.
        gate.end_threads()
        gate.settle(job, None, None)
