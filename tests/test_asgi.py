"""The status app: who may look, what is told, and where it can be mounted."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from litestar import Litestar, asgi
from pkcs11 import KeyType
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Mount

from pkcs11_pool import InvalidOption, KeyNotFound, TokenPool
from pkcs11_pool.asgi import BasicAuth, StatusApp
from pkcs11_pool.asgi.page import PAGE, POLICY
from pkcs11_pool.integrations.lifespan import NAME
from poolkit import (
    Hold,
    digest,
    eventually,
    given_up,
    settled,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakePool

SECRET = "secret-label"  # noqa: S105  # the name of a key
PATHS = ("/", "/status.json", "/metrics")


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """It awaits nothing of its own; two loops are enough."""
    return request.param


def client(
    app: Any, pool: TokenPool | None = None, host: str = "localhost", root: str = ""
) -> httpx.AsyncClient:
    """Asks an application, as a server would that has the pool in its state."""

    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        more = {"state": {NAME: pool}, "root_path": root}
        await app(scope | more, receive, send)

    transport = httpx.ASGITransport(with_state)
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allow_anonymous": False},
        {"allow_anonymous": True, "guard": lambda _scope: True},
        {"guard": "password"},
        {"allow_anonymous": True, "allowed_hosts": "localhost"},
        {"allow_anonymous": True, "pools": 3},
        {"allow_anonymous": True, "pools": ["pool"]},
    ],
)
def test_it_is_off_until_somebody_says_who_may_look(options: Any) -> None:
    """A mount that was forgotten shows nothing to the world."""
    with pytest.raises(InvalidOption):
        StatusApp(**options)


async def test_it_tells_of_the_pool(pool: TokenPool) -> None:
    """A page, figures in JSON, and metrics."""
    await digest(pool)
    await settled(pool)
    async with client(StatusApp(pool, allow_anonymous=True)) as http:
        page = await http.get("/")
        told = await http.get("/status.json")
        metrics = await http.get("/metrics")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.content == PAGE
    assert told.headers["Content-Type"] == "application/json"
    assert told.json()["pools"][0]["operations_total"] == 1
    assert metrics.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    families = {one.name for one in text_string_to_metric_families(metrics.text)}
    assert "pkcs11_pool_operations" in families


async def test_it_tells_of_no_key_no_pin_and_no_error_text(pool: TokenPool) -> None:
    """Whatever went wrong with them."""
    await pool.generate_key(KeyType.AES, 256, label=SECRET, store=True)
    with pytest.raises(KeyNotFound, match=f"no-{SECRET}"):
        await pool.key(label=f"no-{SECRET}").sign(b"data")
    await settled(pool)
    async with client(StatusApp(pool, allow_anonymous=True)) as http:
        for path in PATHS:
            answer = await http.get(path)
            assert answer.status_code == 200
            assert SECRET not in answer.text
            assert "1234" not in re.sub(r"[\d.]{5,}", "", answer.text)
        told = (await http.get("/status.json")).json()
    (error,) = told["pools"][0]["recent_errors"]
    assert error["type"] == "KeyNotFound"


async def test_every_answer_has_the_headers_that_keep_others_out(
    pool: TokenPool,
) -> None:
    """Refusals, too."""
    app = StatusApp(pool, guard=BasicAuth("ops", "right"))
    async with client(app) as http:
        for path in (*PATHS, "/livez", "/nowhere"):
            for auth in (None, ("ops", "right")):
                headers = (await http.get(path, auth=auth)).headers
                assert headers["Cache-Control"] == "no-store"
                assert headers["Content-Security-Policy"] == POLICY
                assert headers["X-Content-Type-Options"] == "nosniff"
                assert headers["X-Frame-Options"] == "DENY"
                assert headers["Referrer-Policy"] == "no-referrer"
                assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("tag", ["style", "script"])
def test_the_policy_names_exactly_what_is_in_the_page(tag: str) -> None:
    """Without ``unsafe-inline``; a browser would run nothing else."""
    (inside,) = re.findall(rf"(?s)<{tag}>(.*?)</{tag}>", PAGE.decode())
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    assert f"{tag}-src 'sha256-{digest}';" in POLICY
    assert "unsafe" not in POLICY


def test_the_page_fetches_nothing_from_elsewhere() -> None:
    """No font, no library, no picture of somebody else's."""
    page = PAGE.decode()
    found = set(re.findall(r"https?://[^\s\"']+", page))
    assert found == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not re.search(r"<(link|img|iframe)|\ssrc=|url\(|@import|innerHTML", page)


