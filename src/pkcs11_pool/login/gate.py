"""What the login actor asks of the engine that it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.jobs import Job
    from pkcs11_pool.pins import Source


class Gate(Protocol):
    """The engine, as far as the actor needs it."""

    def begin(self, job: Job, *, pauses: bool) -> bool:
        """The actor starts on a request; False if its caller has gone.

        One that pauses goes on waiting, until :meth:`pause` has succeeded.
        """

    def put_off(self, job: Job) -> bool:
        """A request waits again; False: its caller has gone, or it was tried enough."""

    def settle(self, job: Job, result: Any, error: BaseException | None) -> bool:
        """A request is done; whether its caller is still there to hear of it."""

    def pause(self, job: Job, *, leases: bool) -> bool | None:
        """Let nothing start; wait until nothing is inside; whether it succeeded.

        False: the request is settled, and all is as before. None: the login is lost;
        restore it and call again.
        """

    def login_awaited(self) -> bool:
        """Whether operations wait for a lost login to be restored."""

    def resume(self) -> None:
        """Let jobs start again."""

    def close_ahead(self) -> None:
        """Close the sessions that were opened ahead."""

    def keep_alive(self, idle: float) -> None:
        """Use the sessions that are lent, or the token drops them as idle."""

    def interrupt(self, cause: Exception) -> None:
        """What needs the login that ends now must not go on."""

    def login_settled(self, error: BaseException | None) -> None:
        """The login that operations wait for succeeded, or failed."""

    def send_for_pin(self, source: Source) -> None:
        """Have a caller who waits for the login await this PIN source."""

    def send_another(self) -> None:
        """Have another one await it, if the one who was sent has gone."""

    def drain(self, deadline: float) -> None:
        """Wait for running calls, then close every session."""

    def end_threads(self) -> None:
        """End the workers."""

    def counted(self, **counts: int) -> None:
        """Add to the counters of the statistics."""

    def hold_off(self, error: BaseException) -> bool:
        """Let nothing start, for the token may be lost; False if that is known."""

    def is_held_off(self) -> bool:
        """Whether nothing starts, because the token is or may be lost."""

    def wait_quiet(self, deadline: float) -> bool:
        """Wait until nothing is inside the module; whether nothing is."""

    def token_lost(self, cause: BaseException) -> list[Session]:
        """What is open is no more; the sessions, to be closed by whoever calls."""

    def still_down(self, error: BaseException) -> None:
        """One more try was in vain: what to tell those who wait too long."""

    def token_back(self, *, lost: bool) -> None:
        """All is well, and jobs start again; whether anything had been lost."""
