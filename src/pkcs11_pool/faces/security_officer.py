"""A period of the security officer, who has the token for himself meanwhile."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from pkcs11_pool import events, pins
from pkcs11_pool.cryptoki import recovery, rv
from pkcs11_pool.errors import OutcomeUnknown, PoolClosed, WouldDeadlock
from pkcs11_pool.faces import changes
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.faces.pooled_session import PooledSession
from pkcs11_pool.faces.waiting import checkpoint, current_waiter, loop_runs_here
from pkcs11_pool.jobs import Change, Job, Kind
from pkcs11_pool.login.pin_guard import SO, USER, check_length

if TYPE_CHECKING:
    from types import TracebackType

    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.leases import Lease
    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.faces.calls import Calls
    from pkcs11_pool.pins import Secret
    from pkcs11_pool.state import TokenInfo


class SecurityOfficer:
    """What the security officer can do, while logged in.

    Attributes:
        session: A R/W ``PooledSession`` in the state ``CKS_RW_SO_FUNCTIONS``.

    Example:
        .. code-block:: python

            async with pool.security_officer("12345678") as so:
                await so.init_pin("1234")
    """

    def __init__(self, engine: TokenEngine, session: PooledSession) -> None:
        self._engine = engine
        self.session = session

    @hides_pins
    async def init_pin(self, pin: str, *, timeout: Timeout = DEFAULT) -> None:
        """Set the user's PIN, also when it is locked. It becomes the pool's.

        Args:
            pin: The user's new PIN.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Raises:
            PinLengthInvalid: The token takes no PIN of this length; nothing was sent.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_InitPIN``.

        Source:
            PKCS#11 v3.1, "Slot and token management functions".
        """
        new = pins.secret(pin)  # type: ignore[arg-type]
        check_length(new, token_info(self._engine))
        actor = self._engine.actor

        def work(session: Session) -> None:
            actor.pin_in_doubt()
            code = session.functions.C_InitPIN(session.handle, new.encoded(), len(new))
            _known(code, "C_InitPIN", changes.INIT_PIN)
            # Here and not behind the await: the caller may be cancelled by then.
            if code:
                actor.pin_kept()
            rv.check(code, "C_InitPIN")
            actor.pin_changed(new)

        await self.session._perform(  # noqa: SLF001  # one package
            work, timeout, changes=changes.INIT_PIN
        )

    @hides_pins
    async def set_pin(self, old: str, new: str, *, timeout: Timeout = DEFAULT) -> None:
        """Change the security officer's own PIN.

        Args:
            old: The present PIN.
            new: The one to come.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Raises:
            PinLengthInvalid: The token takes no PIN of this length; nothing was sent.
            PinRefused: ``old`` is not the PIN.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_SetPIN``.

        Source:
            PKCS#11 v3.1, "Slot and token management functions".
        """
        work = pin_change(self._engine, SO, pins.secret(old), pins.secret(new))  # type: ignore[arg-type]
        await self.session._perform(  # noqa: SLF001
            work, timeout, changes=changes.SET_SO_PIN
        )


class SecurityOfficerBlock:
    """``async with pool.security_officer(so_pin) as so:``."""

    def __init__(
        self, engine: TokenEngine, pool: Calls, so_pin: Any, timeout: float | None
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._so_pin = so_pin
        self._timeout = timeout
        self._lane: Lease | None = None

    async def __aenter__(self) -> SecurityOfficer:
        """Drain, then log the SO in.

        Raises:
            WouldDeadlock: This task holds a session of the pool.
            PoolTimeout: Calls or sessions did not end in time; nothing has changed.
            PinRefused: The token refused the PIN; the login found before is restored.
        """
        engine = self._engine
        engine.home.check()
        await checkpoint()
        engine.check_open()
        waiter = current_waiter()
        if engine.holds_lease(waiter.holder):
            message = (
                "the security officer waits until every session is closed, and this "
                "task holds one: leave its block first"
            )
            raise WouldDeadlock(message)
        # timeout=0 waits for nobody, but the login itself takes its time.
        nowait = self._timeout == 0
        limit = engine.options.timeout or None if nowait else self._timeout
        job = Job(
            None,
            Kind.ACTOR,
            waiter=waiter,
            deadline=None if limit is None else time.monotonic() + limit,
            nowait=nowait,
            changes=True,
        )
        try:
            engine.request(job, lambda j: engine.actor.so_begin(j, self._so_pin))
            session: Session = await waiter.result(engine, job)
        except BaseException:
            # Cancelled, but the period had begun by then: end it.
            if job.result is not None:
                self._lane = engine.begin_so_lane(job.result, waiter.holder)
                await self._end()
            raise
        self._lane = engine.begin_so_lane(session, waiter.holder)
        return SecurityOfficer(engine, PooledSession(engine, self._pool, self._lane))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Log the SO out, and in again whoever was logged in before.

        Raises:
            PinRefused, PKCS11Error: The login could not be restored: the pool is
                ``PUBLIC``. Not raised over an error of the block.
        """
        if kind is GeneratorExit or not loop_runs_here():
            # Forgotten with its loop: nothing can be awaited any more. What the block
            # awaited may have made another error of that.
            if self._lane is not None:
                self._engine.forget_so_lane(self._lane)
            return
        try:
            await self._end()
        except Exception as failure:
            if error is None:
                raise
            engine = self._engine
            events.warning(
                events.SO_FAILED,
                token=engine.actor.known.label,
                error=type(failure).__name__,
            )

    async def _end(self) -> None:
        engine, lane = self._engine, self._lane
        if lane is None or engine.home.is_forked:
            return
        engine.end_so_lane(lane)
        waiter = current_waiter()
        job = Job(None, Kind.ACTOR, waiter=waiter, deadline=None, stays=True)
        engine.request(job, engine.actor.so_end)
        # A pool that was closed meanwhile has ended the period as well.
        with suppress(PoolClosed):
            await waiter.result(engine, job)


