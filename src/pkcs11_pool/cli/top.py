"""The command that watches a running service through its status app.

It reads ``/status.json`` and computes rates from two readings; what a service counts
under the names of ``PoolStats`` is shown as it is.
"""

from __future__ import annotations

import base64
import json as jsons
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import urlsplit, urlunsplit

from cyclopts import Parameter

from pkcs11_pool.cli import output
from pkcs11_pool.cli.exits import CommandError, Exit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

SCHEMA: Final = 1
_FILE: Final = "/status.json"
_COLUMNS: Final = (
    "pool",
    "state",
    "login",
    "sessions",
    "running",
    "waiting",
    "op/s",
    "wait p50 ms",
    "run p50 ms",
    "run p99 ms",
    "failed",
    "timed out",
    "lost",
)
_LEAST: Final = 0.1
_BAD_REQUEST: Final = 400
_UNKNOWN: Final = 401
_FORBIDDEN: Final = 403
_MOVED: Final = (301, 302, 303, 307, 308)
_FAILED: Final = 500


def top(
    url: str,
    /,
    *,
    interval: float = 1.0,
    count: int | None = None,
    user_env: Annotated[tuple[str, str] | None, Parameter()] = None,
    header_env: Annotated[tuple[str, str] | None, Parameter()] = None,
    json: bool = False,
) -> int:
    """Watch the pools of a running service, until Ctrl-C.

    Args:
        url: Where its status app is mounted, such as http://localhost:8000/pkcs11.
        interval: Seconds between two readings.
        count: End after so many readings.
        user_env: A user's name, and the variable that holds the password, for a status
            app with BasicAuth.
        header_env: A header's name, and the variable that holds its value, for one with
            another guard.
        json: Print each reading as one line of JSON.
    """
    if not interval >= _LEAST:
        raise CommandError(f"--interval is {_LEAST} seconds or more, not {interval}")
    if count is not None and count < 1:
        raise CommandError(f"--count is 1 or more, not {count}")
    headers = {**_basic(user_env), **_headers(header_env)}
    readings = _readings(_place(url), interval, count, headers)
    if json or not sys.stdout.isatty():
        _plain(readings, json=json)
    else:
        _live(readings)
    return Exit.OK


def _plain(readings: Iterator[dict[str, Any]], *, json: bool) -> None:
    before: dict[str, Any] | None = None
    for now in readings:
        if json:
            sys.stdout.write(jsons.dumps(now) + "\n")
        else:
            output.console().print(view(now, before))
        sys.stdout.flush()
        before = now


def _live(readings: Iterator[dict[str, Any]]) -> None:
    from rich.live import Live  # noqa: PLC0415  # only on a terminal

    before: dict[str, Any] | None = None
    with Live(console=output.console(), screen=True, auto_refresh=False) as shown:
        for now in readings:
            shown.update(view(now, before), refresh=True)
            before = now


def _readings(
    url: str, interval: float, count: int | None, headers: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """One reading after another; the first errors end it."""
    try:
        import httpx  # noqa: PLC0415  # an extra, and only here
    except ModuleNotFoundError as error:
        raise CommandError(
            f"top needs {error.name}: pip install 'pkcs11-pool[cli]'"
        ) from error
    done = 0
    try:
        with httpx.Client(headers=headers, timeout=10.0) as client:
            while True:
                yield checked(client.get(url), url, known=bool(headers))
                done += 1
                if done == count:
                    return
                time.sleep(interval)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CommandError(_silent(url, error), Exit.UNAVAILABLE) from error


def _silent(url: str, error: Exception) -> str:
    """Why nobody answers, and what to look at first."""
    text = str(error) or type(error).__name__
    scheme = url.partition(":")[0]
    if "SSL" in text:
        hint = "is it http:// there, or a certificate that this machine does not know?"
    elif "disconnected" in text:
        hint = "is it https:// there?"
    elif "Name or service" in text or "Temporary failure in name" in text:
        hint = "is the name right?"
    else:
        hint = "is the service running, and is this its port?"
    return f"{url.removesuffix(_FILE)} does not answer by {scheme}: {text}; {hint}"


def checked(answer: Any, url: str, *, known: bool = False) -> dict[str, Any]:
    """What a status app answered.

    Args:
        answer: Its answer.
        url: Where it was asked for.
        known: Who asks had said who it is.

    Raises:
        CommandError: It refused, or this is none.
    """
    try:
        found = answer.json() if answer.is_success else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("pools"), list):
        place = url.removesuffix(_FILE)
        raise CommandError(_no_report(place, answer, known=known), Exit.UNAVAILABLE)
    if found.get("schema") != SCHEMA:
        raise CommandError(
            f"{url} speaks schema {found.get('schema')}, and this program {SCHEMA}: "
            "use the version of pkcs11-pool that the service has"
        )
    return found


