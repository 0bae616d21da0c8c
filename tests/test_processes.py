"""Several processes: each has sessions of its own, or a clear error."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from pkcs11_pool import TokenPool
from poolkit import LAST_RESORT, make_ec_key, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11_pool.softhsm import ThrowawayToken

_HERE = Path(__file__).parent
_DATA = bytes(32)
_WORKERS = 4


# A child process of each kind, while the parent's pool is open and in use.
_CHILDREN = """
import multiprocessing, sys, threading
import anyio
from pkcs11 import Mechanism
from pkcs11_pool import ForkedProcess, TokenPool

MODULE, BACKEND, LABEL, PIN, METHOD = sys.argv[1:]


async def sign(pool):
    return await pool.key(label="signer").sign(
        bytes(32), mechanism=Mechanism.ECDSA, signature_format="der"
    )


async def in_child():
    async with TokenPool(MODULE, token_label=LABEL, pin=PIN) as pool:
        return (await sign(pool)).hex()


def child(end):
    def work():
        try:
            end.send(anyio.run(in_child, backend=BACKEND))
        except ForkedProcess as error:
            end.send(f"ForkedProcess: {error}")

    # Not on the thread that was forked: it still thinks that a loop runs there.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


async def main():
    context = multiprocessing.get_context(METHOD)
    async with TokenPool(MODULE, token_label=LABEL, pin=PIN) as pool:
        await sign(pool)
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there,))
        process.start()
        print(await anyio.to_thread.run_sync(here.recv))
        process.join()
        print((await sign(pool)).hex())
        print(process.exitcode)


if __name__ == "__main__":
    anyio.run(main, backend=BACKEND)
"""


async def _public(pool: TokenPool) -> ec.EllipticCurvePublicKey:
    """Make the key that the children sign with; its public half."""
    key = await make_ec_key(pool)
    public = load_der_public_key(await key.public_key_der())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return public


def _verify(public: ec.EllipticCurvePublicKey, signature: str) -> None:
    public.verify(bytes.fromhex(signature), _DATA, ec.ECDSA(Prehashed(SHA256())))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The parent, as a file: a child that is not forked has to load it."""
    path = tmp_path / "parent.py"
    path.write_text(_CHILDREN)
    return path


def _answers_of_child(
    script: Path, token: ThrowawayToken, backend: str, method: str
) -> list[str]:
    """What the child answered, what the parent signed then, and the child's status."""
    arguments = [str(token.module), backend, token.label, token.user_pin, method]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_that_is_not_forked_from_here_has_a_pool_of_its_own(
    script: Path, token: ThrowawayToken, backend: str, method: str
) -> None:
    """On the same token at the same time, and the parent goes on."""
    public = anyio.run(_key_alone, token)
    theirs, ours, status = _answers_of_child(script, token, backend, method)
    _verify(public, theirs)
    _verify(public, ours)
    assert status == "0"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_forked_child_that_opens_a_pool_is_told_what_to_do(
    script: Path, token: ThrowawayToken, backend: str
) -> None:
    """The parent has the module open; the child is told of spawn and forkserver."""
    public = anyio.run(_key_alone, token)
    theirs, ours, status = _answers_of_child(script, token, backend, "fork")
    assert theirs.startswith("ForkedProcess")
    assert "spawn" in theirs
    _verify(public, ours)
    assert status == "0"


class _Server:
    """A server in processes of its own, on a socket file."""

    def __init__(self, path: Path, log: Path) -> None:
        self.socket = path
        self.log = log

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0

    @contextlib.contextmanager
    def running(
        self, command: list[str], token: ThrowawayToken, **environment: str
    ) -> Iterator[httpx.Client]:
        """Start it, give a client, stop it by its process id."""
        given = {
            **os.environ,
            "TEST_MODULE": str(token.module),
            "TEST_TOKEN": token.label,
            "TEST_PIN": token.user_pin,
            **environment,
        }
        with (
            self.log.open("wb") as log,
            subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=_HERE / "servers",
                env=given,
                stdout=log,
                stderr=log,
            ) as process,
        ):
            try:
                wait_for(lambda: self._listens() or process.poll() is not None)
                assert process.poll() is None, self.log.read_text()
                transport = httpx.HTTPTransport(uds=str(self.socket))
                with httpx.Client(
                    transport=transport,
                    base_url="http://localhost",
                    timeout=3 * LAST_RESORT,
                    # Each request may come to another worker.
                    headers={"Connection": "close"},
                ) as client:
                    yield client
            finally:
                process.send_signal(signal.SIGTERM)
                ended = process.wait(3 * LAST_RESORT)
        assert ended in {0, -signal.SIGTERM}, self.log.read_text()


@pytest.fixture
def server(tmp_path: Path) -> _Server:
    """A server that is not started yet."""
    return _Server(tmp_path / "http", tmp_path / "log")


def _answers(client: httpx.Client, workers: int) -> list[dict[str, Any]]:
    """Ask until each worker has answered, many at once: one alone takes them all."""
    answers: list[dict[str, Any]] = []

    def ask(_number: int) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = client.post("/sign", content=_DATA).json()
        except httpx.RemoteProtocolError:
            # SoftHSM2 may miss a token that another process writes. That worker
            # cannot open its pool, ends, and is started anew by its server.
            return None
        return answer

    def all_there() -> bool:
        answers.extend(filter(None, threads.map(ask, range(4 * workers))))
        return len({answer["pid"] for answer in answers}) == workers

    with ThreadPoolExecutor(4 * workers) as threads:
        wait_for(all_there)
    return answers


async def _key_alone(token: ThrowawayToken) -> ec.EllipticCurvePublicKey:
    """Make the key, and leave the token to the server."""
    async with TokenPool(
        token.module, token_label=token.label, pin=token.user_pin
    ) as pool:
        return await _public(pool)


def test_uvicorn_with_four_workers_has_four_pools(
    server: _Server, token: ThrowawayToken
) -> None:
    """Every worker signs, with sessions of its own, and all end in order."""
    public = anyio.run(_key_alone, token)
    options = ["--workers", str(_WORKERS), "--uds", str(server.socket)]
    with server.running(["uvicorn", "asgi_app:app", *options], token) as client:
        answers = _answers(client, _WORKERS)
    for answer in answers:
        _verify(public, answer["signature"])


def test_gunicorn_with_preload_has_a_pool_in_each_worker(
    server: _Server, token: ThrowawayToken
) -> None:
    """The pool is made before the fork and opened after it."""
    public = anyio.run(_key_alone, token)
    with server.running(_gunicorn(server), token) as client:
        answers = _answers(client, 2)
    for answer in answers:
        _verify(public, answer["signature"])


def test_gunicorn_that_opens_before_the_fork_is_told_so(
    server: _Server, token: ThrowawayToken
) -> None:
    """Each worker refuses: it would share the parent's sessions."""
    anyio.run(_key_alone, token)
    with server.running(_gunicorn(server), token, TEST_OPEN="early") as client:
        answers = _answers(client, 2)
    assert all("after the fork" in answer["refused"] for answer in answers)


def _gunicorn(server: _Server) -> list[str]:
    options = ["--preload", "--workers", "2", "--threads", "2"]
    return ["gunicorn", *options, "--bind", f"unix:{server.socket}", "wsgi_app:app"]
