"""The tables of the reference, written from the code that they tell of.

    python docs/tables.py          write them into the pages anew
    python docs/tables.py --check  say which page is not as the code is

A table stands in its page between ``<!-- table: NAME -->`` and ``<!-- end -->``, so
that the page can be read as it is. A test keeps pages and code together.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pkcs11_pool
from pkcs11_pool import errors, events, stats
from pkcs11_pool.state import SessionState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE: Final = Path(__file__).parent
_TABLE: Final = re.compile(r"(?s)(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)")


def markdown(text: str) -> str:
    """A docstring as Markdown on one line, for a cell."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").replace("|", r"\|").split())


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comments(module: object, *, above: bool) -> dict[str, str]:
    """What the source says right above or behind its names, by name.

    Args:
        module: A Python module of ours.
        above: Comments (``#:``) above a name; otherwise the string behind it.
    """
    source = inspect.getsource(module)  # type: ignore[arg-type]
    lines, found = source.splitlines(), {}
    bodies = [ast.parse(source).body]
    bodies += [node.body for node in bodies[0] if isinstance(node, ast.ClassDef)]
    for body in bodies:
        for node, after in zip(body, [*body[1:], None], strict=True):
            name = _assigned(node)
            if name is None:
                continue
            if above:
                line = node.lineno - 2
                text: list[str] = []
                while lines[line].lstrip().startswith("#:"):
                    text.insert(0, lines[line].lstrip().removeprefix("#:"))
                    line -= 1
                if text:
                    found[name] = " ".join(text)
            elif isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[name] = str(after.value.value)
    return found


def _assigned(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    return None


def option_texts() -> dict[str, str]:
    """What the docstring of the pool says of each option."""
    text = inspect.getdoc(pkcs11_pool.TokenPool) or ""
    arguments = re.search(r"(?s)\nArgs:\n(.*?)\n\n", text)
    assert arguments is not None  # noqa: S101  # it is ours
    return dict(re.findall(r"(?ms)^    (\w+): (.*?)(?=^    \w|\Z)", arguments[1]))


def option_table() -> str:
    """The options of a pool, with their defaults."""
    texts = option_texts()
    parameters = inspect.signature(pkcs11_pool.TokenPool).parameters.values()

    def default(parameter: inspect.Parameter) -> str:
        if parameter.default is parameter.empty:
            return "needed"
        value = parameter.default
        return f"`{value:_}`" if type(value) is int else f"`{value}`"

    rows = ((f"`{p.name}`", default(p), markdown(texts[p.name])) for p in parameters)
    return table(("option", "default", "meaning"), rows)


def error_table() -> str:
    """Each error, what else it is, what happened and what to do."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name in sorted(errors.__all__):
            kind = getattr(errors, name)
            bases = [
                b for b in kind.__bases__ if b not in {Exception, errors.PoolError}
            ]
            shown = ", ".join(f"`{_known_as(base)}`" for base in bases)
            text = (inspect.getdoc(kind) or "").partition("\n\nAttributes:")
            said = markdown(text[0])
            if text[2]:
                said += " " + markdown(re.sub(r"(?m)^\s*(\w+):", r"`\1`:", text[2]))
            yield f"`{name}`", shown, said

    return table(("error", "is also", "what happened, and what to do"), rows())


def _known_as(kind: type) -> str:
    if kind.__module__ == "pkcs11.exceptions":
        return f"pkcs11.{kind.__name__}"
    return kind.__name__


def event_table() -> str:
    """Each log event and when it is written."""
    texts = comments(events, above=False)
    rows = (
        (f"`{value}`", markdown(texts[name]))
        for name, value in vars(events).items()
        if name.isupper() and isinstance(value, str)
    )
    return table(("event", "when"), rows)


def stats_table() -> str:
    """Each figure of ``pool.stats()``."""
    texts = comments(stats, above=True)
    counted = {field.name for field in dataclasses.fields(stats.Counters)}

    def kind(field: dataclasses.Field[object]) -> str:
        if field.name in counted:
            return "text" if field.name == "last_error" else "counter"
        kinds = {"Histogram": "histogram", "int": "gauge"}
        return kinds.get(str(field.type), "list")

    rows = (
        (f"`{field.name}`", kind(field), markdown(texts[field.name]))
        for field in dataclasses.fields(stats.PoolStats)
    )
    return table(("figure", "kind", "meaning"), rows)


def access_table() -> str:
    """What a session may do in which state: ``state.access``, as a table."""
    kinds = [(t, p) for t in (False, True) for p in (False, True)]
    head = [
        f"{'private' if private else 'public'} {'token' if token else 'session'}"
        for token, private in kinds
    ]

    def rows() -> Iterator[tuple[str, ...]]:
        for state in SessionState:
            kind = "R/O" if state.name.startswith("RO") else "R/W"
            cells = [
                state.access(token=token, private=private).value.replace("_", ", ")
                for token, private in kinds
            ]
            yield (f"`{state.name}`", kind, *cells)

    return table(("state", "session", *head), rows())


TABLES: Final[dict[str, Callable[[], str]]] = {
    "access": access_table,
    "errors": error_table,
    "events": event_table,
    "options": option_table,
    "stats": stats_table,
}


def with_tables(text: str) -> str:
    """A page as it must be: its tables written anew."""

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[4]}"

    return _TABLE.sub(filled, text)


def pages() -> list[Path]:
    """All pages that hold a table."""
    found = sorted(HERE.rglob("*.md"))
    return [page for page in found if "<!-- table: " in page.read_text()]


def main(arguments: list[str]) -> int:
    """Write or check the tables."""
    stale = [
        page for page in pages() if page.read_text() != with_tables(page.read_text())
    ]
    shown = {
        name for page in pages() for _, name, *_ in _TABLE.findall(page.read_text())
    }
    lost = sorted(TABLES.keys() - shown)
    for name in lost:
        print(f"the table {name} is on no page")
    for page in stale:
        print(page)
        if "--check" not in arguments:
            page.write_text(with_tables(page.read_text()))
    return 1 if lost or (stale and "--check" in arguments) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
