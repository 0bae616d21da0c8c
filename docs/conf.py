"""How Sphinx builds these pages: ``python3 dev.py docs``.

The build reads no network. Names of other projects are resolved with the inventories
that Debian's documentation packages bring, where they are installed; else they are
listed here, so that the build passes on any machine. Our own names must always resolve.
"""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sphinx.util import logging
from sphinx.util.nodes import make_refnode

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

logger = logging.getLogger(__name__)

project = "pkcs11-pool"
author = "The pkcs11-pool authors"
copyright = author  # noqa: A001  # Sphinx calls it that
release = version = "0.1"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
nitpicky = True
# `name` in a docstring is code, as in Markdown.
default_role = "code"

# -- Pages ----------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "pkcs11-pool"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options: dict[str, Any] = {
    "sidebar_hide_name": False,
    "navigation_with_keys": True,
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# -- Docstrings -----------------------------------------------------------------------

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# The sections of this house: what a cancelled caller finds, which C_ functions run.
napoleon_custom_sections = ["Cancellation", "Cryptoki", "Source"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
# Aliases show by their name, and are explained once: docs/reference/types.md.
autodoc_type_aliases = {
    name: name for name in ("Data", "Template", "Timeout", "SignatureFormat")
}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
add_module_names = False
toc_object_entries_show_parents = "hide"


# -- Names of others ------------------------------------------------------------------


class Project(NamedTuple):
    """A project whose names we use.

    Attributes:
        site: Where its documentation is.
        inventory: Where a Debian package puts ``objects.inv``, or None: there is none.
        names: Its names, as a pattern, for where the inventory is not installed or
            does not hold them.
        reason: Why they are listed here.
    """

    site: str
    inventory: str | None
    names: str
    reason: str


PROJECTS = {
    "python": Project(
        "https://docs.python.org/3",
        "/usr/share/doc/python3.11/html/objects.inv",
        r"(object|type|bool|int|float|str|bytes|bytearray|memoryview|tuple|list|dict|set"
        r"|frozenset|None|BaseException|Exception|[A-Z]\w*Error|StopAsyncIteration"
        r"|StopIteration|GeneratorExit|KeyboardInterrupt|contextlib\..*|asyncio\..*"
        r"|collections\..*|datetime\..*|enum\..*|functools\..*|logging\..*|os\..*|pathlib\..*"
        r"|threading\..*|types\..*|typing\..*|Any|Literal|Self|PathLike|os.PathLike"
        r"|Enum|IntEnum|Path|AsyncIterable|AsyncIterator|Awaitable|Callable|Iterable"
        r"|Iterator|Mapping|Sequence|TracebackType|Generic|~?T)",
        "python3-doc is not installed, or a name stands without its module",
    ),
    "pkcs11": Project(
        "https://python-pkcs11.readthedocs.io/en/latest",
        None,
        r"(pkcs11\..*|p11\..*|Attribute|KeyType|Mechanism|MechanismFlag|ObjectClass"
        r"|TokenFlag|MechanismInfo|NoSuchKey|NoSuchToken|UserNotLoggedIn|PinIncorrect"
        r"|PinLenRange|MultipleObjectsReturned|MultipleTokensReturned)",
        "Debian has no documentation package of python-pkcs11",
    ),
    "structlog": Project(
        "https://www.structlog.org/en/stable",
        "/usr/share/doc/python-structlog-doc/html/objects.inv",
        r"structlog\..*",
        "python-structlog-doc is not installed",
    ),
    "anyio": Project(
        "https://anyio.readthedocs.io/en/stable",
        None,
        r"anyio\..*",
        "Debian has no documentation package of AnyIO",
    ),
    "pydantic": Project(
        "https://docs.pydantic.dev/latest",
        None,
        r"pydantic(_settings)?\..*|SecretStr|BaseSettings",
        "Debian has no documentation package of pydantic",
    ),
    "cryptography": Project(
        "https://cryptography.io/en/latest",
        "/usr/share/doc/python-cryptography-doc/html/objects.inv",
        r"(cryptography\..*|(rsa|ec|ed25519|ed448)\..*|PublicKeyTypes|Buffer|Ed\w+Key)",
        "python-cryptography-doc is not installed, or has an older version's",
    ),
    "asn1crypto": Project(
        "https://github.com/wbond/asn1crypto",
        None,
        r"(asn1crypto\..*|(x509|csr|crl|keys|algos)\.\w+|SignedDigestAlgorithm)",
        "asn1crypto has pages, and no inventory",
    ),
    "joserfc": Project(
        "https://jose.authlib.org/en",
        None,
        r"(joserfc\..*|KeyParameters|(RSA|EC|OKP)Key)",
        "Debian has no documentation package of joserfc",
    ),
    "pyhanko": Project(
        "https://docs.pyhanko.eu/en/latest",
        None,
        r"(pyhanko.*|CertificateStore|Signer)",
        "Debian has no documentation package of pyHanko",
    ),
    "securesystemslib": Project(
        "https://python-securesystemslib.readthedocs.io/en/latest",
        None,
        r"(securesystemslib\..*|Key|SecretsHandler|Signature|SSlibKey)",
        "Debian has no documentation package of securesystemslib",
    ),
    "trio": Project(
        "https://trio.readthedocs.io/en/stable",
        None,
        r"trio\..*",
        "Debian has no documentation package of trio",
    ),
}

INSIDE = {
    # What a reader never writes, with why it stands in a signature.
    r"(pkcs11_pool\.\w+\.\w+\.)?(Session|SecurityOfficer)Block": "for `async with`",
    r"(pkcs11_pool\.faces\.\w+\.)?(Calls|Making|KeyMaker)": "a base of public classes",
    r"TokenEngine|Lease|Target|Task|Work": "made by the pool, never by its user",
    r"TypeAliasForwardRef": "how autodoc shows an alias in a union",
    r"Library": "python-pkcs11's `lib`, with a method of ours",
    r"NameLike|PublicKeyLike|WrapName": "said with the argument that is one",
    r"dt\.\w+|AbstractSet": "how a module of ours imports them",
    r"Session": "python-pkcs11's session, with guards of ours",
    r"PinSource|PinCallable|PinPad|NoPin": "whatever `pin=` takes: see the options",
    r"Secret|pkcs11_pool\.pins\.Secret": "how a PIN is kept out of sight",
}

intersphinx_mapping = {
    name: (other.site, other.inventory)
    for name, other in PROJECTS.items()
    if other.inventory and Path(other.inventory).exists()
}
intersphinx_timeout = 1

nitpick_ignore_regex = [
    (r"py:.*", pattern) for pattern in (*(p.names for p in PROJECTS.values()), *INSIDE)
]


# -- Our own names --------------------------------------------------------------------


def house_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element
) -> nodes.Element | None:
    """Find a public name from wherever it is used.

    Docstrings say ``KeyRef.sign``, in whichever file they stand; the pages list it
    where users import it from.
    """
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].removeprefix("pkcs11_pool.")
    others = "errors. stats. faces.parameters. integrations.cryptography."
    for where in ("", *others.split()):
        full = f"pkcs11_pool.{where}{name}"
        found = env.domains.python_domain.objects.get(full)
        if found is not None:
            return make_refnode(
                app.builder, node["refdoc"], found.docname, found.node_id, [text], full
            )
    return None


