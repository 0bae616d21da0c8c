"""A pool in web applications: opened at start-up, reachable in handlers, closed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient as AiohttpClient
from aiohttp.test_utils import TestServer
from fastapi import FastAPI
from litestar import Litestar, get
from litestar.params import FromPath  # noqa: TC002  # it is read at run time
from pkcs11 import Mechanism, PKCS11Error
from pkcs11 import exceptions as p11
from quart import Quart
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

import pkcs11_pool
from pkcs11_pool import (
    InvalidType,
    PinRefused,
    PoolError,
    PoolState,
    PoolTimeout,
    TokenPool,
    TooManyWaiting,
    WouldDeadlock,
)
from pkcs11_pool.asgi import StatusApp
from pkcs11_pool.integrations import aiohttp as for_aiohttp
from pkcs11_pool.integrations import fastapi as for_fastapi
from pkcs11_pool.integrations import litestar as for_litestar
from pkcs11_pool.integrations import quart as for_quart
from pkcs11_pool.integrations import starlette as for_starlette
from pkcs11_pool.integrations.lifespan import open_pool
from pkcs11_pool.integrations.problems import PROBLEMS, TIMEOUT_RUNNING, problem_of
from poolkit import ASYNCIO_ONLY, digest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request

    from conftest import MakePool


class Served:
    """An application, with the pool that its start made."""

    def __init__(self, make_pool: MakePool, **options: Any) -> None:
        self.pools: list[TokenPool] = []
        self._make = make_pool
        self._options = options

    def make(self) -> TokenPool:
        """Make the pool of one start of the application."""
        self.pools.append(self._make(**self._options))
        return self.pools[-1]


async def work(pool: TokenPool) -> dict[str, str]:
    """What the handlers do."""
    return {"digest": (await digest(pool)).hex()}


async def is_busy(_pool: TokenPool) -> None:
    """As a pool on which too many wait."""
    raise TooManyWaiting("secret-label")


FAILURES: dict[str, tuple[Callable[[TokenPool], Any], int, str]] = {
    # An error of both kinds; of the pool alone; of the token alone.
    "both": (lambda pool: pool.key(label="secret-label").sign(b""), 404, "KeyNotFound"),
    "pool": (lambda pool: digest(pool, timeout="secret-label"), 400, "InvalidType"),
    "token": (
        lambda pool: pool.digest(b"", mechanism=Mechanism.RSA_PKCS),
        400,
        "MechanismInvalid",
    ),
    "busy": (is_busy, 503, "TooManyWaiting"),
}
"""What handlers do that fails, its status and the code of the problem."""


async def fail(pool: TokenPool, kind: str) -> None:
    """What the handlers do that fail."""
    await FAILURES[kind][0](pool)


class Client:
    """Starts an ASGI application, asks it, and stops it, as a server does."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._state: dict[str, Any] = {}
        transport = httpx.ASGITransport(self._with_state, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self.told: list[dict[str, Any]] = []

    async def _with_state(self, scope: Any, receive: Any, send: Any) -> None:
        # A server gives each request a copy of what the lifespan left.
        await self._app(scope | {"state": dict(self._state)}, receive, send)

    async def run(self, body: Callable[[], Any]) -> None:
        """Call ``body`` while the application is up."""
        started, stop = anyio.Event(), anyio.Event()

        async def receive() -> dict[str, str]:
            if self.told or started.is_set():
                await stop.wait()
                return {"type": "lifespan.shutdown"}
            started.set()
            return {"type": "lifespan.startup"}

        up = anyio.Event()

        async def send(message: Any) -> None:
            self.told.append(message)
            up.set()

        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self._state}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._lifespan, scope, receive, send)
            await up.wait()
            try:
                if self.told[0]["type"] == "lifespan.startup.complete":
                    await body()
            finally:
                stop.set()
        await self.http.aclose()

    async def _lifespan(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._app(scope, receive, send)
        except* PoolError:
            # Told by a message, too; a server logs it. Litestar raises a group.
            assert self.told[-1]["type"] == "lifespan.startup.failed"


def fastapi_app(make: Callable[[], TokenPool]) -> FastAPI:
    """The handlers on FastAPI."""
    app = FastAPI(lifespan=for_fastapi.lifespan(make))
    for_fastapi.handle_errors(app)

    @app.get("/work")
    async def do_work(pool: for_fastapi.Pool) -> dict[str, str]:
        return await work(pool)

    @app.get("/fail/{kind}")
    async def do_fail(pool: for_fastapi.Pool, kind: str) -> None:
        await fail(pool, kind)

    return app


def starlette_app(make: Callable[[], TokenPool]) -> Starlette:
    """The handlers on Starlette; one of them in an application below."""

    async def do_work(request: Request) -> JSONResponse:
        return JSONResponse(await work(for_starlette.get_pool(request)))

    async def do_fail(request: Request) -> None:
        await fail(for_starlette.get_pool(request), request.path_params["kind"])

    below = Starlette(routes=[Route("/", do_work)])
    app = Starlette(
        lifespan=for_starlette.lifespan(make),
        routes=[Mount("/work", below), Route("/fail/{kind}", do_fail)],
    )
    for_starlette.handle_errors(app)
    return app


def litestar_app(make: Callable[[], TokenPool]) -> Litestar:
    """The handlers on Litestar."""

    @get("/work")
    async def do_work(pool: for_litestar.Pool) -> dict[str, str]:
        return await work(pool)

    @get("/fail/{kind:str}")
    async def do_fail(pool: for_litestar.Pool, kind: FromPath[str]) -> None:
        await fail(pool, kind)

    return Litestar([do_work, do_fail], plugins=[for_litestar.PoolPlugin(make)])


def quart_app(make: Callable[[], TokenPool]) -> Quart:
    """The handlers on Quart."""
    app = Quart("test")
    for_quart.install(app, make)

    @app.get("/work")
    async def do_work() -> dict[str, str]:
        return await work(for_quart.current_pool())

    @app.get("/fail/<kind>")
    async def do_fail(kind: str) -> str:
        await fail(for_quart.current_pool(), kind)
        return ""

    @app.get("/poolside")
    async def beside_the_status_page() -> str:
        return "own"

    return app


APPS = pytest.mark.parametrize(
    "make_app",
    [
        pytest.param(fastapi_app, id="fastapi"),
        pytest.param(starlette_app, id="starlette"),
        pytest.param(litestar_app, id="litestar"),
    ],
)
QUART = pytest.mark.parametrize("make_app", [pytest.param(quart_app, id="quart")])


async def serves(make_pool: MakePool, make_app: Any) -> None:
    """The pool is there while the application is up, each time anew."""
    served = Served(make_pool)
    app = make_app(served.make)
    assert served.pools == []
    for number in range(2):
        client = Client(app)

        async def asks(client: Client = client, number: int = number) -> None:
            assert served.pools[number].state is PoolState.READY
            answer = await client.http.get("/work", follow_redirects=True)
            assert answer.status_code == 200
            assert len(answer.json()["digest"]) == 64
            await answers_errors(client.http)

        await client.run(asks)
        assert [told["type"] for told in client.told] == [
            "lifespan.startup.complete",
            "lifespan.shutdown.complete",
        ]
        assert served.pools[number].state is PoolState.CLOSED


async def answers_errors(http: Any) -> None:
    """A problem in JSON, and nothing of the error's own text."""
    for kind, (_, status, code) in FAILURES.items():
        answer = await http.get(f"/fail/{kind}")
        assert answer.status_code == status
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers.get("Retry-After") == ("1" if kind == "busy" else None)
        assert json.loads(answer.content)["code"] == code
        assert b"secret-label" not in answer.content


async def says_that_there_is_no_pool(client: Client) -> None:
    """A handler that asks for the pool of no running application."""
    answer = await client.http.get("/fail/both")
    assert answer.status_code == 500
    assert json.loads(answer.content)["code"] == "PoolError"


@APPS
async def test_an_application_has_the_pool_while_it_is_up(
    make_pool: MakePool, make_app: Any
) -> None:
    """On each framework, on each loop."""
    await serves(make_pool, make_app)


@ASYNCIO_ONLY
@QUART
async def test_quart_has_the_pool_while_it_is_up(
    make_pool: MakePool, make_app: Any
) -> None:
    """It knows asyncio only."""
    await serves(make_pool, make_app)


async def fails_clearly(make_pool: MakePool, make_app: Any) -> None:
    """The message of the failed start says what is wrong, and no PIN."""
    served = Served(make_pool, pin="wrong-pin")
    client = Client(make_app(served.make))
    await client.run(anyio.sleep_forever)
    told = client.told[0]
    assert told["type"] == "lifespan.startup.failed"
    assert "the token refused the PIN" in told["message"]
    assert "wrong-pin" not in told["message"]
    assert served.pools[0].state is PoolState.CLOSED


@APPS
async def test_a_pool_that_does_not_open_fails_the_start(
    make_pool: MakePool, make_app: Any
) -> None:
    """Not the first request."""
    await fails_clearly(make_pool, make_app)


@ASYNCIO_ONLY
@QUART
async def test_a_pool_that_does_not_open_fails_quarts_start(
    make_pool: MakePool, make_app: Any
) -> None:
    """Not the first request."""
    await fails_clearly(make_pool, make_app)


@APPS
async def test_without_a_lifespan_a_handler_says_so(
    make_pool: MakePool, make_app: Any
) -> None:
    """As under a test client that was not entered."""
    client = Client(make_app(Served(make_pool).make))
    await says_that_there_is_no_pool(client)
    await client.http.aclose()


@ASYNCIO_ONLY
async def test_before_and_after_it_serves_quart_has_no_pool(
    make_pool: MakePool,
) -> None:
    """A handler says so, and never has one that is closed."""
    app = quart_app(Served(make_pool).make)
    async with Client(app).http as http:
        assert (await http.get("/work")).json()["code"] == "PoolError"
    client = Client(app)

    async def body() -> None:
        assert (await client.http.get("/work")).status_code == 200

    await client.run(body)
    after = Client(app)
    await says_that_there_is_no_pool(after)
    await after.http.aclose()


@pytest.fixture
async def aiohttp_client(
    make_pool: MakePool,
) -> AsyncIterator[tuple[AiohttpClient[Any, Any], Served]]:
    """The handlers on aiohttp, served over a socket."""
    served = Served(make_pool)

    async def do_work(request: web.Request) -> web.Response:
        return web.json_response(await work(request.app[for_aiohttp.POOL]))

    async def do_fail(request: web.Request) -> web.Response:
        await fail(request.app[for_aiohttp.POOL], request.match_info["kind"])
        return web.Response()

    app = web.Application(middlewares=[for_aiohttp.answer_errors])
    app.cleanup_ctx.append(for_aiohttp.pool_context(served.make))
    app.add_routes([web.get("/work", do_work), web.get("/fail/{kind}", do_fail)])
    async with AiohttpClient(TestServer(app)) as client:
        yield client, served
    assert served.pools[0].state is PoolState.CLOSED


@ASYNCIO_ONLY
async def test_aiohttp_has_the_pool_while_it_is_up(
    aiohttp_client: tuple[AiohttpClient[Any, Any], Served],
) -> None:
    """By its key in the application."""
    client, served = aiohttp_client
    assert served.pools[0].state is PoolState.READY
    answer = await client.get("/work")
    assert len((await answer.json())["digest"]) == 64
    for kind, (_, status, code) in FAILURES.items():
        answer = await client.get(f"/fail/{kind}")
        assert answer.status == status
        assert answer.content_type == "application/problem+json"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers.get("Retry-After") == ("1" if kind == "busy" else None)
        text = await answer.text()
        assert json.loads(text)["code"] == code
        assert "secret-label" not in text


async def shows_its_status(ask: Any, root: str) -> None:
    """As the status app does elsewhere: whom it answers, and what."""
    answer = await ask("GET", f"{root}/readyz")
    assert (answer[0], answer[2]) == (200, b"ready\n")
    for path in ("", "/"):
        status, headers, body = await ask("GET", f"{root}{path}")
        assert status == 200
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert int(headers["Content-Length"]) == len(body)
    status, headers, body = await ask("GET", f"{root}/status.json?x=1")
    assert [pool["state"] for pool in json.loads(body)["pools"]] == ["ready"]
    status, headers, head = await ask("HEAD", f"{root}/status.json")
    assert (status, head) == (200, b"")
    assert headers["Content-Length"] != "0"
    assert (await ask("GET", f"{root}/nothing/here"))[0] == 404
    assert (await ask("POST", f"{root}/status.json"))[0] == 405
    answer = await ask("GET", f"{root}/", Host="attacker.example")
    assert answer[0] == 400
    assert b"allowed_hosts" in answer[2]
    # A path that only begins so is the application's own.
    assert (await ask("GET", f"{root}ide"))[::2] == (200, b"own")


@ASYNCIO_ONLY
async def test_quart_shows_the_status_page(make_pool: MakePool) -> None:
    """Below a path; the rest is the application's own."""
    served = Served(make_pool)
    app = quart_app(served.make)
    for_quart.mount_status(app, "/pools/", StatusApp(allow_anonymous=True))
    client = Client(app)

    async def ask(method: str, path: str, **headers: str) -> Any:
        answer = await client.http.request(method, path, headers=headers)
        return answer.status_code, answer.headers, answer.content

    async def body() -> None:
        assert (await ask("GET", "/work"))[0] == 200
        await shows_its_status(ask, "/pools")

    assert (await ask("GET", "/pools/readyz"))[0] == 503
    await client.run(body)


@ASYNCIO_ONLY
@pytest.mark.parametrize("within", ["", "/pools"])
async def test_aiohttp_shows_the_status_page(make_pool: MakePool, within: str) -> None:
    """Below a path of the application, or of one that is a part of it."""
    app = web.Application()
    app.cleanup_ctx.append(for_aiohttp.pool_context(Served(make_pool).make))
    part = web.Application() if within else app
    for_aiohttp.mount_status(part, "/pools", StatusApp(allow_anonymous=True))

    async def own(_request: web.Request) -> web.Response:
        return web.Response(text="own")

    part.router.add_get("/poolside", own)
    if within:
        app.add_subapp(within, part)
    async with AiohttpClient(TestServer(app)) as client:

        async def ask(method: str, path: str, **headers: str) -> Any:
            async with client.request(method, path, headers=headers) as answer:
                return answer.status, answer.headers, await answer.read()

        await shows_its_status(ask, f"{within}/pools")


async def test_a_failed_start_has_a_note(make_pool: MakePool) -> None:
    """Who reads the traceback of a server knows what it is about."""
    with pytest.raises(PinRefused) as caught:
        async with open_pool(lambda: make_pool(pin="wrong-pin", name="signing")):
            pass
    assert caught.value.__notes__ == [
        "the application does not start without the pool 'signing'"
    ]


async def test_a_pool_in_the_place_of_its_maker_is_refused(pool: TokenPool) -> None:
    """It could be opened once only."""
    for wrong in (pool, None, lambda: None):
        with pytest.raises(InvalidType, match="lambda: TokenPool"):
            async with open_pool(wrong):  # type: ignore[arg-type]
                pass


# -- Which answer each error is -------------------------------------------------------

POOL_ERRORS = [
    error
    for name in pkcs11_pool.errors.__all__
    if issubclass(error := getattr(pkcs11_pool.errors, name), PoolError)
]


def made(error: type[Exception]) -> Exception:
    """An error of a class."""
    if issubclass(error, PoolTimeout):
        return error("secret-label", "waiting")
    return error("secret-label")


@pytest.mark.parametrize("error", POOL_ERRORS)
def test_every_error_of_the_pool_has_an_answer_of_its_own(
    error: type[PoolError],
) -> None:
    """One that is added is put into the table, or is as a base is, but the root."""
    nearest = next(cls for cls in error.__mro__ if cls in PROBLEMS)
    assert nearest is error or nearest is not PoolError
    problem = problem_of(made(error))
    assert problem.code == error.__name__
    assert 400 <= problem.status < 600
    assert b"secret-label" not in problem.body
    assert set(json.loads(problem.body)) == {
        *("type", "title", "status", "detail", "code")
    }


def test_a_problem_has_the_members_of_the_standard() -> None:
    """RFC 9457, and a `code` for programs; no cache keeps it."""
    problem = problem_of(TooManyWaiting("secret-label"))
    assert problem.headers == {
        "Content-Type": "application/problem+json",
        "Cache-Control": "no-store",
        "Retry-After": "1",
    }
    assert json.loads(problem.body) == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "The service is busy. Nothing was done.",
        "code": "TooManyWaiting",
    }


