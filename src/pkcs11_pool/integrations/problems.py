"""Which HTTP answer each error is, for services that stand on a pool.

A table, and no web framework. What a client is told are fixed sentences: the text of
an error may name a key or a path, and is for the service's own log.

Source: RFC 9457, "Problem Details for HTTP APIs"; RFC 9110, "Status Codes".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from pkcs11 import exceptions as p11

from pkcs11_pool import errors

MEDIA_TYPE: Final = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Problem:
    """The answer to a request that failed.

    Attributes:
        status: The HTTP status code.
        detail: What the client is told.
        retry_after: Seconds after which to try again; None: no use in that.
        code: The class of the error, for the member ``code``.
    """

    status: HTTPStatus
    detail: str
    retry_after: int | None = None
    code: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """``Content-Type``, and ``Retry-After`` where it helps."""
        headers = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return headers

    @property
    def members(self) -> dict[str, str | int]:
        """The members of the JSON object."""
        return {
            "type": "about:blank",
            "title": self.status.phrase,
            "status": int(self.status),
            "detail": self.detail,
            "code": self.code,
        }

    @property
    def body(self) -> bytes:
        """The JSON object."""
        return json.dumps(self.members).encode()


_BAD, _NOT_FOUND = HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND
_CONFLICT, _GONE = HTTPStatus.CONFLICT, HTTPStatus.GONE
_BUG, _GATEWAY = HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY
_DOWN, _LATE = HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT

_SET_UP: Final = "The service is not set up rightly. Its operator has to see to it."
_MISTAKE: Final = "The service made a mistake."
_NOT_IN: Final = "The service is not logged in to its token."

PROBLEMS: Final[dict[type[Exception], Problem]] = {
    # What the client asked for.
    errors.InvalidOption: Problem(_BAD, "A value of the request is not possible."),
    errors.InvalidCiphertext: Problem(_BAD, "This was not encrypted here, or changed."),
    errors.KeyNotFound: Problem(_NOT_FOUND, "There is no such key."),
    errors.KeyAmbiguous: Problem(_CONFLICT, "More than one key has that name."),
    errors.KeyFunctionNotPermitted: Problem(_CONFLICT, "The key is not for this use."),
    errors.SessionObjectDestroyed: Problem(_GONE, "The object is gone."),
    # Too much at once: nothing was done, it may be asked again.
    errors.PoolTimeout: Problem(_DOWN, "The service is busy. Nothing was done.", 1),
    errors.TooManyWaiting: Problem(_DOWN, "The service is busy. Nothing was done.", 1),
    errors.StreamInterrupted: Problem(_DOWN, "The work was cut off. Begin again.", 1),
    errors.SessionClosed: Problem(_DOWN, "The work was cut off. Begin again.", 1),
    errors.PoolClosed: Problem(_DOWN, "The service is starting or stopping.", 5),
    errors.TokenUnavailable: Problem(_DOWN, "The token does not answer.", 5),
    # It takes a person to mend this: asking again is no use.
    errors.LoginRequired: Problem(_DOWN, _NOT_IN),
    errors.PinRefused: Problem(_DOWN, _NOT_IN),
    errors.TokenNotFound: Problem(_DOWN, _SET_UP),
    errors.TokenAmbiguous: Problem(_DOWN, _SET_UP),
    errors.TokenInUse: Problem(_DOWN, _SET_UP),
    errors.ModuleInUse: Problem(_DOWN, _SET_UP),
    errors.ModuleError: Problem(_DOWN, _SET_UP),
    errors.InvalidURI: Problem(_DOWN, _SET_UP),
    # It may have been done.
    errors.OutcomeUnknown: Problem(
        _GATEWAY, "The token went away during the work. It may have been done."
    ),
    # The service's own mistakes.
    errors.WouldDeadlock: Problem(_BUG, _MISTAKE),
    errors.WouldBlockLoop: Problem(_BUG, _MISTAKE),
    errors.WrongLoop: Problem(_BUG, _MISTAKE),
    errors.ForkedProcess: Problem(_BUG, _MISTAKE),
    errors.SessionObjectNeedsSession: Problem(_BUG, _MISTAKE),
    errors.PoolError: Problem(_BUG, _MISTAKE),
    # What the token itself answers.
    p11.DataInvalid: Problem(_BAD, "The token does not take this data."),
    p11.DataLenRange: Problem(_BAD, "The data is too long or too short."),
    p11.EncryptedDataInvalid: Problem(_BAD, "The data cannot be decrypted."),
    p11.EncryptedDataLenRange: Problem(_BAD, "The data cannot be decrypted."),
    p11.SignatureInvalid: Problem(_BAD, "The signature is not valid."),
    p11.SignatureLenRange: Problem(_BAD, "The signature is not valid."),
    p11.MechanismInvalid: Problem(_BAD, "The token does not do this with this key."),
    p11.MechanismParamInvalid: Problem(_BAD, "A parameter is not possible."),
    p11.PKCS11Error: Problem(_GATEWAY, "The token refused, or failed."),
}
"""By class; what is not here is as its nearest base class."""

TIMEOUT_RUNNING: Final = Problem(
    _LATE, "The token did not answer in time. It may have been done."
)
"""Instead, for a ``PoolTimeout`` whose phase is ``"running"``."""


def problem_of(error: Exception) -> Problem:
    """The answer for an error of the pool or of the token; for any other a 500."""
    name = type(error).__name__
    if isinstance(error, errors.PoolTimeout) and error.phase == "running":
        found = TIMEOUT_RUNNING
    else:
        known = (PROBLEMS[cls] for cls in type(error).__mro__ if cls in PROBLEMS)
        found = next(known, Problem(_BUG, _MISTAKE))
    return Problem(found.status, found.detail, found.retry_after, name)