def say_what_is_needed(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Say below the title of a page which keys its code finds."""
    found = re.search(r"<!-- page:.*?keys=(\S+)", source[0])
    if found is None:
        return
    keys = ", ".join(f"`{key}`" for key in found[1].split(","))
    note = (
        "\n```{admonition} What the code here needs\n:class: note\n"
        f"A token `demo` with {keys}. Where `pool` is used and not made, it is an open "
        "one, inside of an `async def`. {ref}`How to make them <what-pages-need>`\n"
        "```\n"
    )
    source[0] = re.sub(
        r"(?m)^(# .*\n)", lambda title: title[1] + note, source[0], count=1
    )


def find_dead_links(app: Sphinx, error: Exception | None) -> None:
    """Warn of links within the site that lead nowhere.

    Sphinx checks those that writers make, not those that it makes itself: in the
    listings of sources, each Python module has but one place in the reference.
    """
    if error is not None or app.builder.format != "html":
        return
    pages = {path.resolve(): path.read_text() for path in app.outdir.rglob("*.html")}
    names = {path: set(re.findall(r'\bid="(.+?)"', pages[path])) for path in pages}
    for path, text in pages.items():
        for link, anchor in re.findall(r'href="([^":?#]*)#([^"]+)"', text):
            target = (path.parent / link).resolve() if link else path
            if target in names and unescape(anchor) not in names[target]:
                page = path.relative_to(app.outdir.resolve())
                logger.warning("%s: %s#%s leads nowhere", page, link, anchor)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("build-finished", find_dead_links)
    app.connect("source-read", say_what_is_needed)
    app.connect("missing-reference", house_name, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