async def test_it_only_reads(pool: TokenPool) -> None:
    """And ``HEAD`` gives what ``GET`` would, without it."""
    async with client(StatusApp(pool, allow_anonymous=True)) as http:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            for path in (*PATHS, "/livez"):
                answer = await http.request(method, path)
                assert answer.status_code == 405
                assert answer.headers["Allow"] == "GET, HEAD"
        answer = await http.head("/")
        assert answer.status_code == 200
        assert int(answer.headers["Content-Length"]) == len(PAGE)
        assert answer.content == b""
        assert (await http.get("/nowhere")).status_code == 404


# -- Who may look ---------------------------------------------------------------------


async def test_basic_auth_asks_for_a_name_and_a_password(pool: TokenPool) -> None:
    """A browser shows its window; a wrong one gets nothing."""
    async with client(StatusApp(pool, guard=BasicAuth("ops", "pass:wörd"))) as http:
        for path in PATHS:
            for auth in (None, ("ops", "wrong"), ("other", "pass:wörd"), ("ops", "")):
                answer = await http.get(path, auth=auth)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
                assert "operations" not in answer.text
            right = httpx.BasicAuth("ops", "pass:wörd")
            assert (await http.get(path, auth=right)).status_code == 200
        for odd in ("Basic !!!", "Basic", "Bearer b3BzOnBhc3M6d8O2cmQ=", ""):
            answer = await http.get("/", headers={"Authorization": odd})
            assert answer.status_code == 401


def test_a_password_does_not_show() -> None:
    """Not in the guard, not in a traceback of its making."""
    guard = BasicAuth("ops", "pass-word")
    assert "pass-word" not in repr(vars(guard))
    for user, password in (("a:b", "pass-word"), ("", "pass-word"), ("ops", "")):
        with pytest.raises(InvalidOption) as caught:
            BasicAuth(user, password)
        inside = [e for e in caught.traceback if "asgi" in str(e.path)]
        assert "pass-word" not in repr([entry.frame.f_locals for entry in inside[1:]])


async def test_a_guard_of_ones_own_may_be_async(pool: TokenPool) -> None:
    """And lets nobody in by forgetting to say no."""

    async def guard(scope: Any) -> bool:
        await anyio.lowlevel.checkpoint()
        return dict(scope["headers"]).get(b"x-operator") == b"yes"

    async with client(StatusApp(pool, guard=guard)) as http:
        assert (await http.get("/metrics")).status_code == 403
        answer = await http.get("/metrics", headers={"X-Operator": "yes"})
        assert answer.status_code == 200
    forgetful: Any = lambda _scope: None  # noqa: E731
    async with client(StatusApp(pool, guard=forgetful)) as http:
        assert (await http.get("/metrics")).status_code == 403


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (None, "localhost", 200),
        (None, "LOCALHOST:8000", 200),
        (None, "127.0.0.1:80", 200),
        (None, "[::1]:8000", 200),
        (None, "[::1]", 200),
        (None, "evil.example", 400),
        (None, "localhost.evil.example", 400),
        (None, "evil.example:80@localhost", 400),
        (None, "", 400),
        (["ops.example.org"], "ops.example.org:8443", 200),
        (["ops.example.org"], "localhost", 400),
        (["*.example.org"], "a.b.example.org", 200),
        (["*.example.org"], "example.org", 400),
        (["*.example.org"], "evil-example.org", 400),
        (["*"], "anything.example", 200),
    ],
)
async def test_the_host_must_be_one_of_those_allowed(
    pool: TokenPool, allowed: list[str] | None, host: str, status: int
) -> None:
    """A page from elsewhere may point its own name at this server."""
    options: Any = {} if allowed is None else {"allowed_hosts": allowed}
    async with client(StatusApp(pool, allow_anonymous=True, **options)) as http:
        for path in PATHS:
            answer = await http.get(path, headers={"Host": host})
            assert answer.status_code == status
        # A probe asks by an address, and is told one word.
        answer = await http.get("/livez", headers={"Host": host})
        assert answer.status_code == 200


