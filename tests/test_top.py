"""The live view of a service shows what its pools tell, and says what is in the way."""

from __future__ import annotations

import json
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import pagekit
from pkcs11_pool.asgi import BasicAuth, StatusApp
from pkcs11_pool.cli import top
from pkcs11_pool.integrations.status import report
from terminalkit import on_a_terminal
from test_cli import Run, bare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11_pool import TokenPool

__all__ = ["bare"]

Answer = tuple[int, str]


@contextmanager
def serving(answers: Any) -> Iterator[str]:
    """A service: gives what ``answers(path, headers)`` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers(self.path, self.headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def service(pkcs11_pool: TokenPool) -> Iterator[str]:
    """A service with a pool, that does three operations between two readings."""

    def answers(path: str, _headers: Any) -> Answer:
        if path != "/pkcs11/status.json":
            return 404, "not found"
        for _ in range(3):
            pkcs11_pool.run_sync(lambda session: session.generate_random(64))
        return 200, json.dumps(report([pkcs11_pool]))

    with serving(answers) as url:
        yield f"{url}/pkcs11"


def test_each_reading_is_a_line_of_json(bare: Run, service: str) -> None:
    """What the service told, as it told it; under the names of PoolStats."""
    told = bare("top", service, "--count", "2", "--interval", "0.1", "--json").out
    readings = [json.loads(line) for line in told.splitlines()]
    done = [reading["pools"][0]["operations_total"] for reading in readings]
    assert done[1] - done[0] == 3
    assert readings[0]["pools"][0]["state"] == "ready"


def test_each_reading_is_a_table_for_people(bare: Run, service: str) -> None:
    """State, login, sessions, and how much is done in a second."""
    told = bare("top", f"{service}/", "--count", "2", "--interval", "0.1").out
    assert told.count("pkcs11-pool at ") == 2
    rows = [line.split() for line in told.splitlines() if " ready " in line]
    assert [row[1:3] for row in rows] == [["ready", "user"]] * 2
    assert rows[0][6] == "-"
    assert int(rows[1][6].replace(",", "")) > 0


def test_on_a_terminal_one_table_is_drawn_anew(service: str) -> None:
    """On a screen of its own, which the terminal leaves at the end."""
    words = ("top", service, "--count", "2", "--interval", "0.1")
    done = on_a_terminal(words, both=True)
    assert done.status == 0, done.screen
    assert (done.raw.count("\x1b[?1049h"), done.raw.count("\x1b[?1049l")) == (1, 1)
    assert done.screen.count("pkcs11-pool at ") >= 2
    assert " ready " in done.screen


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, "not found", "give the address where it is mounted"),
        (200, "<html>", "there is no status app"),
        (200, "[]", "there is no status app"),
        (200, '{"schema": 1}', "there is no status app"),
        (400, "bad request", "there is no status app"),
        (401, "", "--user-env USER VARIABLE"),
        (403, "", "--header-env NAME VARIABLE"),
        (307, "", "sends to elsewhere (307)"),
        (500, "", "the service fails at"),
    ],
)
def test_what_is_no_status_app_is_told(
    bare: Run, status: int, body: str, said: str
) -> None:
    """In one line, with a status of its own."""
    with serving(lambda _path, _headers: (status, body)) as url:
        assert said in bare("top", url, status=7).err


def test_another_schema_is_not_guessed_at(bare: Run) -> None:
    """The service may be newer than this program."""
    body = '{"schema": 2, "pools": []}'
    with serving(lambda _path, _headers: (200, body)) as url:
        assert "speaks schema 2" in bare("top", url, status=2).err


# -- The real status app, in a real service ------------------------------------------


@contextmanager
def mounted(pool: TokenPool, at: str = "/pools", **options: Any) -> Iterator[str]:
    """A service of Starlette on a port of its own; the address of its status app."""
    status = StatusApp(pool, **options)
    with pagekit.serving(Starlette(routes=[Mount(at, status)])) as url:
        yield f"{url}{at}"


def test_a_running_service_is_watched(bare: Run, pkcs11_pool: TokenPool) -> None:
    """Its figures are the pool's own, whichever of its pages was given."""
    pkcs11_pool.run_sync(lambda session: session.generate_random(64))
    stats = pkcs11_pool.stats()
    with mounted(pkcs11_pool, allow_anonymous=True) as url:
        for page in ("", "/", "/status.json", "/metrics", "/readyz", "/?x=1#y"):
            words = (f"{url}{page}", "--count", "1", "--json")
            (told,) = json.loads(bare("top", *words).out)["pools"]
            assert told["operations_total"] == stats.operations_total
            assert told["sessions_max"] == stats.sessions_max
        table = bare("top", url, "--count", "1").out
    (row,) = [line.split() for line in table.splitlines() if " ready " in line]
    assert row[0] == told["name"]
    assert row[1:3] == ["ready", "user"]
    assert row[3].endswith(f"/{stats.sessions_max}")


