"""Using an object in a call: by its number, and sure that it was that object.

On its session, on a worker thread. Numbers are the handle cache's; what is done here
is to make good where one died or went to another object meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from pkcs11 import exceptions as p11
from pkcs11.constants import ObjectClass

from pkcs11_pool.cryptoki import recovery, rv
from pkcs11_pool.cryptoki.keys import GONE, SessionObject, narrowed
from pkcs11_pool.errors import (
    KeyFunctionNotPermitted,
    KeyNotFound,
    OutcomeUnknown,
    SessionObjectDestroyed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11_pool.cryptoki.keys import Entry, HandleCache, Target
    from pkcs11_pool.cryptoki.session import Session

T = TypeVar("T")

_TRIES: Final = 4
_NOT_PERMITTED: Final = rv.CODES["CKR_KEY_FUNCTION_NOT_PERMITTED"]


def with_object(
    session: Session,
    cache: HandleCache,
    target: Target,
    classes: tuple[int, ...] | None,
    call: Callable[[Entry], T],
) -> T:
    """Make a call with an object's number, and be sure it was that object's.

    A dead number is looked up once more. When objects changed during the call,
    the number is verified again before the result leaves; a result that another
    object may have made is thrown away and the call made anew.
    """
    if isinstance(target, SessionObject):
        return _with_session_object(session, target, call)
    for attempt in range(_TRIES):
        entry = cache.entry(session, target, classes)
        # As of when it was sure, not of now: what comes in between is noticed, too.
        mark = entry.mark
        try:
            result = call(entry)
        except p11.PKCS11Error as error:
            error_stands = stands(session, cache, target, entry, mark, error)
            if error_stands or attempt == _TRIES - 1:
                raise
        else:
            if mark == cache.mark >= 0 or cache.verify(session, entry):
                return result
        cache.drop(narrowed(target, classes))
    message = f"{target} changes on the token faster than it can be used"
    raise KeyNotFound(message)


def stands(  # noqa: PLR0917  # as the loop above has them
    session: Session,
    cache: HandleCache,
    target: Target,
    entry: Entry,
    mark: int,
    error: p11.PKCS11Error,
) -> bool:
    """Whether the error of a call is that object's, and no other's.

    Raises:
        KeyFunctionNotPermitted, OutcomeUnknown: The error that it is for the caller.
    """
    code = rv.code_of(error)
    if code == _NOT_PERMITTED:
        raise _not_permitted(target, entry) from error
    if recovery.is_stateful(entry.key_type):
        _check_used_up(target, entry, error)
        recovery.forbid_repeat(error)
    if code in rv.NO_OBJECT:
        return False
    return mark == cache.mark >= 0 or cache.verify(session, entry)


def _not_permitted(target: Target, entry: Entry) -> KeyFunctionNotPermitted:
    kind = ObjectClass(entry.object_class).name.lower().replace("_", " ")
    return KeyFunctionNotPermitted(
        f"the token does not allow this with {target}, a {kind}: the private key "
        "signs, decrypts, unwraps and derives, the public key verifies, encrypts and "
        "wraps; or make a key with that capability"
    )


def _check_used_up(target: Target, entry: Entry, error: p11.PKCS11Error) -> None:
    """Keep a signature that was lost with its token from being made again.

    Raises:
        OutcomeUnknown: The private key may have used up one of its few.
    """
    if (
        entry.object_class == ObjectClass.PRIVATE_KEY
        and recovery.classify(error).is_outage
    ):
        message = (
            f"the token was lost while {target} signed: it may have used up one of the "
            "signatures that it can make; whoever wants another one asks again"
        )
        raise OutcomeUnknown(message) from error


def _with_session_object(
    session: Session, target: SessionObject, call: Callable[[Entry], T]
) -> T:
    with target.owner.used():
        target.check(session.epoch, session.generation)
        with target.told_when_gone():
            result = call(target.entry)
        if target.destroyed or target.owner.gone:
            # The number may have been another object's by then.
            raise SessionObjectDestroyed(GONE)
        return result
