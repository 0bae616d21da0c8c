"""Whatever stands in a template: the token takes it or not, and nothing breaks."""

from __future__ import annotations

import datetime as dt
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from hypothesis import given
from hypothesis import strategies as st
from pkcs11 import Attribute, CertificateType, KeyType, Mechanism, ObjectClass

from fuzzkit import (
    ANYTHING,
    BYTES,
    HUGE,
    NUMBERS,
    PROPER,
    TEXTS,
    examples,
    made,
    on_a_loop,
)
from pkcs11_pool import InvalidType
from pkcs11_pool.faces import arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakePool
    from faultmodule import FaultModule

_KINDS = st.one_of(
    st.sampled_from(list(Attribute)),
    st.sampled_from([0x80000000, 0x80000001, 2**63, *HUGE, -1, 0x0FFFFFFF]),
)
_FITTING = st.one_of(
    st.booleans(),
    st.sampled_from([0, 1, 2, 16, 64, 255, 256, 2048, 2**63]),
    st.text(max_size=10),
    st.binary(max_size=70),
    st.sampled_from(list(ObjectClass)),
    st.sampled_from(list(KeyType)),
    st.sampled_from(list(CertificateType)),
    st.just(dt.date(2026, 11, 24)),
)
_TEMPLATES = st.dictionaries(
    st.one_of(_KINDS, _KINDS, _KINDS, st.sampled_from(["label", None, b"x", 1.5])),
    st.one_of(_FITTING, _FITTING, ANYTHING),
    max_size=5,
)
# What some modules take minutes for, or as much memory as they are told.
_COSTLY = frozenset(
    {
        Attribute.MODULUS_BITS,
        Attribute.VALUE_LEN,
        Attribute.PRIME_BITS,
        Attribute.SUBPRIME_BITS,
        Attribute.TOKEN,
    }
)

_BASE: dict[str, dict[Attribute, Any]] = {
    "data": {Attribute.CLASS: ObjectClass.DATA, Attribute.VALUE: b"x"},
    "secret": {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
        Attribute.VALUE: bytes(16),
    },
    "aes": {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.AES,
        Attribute.VALUE: bytes(16),
    },
    "certificate": {
        Attribute.CLASS: ObjectClass.CERTIFICATE,
        Attribute.CERTIFICATE_TYPE: CertificateType.X_509,
        Attribute.SUBJECT: b"x",
        Attribute.VALUE: b"x",
    },
    "public": {
        Attribute.CLASS: ObjectClass.PUBLIC_KEY,
        Attribute.KEY_TYPE: KeyType.RSA,
        Attribute.MODULUS: bytes(range(128)),
        Attribute.PUBLIC_EXPONENT: b"\1\0\1",
    },
    "domain": {
        Attribute.CLASS: ObjectClass.DOMAIN_PARAMETERS,
        Attribute.KEY_TYPE: KeyType.DH,
        Attribute.PRIME: b"\x17",
        Attribute.BASE: b"\x05",
    },
    "nothing": {},
}


async def _key(session: Any) -> Any:
    return await session.create_object(
        _BASE["aes"]
        | dict.fromkeys((Attribute.DERIVE, Attribute.UNWRAP, Attribute.ENCRYPT), True)
        | {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
    )


_WRAPPED = aes_key_wrap(bytes(16), b"sixteen bytes---")
_Template = dict[Any, Any]
_OF_A_SESSION: dict[str, Callable[[Any, _Template], Any]] = {
    "find": lambda s, t: s.find(t),
    "generate": lambda s, t: s.generate_key(KeyType.AES, 128, template=t),
    "pair": lambda s, t: s.generate_keypair(
        KeyType.EC, curve="secp256r1", public_template=t, private_template=t
    ),
    "domain": lambda s, t: s.create_domain_parameters(KeyType.DH, t),
}
_OF_A_KEY: dict[str, Callable[[Any, _Template], Any]] = {
    "copy": lambda k, t: k.copy(t),
    "change": lambda k, t: k.set_attributes(t),
    "read": lambda k, t: k.attributes(t),
    "derive": lambda k, t: k.derive_key(
        KeyType.AES,
        128,
        mechanism=Mechanism.AES_ECB_ENCRYPT_DATA,
        mechanism_param=bytes(16),
        template=t,
    ),
    "unwrap": lambda k, t: k.unwrap_key(
        ObjectClass.SECRET_KEY,
        KeyType.AES,
        _WRAPPED,
        mechanism=Mechanism.AES_KEY_WRAP,
        template=t,
    ),
}
_WAYS = ("create", *_OF_A_SESSION, *_OF_A_KEY)


async def _do(session: Any, way: str, base: str, template: _Template) -> None:
    """One of the ways in which a template reaches the token."""
    if way == "create":
        await session.create_object(_BASE[base] | template)
    elif way in _OF_A_SESSION:
        await _OF_A_SESSION[way](session, template)
    else:
        await _OF_A_KEY[way](await _key(session), template)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_whatever_a_template_holds(
    make_pool: MakePool, fault: FaultModule, backend: str, request: Any
) -> None:
    """In every way to give one; the session and the pool go on."""
    pool = make_pool(module=fault.path, timeout=20.0)

    async def attempt(way: str, base: str, template: dict[Any, Any]) -> None:
        async with pool.session(rw=True) as session:
            with suppress(*PROPER):
                await _do(session, way, base, template)
            assert len(await session.generate_random(64)) == 8
            for ref in await session.find():
                with suppress(*PROPER):
                    # Also what the token made of it can be read.
                    await ref.attributes()

    with on_a_loop(pool, backend) as bench:

        @examples(request, 250)
        @given(st.sampled_from(_WAYS), st.sampled_from(sorted(_BASE)), _TEMPLATES)
        def check(way: str, base: str, drawn: dict[Any, Any]) -> None:
            template = {k: made(v) for k, v in drawn.items() if k not in _COSTLY}
            bench.attempt(lambda: attempt(way, base, template))
            bench.is_well()

        check()
    counts = fault.counts()
    assert fault.sessions() == []
    assert counts["C_OpenSession"] == counts["C_CloseSession"]


def test_a_value_is_packed_or_refused_and_not_shown(request: Any) -> None:
    """Whatever the attribute: InvalidType, or bytes that are no longer than it is."""

    @examples(request, 500)
    @given(st.sampled_from(list(Attribute)), st.one_of(ANYTHING, BYTES, TEXTS, NUMBERS))
    def check(kind: Attribute, drawn: Any) -> None:
        value = made(drawn)
        try:
            packed = arguments.pack(kind, value)
        except InvalidType as error:
            assert error.__cause__ is None  # noqa: PT017  # it would show the value
            assert kind.name in str(error)  # noqa: PT017
        else:
            long = isinstance(value, (str, bytes, bytearray, memoryview, list, tuple))
            assert len(packed) <= (len(value) * 4 if long else 8)

    check()
