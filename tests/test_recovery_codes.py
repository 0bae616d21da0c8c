"""Every code that a token may answer, through a whole pool: what is made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pkcs11 import KeyType, Mechanism, PKCS11Error

from pkcs11_pool import (
    KeyFunctionNotPermitted,
    LoginRequired,
    LoginState,
    OutcomeUnknown,
)
from pkcs11_pool.cryptoki import recovery, rv
from pkcs11_pool.cryptoki.recovery import Fault
from poolkit import eventually, make_ec_key

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, TokenPool

_VENDORS = [0x80000001, 0xCE534351]
_ROOM = rv.CODES["CKR_BUFFER_TOO_SMALL"]
"""Not the end of a call, but a question for more room: ``test_outputs``."""
_CODES = [*(code for code in sorted(rv.NAMES) if code not in (0, _ROOM)), *_VENDORS]
_AGAIN = {Fault.SESSION, Fault.TOKEN, Fault.MODULE, Fault.HANDLE}
_LOOKED_AT = rv.CODES["CKR_OBJECT_HANDLE_INVALID"]
_BUSY = rv.CODES["CKR_FUNCTION_FAILED"]


async def test_whatever_a_signature_is_answered(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Made again, unseen, or the caller has the token's own error, after one call."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        seen = {}
        for code in _CODES:
            fault.reset_counts()
            # The operation is at its end then, as the standard has it.
            fault.on("C_Sign", replace=code)
            seen[code] = (await _came_to(_sign(key)), fault.count("C_Sign"))
            await _well(pool)
        expected: dict[int, Any] = {}
        for code in _CODES:
            group = recovery.fault_of(code)
            again = group in _AGAIN or code == _BUSY
            told = LoginRequired if group is Fault.LOGIN else code
            expected[code] = ("done", 2) if again else (told, 1)
        assert seen == expected
        assert pool.stats().recoveries_total == 0


async def test_whatever_a_key_generation_is_answered(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Sent once, whatever comes; where its outcome is lost, the caller is told so."""
    async with make_pool(module=fault.path) as pool:
        seen = {}
        for code in _CODES:
            fault.reset_counts()
            fault.on("C_GenerateKey", answer=code)
            make = pool.generate_key(KeyType.AES, 128, label="new", store=True)
            seen[code] = (await _came_to(make), fault.count("C_GenerateKey"))
            await _well(pool)
        expected: dict[int, Any] = {}
        for code in _CODES:
            group = recovery.fault_of(code)
            told = LoginRequired if group is Fault.LOGIN else code
            # What was made is looked at, and only that look can come to this.
            unknown = group.is_outage or code == _LOOKED_AT
            expected[code] = (OutcomeUnknown if unknown else told, 1)
        assert seen == expected


async def _sign(key: KeyRef) -> bytes:
    return await key.sign(b"d" * 32, mechanism=Mechanism.ECDSA)


async def _came_to(call: Awaitable[object]) -> Any:
    """The code of its error, the class of one of the pool, or that it is done."""
    try:
        await call
    except (LoginRequired, OutcomeUnknown) as error:
        return type(error)
    except KeyFunctionNotPermitted as error:
        # As the token says it, with what to do.
        return rv.code_of(error.__cause__ or error)
    except PKCS11Error as error:
        return rv.code_of(error)
    return "done"


async def _well(pool: TokenPool) -> None:
    """What was only said to be lost has been looked at."""
    await eventually(lambda: pool.state.value == "ready")
    assert pool.login_state is LoginState.USER