def pin_change(engine: TokenEngine, user: str, old: Secret, new: Secret) -> Any:
    """The work of changing a PIN, refused here where it can only fail."""
    info = token_info(engine)
    check_length(old, info)
    check_length(new, info)
    actor = engine.actor
    actor.guard.check_refused(user, old)

    def work(session: Session) -> None:
        # Where each session is logged in, none is with the old one meanwhile.
        each = user == USER and engine.options.login_per_session
        with actor.guard.one_try(old) if each else nullcontext():
            send(session)

    def send(session: Session) -> None:
        if user == USER:
            actor.pin_in_doubt()
        code = _set_pin(session, old, new)
        change = changes.SET_PIN if user == USER else changes.SET_SO_PIN
        _known(code, "C_SetPIN", change)
        # Here and not behind the await: the caller may be cancelled by then.
        if code and user == USER:
            actor.pin_kept()
        actor.guard.answered(user, old, code, "C_SetPIN", actor.same_token)
        if user == USER:
            actor.pin_changed(new)
        else:
            actor.guard.accepted(user)

    return work


def token_info(engine: TokenEngine) -> TokenInfo:
    """What the token told last; the pool is open."""
    engine.check_open()
    info = engine.actor.info
    if info is None:
        raise PoolClosed("the pool is not open")
    return info


def _known(code: int, function: str, change: Change) -> None:
    """Refuse an answer that does not tell whether the PIN was changed.

    Raises:
        OutcomeUnknown: The token or its module went away during the call, or says no
            more than that it failed.
    """
    error = rv.error_of(code, function) if code else None
    if error is None or not recovery.classify(error).tells_of_outage:
        return
    message = (
        f"{change.call} was answered {rv.name_of(code)}, so nobody knows whether it "
        f"changed the PIN. {change.look}"
    )
    raise OutcomeUnknown(message) from error


def _set_pin(session: Session, old: Secret, new: Secret) -> int:
    """``C_SetPIN``; the code. Raises nothing, so no traceback holds a PIN."""
    return session.functions.C_SetPIN(
        session.handle, old.encoded(), len(old), new.encoded(), len(new)
    )
