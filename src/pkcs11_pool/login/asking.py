"""Gets the PIN from a callable, for all who wait for the login: it is asked once.

A plain callable is asked on a thread of its own; one that must be awaited, by a caller
who waits for the login.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkcs11_pool.login.question import Question

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.jobs import Job
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.login.mailbox import Mailbox
    from pkcs11_pool.pins import Pin, Source


class Asking:
    """Who waits for the user's login under way, or for its PIN.

    Args:
        gate: Where callers wait.
        mail: Where answers come.
        came: What is done with an answer.

    Attributes:
        wanted_by_operations: Whether the login was lost, and operations wait for it.
        insisted: Whether one of the requests said ``force=True``.
        question: A plain source that was asked and has not answered.
    """

    def __init__(
        self,
        gate: Gate,
        mail: Mailbox,
        came: Callable[[Pin | None, BaseException | None], None],
    ) -> None:
        self.wanted_by_operations = False
        self.insisted = False
        self.question: Question | None = None
        self._gate = gate
        self._mail = mail
        self._came = came
        self._waiting: list[Job] = []
        # Whether a caller was sent for the PIN, or a source asked, and is not back.
        self._under_way = False

    def ask(self, source: Source, job: Job | None) -> None:
        """Get a PIN from a callable: here, or by a caller if it must be awaited."""
        self._waiting = [waiting for waiting in self._waiting if not waiting.dropped]
        if job is not None:
            self._waiting.append(job)
        if self._under_way:
            # Whoever was sent may have gone since, when nobody else was there.
            self._gate.send_another()
            return
        self._under_way = True
        if source.is_async:
            self._gate.send_for_pin(source)
        elif self.question is None:
            # One that hangs is asked no second time: whoever comes later joins in.
            self.question = Question(source, self._mail.put, self._answered)

    def _answered(self, question: Question) -> None:
        """A plain PIN source has come back. Nobody may want its answer any more."""
        self.question = None
        if self._under_way:
            # Else it is not wanted: somebody logged in by another PIN, or out.
            self._came(question.pin, question.error)

    def take_waiting(self) -> list[Job]:
        """Those who wait by name; whoever takes them settles them."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def refuse_waiting(self, error: BaseException | None) -> None:
        """Settle those who wait by name."""
        for job in self.take_waiting():
            self._gate.settle(job, None, error)

    def over(self, error: BaseException | None) -> None:
        """The login succeeded, or failed: settle all who wait, by name or not."""
        self.refuse_waiting(error)
        self.wanted_by_operations = self.insisted = self._under_way = False
        self._gate.login_settled(error)
