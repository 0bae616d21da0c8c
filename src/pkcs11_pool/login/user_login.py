"""The user's login: asked for by name, wanted by operations, lost, or restored.

Callers that want it at the same time share it: the PIN reaches the token once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from pkcs11 import exceptions as p11

from pkcs11_pool import events
from pkcs11_pool.cryptoki import recovery
from pkcs11_pool.errors import LoginRequired, PinRefused
from pkcs11_pool.login.asking import Asking
from pkcs11_pool.login.attachment import who_is_in
from pkcs11_pool.login.mailbox import Request
from pkcs11_pool.login.opening import is_down
from pkcs11_pool.login.pausing import pause_for
from pkcs11_pool.login.pin_guard import USER
from pkcs11_pool.pins import Source
from pkcs11_pool.state import LoginEvent, LoginState

if TYPE_CHECKING:
    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.jobs import Job
    from pkcs11_pool.login.attachment import Attachment
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.login.mailbox import Mailbox
    from pkcs11_pool.login.own_pin import OwnPin
    from pkcs11_pool.login.recovering import Recovery
    from pkcs11_pool.login.sending import PinSender
    from pkcs11_pool.pins import Pin
    from pkcs11_pool.state import Epoch

_SOON: Final = 1.0
"""Seconds that a recovery waits for a plain PIN source."""


class UserLogin:
    """Logs the user in and out, and in again where the login was lost.

    Args:
        attachment: Where he is logged in.
        options: The pool's.
        gate: Where callers wait.
        mail: What waits for the token, too, is put off there.
        own_pin: What he is logged in with, if nobody gives a PIN.
        sender: Sends it.
        recovery: Is told when the token is lost with the login.
    """

    def __init__(
        self,
        attachment: Attachment,
        options: PoolOptions,
        gate: Gate,
        mail: Mailbox,
        *,
        own_pin: OwnPin,
        sender: PinSender,
        recovery: Recovery,
    ) -> None:
        self._attachment = attachment
        self._standing = attachment.standing
        self._options = options
        self._gate = gate
        self._mail = mail
        self._own_pin = own_pin
        self._sender = sender
        self._recovery = recovery
        self._asking = Asking(gate, mail, self.pin_came)

    # -- Logging in ---------------------------------------------------------------

    def log_in(
        self, job: Job, pin: Pin | None, *, force: bool, fresh: bool = False
    ) -> None:
        """Log the user in, with this PIN or the pool's own.

        ``fresh``: the anchor was opened just now.
        """
        if self._standing.login.state is LoginState.USER:
            self._gate.settle(job, None, None)
            return
        if self._options.login_ignored:
            self._is_in()
            self._gate.settle(job, None, None)
            return
        source = self._own_pin.get() if pin is None else pin
        if isinstance(source, Source):
            self._asking.insisted |= force
            self._asking.ask(source, job)
            return
        self._try(source, force=force, fresh=fresh)
        if pin is not None:
            self._own_pin.becomes(source)
            self._own_pin.in_doubt = False
        self._gate.settle(job, None, None)
        self._asking.over(None)

    def _try(self, pin: Pin, *, force: bool, fresh: bool = False) -> None:
        anchor = self._attachment.open_anchor
        with self._standing.attached.turn:
            if not fresh:
                self._sender.look(anchor)
            self._sender.send(anchor, USER, pin, force=force)
        if self._options.login_per_session:
            # Before the epoch: whoever sees that the user is in finds the PIN.
            self._standing.session_pin = pin
        self._is_in()

    def _is_in(self) -> None:
        standing = self._standing
        self._attachment.change(LoginEvent.USER_IN)
        epoch = int(standing.login.epoch)
        events.info(events.LOGIN_COMPLETED, token=standing.label, epoch=epoch)

    def pin_came(self, pin: Pin | None, error: BaseException | None) -> None:
        """A source gave a PIN, or an error; nobody may want it any more."""
        if not self._recovery.is_over:
            self._mail.postpone(partial(self.pin_came, pin, error))
            return
        if self._standing.login.state is not LoginState.USER and pin is not None:
            try:
                self._try(pin, force=self._asking.insisted)
            except Exception as failure:  # noqa: BLE001  # raised at the waiting
                self._failed(failure)
                return
            else:
                if self._asking.wanted_by_operations:
                    self._gate.counted(recoveries_total=1)
        self._asking.over(error)

    def _failed(self, error: BaseException) -> None:
        """What is lost with its token is restored with it; else all who wait fail."""
        lost = self._recovery.gone(error)
        for job in self._asking.take_waiting():
            # What was asked for by name waits for the token, too, then asks anew.
            later = lost and not self._sender.sent and is_down(error)
            if later and self._gate.put_off(job):
                again = partial(self.log_in, job, None, force=self._asking.insisted)
                request = Request(job=job, do=again, is_login=True, sends_pin=True)
                self._mail.postpone(request)
            else:
                self._gate.settle(job, None, error)
        back = lost and recovery.classify(error).is_outage
        self._asking.over(None if back else error)
        if lost:
            self._recovery.suspect(error)

    # -- Logging in again ---------------------------------------------------------

    def need(self, epoch: Epoch) -> None:
        """An operation of this epoch found the token logged out."""
        standing, gate = self._standing, self._gate
        if not self._recovery.is_over:
            # It is restored with the rest: nobody waits for it alone.
            gate.login_settled(None)
            return
        if standing.login.epoch == epoch and standing.login.state is LoginState.USER:
            events.warning(events.LOGIN_LOST, token=standing.label, epoch=epoch)
            self._attachment.change(LoginEvent.LOST)
        if standing.login.state is LoginState.USER or self._restored_unasked():
            gate.login_settled(None)
            return
        if standing.login.wanted is not LoginState.USER or not self._own_pin.is_given:
            gate.login_settled(
                LoginRequired("nobody is logged in: await pool.login(pin)")
            )
            return
        self._asking.wanted_by_operations = True
        try:
            source = self._own_pin.get()
            if isinstance(source, Source):
                self._asking.ask(source, None)
                return
            self._try(source, force=False)
        except Exception as error:  # noqa: BLE001  # raised at those who wait for it
            self._failed(error)
        else:
            gate.counted(recoveries_total=1)
            self._asking.over(None)

    def restore(self, job: Job | None) -> bool:
        """The login that was there before a period of the security officer.

        True: a caller was asked for the PIN, and ``job`` is settled when it comes.
        """
        if self._restored_unasked():
            return False
        login = self._standing.login
        wanted = login.wanted is LoginState.USER
        if not wanted or login.state is LoginState.USER or not self._own_pin.is_given:
            return False
        source = self._own_pin.get()
        if isinstance(source, Source):
            if job is not None:
                # The period is over; what is left is a login, and may be left alone.
                job.stays = False
            self._asking.ask(source, job)
            return True
        self._try(source, force=False, fresh=True)
        return False

    def restore_with_token(self) -> None:
        """The login that was there before an outage; a PIN may be refused meanwhile."""
        standing, attachment = self._standing, self._attachment
        if self._options.login_ignored:
            self._restored_unasked()
            return
        with standing.attached.turn:
            outlived = who_is_in(attachment.open_anchor) is LoginState.USER
        wanted = standing.login.wanted is LoginState.USER
        if outlived:
            # A call that was inside kept its session, and with it the login; it may be
            # one that nobody knows of, as its answer was lost.
            if wanted:
                attachment.change(LoginEvent.USER_IN)
            else:
                attachment.log_out()
        if outlived or not wanted:
            return
        try:
            pin = self._own_pin_soon()
            if pin is not None:
                self._try(pin, force=False)
        except PinRefused as error:
            events.warning(events.LOGIN_FAILED, token=standing.label, error=str(error))
        except LoginRequired:
            pass  # no PIN is known: whoever needs the login is told so

    def _own_pin_soon(self) -> Pin | None:
        """The pool's PIN, if the token need not be kept waiting for it."""
        source = self._own_pin.get()
        if not isinstance(source, Source):
            return source
        if source.is_async:
            return None  # the first operation that needs it is sent for it
        self._asking.ask(source, None)
        # Used now, so that who goes on finds the login. The answer is posted as well.
        question = self._asking.question
        return None if question is None else question.wait(_SOON)

    def _restored_unasked(self) -> bool:
        """Whether the user is in again because the token asks for no login."""
        login = self._standing.login
        unasked = self._options.login_ignored and login.wanted is LoginState.USER
        if unasked and login.state is not LoginState.USER:
            self._is_in()
        return unasked

    # -- Logging out --------------------------------------------------------------

    def log_out(self, job: Job) -> None:
        """Log out, and stay out."""
        if not pause_for(job, self._gate, self._mail, leases=False):
            self._mail.repost()
            return
        refused: p11.PKCS11Error | None = None
        try:
            try:
                self._attachment.user_out()
            except p11.PKCS11Error as error:
                refused = error
            # A chain of calls may be alive in the module after a logout.
            self._gate.interrupt(
                LoginRequired(
                    "logged out in the middle of the data: await pool.login(pin), then "
                    "begin again"
                )
            )
            self._attachment.change(LoginEvent.OUT)
            if refused is not None:
                # The user's word stands: closing the last session logs out, too.
                self._recovery.start_over(refused)
        finally:
            self._gate.resume()
            self._mail.repost()
        # A login that was under way is against the user's word now.
        self._asking.over(LoginRequired("logged out meanwhile: pool.login(pin)"))
        events.info(events.LOGOUT_COMPLETED, token=self._standing.label)
        self._gate.settle(job, None, None)

    def refuse_waiting(self, error: BaseException) -> None:
        """Those who wait by name for a login need not wait any longer."""
        self._asking.refuse_waiting(error)
