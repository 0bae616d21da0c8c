"""Every error that the pool decides on, grouped by what the caller can do.

What the token itself answers is not here: it reaches the caller as the
exception of :mod:`pkcs11.exceptions` that it is. An error of this module that
has a counterpart there is a subclass of both.
"""

from __future__ import annotations

from typing import Literal

from pkcs11 import exceptions as p11

__all__ = [
    "ForkedProcess",
    "InvalidCiphertext",
    "InvalidOption",
    "InvalidType",
    "InvalidURI",
    "KeyAmbiguous",
    "KeyFunctionNotPermitted",
    "KeyNotExportable",
    "KeyNotFound",
    "LoginRequired",
    "ModuleError",
    "ModuleInUse",
    "OutcomeUnknown",
    "PinLengthInvalid",
    "PinRefused",
    "PinSourceError",
    "PoolClosed",
    "PoolError",
    "PoolTimeout",
    "SessionClosed",
    "SessionObjectDestroyed",
    "SessionObjectNeedsSession",
    "StreamInterrupted",
    "TokenAmbiguous",
    "TokenInUse",
    "TokenNotFound",
    "TokenUnavailable",
    "TooManyWaiting",
    "WouldBlockLoop",
    "WouldDeadlock",
    "WrongLoop",
]


class PoolError(Exception):
    """Base of everything that the pool itself decides.

    Catch it to tell the pool's own refusals from the token's answers.
    """


# -- The caller's arguments: mend the call --------------------------------------


class InvalidOption(PoolError, ValueError):
    """An argument is wrong. The message says which one, and what it may be."""


class InvalidType(InvalidOption, TypeError):
    """An argument has a type that this call cannot take."""


class InvalidURI(InvalidOption):
    """A PKCS#11 URI (RFC 7512) cannot be read. The message says where."""


class KeyFunctionNotPermitted(InvalidOption):
    """The key's attributes do not allow this operation.

    Use another key, or make one with the capability (``CKA_SIGN``,
    ``CKA_DECRYPT``, …) set to true. Nothing was done with the key.
    """


class KeyNotExportable(InvalidOption):
    """The value of a private key was asked for. It never leaves the token.

    Use the key where it is: let the pool sign, decrypt or derive with it.
    """


class SessionObjectNeedsSession(InvalidOption):
    """The call would make a session object in a session that ends with the call.

    Make it inside ``async with pool.session() as session:``, or make a token
    object with ``store=True``. Nothing was sent.
    """


# -- The key or object: look again ----------------------------------------------


class KeyNotFound(PoolError, p11.NoSuchKey):
    """No object on the token matches. Check label, id, class and token."""


class KeyAmbiguous(PoolError, p11.MultipleObjectsReturned):
    """More than one object matches. Name the key more closely, by ``id``."""


class SessionObjectDestroyed(PoolError):
    """The session that owned this object is closed, so the object is gone.

    Also after a logout, for a private session object, and after its ``destroy``.
    Make the object again in an open session.
    """


class InvalidCiphertext(PoolError, ValueError):
    """What was given was not encrypted with this key and context, or was changed.

    Do not use any part of it. ``__cause__`` is the token's answer, if it was asked.
    """


# -- Login: give a PIN, or another one ------------------------------------------


class LoginRequired(PoolError, p11.UserNotLoggedIn):
    """The operation needs a login, and nobody is logged in.

    Call ``await pool.login(pin)``. The pool does not log in by itself after
    ``logout()``, nor without a PIN.
    """


class PinRefused(PoolError, p11.PinIncorrect):
    """This PIN was not accepted, or was not even sent, to keep the token unlocked.

    Give another PIN with ``await pool.login(pin)``, or, when this one is known
    to be right, insist with ``force=True``. A locked PIN needs the security
    officer (``so.init_pin``).
    """


class PinLengthInvalid(PinRefused, InvalidOption, p11.PinLenRange):
    """The PIN is shorter or longer than the token takes. It was not sent."""


class PinSourceError(PinRefused):
    """The PIN source raised, or gave something that is no PIN. Nothing was sent."""


# -- Time and room: wait, or ask for less ---------------------------------------


class PoolTimeout(PoolError, TimeoutError):
    """The deadline of the operation has passed.

    Attributes:
        phase: ``"waiting"``: nothing was sent to the token, the call may be made
            again. ``"running"``: it was sent; a call that changes the token may
            have happened.
    """

    def __init__(self, message: str, phase: Literal["waiting", "running"]) -> None:
        super().__init__(message)
        self.phase: Literal["waiting", "running"] = phase

    def __reduce__(self) -> tuple[type[PoolTimeout], tuple[str, str]]:
        """Keep the phase through a pickle."""
        return type(self), (str(self), self.phase)


class TooManyWaiting(PoolError):
    """``max_waiting`` callers wait already. Shed load, or raise the limit."""


class WouldDeadlock(PoolError):
    """The caller holds a session and asks for one more while all are lent.

    Use ``key.on(session)``, or give the session back first.
    """


class WouldBlockLoop(PoolError):
    """A blocking call was made on a thread that runs an event loop.

    Await the async form, or call from a worker thread.
    """


class WrongLoop(PoolError):
    """Another library that takes part here runs on asyncio, and this is trio.

    Use its blocking form on a worker thread; the message says how. Nothing was sent.
    """


# -- Sessions and the pool's own life -------------------------------------------


class PoolClosed(PoolError):
    """The pool is not open: closed, closing, or never opened."""


class SessionClosed(PoolError, p11.SessionClosed):
    """This ``PooledSession`` is over. ``__cause__`` says why when it was lost."""


class StreamInterrupted(SessionClosed):
    """Data in parts was cut off: by the SO, by a lost login, or by a lost token.

    Begin again, with the data from its start. The pool does that by itself where
    it still has the data: not with an iterator, which cannot be read twice, and not
    when output was given already. After ``logout()`` it is ``LoginRequired``.
    """


class ForkedProcess(PoolError):
    """The pool belongs to the process that was forked. Nothing was touched.

    Use the start methods ``spawn`` or ``forkserver``, or open after the fork.
    """


# -- Token and module: mend the set-up, or wait ---------------------------------


class TokenNotFound(PoolError, p11.NoSuchToken):
    """No token in any slot of the module matches. The message lists what is there."""


class TokenAmbiguous(PoolError, p11.MultipleTokensReturned):
    """More than one token matches. Add ``token_serial`` or ``slot_id``."""


class TokenInUse(PoolError):
    """Another open pool of this process serves this token. Use that one."""


class TokenUnavailable(PoolError):
    """The token or its server is down. ``__cause__`` says how.

    The pool goes on trying, and serves again by itself; shed load meanwhile. Where a
    call hangs in the module only a new process can help, and the message says so.
    """


class ModuleInUse(PoolError):
    """Somebody else in this process has initialised the module already.

    Open the pool first and hand ``pool.lib`` to the other code, or let the
    other code finalise the module before.
    """


class ModuleError(PoolError):
    """The file cannot be used as a Cryptoki module. The message says why."""


class OutcomeUnknown(PoolError):
    """A call that must not be repeated was lost with the token.

    It may have happened. Look at the token, for what it makes or changes, before
    making it again.
    """
