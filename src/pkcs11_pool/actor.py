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
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from pkcs11 import exceptions as p11
from pkcs11.constants import TokenFlag

from pkcs11_pool import cryptoki, events, pins, recovery, rv
from pkcs11_pool import module as modules
from pkcs11_pool.errors import (
    LoginRequired,
    PinLengthInvalid,
    PinRefused,
    PoolClosed,
    PoolError,
    PoolTimeout,
    TokenUnavailable,
)
from pkcs11_pool.operations import raw_login
from pkcs11_pool.session import Session
from pkcs11_pool.state import Epoch, Login, LoginEvent, LoginState

if TYPE_CHECKING:
    from collections.abc import Callable

    import pkcs11

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.jobs import Job
    from pkcs11_pool.keys import HandleCache
    from pkcs11_pool.pins import Pin, PinCallable, RejectedPins
    from pkcs11_pool.state import TokenInfo

_RETRY: Final = 0.2
"""Seconds between two tries to reach a module that is down, at opening."""
_USER: Final = "user"
_SO: Final = "security officer"
_IN: Final = frozenset({0, rv.CODES["CKR_USER_ALREADY_LOGGED_IN"]})
_REJECTED: Final = {
    rv.CODES[name]: text
    for name, text in {
        "CKR_PIN_INCORRECT": "the token refused the PIN",
        "CKR_PIN_LOCKED": "the PIN is locked: the security officer can set a new one",
        "CKR_PIN_INVALID": "the token does not take this PIN",
        "CKR_PIN_LEN_RANGE": "the PIN is too short or too long for this token",
    }.items()
}


class Gate(Protocol):
    """The engine, as far as the actor needs it."""

    def begin(self, job: Job) -> bool:
        """The actor starts on a request; False if its caller has gone."""

    def settle(self, job: Job, result: Any, error: BaseException | None) -> None:
        """A request is done."""

    def pause(self, deadline: float | None, *, leases: bool) -> bool:
        """Let nothing start; wait until nothing is inside; whether it succeeded."""

    def resume(self) -> None:
        """Let jobs start again."""

    def close_ahead(self) -> None:
        """Close the sessions that were opened ahead."""

    def login_settled(self, error: BaseException | None) -> None:
        """The login that operations wait for succeeded, or failed."""

    def send_for_pin(self, source: PinCallable) -> None:
        """Have a caller who waits for the login await this PIN source."""

    def drain(self, deadline: float) -> None:
        """Wait for running calls, then close every session."""

    def end_threads(self) -> None:
        """End the workers."""

    def counted(self, **counts: int) -> None:
        """Add to the counters of the statistics."""