def test_what_may_be_asked_again_says_when() -> None:
    """And what may have been done does not invite to do it twice."""
    busy = problem_of(PoolTimeout("x", "waiting"))
    assert (busy.status, busy.headers["Retry-After"]) == (503, "1")
    late = problem_of(PoolTimeout("x", "running"))
    assert late.status == 504
    assert "Retry-After" not in late.headers
    assert "Retry-After" not in problem_of(PinRefused("x")).headers
    assert problem_of(WouldDeadlock("x")).status == 500


def test_every_error_of_the_token_has_an_answer() -> None:
    """The client's mistakes are its own; the rest is the token's."""
    for error in vars(p11).values():
        if isinstance(error, type) and issubclass(error, PKCS11Error):
            problem = problem_of(error("secret-label"))
            assert problem.status in {400, 502}
            assert b"secret-label" not in problem.body
    assert problem_of(p11.DataLenRange()).status == 400
    assert problem_of(p11.DeviceError()).status == 502


def test_an_error_of_somebody_else_is_no_ones_secret_told() -> None:
    """It is a 500 like any other."""
    assert problem_of(ValueError("secret-label")).status == 500
    assert b"secret-label" not in problem_of(ValueError("secret-label")).body


def problem_rows() -> list[str]:
    """The lines of the table in the documentation."""
    rows = [(error.__name__, problem) for error, problem in PROBLEMS.items()]
    at = next(n for n, (name, _) in enumerate(rows) if name == "PoolTimeout")
    rows.insert(at + 1, ("PoolTimeout, running", TIMEOUT_RUNNING))
    return [
        f"| `{name}` | {int(one.status)} | {one.retry_after or ''} | {one.detail} |"
        for name, one in rows
    ]


def test_the_page_has_the_table_of_the_code() -> None:
    """The page is for people, ``PROBLEMS`` for programs."""
    page = Path(__file__).parents[1] / "docs/reference/http-errors.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert lines == problem_rows()
