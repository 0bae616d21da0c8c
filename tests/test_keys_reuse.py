"""A number is not an identity: a module that gives it to the next object at once."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

import anyio
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from keykit import SECRET, make_secret
from pkcs11_pool import KeyNotFound
from poolkit import hangs, make_ec_key

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, TokenPool

_DIGEST = b"d" * 32
_SIGNATURES = 700
_CHANGES = 12
_SCHEME = ec.ECDSA(utils.Prehashed(hashes.SHA256()))


class _Signer:
    """Signs with one key for as long as others change the token."""

    def __init__(self, key: KeyRef, der: bytes) -> None:
        self._key = key
        public = load_der_public_key(der)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        self._public = public
        self.made = 0

    async def work(self, enough: anyio.Event) -> None:
        """Sign and verify, until there is enough of it."""
        while self.made < _SIGNATURES:
            raw = await self._key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
            r, s = (int.from_bytes(half, "big") for half in (raw[:32], raw[32:]))
            self._public.verify(utils.encode_dss_signature(r, s), _DIGEST, _SCHEME)
            self.made += 1
        enough.set()


async def _change(pool: TokenPool, label: str, enough: anyio.Event) -> None:
    # On a busy machine the signers are done before much has changed.
    more = itertools.count(_CHANGES, -1)
    while next(more) > 0 or not enough.is_set():
        public, private = await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", label=label, store=True
        )
        await private.destroy()
        await public.destroy()


async def test_no_signature_is_made_with_another_key_than_the_one_it_names(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Numbers of destroyed keys go to new ones at once, while two keys are used."""
    fault.reuse_numbers()
    async with make_pool(module=fault.path) as pool:
        # A key that goes first leaves its low number to those that come.
        spare = await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", label="spare", store=True
        )
        signers = []
        for label in ("first", "second"):
            key = await make_ec_key(pool, label)
            signers.append(_Signer(key, await key.public_key_der()))
        for ref in spare:
            await ref.destroy()
        enough = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for signer in signers:
                tasks.start_soon(signer.work, enough)
            for number in range(2):
                tasks.start_soon(_change, pool, f"other {number}", enough)
        assert [signer.made for signer in signers] == [_SIGNATURES] * 2
        destroyed = Counter(
            call.object for call in fault.calls("C_DestroyObject") if call.rv == 0
        )
        # The same number was an object's again and again. On a busy machine the log
        # holds the last of them only.
        assert max(destroyed.values()) > 1


async def test_an_old_number_signs_for_nobody_when_it_is_another_keys(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The key is destroyed behind the reference, and its number is a stranger's now."""
    fault.reuse_numbers()
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool, "mine")
        der = await key.public_key_der()
        await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)

        def replace(session: object) -> None:
            found = list(session.get_objects({}))  # type: ignore[attr-defined]
            copies = [item.copy({}) for item in found]
            for item in found:
                item.destroy()
            assert len(copies) == 2
            _make(session)

        await pool.run(replace, rw=True)
        signer = _Signer(key, der)
        enough = anyio.Event()
        signer.made = _SIGNATURES - 10
        await signer.work(enough)


def _make(session: object) -> None:
    from pkcs11 import Attribute  # noqa: PLC0415
    from pkcs11.util.ec import encode_named_curve_parameters  # noqa: PLC0415

    session.generate_keypair(  # type: ignore[attr-defined]
        KeyType.EC,
        public_template={
            Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")
        },
        store=True,
        label="stranger",
    )


@pytest.mark.usefixtures("never_idle")
async def test_signing_in_the_steady_state_looks_nothing_up(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Fifty signatures cost their four calls each; a search costs one check more."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        fault.reset_counts()
        for _ in range(50):
            await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        counts = fault.counts()
        assert counts.pop("C_SignInit") == counts.pop("C_Sign") == 50
        assert abs(counts.pop("C_OpenSession") - 50) <= 8
        assert abs(counts.pop("C_CloseSession") - 50) <= 8
        assert counts == {}
        await pool.find()
        fault.reset_counts()
        for _ in range(5):
            await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        assert fault.count("C_GetAttributeValue") == 1
        assert fault.count("C_FindObjectsInit") == 0


@pytest.mark.parametrize("how", ["C_CopyObject", "C_UnwrapKey"])
async def test_what_a_destroyed_key_made_is_not_left_on_the_token(
    make_pool: MakePool, fault: FaultModule, how: str
) -> None:
    """The caller is told that the key is not found: so nothing was made with it."""
    async with make_pool(module=fault.path) as pool:
        key = await make_secret(pool, unwrap=True)
        outcomes: list[type[Exception]] = []

        async def make() -> None:
            try:
                if how == "C_CopyObject":
                    await key.copy({Attribute.LABEL: "made"})
                else:
                    await key.unwrap_key(
                        ObjectClass.SECRET_KEY,
                        KeyType.AES,
                        aes_key_wrap(SECRET, bytes(16)),
                        mechanism=Mechanism.AES_KEY_WRAP,
                        label="made",
                        store=True,
                    )
            except KeyNotFound as error:
                outcomes.append(type(error))

        fault.on(how, hang="after")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(make)
            await hangs(fault, how)
            await key.destroy()
            fault.release()
        assert outcomes == [KeyNotFound]
        assert await pool.find() == []
