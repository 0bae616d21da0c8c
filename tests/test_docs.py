"""What the pages show runs, and what they say of the code is so."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, cast
from xml.etree import ElementTree as ET

import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.serialization import load_der_public_key

import pkcs11_pool
from pagekit import README, ROOT, Page, foreign, pages, skipped, sources, unmarked
from pkcs11_pool import PoolClosed, PoolState, SessionObjectDestroyed, events

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric import rsa

    from conftest import MakePool
    from pkcs11_pool.softhsm import ThrowawayToken

SKIPPED = {
    "docs/contributing.md": 4,
    "docs/how-to/index.md": 1,
    "docs/tutorial/first-signature.md": 1,
}
"""How many blocks of which page are not run; each says why, next to it."""

LANGUAGES = {
    "ini": "a unit of systemd, which containers do not have",
    "lua": "for wrk; the tests of the signing service load it with the same lines",
    "sh": "they install, or run these very tests; CI does both",
}
"""The other languages of blocks, and why these are not run."""

FOREIGN = {
    "README.md": {"sh": 3},
    "docs/how-to/keep-the-pin.md": {"ini": 1},
    "docs/how-to/signing-service.md": {"lua": 1},
}
"""How many such blocks which page has."""


def named(path: Path) -> str:
    """A page by its name."""
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*pages(), *sources()], ids=named)
def test_the_code_of_a_page_runs(
    path: Path, token: ThrowawayToken, tmp_path: Path
) -> None:
    """Each block, in order, on a real token; and it prints what the page says."""
    home = tmp_path / "reader"
    home.mkdir()
    Page(path, token, home).run()


def test_only_what_says_why_is_skipped() -> None:
    """A block that is not run any more is seen here."""
    found = {named(page): skipped(page) for page in pages() if skipped(page)}
    assert found == SKIPPED
    for page in pages():
        for directive in re.findall(r"(?m)^<!-- skip: .*$", page.read_text()):
            assert re.search(r' ".+" -->$|reason=".+"\) -->$', directive), page


def test_only_what_is_no_python_is_in_another_language() -> None:
    """A block that has no language that runs has a reason."""
    found = {named(page): foreign(page) for page in pages() if foreign(page)}
    assert found == FOREIGN
    assert {kind for kinds in found.values() for kind in kinds} == set(LANGUAGES)


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=named)
def test_code_in_a_docstring_is_in_a_block(path: Path) -> None:
    """Only blocks are run."""
    assert unmarked(path) == []


def test_every_floor_is_in_the_drawing() -> None:
    """In the order of the contract, those of one floor on one line."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one["id"] == "floors"]
    drawing = ET.parse(ROOT / "docs" / "_static" / "floors.svg")  # noqa: S314
    texts = drawing.iterfind(".//{http://www.w3.org/2000/svg}text[@class='code']")
    drawn = [(text.text or "").split(" · ") for text in texts]
    assert drawn == [re.split(r" [|:] ", layer) for layer in layers]


def test_every_public_name_is_in_the_reference() -> None:
    """What users import, they can look up."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    names = {
        name for name in pkcs11_pool.__all__ if not re.search(rf"\b{name}\b", text)
    }
    assert names == set()


def test_every_how_to_page_is_in_one_group_of_the_sidebar() -> None:
    """The same groups in the list of pages, under the titles of the pages."""
    docs = ROOT / "docs"
    tree = re.compile(
        r'(?s)```\{toctree\}\n:hidden:\n:caption: "How-to: (.*?)"\n(.*?)```'
    )
    sidebar = {
        group: re.findall(r"how-to/(\S+)", pages)
        for group, pages in tree.findall((docs / "index.md").read_text())
    }
    listed: dict[str, list[str]] = {}
    titles = {}
    for line in (docs / "how-to/index.md").read_text().splitlines():
        if line.startswith("## "):
            group = line[3:4].lower() + line[4:]
        elif found := re.fullmatch(r"- \[(.+)\]\((\S+)\.md\)", line):
            listed.setdefault(group, []).append(found[2])
            titles[found[2]] = found[1]
    assert listed == sidebar
    pages = {page.stem: page for page in (docs / "how-to").glob("*.md")}
    del pages["index"]
    assert sorted(titles) == sorted(name for names in listed.values() for name in names)
    for name, page in pages.items():
        assert f"# {titles[name]}\n" in page.read_text()


def test_the_tables_are_those_of_the_code() -> None:
    """Errors, options, events, figures and access: `python docs/tables.py` mends it."""
    command = [sys.executable, str(ROOT / "docs" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def written_events() -> Iterator[tuple[str, set[str]]]:
    """Each place of the source that writes an event: its name there, and the keys."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func) in {"events.info", "events.warning"}:
                name = ast.unparse(node.args[0]).removeprefix("events.")
                yield name, {str(keyword.arg) for keyword in node.keywords}


