"""References to keys: each names one object, and is never used for another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from pkcs11_pool import KeyAmbiguous, KeyRef
from poolkit import make_ec_key

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

_DIGEST = b"d" * 32


@pytest.mark.parametrize("names", [{}, {"label": "same"}, {"id": b"same"}])
async def test_keys_of_one_name_are_not_taken_for_each_other(
    pool: TokenPool, names: dict[str, str | bytes]
) -> None:
    """A reference made with a key signs with that key, or says that it cannot tell."""
    pairs = [
        await pool.generate_keypair(KeyType.EC, curve="secp256r1", store=True, **names)  # type: ignore[arg-type]
        for _ in range(3)
    ]
    for public, private in pairs:
        try:
            signature = await private.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        except KeyAmbiguous:
            continue
        assert await public.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)


async def test_secret_keys_of_one_name_are_not_taken_for_each_other(
    pool: TokenPool,
) -> None:
    """Not even when the token tells nothing by which they differ."""
    keys = [
        await pool.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.AES,
                Attribute.VALUE: bytes([number]) * 16,
                Attribute.TOKEN: True,
                Attribute.ENCRYPT: True,
                Attribute.SENSITIVE: False,
                Attribute.EXTRACTABLE: True,
            }
        )
        for number in range(2)
    ]
    results = []
    for key in keys:
        assert isinstance(key, KeyRef)
        try:
            results.append(await key.encrypt(b"b" * 16, mechanism=Mechanism.AES_ECB))
        except KeyAmbiguous:
            return
    assert len(set(results)) == 2


async def test_of_two_keys_of_one_name_the_right_one_is_destroyed(
    pool: TokenPool,
) -> None:
    """The other one stays, or both do."""
    (_, gone), (public, stays) = [
        await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", label="same", store=True
        )
        for _ in range(2)
    ]
    try:
        await gone.destroy()
    except KeyAmbiguous:
        return
    signature = await stays.sign(_DIGEST, mechanism=Mechanism.ECDSA)
    assert await public.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)


async def test_two_names_are_two_keys(pool: TokenPool) -> None:
    """The plain case, for comparison."""
    one, two = await make_ec_key(pool, "one"), await make_ec_key(pool, "two")
    signature = await one.sign(_DIGEST, mechanism=Mechanism.ECDSA)
    assert await one.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)
    assert not await two.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)


async def test_a_number_is_never_used_in_another_login_than_its_own(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """After logout and login the key is found anew, not tried with its old number."""
    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        await pool.logout()
        await pool.login()
        fault.clear_log()
        await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        functions = [call.function for call in fault.calls()]
        assert functions.index("C_FindObjectsInit") < functions.index("C_SignInit")
        assert [call.rv for call in fault.calls("C_SignInit")] == [0]
