"""The examples run; what stands in the pages is in ``test_docs``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SAID = {
    "envelope_encryption.py": "tenant 7 reads b'card 4711'; tenant 8 cannot",
    "issue_certificate.py": "100 certificates verify",
    "sign_tuf.py": "100 signatures verify",
    "sign_pdf.py": "20 of 20 signed PDFs are valid",
    "sign_certificate.py": "50 certificates verify",
    "sign_jwt.py": "100 tokens verify, the last is for user 99",
    "asyncio_sign.py": "100 of 100 signatures verify, after 1 login",
    "batch_of_signatures.py": "number 4321: InvalidType: an item must be bytes",
    "fastapi_sign.py": "sign There is no such key.\nready? ready",
    "key_ceremony.py": "5. the minutes are signed: True",
    "trio_sign.py": "the signature verifies",
}
LINES = 75
"""As many as fit on a screen or two."""
CORES = {
    "envelope_encryption.py": "seal",
    "issue_certificate.py": "issue",
    "sign_certificate.py": "issue",
    "sign_jwt.py": "issue",
    "sign_pdf.py": "sign",
    "sign_tuf.py": "sign",
}


def test_every_example_is_run_here() -> None:
    """One that is added must say below what it prints."""
    found = {path.name for path in EXAMPLES.glob("*.py")}
    # The service has a test of its own: it ends with its server only.
    assert found == set(SAID) | {"signing_service.py"}


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
    assert SAID[name] in done.stdout


@pytest.mark.parametrize("name", sorted(SAID))
def test_an_example_is_short(name: str) -> None:
    """Long ones are not read."""
    assert len((EXAMPLES / name).read_text().splitlines()) <= LINES


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


@pytest.mark.parametrize(
    "page", ["aiohttp", "fastapi", "litestar", "quart", "starlette"]
)
def test_the_wiring_of_a_web_framework_is_under_ten_lines(page: str) -> None:
    """All that gives a service the pool, its errors and its status page."""
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text()
    tree = ast.parse(text.partition("```python\n")[2].partition("```\n")[0])
    ours = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("pkcs11_pool")
        for alias in node.names
    }
    # Beside its handlers, and the options of the pool.
    lines = 0
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.Expr)) and ours & _names(node):
            lines += (node.end_lineno or 0) - node.lineno + 1
            ours |= _names(node)  # what is made of ours is wired on
    assert 1 < lines < 10


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