def test_every_event_has_the_keys_that_its_text_names() -> None:
    """Those before a semicolon always, those behind it at times."""
    page = (ROOT / "docs/reference/events.md").read_text()
    texts = dict(re.findall(r"(?m)^\| `([\w.]+)` \| .* Keys: (.+) \|$", page))
    seen: dict[str, set[str]] = {}
    for name, keys in written_events():
        event = getattr(events, name)
        always, _, at_times = texts[event].partition(";")
        must, may = (set(re.findall(r"`(\w+)`", part)) for part in (always, at_times))
        assert must <= keys <= must | may, (name, keys)
        seen.setdefault(event, set()).update(keys)
    told = {event: set(re.findall(r"`(\w+)`", text)) for event, text in texts.items()}
    assert seen == told
    constants = {value for name, value in vars(events).items() if name.isupper()}
    assert constants == set(seen)


def test_the_readme_begins_with_the_two_commands() -> None:
    """The first does the main job, the second passes the tests."""
    first = re.search(r"(?ms)^```\w*\n(.*?)^```$", README.read_text())
    assert first is not None
    assert first[1] == "python3 dev.py demo\npython3 dev.py test\n"


def test_the_readme_signs_with_the_key_that_it_names(
    token: ThrowawayToken, tmp_path: Path, make_pool: MakePool
) -> None:
    """Another library verifies; what the page says is gone is gone."""
    page = Page(README, token, tmp_path)
    page.run()
    in_async, in_threads = page.after

    async def public_key() -> bytes:
        async with make_pool() as pool:
            return await pool.key(label="signer").public_key_der()

    der = asyncio.run(public_key())
    public = cast("rsa.RSAPublicKey", load_der_public_key(der))
    public.verify(in_async["signature"], b"data", PKCS1v15(), SHA256())
    public.verify(in_threads["signature"], b"data", PKCS1v15(), SHA512())
    assert len(in_threads["number"]) == 8
    assert in_threads["pool"].state is PoolState.CLOSED
    with pytest.raises((SessionObjectDestroyed, PoolClosed)):
        in_async["secret"].sync.encrypt(b"data", mechanism_param=bytes(16))


@pytest.mark.parametrize("path", pages(), ids=named)
def test_every_link_to_a_file_leads_somewhere(path: Path) -> None:
    """Files are renamed, pages stay."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def qualified_names(source: Path) -> set[str]:
    """The classes and functions of a file, methods with their class."""
    found = set()
    for node in ast.parse(source.read_text()).body:
        name = getattr(node, "name", "")
        found |= {name}
        if isinstance(node, ast.ClassDef):
            found |= {f"{name}.{getattr(part, 'name', '')}" for part in node.body}
            found |= {getattr(part, "name", "") for part in node.body}
    return found


def test_the_tour_leads_to_functions_that_exist() -> None:
    """Code is moved and renamed; the way of a signature is told as it is."""
    tour = ROOT / "docs" / "contributing.md"
    steps = re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)", tour.read_text())
    assert len(steps) > 15
    for name, where in steps:
        assert name in qualified_names(tour.parent / where), (name, where)
