"""Lets nothing start on the token, for a request that wants it quiet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pkcs11_pool.jobs import Phase
from pkcs11_pool.login.mailbox import Request

if TYPE_CHECKING:
    from pkcs11_pool.jobs import Job
    from pkcs11_pool.login.gate import Gate
    from pkcs11_pool.login.mailbox import Mailbox

_LOOK: Final = 0.05
"""Seconds between two looks at the request that waits, during a login."""


def pause_for(job: Job, gate: Gate, mail: Mailbox, *, leases: bool) -> bool:
    """Pause the queue for a request; whether it succeeded.

    Logins go on meanwhile: those who are waited for may need one. Every other
    request is kept for later; whoever ends the pause has it posted again.
    """
    while (quiet := gate.pause(job, leases=leases)) is None:
        while gate.login_awaited() and job.phase is not Phase.SETTLED:
            message = mail.get(_LOOK)
            if message is None:
                continue
            if isinstance(message, Request) and not message.is_login:
                mail.postpone(message)
            else:
                mail.handle(message)
    return quiet