def _no_report(place: str, answer: Any, *, known: bool) -> str:
    """Why there is no report, and what to give instead."""
    status = answer.status_code
    if status in (_UNKNOWN, _FORBIDDEN):
        if known:
            return (
                f"the guard of {place} refused what was sent ({status}): is it right?"
            )
        return (
            f"the guard of {place} wants to know who asks ({status}): give --user-env "
            "USER VARIABLE, or --header-env NAME VARIABLE"
        )
    if status == _BAD_REQUEST and "allowed_hosts" in answer.text:
        return (
            f"{place} does not answer to that name: give one that is in its "
            "StatusApp(allowed_hosts=...), such as localhost, or add this one there"
        )
    if status in _MOVED:
        to = answer.headers.get("location", "elsewhere").removesuffix(_FILE)
        return f"{place} sends to {to} ({status}): give that address"
    if status >= _FAILED:
        return f"the service fails at {place} ({status}): its log says why"
    return (
        f"there is no status app of pkcs11-pool at {place} ({status}): give the "
        "address where it is mounted, such as http://localhost:8000/pools"
    )


def view(now: dict[str, Any], before: dict[str, Any] | None) -> Table:
    """The pools as a table."""
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    at = time.strftime("%H:%M:%S", time.localtime(now.get("at", 0)))
    table = Table(box=box.SIMPLE_HEAD, title=f"pkcs11-pool at {at}", pad_edge=False)
    for name in _COLUMNS:
        left = name in ("pool", "state", "login")
        table.add_column(name, justify="left" if left else "right")
    earlier = {pool.get("name"): pool for pool in (before or {}).get("pools", [])}
    seconds = now.get("at", 0) - (before or {}).get("at", 0)
    for pool in now["pools"]:
        cells = row(pool, earlier.get(pool.get("name")), seconds)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def row(
    pool: dict[str, Any], before: dict[str, Any] | None, seconds: float
) -> list[str]:
    """One pool as text; a dash where there is nothing to tell."""
    return [
        str(pool.get("name", "-")),
        str(pool.get("state", "-")),
        str(pool.get("login_state", "-")),
        f"{_count(pool, 'sessions_open')}/{_count(pool, 'sessions_max')}",
        _count(pool, "operations_running"),
        _count(pool, "operations_waiting"),
        _rate(pool, before, seconds),
        _milliseconds(pool, "wait_p50"),
        _milliseconds(pool, "run_p50"),
        _milliseconds(pool, "run_p99"),
        _count(pool, "operations_failed"),
        _count(pool, "operations_timed_out"),
        _count(pool, "calls_lost"),
    ]


def _count(pool: dict[str, Any], name: str) -> str:
    value = pool.get(name)
    return "-" if value is None else f"{value:,}"


def _milliseconds(pool: dict[str, Any], name: str) -> str:
    value = pool.get(name)
    return "-" if value is None else f"{1000 * value:.2f}"


def _rate(pool: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> str:
    if before is None or seconds <= 0:
        return "-"
    done = pool.get("operations_total", 0) - before.get("operations_total", 0)
    # A service that was started anew counts from 0.
    return "-" if done < 0 else f"{done / seconds:,.0f}"


def _place(url: str) -> str:
    """The address of the report, whichever page of the status app was given.

    Raises:
        CommandError: It is no address, or holds a password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        guess = f"http://{url}" if url[:1].isalnum() and "://" not in url else ""
        hint = f"{guess}?" if guess else "http://HOST:PORT/PATH"
        raise CommandError(f"{url!r} is no address: {hint}")
    if parts.password is not None:
        # Not shown: others see the words of a program, and read its output.
        raise CommandError(
            "a password is no word of a command, because others see it: give "
            "--user-env USER VARIABLE"
        )
    path = parts.path.rstrip("/")
    for page in (_FILE, "/metrics", "/livez", "/readyz"):
        path = path.removesuffix(page)
    return urlunsplit((parts.scheme, parts.netloc, path + _FILE, "", ""))


def _basic(named: tuple[str, str] | None) -> dict[str, str]:
    """The header of RFC 7617."""
    if named is None:
        return {}
    pair = f"{named[0]}:{_variable('--user-env', named[1])}".encode()
    return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}


def _headers(named: tuple[str, str] | None) -> dict[str, str]:
    if named is None:
        return {}
    return {named[0]: _variable("--header-env", named[1])}


def _variable(word: str, name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise CommandError(f"{word}: the variable {name} is not set")
    return value
