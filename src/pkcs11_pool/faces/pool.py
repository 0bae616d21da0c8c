"""The pool: what users import, await and close."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar

from pkcs11_pool import config, pins
from pkcs11_pool.config import PoolOptions
from pkcs11_pool.engine.token_engine import TokenEngine
from pkcs11_pool.errors import PoolClosed
from pkcs11_pool.faces import arguments, by_uri, changes, life
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.faces.fresh import FreshCalls
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.faces.mapping import SyncResults
from pkcs11_pool.faces.pooled_session import SessionBlock
from pkcs11_pool.faces.requests import request
from pkcs11_pool.faces.security_officer import SecurityOfficerBlock, pin_change
from pkcs11_pool.faces.waiting import blocking
from pkcs11_pool.login.pin_guard import USER

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from pkcs11_pool.cryptoki.interface import Library
    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.state import LoginState, PoolState, TokenInfo
    from pkcs11_pool.stats import PoolStats
    from pkcs11_pool.uri import Pkcs11URI

T = TypeVar("T")


class TokenPool(FreshCalls):
    """A pool of sessions with one token of one Cryptoki module.

    Each operation runs on a worker thread in a fresh session of its own. One
    thread alone logs in and out, so that every session sees the same login. One
    open pool serves every event loop and every thread of the process.

    Args:
        module: Path of the Cryptoki module, a ``.so`` file.
        token_label: Label of the token.
        token_serial: Its serial number, as bytes.
        token_model: Its model, which must match as well; needs one of the others.
        token_manufacturer: The same for its manufacturer.
        slot_id: The slot that it is in. Exactly one token must match what is given;
            the pool then stays with that token, whatever slot it moves to.
        pin: Where the user's PIN comes from: text, a callable, an async callable,
            ``pkcs11.PROTECTED_AUTH`` for a PIN pad, or None to log in later or never.
        max_sessions: The most sessions for operations and open ``PooledSession``
            objects; the login's own is one more. Capped by what the token allows.
        timeout: Seconds for one operation, waiting included; None: no limit;
            0: do not wait for a session.
        max_waiting: How many callers may wait; None: no limit.
        open_timeout: Seconds to wait, at opening, for a module that is down.
        close_timeout: Seconds that closing waits for running calls.
        recovery_timeout: Seconds that callers wait, inside their deadlines, for a lost
            token to come back. Then ``TokenUnavailable``, at once for those who come
            later, while the pool goes on trying.
        handle_max_age: Seconds after which a remembered object number is verified
            before its next use; 0: always; None: never for its age alone.
        init_reserved: Module parameters for ``C_Initialize``, as NSS wants them.
        serialize: Whether the module is called by one thread at a time; None: where
            it needs it.
        rw_sessions_only: Open all sessions R/W, also where R/O ones would do: for
            tokens that have no R/O sessions (AWS CloudHSM).
        login_per_session: Log each session in by itself, and log out by closing them:
            for tokens whose sessions do not share the login (Nitrokey NetHSM). The PIN
            stays in memory while logged in.
        login_ignored: Send no login: for tokens that ask for none (Google Cloud KMS).
            The user counts as logged in until ``logout()``, from where on the pool
            itself refuses private objects. Without ``pin``.
        session_max_idle: Seconds after which the token drops a session that nobody uses
            (YubiHSM 2: 30). None that waited that long is used, and those that stay
            open are kept alive. None: it drops none.
        name: In logs and messages; default: the token's label.

    Raises:
        InvalidOption: A value is wrong. The constructor does no I/O.

    Example:
        .. code-block:: python

            async with TokenPool(module, token_label="demo", pin="1234") as pool:
                signature = await pool.key(label="signer").sign(b"data")
    """

    def __init__(  # the options of a pool, all by name but the first
        self,
        module: str | os.PathLike[str],
        *,
        token_label: str | None = None,
        token_serial: bytes | None = None,
        token_model: str | None = None,
        token_manufacturer: str | None = None,
        slot_id: int | None = None,
        pin: Any = None,
        max_sessions: int = 8,
        timeout: float | None = 30.0,
        max_waiting: int | None = 10_000,
        open_timeout: float | None = 30.0,
        close_timeout: float = 5.0,
        recovery_timeout: float = 30.0,
        handle_max_age: float | None = 60.0,
        init_reserved: str | bytes | None = None,
        serialize: bool | None = None,
        rw_sessions_only: bool = False,
        login_per_session: bool = False,
        login_ignored: bool = False,
        session_max_idle: float | None = None,
        name: str | None = None,
    ) -> None:
        # First of all: from here on no frame of ours holds the PIN as text.
        pin = pins.hide_source(pin)
        options = PoolOptions(
            module=config.module_path(module),
            token_label=token_label,
            token_serial=token_serial,
            token_model=token_model,
            token_manufacturer=token_manufacturer,
            slot_id=slot_id,
            pin=pins.checked_source(pin),
            max_sessions=max_sessions,
            timeout=timeout,
            max_waiting=max_waiting,
            open_timeout=open_timeout,
            close_timeout=close_timeout,
            recovery_timeout=recovery_timeout,
            handle_max_age=handle_max_age,
            init_reserved=config.reserved_bytes(init_reserved),
            serialize=serialize,
            rw_sessions_only=rw_sessions_only,
            login_per_session=login_per_session,
            login_ignored=login_ignored,
            session_max_idle=session_max_idle,
            name=name,
        )
        self._engine = TokenEngine(options)

    @classmethod
    def from_uri(
        cls,
        text: str | Pkcs11URI,
        *,
        allow_pin_command: bool = False,
        **options: Any,
    ) -> TokenPool:
        """A pool from a PKCS#11 URI (RFC 7512): token, slot, module, PIN.

        What it says of an object is left to :meth:`key_from_uri`.

        Args:
            text: The URI.
            allow_pin_command: Run the program that ``pin-source`` names after ``|``,
                at each login.
            **options: As the constructor takes them; they win over the URI's.

        Raises:
            InvalidURI: The URI is malformed, names no module, or says something of the
                token that the pool cannot look at.
        """
        # In its own place: from here on no frame of ours has the URI as text.
        text = parsed = by_uri.read(text)  # type: ignore[assignment]
        given = by_uri.pool_options(
            parsed, options, allow_pin_command=allow_pin_command
        )
        return cls(**given)

    def key_from_uri(self, text: str | Pkcs11URI) -> KeyRef:
        """The key that a PKCS#11 URI names: ``object``, ``id``, ``type``. No I/O.

        Args:
            text: A URI, as text or read already.

        Returns:
            A reference, as :meth:`key` gives it.

        Raises:
            InvalidURI: The URI is malformed, names no key, or names another token than
                this pool's.

        Source:
            RFC 7512, "PKCS #11 URI Scheme Definition".
        """
        text = parsed = by_uri.read(text)  # type: ignore[assignment]
        return self.key(**by_uri.key_options(parsed, self._engine))

    # -- Life ---------------------------------------------------------------------

    async def open(self) -> None:
        """Load the module, find the token, log in if there is a PIN.

        Raises:
            ModuleError, ModuleInUse: The file cannot be used.
            TokenNotFound, TokenAmbiguous, TokenInUse: By the token's name. The first
                is said after about a second.
            TokenUnavailable: The module was down for ``open_timeout`` seconds.
            PinRefused: The token refused the PIN.
            PoolClosed: It was open before; a pool is opened once.

        Cancellation:
            Stops the opening; the pool is closed then.

        Cryptoki:
            ``C_Initialize``, ``C_GetSlotList``, ``C_GetTokenInfo``,
            ``C_OpenSession``, ``C_Login``. All but the last again, and ``C_Finalize``
            before, for at most a second: where the token is not there, or
            ``CKR_GENERAL_ERROR``, as it may be misread while others write it.

        Source:
            PKCS#11 v3.1, "General-purpose functions", "Session management functions".
        """
        await life.open_pool(self._engine)

    async def close(self) -> None:
        """Refuse new operations, let running ones finish, log out, close all.

        Waits at most ``close_timeout`` seconds for calls inside the module; what
        runs longer is lost. Closing twice is harmless. Completes also when
        cancelled, and raises the cancellation then.

        Cancellation:
            The closing is completed first, then the cancellation raised.

        Cryptoki:
            ``C_CloseSession``, ``C_Logout``; ``C_Finalize`` by the module's last pool.

        Source:
            PKCS#11 v3.1, "General-purpose functions", "Session management functions".
        """
        await life.close_pool(self._engine)

    async def __aenter__(self) -> Self:
        """Open the pool."""
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the pool. The error that leaves the block is the one raised in it."""
        await self.close()

    # -- What it is ---------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name in metrics, which is ``name`` or the label of its token."""
        return self._engine.name

    @property
    def state(self) -> PoolState:
        """Where the pool is in its life."""
        return self._engine.state

    @property
    def login_state(self) -> LoginState:
        """Who is logged in to the token."""
        return self._engine.actor.login.state

    @property
    def login_epoch(self) -> int:
        """A number that grows with every login, logout, SO period and lost login."""
        return int(self._engine.actor.login.epoch)

    @property
    def token(self) -> TokenInfo:
        """The token, as it told of itself at the last login.

        Raises:
            PoolClosed: The pool is not open.
        """
        info = self._engine.actor.info
        if info is None:
            message = "the pool is not open, so it has no token"
            raise PoolClosed(message)
        return info

    @property
    def lib(self) -> Library:
        """python-pkcs11's library object, shared by all pools on the module.

        Give it to other code that wants to use the same module in this process.

        Raises:
            PoolClosed: The pool is not open.
        """
        return self._checked().actor.attached.library

    def stats(self) -> PoolStats:
        """A snapshot of gauges and counters.

        Returns:
            Taken at one moment, under the pool's lock.
        """
        return self._engine.stats()

    def __repr__(self) -> str:
        """The token and the state."""
        if not hasattr(self, "_engine"):
            return "<TokenPool, not made>"  # in a traceback of the constructor
        options = self._engine.options
        return f"<TokenPool {options.name or options.wanted_token} {self.state.value}>"

    # -- Sessions -----------------------------------------------------------------

    def session(self, *, rw: bool = False, timeout: Timeout = DEFAULT) -> SessionBlock:
        """``async with pool.session() as session:``, a session for a block.

        Args:
            rw: Read-write.
            timeout: Seconds to wait for it.

        Returns:
            For ``async with``: it gives a :class:`PooledSession`.

        Raises:
            WouldDeadlock: At entry: all are lent, one of them to this task.
            PoolTimeout: At entry: none came free in time.

        Cancellation:
            While it waits: nothing happened. A session that came just then goes back.

        Cryptoki:
            ``C_OpenSession``; at the end ``C_CloseSession``.

        Source:
            PKCS#11 v3.1, "Session management functions".
        """
        config.check_flag("rw", rw)
        limit = arguments.timeout(timeout, self._engine.options.timeout)
        return SessionBlock(self._engine, self, rw=rw, timeout=limit)

    @hides_pins
    def security_officer(
        self, so_pin: Any, *, timeout: Timeout = DEFAULT
    ) -> SecurityOfficerBlock:
        """``async with pool.security_officer(so_pin) as so:``.

        Stops new operations, waits for running ones and for open sessions, at most
        ``timeout`` seconds, and logs the SO in. Other operations wait meanwhile,
        inside their deadlines. At the end the login found before is restored.

        Args:
            so_pin: The security officer's PIN; or ``PROTECTED_AUTH``.
            timeout: Seconds to wait until the token is quiet.

        Returns:
            For ``async with``: it gives a :class:`SecurityOfficer`.

        Raises:
            WouldDeadlock: At entry: this task holds a session of the pool.
            PoolTimeout: At entry: calls or sessions did not end; nothing has changed.
            PinRefused: At entry: the token refused the PIN.

        Cancellation:
            While it waits: nothing happened. During the login: what was before is
            restored first.

        Cryptoki:
            ``C_OpenSession`` (R/W), ``C_CloseSession`` of all others, ``C_Logout``,
            ``C_Login``; and the same way back.

        Source:
            PKCS#11 v3.1, "Session states", "Session management functions".
        """
        pins.checked(so_pin)
        limit = arguments.timeout(timeout, self._engine.options.timeout)
        return SecurityOfficerBlock(self._engine, self, so_pin, limit)

    # -- Login --------------------------------------------------------------------

    @hides_pins
    async def login(self, pin: str | None = None, *, force: bool = False) -> None:
        """Log the user in, with ``pin`` or the pool's own source.

        An accepted PIN becomes the pool's. While logged in it returns at once and
        checks nothing: tokens answer ``CKR_USER_ALREADY_LOGGED_IN`` to a wrong PIN
        too.

        Args:
            pin: The PIN, or None for the pool's source.
            force: Send a PIN that was refused before, or that is the final try.

        Raises:
            PinRefused: The token refused it, or it was not sent. The pool stays open.
            LoginRequired: There is no PIN.
            WouldDeadlock: This task is the security officer.

        Cancellation:
            Stops the wait, not the login.

        Cryptoki:
            ``C_GetTokenInfo``, ``C_Login``.

        Source:
            PKCS#11 v3.1, "Session management functions".
        """
        given = None if pin is None else pins.checked(pin)  # type: ignore[arg-type]
        config.check_flag("force", force)
        actor = self._checked().actor
        await request(
            self._engine,
            lambda job: actor.log_in(job, given, force=force),
            self._engine.options.timeout,
        )

    async def logout(self) -> None:
        """Log out, and stay out until ``login()``. Every session is logged out.

        Waits for running calls, inside the pool's ``timeout``.

        Raises:
            PoolTimeout: They did not end in time; nothing has changed.
            WouldDeadlock: This task is the security officer.

        Cancellation:
            Stops the wait, not the logout.

        Cryptoki:
            ``C_Logout``.

        Source:
            PKCS#11 v3.1, "Session management functions".
        """
        engine = self._checked()
        await request(engine, engine.actor.log_out, engine.options.timeout)

    @hides_pins
    async def set_pin(self, old: str, new: str, *, timeout: Timeout = DEFAULT) -> None:
        """Change the user's PIN; the new one becomes the pool's.

        Args:
            old: The present PIN.
            new: The one to come.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Raises:
            PinLengthInvalid: The token takes no PIN of this length; nothing was sent.
            PinRefused: ``old`` is not the PIN.
            OutcomeUnknown: The token went away during the call: the PIN is the old
                one or the new one. The pool tries neither until ``login(pin)``, before
                which a user who is still logged in must be logged out; so it is after
                ``PoolTimeout`` with the phase ``"running"``, until the call returns.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_SetPIN``, in a fresh R/W session.

        Source:
            PKCS#11 v3.1, "Slot and token management functions".
        """
        before, after = pins.secret(old), pins.secret(new)  # type: ignore[arg-type]
        arguments.timeout(timeout, None)
        work = pin_change(self._checked(), USER, before, after)
        await self._perform(
            work, timeout, rw=True, changes=changes.SET_PIN, restart=False
        )

    # -- For code that is not async -----------------------------------------------

    def run_sync(self, func: Callable[..., T], *args: Any, **options: Any) -> T:
        """The blocking twin of :meth:`run`.

        Args:
            func: As for :meth:`run`.
            *args: Its further arguments.
            **options: As for :meth:`run`, by name.

        Returns:
            What ``func`` returned.

        Raises:
            WouldBlockLoop: This thread runs an event loop.
        """
        return blocking(self.run(func, *args, **options))

    def map_sync(
        self, func: Callable[[Any, Any], T], items: Iterable[Any], **options: Any
    ) -> SyncResults[Any]:
        """The blocking twin of :meth:`map`, for a plain ``for`` loop.

        Args:
            func: As for :meth:`map`.
            items: As for :meth:`map`; no async iterable.
            **options: As for :meth:`map`, by name.

        Returns:
            To iterate over with ``for``; ``close()`` breaks off.

        Raises:
            WouldBlockLoop: At the first result: this thread runs an event loop.
        """
        return SyncResults(self.map(func, items, **options))

    # -- Inside -------------------------------------------------------------------

    def _checked(self) -> TokenEngine:
        self._engine.check_open()
        return self._engine