def test_the_page_shows_what_top_shows() -> None:
    """Its columns, which `python docs/screenshots.py --top` writes there."""
    page = pagekit.ROOT / "docs/how-to/watch-a-service.md"
    shown = page.read_text().partition("<!-- top: ")[2].partition("<!-- end")[0]
    (header,) = [line for line in shown.splitlines() if line.startswith(" pool ")]
    assert tuple(re.split(r"  +", header.strip())) == top._COLUMNS  # noqa: SLF001


def test_basic_auth_lets_in_who_knows_the_password(
    bare: Run, pkcs11_pool: TokenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from a variable; without it, or with a wrong one, it says what to do."""
    guard = BasicAuth("ops", "opensesame")
    monkeypatch.setenv("WRONG", "sesame")
    monkeypatch.setenv("RIGHT", "opensesame")
    with mounted(pkcs11_pool, guard=guard) as url:
        words = ("top", url, "--count", "1", "--json")
        assert "wants to know who asks (401)" in bare(*words, status=7).err
        told = bare(*words, "--user-env", "ops", "WRONG", status=7).err
        assert "refused what was sent (401)" in told
        told = bare(*words, "--user-env", "ops", "NONE", status=2).err
        assert told == "--user-env: the variable NONE is not set\n"
        assert json.loads(bare(*words, "--user-env", "ops", "RIGHT").out)["pools"]
        secret = url.replace("://", "://ops:opensesame@")
        told = bare("top", secret, "--count", "1", status=2).err
        assert "--user-env" in told
        assert "opensesame" not in told


def test_another_guard_has_its_own_header(
    bare: Run, pkcs11_pool: TokenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value is a secret: no word of a command."""

    def guard(scope: Any) -> bool:
        return (b"x-ops", b"opensesame") in scope["headers"]

    with mounted(pkcs11_pool, guard=guard) as url:
        words = ["top", url, "--count", "1", "--json"]
        assert "wants to know who asks (403)" in bare(*words, status=7).err
        words += ["--header-env", "X-Ops", "STATUS"]
        assert "STATUS is not set" in bare(*words, status=2).err
        monkeypatch.setenv("STATUS", "opensesame")
        assert json.loads(bare(*words).out)["pools"]


def test_a_name_that_the_app_does_not_answer_to(
    bare: Run, pkcs11_pool: TokenPool
) -> None:
    """The check of the Host header is told apart from any other refusal."""
    hosts = ("signer.example",)
    with mounted(pkcs11_pool, allow_anonymous=True, allowed_hosts=hosts) as url:
        assert "allowed_hosts=...)" in bare("top", url, status=7).err


def test_the_wrong_place_in_a_service_is_told(
    bare: Run, pkcs11_pool: TokenPool
) -> None:
    """A path where nothing is, a port where nobody is, the wrong scheme, no scheme."""
    with mounted(pkcs11_pool, allow_anonymous=True) as url:
        root = url.removesuffix("/pools")
        told = bare("top", root, status=7).err
        assert f"no status app of pkcs11-pool at {root} (404)" in told
        assert "where it is mounted, such as http://localhost:8000/pools" in told
        host = url.removeprefix("http://")
        assert f"{url}?" in bare("top", host, status=2).err
    told = bare("top", url, status=7).err
    assert "is the service running, and is this its port?" in told
    with serving(lambda _path, _headers: (200, "")) as url:
        told = bare("top", url.replace("http", "https"), status=7).err
        assert "is it http:// there" in told
    assert "is the name right?" in bare("top", "http://none.invalid", status=7).err


def test_a_service_that_was_started_anew_has_no_rate() -> None:
    """Its counters are smaller than they were; so has one that tells nothing."""
    before = {"name": "a", "operations_total": 100}
    assert top.row({"name": "a", "operations_total": 3}, before, 1.0)[6] == "-"
    assert top.row({"name": "a", "operations_total": 300}, before, 2.0)[6] == "100"
    assert set(top.row({}, None, 0.0)) == {"-", "-/-"}


@pytest.mark.parametrize(
    "words", [("--interval", "0"), ("--interval", "nan"), ("--count", "0")]
)
def test_numbers_that_make_no_sense_are_refused(bare: Run, words: tuple[str]) -> None:
    """Before anything is read."""
    bare("top", "http://127.0.0.1:9", *words, status=2)


def test_a_missing_client_is_named(bare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "httpx", None)
    told = bare("top", "http://127.0.0.1:9", status=2)
    assert "pip install 'pkcs11-pool[cli]'" in told.err
