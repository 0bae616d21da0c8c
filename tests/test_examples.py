"""What we show to users runs: the examples, and the code in the pages."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import KeyType

from pkcs11_pool import (
    Access,
    PoolClosed,
    PoolState,
    SessionObjectDestroyed,
    SessionState,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import rsa

    from conftest import MakePool
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MODULE = "/usr/lib/softhsm/libsofthsm2.so"  # Debian's, in the README
SAID = {
    "envelope_encryption.py": "tenant 7 reads b'card 4711'; tenant 8 cannot",
    "issue_certificate.py": "100 certificates verify",
    "sign_pdf.py": "20 of 20 signed PDFs are valid",
    "sign_certificate.py": "50 certificates verify",
    "sign_jwt.py": "100 tokens verify, the last is for user 99",
    "asyncio_sign.py": "100 of 100 signatures verify, after 1 login",
    "trio_sign.py": "the signature verifies",
}
CORES = {
    "envelope_encryption.py": "seal",
    "issue_certificate.py": "issue",
    "sign_certificate.py": "issue",
    "sign_jwt.py": "issue",
    "sign_pdf.py": "sign",
}


def test_every_example_is_run_here() -> None:
    """One that is added must say below what it prints."""
    assert set(SAID) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.usefixtures("soft_hsm")
@pytest.mark.parametrize("name", sorted(SAID))
def test_an_example_runs_as_it_stands(name: str) -> None:
    """It ends well and says what it should, without a warning."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert SAID[name] in done.stdout.splitlines()


@pytest.mark.parametrize("name", sorted(SAID))
def test_an_example_is_short(name: str) -> None:
    """Long ones are not read."""
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60


@pytest.mark.parametrize(("name", "function"), sorted(CORES.items()))
def test_the_core_of_an_integration_is_under_ten_lines(
    name: str, function: str
) -> None:
    """What a user writes, without the throwaway token and the verifier."""
    tree = ast.parse((EXAMPLES / name).read_text())
    (core,) = (node for node in tree.body if getattr(node, "name", "") == function)
    assert isinstance(core, ast.AsyncFunctionDef)
    first, last = core.body[1], core.body[-1]  # after its docstring
    assert (last.end_lineno or 0) - first.lineno + 1 < 10


def blocks(name: str, language: str) -> list[str]:
    """The code of one language in a page."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", (ROOT / name).read_text())


def test_the_readme_begins_with_the_two_commands() -> None:
    """The first does the main job, the second passes the tests."""
    first = re.search(r"(?ms)^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text())
    assert first is not None
    assert first[1] == "python3 dev.py demo\npython3 dev.py test\n"


async def test_the_code_of_the_readme_runs(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """On the throwaway token, with the key that it speaks of."""
    await pool.generate_keypair(KeyType.RSA, 2048, label="signer", store=True)
    public = load_der_public_key(await pool.key(label="signer").public_key_der())
    await pool.close()
    code = blocks("README.md", "python")[0]
    assert MODULE in code
    names = await run(code.replace(MODULE, str(token.module)), {})
    cast("rsa.RSAPublicKey", public).verify(
        names["signature"], b"data", PKCS1v15(), SHA256()
    )
    with pytest.raises((SessionObjectDestroyed, PoolClosed)):
        await names["secret"].encrypt(b"data", mechanism_param=bytes(16))


def test_the_code_for_plain_threads_runs(make_pool: MakePool) -> None:
    """Without an event loop, but to open and to close."""
    pool = make_pool()

    async def main() -> bytes:
        async with make_pool() as first:
            await first.generate_keypair(KeyType.RSA, 2048, label="signer", store=True)
            return await first.key(label="signer").public_key_der()

    public = load_der_public_key(asyncio.run(main()))
    code = blocks("README.md", "python")[1]
    names: dict[str, Any] = {"asyncio": asyncio, "pool": pool}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  # it is ours
    cast("rsa.RSAPublicKey", public).verify(
        names["signature"], b"data", PKCS1v15(), SHA512()
    )
    assert len(names["number"]) == 8
    assert pool.state is PoolState.CLOSED


async def test_the_code_of_the_documentation_runs(pool: TokenPool) -> None:
    """Its assertions are the test."""
    for code in blocks("docs/index.md", "python"):
        await run(code, {"pool": pool})


def test_the_documentation_has_the_access_table_of_the_code() -> None:
    """The page is for people, ``SessionState.access`` for programs."""
    words = {
        Access.NONE: "none",
        Access.READ: "read",
        Access.READ_WRITE: "read, write",
    }
    kinds = [(False, False), (False, True), (True, False), (True, True)]
    page = (ROOT / "docs/index.md").read_text()
    for state in SessionState:
        cells = [words[state.access(token=t, private=p)] for t, p in kinds]
        assert f"| `{state.name}` | {' | '.join(cells)} |\n" in page


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_every_link_to_a_file_leads_somewhere(name: str) -> None:
    """Files are renamed, pages stay."""
    page = ROOT / name
    links = re.findall(r"\]\((?!https:)([^)]+)\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


async def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run code that may await, as a page shows it; give the names that it set."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    coroutine = eval(compile(code, "page", "exec", flags=flags), names)  # noqa: S307
    if coroutine is not None:
        await coroutine
    return names