async def test_of_two_host_headers_none_counts(pool: TokenPool) -> None:
    """Who reads the other one would be deceived."""
    app, sent = StatusApp(pool, allow_anonymous=True), []

    async def send(message: Any) -> None:
        sent.append(message)

    hosts = [(b"host", b"localhost"), (b"host", b"evil.example")]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": hosts}
    await app(scope, anyio.sleep_forever, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 400


# -- Health ---------------------------------------------------------------------------


async def probes(app: StatusApp) -> tuple[str, str]:
    """What the probes are told, without a password and by an address."""
    async with client(app, host="10.0.0.7:8000") as http:
        live, ready = await http.get("/livez"), await http.get("/readyz")
    for answer in (live, ready):
        word = answer.text.strip()
        assert answer.status_code == (503 if word.startswith("not ") else 200)
    return live.text.strip(), ready.text.strip()


async def test_ready_is_a_pool_that_takes_operations(make_pool: MakePool) -> None:
    """Before, and after, it is alive and not ready."""
    pool = make_pool()
    app = StatusApp(pool, guard=lambda _scope: False)
    assert await probes(app) == ("live", "not ready")
    async with pool:
        assert await probes(app) == ("live", "ready")
    assert await probes(app) == ("live", "not ready")


async def test_of_several_pools_all_must_be_ready(
    pool: TokenPool, make_pool: MakePool
) -> None:
    """One that is down makes the service half."""
    app = StatusApp([pool, make_pool()], allow_anonymous=True)
    assert await probes(app) == ("live", "not ready")
    assert await probes(StatusApp([], allow_anonymous=True)) == ("live", "not ready")


async def test_when_only_a_new_process_helps_it_is_not_live(
    make_pool: MakePool,
) -> None:
    """So that what watches over it starts one."""
    async with make_pool(max_sessions=1) as pool:
        app = StatusApp(pool, allow_anonymous=True)
        with Hold() as hold:
            for calls in (1, 2):
                await given_up(pool, lambda: pool.run(hold), hold.entered(calls))
                assert pool.stats().calls_stuck == calls
                assert (await probes(app))[0] == ("live", "not live")[calls - 1]
        await eventually(lambda: not pool.stats().calls_stuck)
        assert (await probes(app))[0] == "live"


# -- Where it stands ------------------------------------------------------------------


async def answers(http: httpx.AsyncClient, prefix: str) -> None:
    """All of it is there, below a prefix."""
    async with http:
        page = await http.get(f"{prefix}/", follow_redirects=True)
        assert page.content == PAGE
        told = await http.get(f"{prefix}/status.json")
        assert told.json()["pools"][0]["name"] == "demo"
        assert (await http.get(f"{prefix}/readyz")).text == "ready\n"
        assert (await http.get(f"{prefix}/nowhere")).status_code == 404


def _mounted(make: Callable[[str, StatusApp], Any]) -> Any:
    return make("/ops/pools", StatusApp(allow_anonymous=True))


async def test_mounted_in_starlette(pool: TokenPool) -> None:
    """It finds the pool that the lifespan left in the state."""
    app = _mounted(lambda path, status: Starlette(routes=[Mount(path, status)]))
    await answers(client(app, pool), "/ops/pools")


async def test_mounted_in_fastapi(pool: TokenPool) -> None:
    """The same."""
    app = FastAPI()
    app.mount("/ops/pools", StatusApp(allow_anonymous=True))
    await answers(client(app, pool), "/ops/pools")


async def test_below_a_root_path(pool: TokenPool) -> None:
    """Behind a proxy that is told to the server: it is a part of the path."""
    app = _mounted(lambda path, status: Starlette(routes=[Mount(path, status)]))
    await answers(client(app, pool, root="/api"), "/api/ops/pools")


async def test_mounted_in_litestar(pool: TokenPool) -> None:
    """It is asked for the pool: Litestar keeps it in the application."""
    status = StatusApp(lambda: app.state[NAME], allow_anonymous=True)
    app = Litestar([asgi("/ops/pools", is_mount=True, copy_scope=True)(status)])
    app.state[NAME] = pool
    await answers(client(app), "/ops/pools")


async def test_by_itself(pool: TokenPool) -> None:
    """A server starts it, asks it, and stops it."""
    app, sent = StatusApp(pool, allow_anonymous=True), []
    await answers(client(app), "")

    async def send(message: Any) -> None:
        sent.append(message)

    asked = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Any:
        return {"type": next(asked)}

    await app({"type": "lifespan"}, receive, send)
    await app({"type": "websocket"}, receive, send)
    assert [message["type"] for message in sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
        "websocket.close",
    ]


async def test_what_a_callable_gives_may_change(
    pool: TokenPool, make_pool: MakePool
) -> None:
    """Pools come and go while the app stays."""
    pools = [pool]
    async with client(StatusApp(lambda: pools, allow_anonymous=True)) as http:
        assert len((await http.get("/status.json")).json()["pools"]) == 1
        pools.append(make_pool(name="other"))
        told = json.loads((await http.get("/status.json")).content)
        assert [one["name"] for one in told["pools"]] == ["demo", "other"]
