"""The example service: what it signs, what it refuses, fuzzed and loaded."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from joserfc import jws
from joserfc.jwk import KeySet
from schemathesis import GenerationMode

from browserkit import served
from pkcs11_pool.asgi import StatusApp
from poolkit import blocking, make_ec_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakePool
    from pkcs11_pool import TokenPool

LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"payload": "under load"}'
"""
EXAMPLE = Path(__file__).parents[1] / "examples" / "signing_service.py"


def loaded() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("signing_service", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["signing_service"] = module
    spec.loader.exec_module(module)
    return module


service = loaded()


@pytest.fixture(
    params=[pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """As uvicorn runs it."""
    return request.param


@asynccontextmanager
async def running(make_pool: MakePool, **options: Any) -> AsyncIterator[str]:
    """The address of the service, on a token with its key."""
    async with make_pool() as pool:
        await make_ec_key(pool, label=service.LABEL)
    app = service.create_app(
        lambda: make_pool(**options), StatusApp(allow_anonymous=True)
    )
    async with served(app) as url:
        yield url


async def test_what_it_signs_others_verify_by_its_key_set(make_pool: MakePool) -> None:
    """And so does the service itself; what was changed it refuses."""
    async with running(make_pool) as url, httpx.AsyncClient(base_url=url) as http:
        signed = (await http.post("/sign", json={"payload": "grüße"})).json()["jws"]
        keys = KeySet.import_key_set((await http.get("/.well-known/jwks.json")).json())
        assert jws.deserialize_compact(signed, keys).payload == "grüße".encode()
        head, _, tail = signed.rpartition(".")
        for text, valid in (
            (signed, True),
            (f"{head}x.{tail}", False),
            (f"{head}.{tail[:-8]}AAAAAAAA", False),
            (f"{head}.{tail[:8]}", False),
            ("no jws", False),
            ("ü.ü", False),
            ("", False),
        ):
            answer = await http.post("/verify", json={"jws": text})
            assert answer.json() == {"valid": valid}
        assert (await http.get("/pools/readyz")).text == "ready\n"
        paths = (await http.get("/openapi.json")).json()["paths"]
        assert set(paths) == {"/sign", "/verify", "/.well-known/jwks.json"}


async def test_a_busy_service_says_when_to_come_again(make_pool: MakePool) -> None:
    """With a problem in JSON; here nobody may wait for the one session."""
    pools: list[TokenPool] = []

    def make() -> TokenPool:
        pools.append(make_pool(max_sessions=1, timeout=0.2))
        return pools[-1]

    async with make_pool() as pool:
        await make_ec_key(pool, label=service.LABEL)
    app = service.create_app(make, StatusApp(allow_anonymous=True))
    async with served(app) as url, httpx.AsyncClient(base_url=url) as http:
        async with pools[0].session():
            answer = await http.post("/sign", json={"payload": "x"})
        assert answer.status_code == 503
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.headers["Retry-After"] == "1"
        assert answer.json()["code"] == "PoolTimeout"
        # On a slow machine its time limit may be too short for the first one.
        for _ in range(20):
            answer = await http.post("/sign", json={"payload": "x"})
            if answer.status_code == 200:
                break
        assert answer.status_code == 200


async def test_no_request_breaks_it(make_pool: MakePool) -> None:
    """Schemathesis asks what nobody would; each answer is as OpenAPI says."""
    async with running(make_pool) as url:
        await blocking(_fuzz, url)
        async with httpx.AsyncClient(base_url=url) as http:
            told = (await http.get("/pools/status.json")).json()["pools"][0]
    assert told["operations_total"] > 10
    assert told["recent_errors"] == []


def _fuzz(url: str) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)
            try:
                _ask(strategy)
            except Unsatisfiable:
                # Nothing of this operation can be wrong: it takes nothing.
                assert (mode, operation.path) == (
                    GenerationMode.NEGATIVE,
                    "/.well-known/jwks.json",
                )


def _ask(strategy: Any) -> None:
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=strategy)
    def ask(case: Any) -> None:
        case.call_and_validate()

    ask()


async def test_it_stands_under_load(make_pool: MakePool, tmp_path: Path) -> None:
    """``wrk`` for a second: every answer is a signature, and one login serves all."""
    if (wrk := shutil.which("wrk")) is None:
        pytest.skip("no wrk: apt-get install wrk")
    script = tmp_path / "sign.lua"
    script.write_text(LUA)
    async with running(make_pool) as url:
        command = [
            wrk,
            "-t1",
            "-c16",
            "-d1s",
            "--timeout",
            "20s",
            "-s",
            str(script),
            f"{url}/sign",
        ]
        done = await blocking(
            subprocess.run, command, capture_output=True, text=True, check=True
        )
        async with httpx.AsyncClient(base_url=url) as http:
            told = (await http.get("/pools/status.json")).json()["pools"][0]
    assert "Non-2xx" not in done.stdout
    assert "Socket errors" not in done.stdout
    assert told["operations_total"] > 16
    assert told["operations_failed"] == 0
    assert told["logins_total"] == 1