class LoginActor:
    """Logs in and out on one token, and holds the anchor.

    Attributes:
        login: The login state, replaced whole at each change. Written by the
            actor's thread only; everybody reads.
        book: PINs that this token refused, by user.
    """

    def __init__(
        self, options: PoolOptions, gate: Gate, cache: HandleCache, name: str | None
    ) -> None:
        self.login = Login(LoginState.PUBLIC, LoginState.PUBLIC, Epoch(1))
        self.module: modules.Module | None = None
        self.token: pkcs11.Token | None = None
        self.info: TokenInfo | None = None
        self.book: RejectedPins = pins.RejectedPins()
        self._options = options
        self._pin = options.pin
        self._gate = gate
        self._cache = cache
        self._name = name
        self._mail: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._anchor: Session | None = None
        # Requests that wait for the login under way, or for its PIN.
        self._logins: list[Job] = []
        self._asking = False
        self._wanted_by_operations = False
        self._so: Session | None = None
        # What came during a SO period and can only be done after it.
        self._postponed: list[Callable[[], None]] = []
        self._thread = threading.Thread(
            target=self._run, name="pkcs11-pool login actor", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

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

    def pin_came(self, pin: Pin | None, error: BaseException | None) -> None:
        """The caller who was sent for the PIN has it, or not."""
        self._mail.put(partial(self._pin_came, pin, error))

    def pin_changed(self, pin: Pin) -> None:
        """The user's PIN on the token is another now."""
        self._mail.put(partial(self._pin_changed, pin))

    def _post(self, job: Job, handle: Callable[..., None], *arguments: Any) -> None:
        self._mail.put(partial(self._handle, job, handle, *arguments))

    # -- The thread ---------------------------------------------------------------

    def _run(self) -> None:
        while (message := self._mail.get()) is not None:
            message()
            # A request and its error live in the frame of the handler, not here.
            del message

    def _handle(self, job: Job, handle: Callable[..., None], *arguments: Any) -> None:
        if self._so is not None and handle not in (self._so_end, self._close):
            self._postponed.append(partial(self._handle, job, handle, *arguments))
            return
        if not self._gate.begin(job):
            return
        try:
            handle(job, *arguments)
        except Exception as error:  # noqa: BLE001  # it is the caller's, raised there
            self._gate.settle(job, None, error)

    def _change(self, event: LoginEvent) -> None:
        # The order matters: operations that start from here on see the new epoch,
        # and what was opened or found in the old one is not used in it.
        self.login = self.login.after(event)
        self._cache.login = self.login.state
        self._gate.close_ahead()

    # -- Opening and closing ------------------------------------------------------

    def _open(self, job: Job) -> None:
        options = self._options
        while True:
            try:
                self._attach()
                break
            except Exception as error:
                self._detach()
                if not _is_down(error):
                    raise
                left = None if job.deadline is None else job.deadline - time.monotonic()
                if left is not None and left <= _RETRY:
                    message = f"{options.module} does not answer: {error}"
                    raise TokenUnavailable(message) from error
                if self._stopping.wait(_RETRY):
                    message = "the pool was closed while it opened"
                    raise PoolClosed(message) from error
        try:
            if self._pin is None:
                self._gate.settle(job, None, None)
            else:
                self._log_in(job, None, force=False)
        except Exception:
            self._detach()
            raise

    def _attach(self) -> None:
        options = self._options
        self.module = modules.acquire(
            options.module, options.init_reserved, serialize=options.serialize
        )
        with self.module.turn:
            if not self.module.library.get_slots():
                # A client whose server was down at C_Initialize has no slots, and
                # keeps none until it is finalised.
                message = f"{options.module} has no slots"
                raise p11.TokenNotPresent(message)
            self.token, info = self.module.find(options)
            self.module.claim(info, self._name or info.label)
            self.info = info
            self._anchor = self._open_session(rw=False)

    def _detach(self) -> None:
        module = self.module
        if module is None:
            return
        with module.turn:
            if self._anchor is not None:
                self._anchor.close()
        self._anchor = None
        if self.info is not None:
            module.unclaim(self.info)
            self.info = None
        modules.release(module)
        self.module = None

    def _open_session(self, *, rw: bool) -> Session:
        assert self.module is not None  # noqa: S101  # attached
        assert self.token is not None  # noqa: S101
        return Session(self.module, self.token, rw=rw, epoch=self.login.epoch)

    def _close(self, job: Job, deadline: float) -> None:
        self._fail_logins(PoolClosed("the pool is closing"))
        if self.module is not None:
            with self.module.turn:
                self._gate.drain(deadline)
                if (
                    self._anchor is not None
                    and self.login.state is not LoginState.PUBLIC
                ):
                    self.module.functions.C_Logout(self._anchor.handle)
            self._change(LoginEvent.OUT)
            self._detach()
        self._gate.end_threads()
        self._mail.put(None)
        self._gate.settle(job, None, None)

    # -- The user's login ---------------------------------------------------------

    def _log_in(self, job: Job, pin: Pin | None, force: bool) -> None:  # noqa: FBT001
        if self.login.state is LoginState.USER:
            self._gate.settle(job, None, None)
            return
        given = pin is not None
        source = pin if given else self._pin
        if source is None:
            message = "no PIN to log in with: await pool.login(pin)"
            raise LoginRequired(message)
        if callable(source):
            self._ask(source, job)
            return
        self._try_login(source, force=force)
        if given:
            self._pin = source
        self._gate.settle(job, None, None)
        self._settle_logins(None)

    def _need_login(self, epoch: Epoch) -> None:
        if self._so is not None:
            self._postponed.append(partial(self._need_login, epoch))
            return
        if self.login.epoch == epoch and self.login.state is LoginState.USER:
            events.warning(events.LOGIN_LOST, token=self._label, epoch=epoch)
            self._change(LoginEvent.LOST)
        if self.login.state is LoginState.USER:
            self._gate.login_settled(None)
            return
        if self.login.wanted is not LoginState.USER or self._pin is None:
            self._gate.login_settled(
                LoginRequired("nobody is logged in: await pool.login(pin)")
            )
            return
        self._wanted_by_operations = True
        try:
            if callable(self._pin):
                self._ask(self._pin, None)
                return
            self._try_login(self._pin, force=False)
        except Exception as error:  # noqa: BLE001  # raised at those who wait for it
            self._settle_logins(error)
        else:
            self._gate.counted(recoveries_total=1)
            self._settle_logins(None)

    def _ask(self, source: PinCallable, job: Job | None) -> None:
        """Get a PIN from a callable: here, or by a caller if it must be awaited."""
        if job is not None:
            self._logins.append(job)
        if not pins.is_async(source):
            try:
                pin = pins.ask(source)
            except PinRefused as error:
                self._pin_came(None, error)
            else:
                self._pin_came(pin, None)
            return
        self._asking = True
        self._gate.send_for_pin(source)

    def _pin_came(self, pin: Pin | None, error: BaseException | None) -> None:
        self._asking = False
        if self.login.state is not LoginState.USER and error is None:
            try:
                assert pin is not None  # noqa: S101  # either a PIN or an error
                self._try_login(pin, force=False)
            except Exception as failure:  # noqa: BLE001  # raised at the waiting
                error = failure
            else:
                if self._wanted_by_operations:
                    self._gate.counted(recoveries_total=1)
        self._settle_logins(error)

    def _settle_logins(self, error: BaseException | None) -> None:
        waiting, self._logins = self._logins, []
        for job in waiting:
            self._gate.settle(job, None, error)
        self._wanted_by_operations = False
        self._gate.login_settled(error)

    def _fail_logins(self, error: PoolError) -> None:
        waiting, self._logins = self._logins, []
        for job in waiting:
            self._gate.settle(job, None, error)

    def _try_login(self, pin: Pin, *, force: bool) -> None:
        assert self._anchor is not None  # noqa: S101  # the pool is open
        assert self.module is not None  # noqa: S101
        with self.module.turn:
            self._send_pin(self._anchor, cryptoki.CKU_USER, pin, force=force)
        self._change(LoginEvent.USER_IN)
        events.info(
            events.LOGIN_COMPLETED, token=self._label, epoch=int(self.login.epoch)
        )

    def _send_pin(self, session: Session, user: int, pin: Pin, *, force: bool) -> None:
        """``C_GetTokenInfo`` and ``C_Login``, if this PIN may be tried."""
        who = _SO if user == cryptoki.CKU_SO else _USER
        self._guard(who, pin, force=force)
        events.info(events.LOGIN_STARTED, token=self._label, user=who)
        code = raw_login(session.functions, session.handle, user, pin)
        if code in _IN:
            self.book.clear(who)
            self._gate.counted(logins_total=1)
            return
        self._gate.counted(logins_failed_total=1)
        events.warning(
            events.LOGIN_FAILED, token=self._label, user=who, rv=rv.name_of(code)
        )
        self.answered(who, pin, code, "C_Login")

    def answered(self, who: str, pin: Pin, code: int, function: str) -> None:
        """Take down a PIN that the token refused.

        Raises:
            PinRefused, PKCS11Error: As the code says.
        """
        if text := _REJECTED.get(code):
            kind = PinRefused
            if code == rv.CODES["CKR_PIN_LEN_RANGE"]:
                kind = PinLengthInvalid
            self.book.add(who, pin)
            raise kind(text) from rv.error_of(code, function)
        rv.check(code, function)

    def check_rejected(self, who: str, pin: Pin) -> None:
        """Refuse a PIN that the token refused before.

        Raises:
            PinRefused: It is in the book.
        """
        if self.book.has(who, pin):
            message = (
                f"this PIN of the {who} was refused before and is not sent again: give "
                "another one, or insist with force=True"
            )
            raise PinRefused(message)

    def _guard(self, who: str, pin: Pin, *, force: bool) -> None:
        """Refuse a PIN that would be wasted on the token, or shown to another one."""
        assert self.module is not None  # noqa: S101  # the pool is open
        assert self.info is not None  # noqa: S101
        fresh = self.module.info(self.info.slot_id)
        if fresh.identity != self.info.identity:
            message = f"another token is in the slot: {fresh}, not {self.info}"
            raise TokenUnavailable(message)
        self.info = fresh
        check_length(pin, fresh)
        if force:
            return
        self.check_rejected(who, pin)
        locked, final = (
            (TokenFlag.SO_PIN_LOCKED, TokenFlag.SO_PIN_FINAL_TRY)
            if who == _SO
            else (TokenFlag.USER_PIN_LOCKED, TokenFlag.USER_PIN_FINAL_TRY)
        )
        if fresh.flags & locked:
            message = f"the PIN of the {who} is locked on the token"
            raise PinRefused(message)
        if fresh.flags & final:
            message = (
                f"one wrong PIN more locks the {who} out, so none is sent: insist with "
                "force=True if this one is right"
            )
            raise PinRefused(message)

    def _pin_changed(self, pin: Pin) -> None:
        self._pin = pin
        self.book.clear(_USER)

    # -- Logout -------------------------------------------------------------------

    def _log_out(self, job: Job) -> None:
        if not self._gate.pause(job.deadline, leases=False):
            message = "logout waited for calls inside the module; nothing has changed"
            raise PoolTimeout(message, "waiting")
        try:
            if self.login.state is LoginState.USER:
                self._raw_logout(self._anchor)
            self._change(LoginEvent.OUT)
        finally:
            self._gate.resume()
        events.info(events.LOGOUT_COMPLETED, token=self._label)
        self._gate.settle(job, None, None)

    def _raw_logout(self, session: Session | None) -> None:
        assert session is not None  # noqa: S101  # the pool is open
        assert self.module is not None  # noqa: S101
        with self.module.turn:
            code = session.functions.C_Logout(session.handle)
        if code != rv.CODES["CKR_USER_NOT_LOGGED_IN"]:
            rv.check(code, "C_Logout")

    # -- The security officer -----------------------------------------------------

    def _so_begin(self, job: Job, so_pin: Pin) -> None:
        if not self._gate.pause(job.deadline, leases=True):
            message = (
                "the security officer waited for running calls and open sessions; "
                "nothing has changed"
            )
            raise PoolTimeout(message, "waiting")
        try:
            session = self._swap_anchor(rw=True)
            self._so_login(session, so_pin)
        except Exception as error:
            events.warning(events.SO_FAILED, token=self._label, error=str(error))
            self._so_undo()
            raise
        self._so = session
        events.info(events.SO_STARTED, token=self._label, epoch=int(self.login.epoch))
        self._gate.settle(job, session, None)

    def _so_undo(self) -> None:
        """The period did not begin: back to what was before."""
        try:
            self._so_restore(None)
        except Exception as error:  # noqa: BLE001  # the first error is the one to raise
            events.warning(events.SO_FAILED, token=self._label, error=str(error))
        finally:
            self._gate.resume()

    def _so_login(self, session: Session, so_pin: Pin) -> None:
        assert self.module is not None  # noqa: S101  # the pool is open
        if self.login.state is LoginState.USER:
            self._raw_logout(session)
            self._change(LoginEvent.LOST)
        with self.module.turn:
            self._send_pin(session, cryptoki.CKU_SO, so_pin, force=False)
        self._change(LoginEvent.SO_IN)

    def _swap_anchor(self, *, rw: bool) -> Session:
        """Replace the anchor by one of the other kind; the new one is opened first.

        The application never has no session by accident: closing the last logs out.
        """
        assert self.module is not None  # noqa: S101  # the pool is open
        with self.module.turn:
            new, old = self._open_session(rw=rw), self._anchor
            self._anchor = new
            if old is not None:
                old.close()
        return new

    def _so_end(self, job: Job) -> None:
        # Nothing of the period may be inside when the SO logs out.
        if not self._gate.pause(job.deadline, leases=False):
            message = "the period waited for its running calls; the SO is still in"
            raise PoolTimeout(message, "waiting")
        session, self._so = self._so, None
        try:
            self._raw_logout(session)
            self._change(LoginEvent.LOST)
            asked = self._so_restore(job)
        finally:
            self._gate.resume()
            postponed, self._postponed = self._postponed, []
            for message_ in postponed:
                self._mail.put(message_)
        events.info(events.SO_COMPLETED, token=self._label)
        if not asked:
            self._gate.settle(job, None, None)

    def _so_restore(self, job: Job | None) -> bool:
        """A R/O anchor, and the login that was there before the period.

        True: a caller was asked for the PIN, and ``job`` is settled when it comes.
        """
        if self._anchor is not None and self._anchor.rw:
            self._swap_anchor(rw=False)
        wanted = self.login.wanted is LoginState.USER
        if not wanted or self.login.state is LoginState.USER or self._pin is None:
            return False
        if callable(self._pin):
            self._ask(self._pin, job)
            return True
        self._try_login(self._pin, force=False)
        return False

    @property
    def _label(self) -> str:
        return self.info.label if self.info is not None else self._options.wanted_token


def check_length(pin: Pin, info: TokenInfo) -> None:
    """Refuse a PIN that the token cannot have.

    Raises:
        PinLengthInvalid: Too short or too long.
    """
    if isinstance(pin, pins.PinPad):
        return
    # Some tokens tell no lengths: then it is theirs to refuse.
    if 0 < info.max_pin_len < len(pin) or len(pin) < info.min_pin_len:
        message = (
            f"a PIN of this token has {info.min_pin_len} to {info.max_pin_len} bytes; "
            f"this one has {len(pin)} and was not sent"
        )
        raise PinLengthInvalid(message)


def _is_down(error: BaseException) -> bool:
    return not isinstance(error, PoolError) and recovery.classify(error) in (
        recovery.Fault.TOKEN,
        recovery.Fault.MODULE,
    )
