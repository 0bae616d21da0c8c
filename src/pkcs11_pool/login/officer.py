"""A period of the security officer: alone with the token, then back to what was.

A R/O session and his login exclude each other. So the anchor is a R/W session
meanwhile, and it is the one that he works in.

Source: PKCS#11 v3.1, "C_Login".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkcs11 import exceptions as p11

from pkcs11_pool import events
from pkcs11_pool.cryptoki import recovery
from pkcs11_pool.login.pausing import pause_for
from pkcs11_pool.login.pin_guard import SO
from pkcs11_pool.state import LoginEvent, LoginState

if TYPE_CHECKING:
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.jobs import Job
    from pkcs11_pool.login.attachment import Attachment
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.login.mailbox import Mailbox
    from pkcs11_pool.login.recovering import Recovery
    from pkcs11_pool.login.sending import PinSender
    from pkcs11_pool.login.user_login import UserLogin
    from pkcs11_pool.pins import Pin


class Officer:
    """Whether the security officer has the token, and how he gets it and gives it back.

    Args:
        attachment: What he gets.
        gate: Where callers wait meanwhile.
        mail: What comes meanwhile is put off there.
        sender: Sends his PIN.
        user: Is logged in again afterwards.
        recovery: Is told when the token is lost.

    Attributes:
        is_in: Whether a period is under way, and he was given its session.
    """

    def __init__(
        self,
        attachment: Attachment,
        gate: Gate,
        mail: Mailbox,
        *,
        sender: PinSender,
        user: UserLogin,
        recovery: Recovery,
    ) -> None:
        self.is_in = False
        self._attachment = attachment
        self._standing = attachment.standing
        self._gate = gate
        self._mail = mail
        self._sender = sender
        self._user = user
        self._recovery = recovery

    # -- The beginning ------------------------------------------------------------

    def begin(self, job: Job, pin: Pin) -> None:
        """Wait until all is quiet, log him in; gives the R/W session."""
        if not pause_for(job, self._gate, self._mail, leases=True):
            self._mail.repost()
            return
        attachment, label = self._attachment, self._standing.label
        self._sender.sent = False
        try:
            if self._standing.attached.leftovers:
                # One of them may be R/O, and then no SO can log in.
                attachment.renew_anchor()
            attachment.swap_anchor(rw=True)
            session = self._log_in(pin)
        except Exception as error:
            events.warning(events.SO_FAILED, token=label, error=str(error))
            self._undo(error)
            raise
        self.is_in = True
        if self._gate.settle(job, session, None):
            events.info(events.SO_STARTED, token=label)
        else:
            # Its deadline passed inside C_Login: nobody is there to have the period.
            self._undo(None)

    def _log_in(self, pin: Pin) -> Session:
        if self._standing.login.state is LoginState.USER:
            self._attachment.user_out()
            self._attachment.change(LoginEvent.LOST)
        # Not the one from before: where each session has its own login, it is another.
        session = self._attachment.open_anchor
        with self._standing.attached.turn:
            self._sender.send(session, SO, pin, force=False)
        self._attachment.change(LoginEvent.SO_IN)
        return session

    def _undo(self, error: BaseException | None) -> None:
        """The period did not begin: back to what was before."""
        try:
            if error is not None and recovery.classify(error).tells_of_outage:
                self._recovery.start_over(error)
                return
            self._log_out()
            self._restore(None)
        except Exception as failure:  # noqa: BLE001  # the first is the one to raise
            label = self._standing.label
            events.warning(events.SO_FAILED, token=label, error=str(failure))
            if isinstance(failure, p11.PKCS11Error) or self._may_stay:
                self._recovery.start_over(failure)
        finally:
            self._gate.resume()
            self._mail.repost()

    # -- The end ------------------------------------------------------------------

    def end(self, job: Job) -> None:
        """Log him out, and in again whoever was logged in before."""
        if not self._recovery.is_over:
            # It ended with the token, and the login is restored with the rest.
            self._gate.settle(job, None, None)
            return
        # Nothing of the period may be inside when the SO logs out.
        if not pause_for(job, self._gate, self._mail, leases=False):
            return
        try:
            self._log_out()
            asked = self._restore(job)
        except Exception as error:
            if not (self._may_stay or recovery.classify(error).is_outage):
                raise
            # The login is restored with the rest.
            self._recovery.start_over(error)
            asked = False
        finally:
            self._gate.resume()
            self._mail.repost()
        events.info(events.SO_COMPLETED, token=self._standing.label)
        if not asked:
            self._gate.settle(job, None, None)

    def lost(self) -> None:
        """The period ends with the token, or with the pool."""
        self.is_in = False

    def _log_out(self) -> None:
        """Log him out, if in. The anchor is the period's R/W session."""
        self.is_in = False
        if self._standing.login.state is LoginState.SO:
            self._attachment.log_out()
            self._attachment.change(LoginEvent.LOST)

    def _restore(self, job: Job | None) -> bool:
        """A R/O anchor, and the user's login: see :meth:`UserLogin.restore`."""
        anchor = self._attachment.anchor
        if anchor is not None and anchor.rw:
            self._attachment.swap_anchor(rw=False)
        return self._user.restore(job)

    @property
    def _may_stay(self) -> bool:
        """Whether the SO is in, or the session that he was in is still the anchor."""
        login, anchor = self._standing.login, self._attachment.anchor
        return login.state is LoginState.SO or (anchor is not None and anchor.rw)
