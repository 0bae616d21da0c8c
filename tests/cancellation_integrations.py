"""What the integrations give to be awaited: the rest of the table of cancellations."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web
from asn1crypto import cms, crl, csr
from asn1crypto import x509 as asn1
from pkcs11 import Mechanism
from pyhanko.sign.signers import Signer

from cancellation_table import Case, Ground, coroutines_of
from pkcs11_pool import integrations
from pkcs11_pool.integrations import (
    aiohttp,
    cryptography,
    jose,
    lifespan,
    pdf,
    tuf,
    x509,
)
from pkcs11_pool.integrations.envelope import Envelope

if TYPE_CHECKING:
    from pkcs11_pool import TokenPool

_DATA = b"data of a user"
_CONTEXT = {"tenant": "7"}
_NAME = {"common_name": "issuer"}


# -- Made once, before what is cancelled ---------------------------------------------


async def _seal(ground: Ground) -> None:
    """An envelope, and blobs of its present and its former KEK."""
    if "envelope" in ground.state:
        return
    old, new = ground.pool.key(label="secret"), ground.pool.key(label="kek")
    ground.state["envelope"] = envelope = Envelope({"new": new, "old": old})
    ground.state["blob"] = await envelope.encrypt(_DATA, _CONTEXT)
    ground.state["old"] = await Envelope({"old": old}).encrypt(_DATA, _CONTEXT)


async def _load_jose(ground: Ground) -> None:
    if "jose" not in ground.state:
        ground.state["jose"] = await jose.load_signer(ground.key("signer"))


async def _load_tuf(ground: Ground) -> None:
    if "tuf" not in ground.state:
        ground.state["tuf"] = await tuf.load_signer(ground.key("signer"))


async def _load_issuer(ground: Ground) -> None:
    if "issuer" not in ground.state:
        ground.state["issuer"] = await x509.load_issuer(ground.key("signer"), _NAME)


async def _load_pdf(ground: Ground) -> None:
    await _load_issuer(ground)
    if "pdf" not in ground.state:
        own = await ground.state["issuer"].self_signed(days=1, ca=False)
        ground.state["certificate"] = own
        ground.state["pdf"] = await pdf.load_signer(ground.key("signer"), own)


# -- Calls that are more than one line ---------------------------------------------


async def _decrypt(ground: Ground) -> None:
    found = await ground.state["envelope"].decrypt(ground.state["blob"], _CONTEXT)
    assert found == _DATA


async def _data_key(ground: Ground) -> None:
    made = await ground.state["envelope"].generate_data_key(_CONTEXT)
    assert len(made.plaintext) == 32


async def _issue(ground: Ground) -> None:
    issuer: x509.Issuer = ground.state["issuer"]
    made = await issuer.certificate(_NAME, ground.signer_der, days=1)
    assert isinstance(made, asn1.Certificate)
    assert isinstance(await issuer.self_signed(days=1), asn1.Certificate)


async def _request(ground: Ground) -> None:
    issuer: x509.Issuer = ground.state["issuer"]
    assert isinstance(await issuer.request(), csr.CertificationRequest)
    assert isinstance(await issuer.crl(number=1, days=1), crl.CertificateList)


async def _cms(ground: Ground) -> None:
    signer: pdf.PoolSigner = ground.state["pdf"]
    digest = hashlib.sha256(_DATA).digest()
    made = await signer.async_sign(digest, "sha256")
    assert isinstance(made, cms.ContentInfo)


async def _answered(ground: Ground) -> None:
    async def handle(_request: Any) -> web.StreamResponse:
        await ground.key("signer").sign(_DATA, mechanism=Mechanism.ECDSA_SHA256)
        raise AssertionError("SoftHSM2 has no such mechanism")

    answer = await aiohttp.answer_errors(None, handle)  # type: ignore[arg-type]
    assert answer.status == 400


def _make(ground: Ground) -> TokenPool:
    pool: TokenPool = ground.make_pool(
        token_label=ground.other.label, pin=ground.other.user_pin
    )
    ground.state["pool"] = pool
    return pool


async def _life(ground: Ground) -> None:
    async with lifespan.open_pool(lambda: _make(ground)) as pool:
        await pool.digest(_DATA, mechanism=Mechanism.SHA256)


async def _aiohttp_life(ground: Ground) -> None:
    app = web.Application()
    context = aiohttp.pool_context(lambda: _make(ground))
    async with asynccontextmanager(context)(app):
        await app[aiohttp.POOL].digest(_DATA, mechanism=Mechanism.SHA256)


async def _nothing_of_it(ground: Ground) -> None:
    """Its block has closed the pool."""
    pool: TokenPool | None = ground.state.pop("pool", None)
    if pool is not None:
        assert pool.stats().sessions_open == 0
        await pool.close()


INTEGRATIONS = [
    Case(
        "envelope.Envelope.encrypt",
        lambda g: g.state["envelope"].encrypt(_DATA, _CONTEXT),
        "C_Encrypt",
        before=_seal,
    ),
    Case("envelope.Envelope.decrypt", _decrypt, "C_Decrypt", before=_seal),
    Case(
        "envelope.Envelope.rewrap",
        lambda g: g.state["envelope"].rewrap(g.state["old"]),
        "C_WrapKey",
        before=_seal,
    ),
    Case(
        "envelope.Envelope.generate_data_key",
        _data_key,
        "C_GenerateRandom",
        before=_seal,
    ),
    Case(
        "jose.load_signer",
        lambda g: jose.load_signer(g.key("signer")),
        "C_GetAttributeValue",
    ),
    Case(
        "jose.JWSSigner.sign jose.JWSSigner.jwt algorithms.Algorithm.sign",
        lambda g: g.state["jose"].jwt({"sub": "user"}),
        "C_Sign",
        before=_load_jose,
    ),
    Case(
        "cryptography.load_private_key",
        lambda g: cryptography.load_private_key(g.key("signer")),
        "C_GetAttributeValue",
    ),
    Case(
        "tuf.load_signer",
        lambda g: tuf.load_signer(g.key("signer")),
        "C_GetAttributeValue",
    ),
    Case(
        "tuf.PoolSigner.sign_async",
        lambda g: g.state["tuf"].sign_async(_DATA),
        "C_Sign",
        before=_load_tuf,
    ),
    Case(
        "x509.load_issuer",
        lambda g: x509.load_issuer(g.key("signer"), _NAME),
        "C_GetAttributeValue",
    ),
    Case(
        "x509.Issuer.certificate x509.Issuer.self_signed x509.Issuer.sign_certificate",
        _issue,
        "C_Sign",
        before=_load_issuer,
    ),
    Case(
        "x509.Issuer.request x509.Issuer.sign_request x509.Issuer.crl"
        " x509.Issuer.sign_crl",
        _request,
        "C_Sign",
        before=_load_issuer,
    ),
    Case(
        "pdf.load_signer",
        lambda g: pdf.load_signer(g.key("signer"), g.state["certificate"]),
        "C_GetAttributeValue",
        before=_load_pdf,
    ),
    Case(
        "pdf.PoolSigner.async_sign_raw",
        lambda g: g.state["pdf"].async_sign_raw(_DATA, "sha256"),
        "C_Sign",
        before=_load_pdf,
    ),
    Case(
        "pdf.PoolSigner.async_sign",
        _cms,
        "C_Sign",
        before=_load_pdf,
        asyncio_only=True,
    ),
    Case("lifespan.open_pool", _life, after=_nothing_of_it, alone=True),
    Case("aiohttp.pool_context", _aiohttp_life, after=_nothing_of_it, alone=True),
    Case("aiohttp.answer_errors", _answered, "C_SignInit"),
]

_FOREIGN = {
    f"pdf.PoolSigner.{name}"
    for name, member in vars(Signer).items()
    if inspect.iscoroutinefunction(member)
} - {"pdf.PoolSigner.async_sign", "pdf.PoolSigner.async_sign_raw"}
"""What is pyHanko's own; all of it comes to these two."""
_PARTS = {"wrapping.wrap", "wrapping.unwrap"}
"""What an envelope's coroutines await."""


def integration_coroutines() -> set[str]:
    """All that a user of an integration can await, found by looking."""
    found = {"aiohttp.pool_context"}  # a function that gives one
    for info in pkgutil.iter_modules(integrations.__path__):
        module: Any = importlib.import_module(f"{integrations.__name__}.{info.name}")
        found |= {f"{info.name}.{name}" for name in coroutines_of(module)}
        found |= {
            f"{info.name}.{name}"
            for name, thing in vars(module).items()
            if not name.startswith("_")
            and getattr(thing, "__module__", "") == module.__name__
            and inspect.isfunction(thing)
            and inspect.isasyncgenfunction(inspect.unwrap(thing))
        }
    return found - _FOREIGN - _PARTS
