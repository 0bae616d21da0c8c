"""The live view of a service shows what its pools tell, and says what is in the way."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from pkcs11_pool.cli import top
from pkcs11_pool.integrations.status import report
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


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, "not found", "is no status app"),
        (200, "<html>", "is no status app"),
        (200, "[]", "is no status app"),
        (200, '{"schema": 1}', "is no status app"),
        (401, "", "--header-env"),
        (403, "", "--header-env"),
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


def test_a_header_for_a_guard_comes_from_a_variable(
    bare: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a secret: no word of a command."""

    def answers(_path: str, headers: Any) -> Answer:
        known = headers["Authorization"] == "Bearer opensesame"
        return (200, '{"schema": 1, "pools": []}') if known else (401, "")

    words = ("--count", "1", "--json", "--header-env", "Authorization", "STATUS")
    with serving(answers) as url:
        assert "STATUS is not set" in bare("top", url, *words, status=2).err
        monkeypatch.setenv("STATUS", "Bearer opensesame")
        assert json.loads(bare("top", url, *words).out)["pools"] == []


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
