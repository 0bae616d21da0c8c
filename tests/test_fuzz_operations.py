"""Whatever is passed to an operation: it works, or is refused in words of ours.

Never another exception, never a hang, nothing left behind, and the pool goes on.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from fuzzkit import ANYTHING, PROPER, examples, made, on_a_loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakePool
    from faultmodule import FaultModule

_IV = bytes(16)


def _func(_session: object, *_arguments: object) -> str:
    return "done"


async def _enter(block: Any) -> None:
    async with block:
        pass


async def _all(results: Any) -> list[Any]:
    async with results:
        return [result async for result in results]


_SIGN = {"mechanism": Mechanism.AES_MAC, "mechanism_param": None}
_CBC: dict[str, Any] = {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": _IV}
_MADE: dict[str, Any] = {"id": b"x", "label": "x", "store": False, "template": {}}
_Options = dict[str, Any]

_CALLS: dict[str, tuple[Callable[[Any, _Options], Any], _Options]] = {
    "run": (lambda p, o: p.run(**o), {"func": _func, "rw": False, "repeat": False}),
    "digest": (
        lambda p, o: p.digest(**o),
        {"data": b"x", "mechanism": Mechanism.SHA256, "mechanism_param": None},
    ),
    "generate_random": (lambda p, o: p.generate_random(**o), {"nbits": 64}),
    "seed_random": (lambda p, o: p.seed_random(**o), {"seed": b"seed"}),
    "find": (lambda p, o: p.find(**o), {"template": {Attribute.LABEL: "aes"}}),
    "map": (
        lambda p, o: _all(p.map(**o)),
        {
            "func": _func,
            "items": [1, 2],
            "rw": False,
            "limit": 2,
            "return_errors": False,
            "repeat": False,
        },
    ),
    "key": (
        lambda p, o: p.key(**o).attributes(),
        {
            "label": "aes",
            "id": None,
            "object_class": ObjectClass.SECRET_KEY,
            "key_type": KeyType.AES,
        },
    ),
    "encrypt": (lambda p, o: p.key(label="aes").encrypt(**o), {"data": b"x", **_CBC}),
    "decrypt": (
        lambda p, o: p.key(label="aes").decrypt(**o),
        {"data": bytes(16), "pin": None, **_CBC},
    ),
    "encrypt_stream": (
        lambda p, o: _all(p.key(label="aes").encrypt_stream(**o)),
        {"data": [b"x"], **_CBC},
    ),
    "sign": (
        lambda p, o: p.key(label="ec").sign(**o),
        {
            "data": bytes(32),
            "mechanism": Mechanism.ECDSA,
            "mechanism_param": None,
            "pin": None,
            "signature_format": "raw",
        },
    ),
    "sign_many": (
        lambda p, o: _all(p.key(label="ec").sign_many(**o)),
        {
            "items": [bytes(32)],
            "mechanism": Mechanism.ECDSA,
            "mechanism_param": None,
            "pin": None,
            "signature_format": "der",
            "limit": 1,
            "return_errors": True,
        },
    ),
    "verify": (
        lambda p, o: p.key(label="ec").verify(**o),
        {
            "data": bytes(32),
            "signature": bytes(64),
            "mechanism": Mechanism.ECDSA,
            "signature_format": "der",
        },
    ),
    "attributes": (
        lambda p, o: p.key(label="aes").attributes(**o),
        {"names": [Attribute.LABEL]},
    ),
    "public_key_der": (lambda p, o: p.key(label="ec").public_key_der(**o), {}),
    "wrap_key": (
        lambda p, o: p.key(label="aes").wrap_key(**o),
        {"key": None, "mechanism": Mechanism.AES_KEY_WRAP, "mechanism_param": None},
    ),
    "on": (lambda p, o: p.key(label="aes").on(**o), {"session": None}),
    "login": (
        lambda p, o: p.login(o["pin"], force=o["force"]),
        {"pin": "1", "force": 0},
    ),
    "session": (lambda p, o: _enter(p.session(**o)), {"rw": True}),
}
_IN_A_SESSION: dict[str, tuple[Callable[[Any, _Options], Any], _Options]] = {
    name: _CALLS[name] for name in ("run", "digest", "find", "generate_random")
} | {
    "info": (lambda s, o: s.info(**o), {}),
    "generate_key": (
        lambda s, o: s.generate_key(**o),
        {
            "key_type": KeyType.AES,
            "key_length": 128,
            "capabilities": None,
            "mechanism": None,
            "mechanism_param": None,
            **_MADE,
        },
    ),
    "generate_keypair": (
        lambda s, o: s.generate_keypair(**o),
        {
            "key_type": KeyType.EC,
            "key_length": None,
            "curve": "secp256r1",
            "capabilities": None,
            "id": b"x",
            "label": "x",
            "store": False,
            "mechanism": None,
            "mechanism_param": None,
            "public_template": None,
            "private_template": None,
        },
    ),
    "create_object": (
        lambda s, o: s.create_object(**o),
        {"template": {Attribute.CLASS: ObjectClass.DATA, Attribute.VALUE: b"x"}},
    ),
    "create_domain_parameters": (
        lambda s, o: s.create_domain_parameters(**o),
        {"key_type": KeyType.DH, "attrs": {}, "local": True, "store": False},
    ),
    "unwrap_key": (
        lambda s, o: s.key(label="aes").on(s).unwrap_key(**o),
        {
            "object_class": ObjectClass.SECRET_KEY,
            "key_type": KeyType.AES,
            "key_data": bytes(24),
            "mechanism": Mechanism.AES_KEY_WRAP,
            "mechanism_param": None,
            "capabilities": None,
            **_MADE,
        },
    ),
    "derive_key": (
        lambda s, o: s.key(label="aes").on(s).derive_key(**o),
        {
            "key_type": KeyType.AES,
            "key_length": 128,
            "mechanism": Mechanism.AES_ECB_ENCRYPT_DATA,
            "mechanism_param": bytes(16),
            "capabilities": None,
            **_MADE,
        },
    ),
    "copy": (lambda s, o: s.key(label="aes").on(s).copy(**o), {"template": {}}),
}


@st.composite
def _drawn(draw: st.DrawFn, calls: dict[str, Any]) -> tuple[str, _Options]:
    """An operation, and its arguments: one or two of them are not as they should be."""
    name = draw(st.sampled_from(sorted(calls)))
    options = dict(calls[name][1])
    if name not in ("key", "on", "login"):
        options["timeout"] = 5.0
    odd = draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=2))
    drawn = {key: draw(ANYTHING) for key in odd}
    if "func" in drawn and callable(made(drawn["func"])):
        # What a caller's function raises is his own.
        drawn["func"] = _func
    return name, options | drawn


def _made(drawn: tuple[str, _Options]) -> tuple[str, _Options]:
    name, options = drawn
    return name, {key: made(value) for key, value in options.items()}


async def _make_keys(pool: Any) -> None:
    await pool.generate_key(KeyType.AES, 128, label="aes", store=True)
    await pool.generate_keypair(KeyType.EC, curve="secp256r1", label="ec", store=True)


def _balance(fault: FaultModule) -> None:
    """Every session that was opened is closed."""
    counts = fault.counts()
    assert fault.sessions() == []
    assert counts["C_OpenSession"] == counts["C_CloseSession"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_whatever_an_operation_is_given(
    make_pool: MakePool, fault: FaultModule, backend: str, request: Any
) -> None:
    """On the pool, each in a session of its own."""
    pool = make_pool(module=fault.path, timeout=20.0)
    with on_a_loop(pool, backend) as bench:
        bench.call(_make_keys, pool)

        @examples(request, 300)
        @given(_drawn(_CALLS))
        def check(drawn: tuple[str, _Options]) -> None:
            name, options = _made(drawn)
            bench.attempt(lambda: _CALLS[name][0](pool, options))
            bench.is_well()

        check()
    _balance(fault)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_whatever_an_open_session_is_given(
    make_pool: MakePool, fault: FaultModule, backend: str, request: Any
) -> None:
    """In one session, which is good for the next call."""
    pool = make_pool(module=fault.path, timeout=20.0)

    async def in_a_session(name: str, options: _Options) -> None:
        async with pool.session(rw=True) as session:
            with contextlib.suppress(*PROPER):
                await _IN_A_SESSION[name][0](session, options)
            if not session.closed:
                assert len(await session.generate_random(64)) == 8

    with on_a_loop(pool, backend) as bench:
        bench.call(_make_keys, pool)

        @examples(request, 300)
        @given(_drawn(_IN_A_SESSION))
        def check(drawn: tuple[str, _Options]) -> None:
            bench.attempt(lambda: in_a_session(*_made(drawn)))
            bench.is_well()

        check()
    _balance(fault)


def test_whatever_a_blocking_call_is_given(
    make_pool: MakePool, fault: FaultModule, request: Any
) -> None:
    """The twins for plain threads refuse the same."""
    pool = make_pool(module=fault.path, timeout=20.0)
    calls: dict[str, Callable[[_Options], Any]] = {
        "run": lambda o: pool.run_sync(o.pop("func"), **o),
        "map": lambda o: list(pool.map_sync(o.pop("func"), o.pop("items"), **o)),
        "sign": lambda o: pool.key(label="ec").sync.sign(o.pop("data"), **o),
        "sign_many": lambda o: list(
            pool.key(label="ec").sync.sign_many(o.pop("items"), **o)
        ),
        "encrypt_stream": lambda o: list(
            pool.key(label="aes").sync.encrypt_stream(o.pop("data"), **o)
        ),
    }

    with on_a_loop(pool, "asyncio") as bench:
        bench.call(_make_keys, pool)

        @examples(request, 200)
        @given(_drawn({name: _CALLS[name] for name in calls}))
        def check(drawn: tuple[str, _Options]) -> None:
            name, options = _made(drawn)
            with contextlib.suppress(*PROPER):
                calls[name](options)
            bench.is_well()

        check()
    _balance(fault)
