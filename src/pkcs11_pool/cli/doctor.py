"""The command that finds what is wrong with a set-up, and says how to mend it.

First what files tell, then the module, the token, the PIN: each only if what it stands
on is good. A wrong PIN is sent once; one that could lock the token is not sent.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from pkcs11 import PKCS11Error
from pkcs11.constants import TokenFlag

from pkcs11_pool import pins
from pkcs11_pool.cli import checks, oddities, output
from pkcs11_pool.cli.checks import Finding, bad, good, warning
from pkcs11_pool.cli.exits import CommandError, Exit, explained
from pkcs11_pool.cli.options import PIN_VARIABLE, TokenOptions
from pkcs11_pool.errors import (
    ModuleInUse,
    PinRefused,
    PinSourceError,
    PoolError,
)
from pkcs11_pool.faces.administration import list_tokens
from pkcs11_pool.state import LoginState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pkcs11_pool.faces.pool import TokenPool
    from pkcs11_pool.state import TokenInfo

_MARKS = {"good": ("ok", "green"), "warning": ("note", "yellow"), "bad": ("BAD", "red")}
_FEW_SESSIONS = 9


def doctor(
    *,
    where: TokenOptions = TokenOptions(),
    no_login: bool = False,
    json: bool = False,
) -> int:
    """Find what is wrong with a set-up, and say how to mend it. Status 1: it is bad.

    Without a token named it looks at the module and all its tokens; with one it also
    logs in, if it has a PIN.

    Args:
        where: Which module and token.
        no_login: Do not try the PIN.
        json: Print JSON.
    """
    found: list[Finding] = []

    async def work() -> None:
        async for finding in _findings(where, login=not no_login):
            found.append(finding)
            if not json:
                _show(finding)

    anyio.run(work)
    if json:
        output.as_json([asdict(finding) for finding in found])
    is_bad = any(finding.level == "bad" for finding in found)
    return Exit.NO if is_bad else Exit.OK


def _show(finding: Finding) -> None:
    mark, style = _MARKS[finding.level]
    output.say(f"{mark:4}  {finding.text}", "" if finding.level == "good" else style)
    if finding.advice:
        output.say(f"      -> {finding.advice}")


async def _findings(where: TokenOptions, *, login: bool) -> AsyncIterator[Finding]:
    for finding in checks.of_python():
        yield finding
    try:
        path = Path(where.module_path())
    except CommandError as error:
        yield bad("no module is named", str(error))
        return
    before = [*checks.of_file(path), *checks.of_softhsm(path)]
    for finding in before:
        yield finding
    if any(finding.level == "bad" for finding in before):
        return
    try:
        tokens = await list_tokens(path)
    except (PoolError, PKCS11Error) as error:
        yield _of_module(error)
        return
    yield good(f"the module answers, and shows {len(tokens)} tokens")
    async for finding in _of_tokens(where, tokens, login=login):
        yield finding


def _of_module(error: Exception) -> Finding:
    if isinstance(error, ModuleInUse):
        return bad(
            "the module is initialised already by other code in this process",
            "open the pool first and give pool.lib to that code, or finalise it there",
        )
    return bad(
        _text(error),
        "is a package missing that the module needs (ldd shows which), or its daemon "
        "not running?",
    )


async def _of_tokens(
    where: TokenOptions, tokens: list[TokenInfo], *, login: bool
) -> AsyncIterator[Finding]:
    ready = [info for info in tokens if info.flags & TokenFlag.TOKEN_INITIALIZED]
    if not tokens:
        yield bad(
            "no token is present",
            "put it into its slot, start its server, or set the module's own "
            "configuration",
        )
        return
    if not ready:
        yield bad("no token is initialised", "pkcs11-pool init-token LABEL")
        return
    for info in ready:
        yield _of_token(info)
    try:
        pool = where.pool(login=False)
    except (CommandError, PoolError):
        yield warning(
            "which token is meant was not said, so no login was tried",
            "give --token-label (or PKCS11_TOKEN)",
        )
        return
    async for finding in _of_login(where, pool, login=login):
        yield finding


def _of_token(info: TokenInfo) -> Finding:
    flags, name = info.flags, f"token {info}"
    officer = "pkcs11-pool set-pin --by-officer sets a new one"
    if not flags & TokenFlag.USER_PIN_INITIALIZED:
        return bad(f"{name}: its user has no PIN", f"{officer} as the first")
    if flags & TokenFlag.USER_PIN_LOCKED:
        return bad(f"{name}: the user's PIN is locked", officer)
    if flags & TokenFlag.USER_PIN_FINAL_TRY:
        return bad(
            f"{name}: one more wrong PIN locks it, so the pool sends none",
            "log in with another tool and the right PIN, or let the officer set one: "
            f"{officer}",
        )
    if flags & TokenFlag.USER_PIN_COUNT_LOW:
        return warning(
            f"{name}: a wrong PIN was sent since the last login",
            "a good login clears this; find who has a wrong PIN",
        )
    if flags & TokenFlag.USER_PIN_TO_BE_CHANGED:
        return warning(f"{name}: its PIN is to be changed", "pkcs11-pool set-pin")
    return good(name)


async def _of_login(
    where: TokenOptions, pool: TokenPool, *, login: bool
) -> AsyncIterator[Finding]:
    try:
        async with pool:
            yield good(f"a pool opens on {pool.token}")
            for finding in (*_of_sessions(pool.token), *oddities.of_token(pool.token)):
                yield finding
            if login:
                yield await _of_pin(where, pool)
            if pool.login_state is LoginState.USER:
                async with pool.session() as session:
                    told = await session.info()
                for finding in oddities.of_session(told):
                    yield finding
            count = len(await pool.find())
            yield good(f"{count} objects are to be seen")
    except (PoolError, PKCS11Error) as error:
        yield next(
            oddities.of_opening(error),
            bad(_text(error), "`pkcs11-pool tokens` shows what is there"),
        )


def _of_sessions(info: TokenInfo) -> list[Finding]:
    if info.max_sessions is None or not 0 < info.max_sessions < _FEW_SESSIONS:
        return []
    return [
        warning(
            f"the token has {info.max_sessions} sessions for each program",
            f"give the pool max_sessions={max(1, info.max_sessions - 1)}",
        )
    ]


async def _of_pin(where: TokenOptions, pool: TokenPool) -> Finding:
    try:
        source = _pin(where)
        if source is None:
            return warning(
                "there is no PIN, so no login was tried",
                f"give --pin-env, --pin-file, --pin-prompt, or set {PIN_VARIABLE}",
            )
        await pool.login(source)  # type: ignore[arg-type]  # hidden already
    except PinSourceError as error:
        return bad(_text(error), "the PIN was not sent")
    except PinRefused as error:
        return bad(
            f"the PIN is wrong: {_text(error)}",
            "mend the PIN before anything tries it again; the officer can set a new "
            "one: pkcs11-pool set-pin --by-officer",
        )
    except (CommandError, PoolError, PKCS11Error) as error:
        return bad(f"no login: {_text(error)}", "see what the token's manual says")
    return good("the PIN is right")


def _pin(where: TokenOptions) -> pins.Secret | None:
    uri = where.parsed()
    source = where.source()
    if source is None and uri.pin_value is not None:
        return uri.pin_value
    if source is None and uri.pin_source is not None:
        source = pins.from_pin_source(
            uri.pin_source, allow_command=where.allow_pin_command
        )
    if source is None:
        try:
            source = where.pin(uri)
        except CommandError:
            return None
    return source if isinstance(source, pins.Secret) else pins.literal(source())


def _text(error: Exception) -> str:
    told = explained(error)
    return type(error).__name__ if told is None else told[0]
