"""The command that finds what is wrong with a set-up, and says how to mend it.

First what files tell, then the module, the token, the PIN: each only if what it stands
on is good. A wrong PIN is sent once; one that could lock the token is not sent.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from signal import Signals
from subprocess import DEVNULL
from typing import TYPE_CHECKING

import anyio
from pkcs11 import PKCS11Error
from pkcs11.constants import TokenFlag

from pkcs11_pool.cli import checks, oddities, output
from pkcs11_pool.cli.checks import Finding, bad, good, warning
from pkcs11_pool.cli.exits import CommandError, Exit, explained
from pkcs11_pool.cli.options import TokenOptions
from pkcs11_pool.cli.output import counted
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
_ANOTHER = (sys.executable, "-m", "pkcs11_pool")


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
    where.parsed()  # what is wrong with a word is no finding

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
    if (crash := await _tried(path, where.timeout)) is not None:
        yield crash
        return
    try:
        tokens = await list_tokens(path)
    except (PoolError, PKCS11Error) as error:
        yield _of_module(error)
        return
    yield good(f"the module answers, and shows {counted(len(tokens), 'token')}")
    async for finding in _of_tokens(where, tokens, login=login):
        yield finding


async def _tried(path: Path, seconds: float) -> Finding | None:
    """Whether a process that only lists the tokens lives through it.

    A module that is loaded can bring a process down, or never come back: so another
    process goes first. What it says otherwise is found out here again.
    """
    words = (*_ANOTHER, "tokens", "--json", "--module", str(path))
    try:
        with anyio.fail_after(seconds):
            done = await anyio.run_process(words, check=False, stderr=DEVNULL)
    except TimeoutError:
        return bad(
            f"the module does not come back within {seconds:g} s",
            "is its server or daemon running, and reachable from here?",
        )
    if done.returncode >= 0:
        return None
    return bad(
        f"the module brings the process down ({Signals(-done.returncode).name})",
        "is the file whole? Install its package anew, for this release of the system",
    )


def _of_module(error: Exception) -> Finding:
    if isinstance(error, ModuleInUse):
        return bad(
            "the module is initialised already by other code in this process",
            "open the pool first and give pool.lib to that code, or finalise it there",
        )
    return checks.of_load(_text(error))


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
    named = where.token_label or where.parsed().token
    for info in ready:
        for finding in (_of_token(info), *_of_officer(info)):
            # What is wrong with another token than the one that is meant is noted.
            other = finding.level == "bad" and named not in (None, info.label)
            yield replace(finding, level="warning") if other else finding
    try:
        pool = where.pool(login=False)
    except (CommandError, PoolError) as error:
        yield warning(
            "which token is meant is not clear, so no login was tried", _text(error)
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


def _of_officer(info: TokenInfo) -> list[Finding]:
    """What the token says of the security officer's PIN."""
    flags, who = info.flags, f"token {info}: the security officer's PIN"
    wipe = "pkcs11-pool init-token --wipe, which destroys all objects"
    if flags & TokenFlag.SO_PIN_LOCKED:
        return [
            warning(
                f"{who} is locked",
                f"the user goes on; a user's PIN that is lost too needs {wipe}",
            )
        ]
    if flags & TokenFlag.SO_PIN_FINAL_TRY:
        return [
            warning(
                f"{who} is locked by one more wrong one",
                "find the right one before anything tries it; a locked one needs "
                f"{wipe}",
            )
        ]
    if flags & TokenFlag.SO_PIN_COUNT_LOW:
        return [
            warning(
                f"{who} was wrong since the last login",
                "a good login of the officer clears this; find who has a wrong one",
            )
        ]
    return []


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
            yield good(f"{counted(len(await pool.find()), 'object')} to be seen")
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
        try:
            pin = where.secret()
        except CommandError as error:
            return warning("there is no PIN, so no login was tried", _text(error))
        await pool.login(pin)  # type: ignore[arg-type]  # hidden already
    except PinSourceError as error:
        return bad(_text(error), "the PIN was not sent")
    except PinRefused as error:
        if _kept_back(pool):
            # What is to be done stands with the token.
            return warning("the PIN was not sent", _text(error))
        return bad(
            f"the PIN is wrong: {_text(error)}",
            "mend the PIN before anything tries it again; the officer can set a new "
            "one: pkcs11-pool set-pin --by-officer",
        )
    except (CommandError, PoolError, PKCS11Error) as error:
        return bad(f"no login: {_text(error)}", "see what the token's manual says")
    return good("the PIN is right")


def _kept_back(pool: TokenPool) -> bool:
    """Whether the token told before that a PIN may lock it, or has."""
    risky = TokenFlag.USER_PIN_LOCKED | TokenFlag.USER_PIN_FINAL_TRY
    return bool(pool.token.flags & risky) and not pool.stats().logins_failed_total


def _text(error: Exception) -> str:
    told = explained(error)
    return type(error).__name__ if told is None else told[0]
