"""64 tasks and 64,000 operations, every result checked by somebody else."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import anyio
import pytest
from cryptography.hazmat.primitives import hashes, padding
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from poolkit import eventually, make_ec_key

if TYPE_CHECKING:
    from conftest import MakePool
    from pkcs11_pool import KeyRef, TokenPool

_TASKS, _EACH = 64, 1_000
_AES = bytes(range(32))
_IV = b"i" * 16


def _decrypted(sealed: bytes) -> bytes:
    decryptor = Cipher(algorithms.AES(_AES), modes.CBC(_IV)).decryptor()
    unpadder = padding.PKCS7(128).unpadder()
    padded = decryptor.update(sealed) + decryptor.finalize()
    return unpadder.update(padded) + unpadder.finalize()


class _Load:
    """One task's operations, by turns, each checked at once."""

    def __init__(
        self, pool: TokenPool, signer: KeyRef, secret: KeyRef, der: bytes
    ) -> None:
        self._pool, self._signer, self._secret = pool, signer, secret
        public = load_der_public_key(der)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        self._public = public
        self.checked = 0
        self.seen: set[bytes] = set()

    async def task(self, number: int) -> None:
        """Make them all."""
        for turn in range(_EACH):
            await self._one(f"{number}/{turn}".encode(), turn)
            self.checked += 1

    async def _one(self, data: bytes, turn: int) -> None:
        digest = hashlib.sha256(data).digest()
        if turn % 8 == 0:
            raw = await self._signer.sign(digest, mechanism=Mechanism.ECDSA)
            r, s = (int.from_bytes(half, "big") for half in (raw[:32], raw[32:]))
            signature = utils.encode_dss_signature(r, s)
            scheme = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
            self._public.verify(signature, digest, scheme)
        elif turn % 8 < 4:
            sealed = await self._secret.encrypt(data, mechanism_param=_IV)
            assert _decrypted(sealed) == data
        elif turn % 8 < 7:
            found = await self._pool.digest(data, mechanism=Mechanism.SHA256)
            assert found == digest
        else:
            random = await self._pool.generate_random(128)
            assert len(random) == 16
            assert random not in self.seen
            self.seen.add(random)


@pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {}), ("trio", {})], ids=["asyncio", "trio"]
)
@pytest.mark.timeout(300)
async def test_sixty_four_thousand_results_are_right(
    make_pool: MakePool,
) -> None:
    """Nothing is wrong, lost or left over. Without uvloop and debug, for the time."""
    async with make_pool() as pool:
        signer = await make_ec_key(pool)
        await pool.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.AES,
                Attribute.VALUE: _AES,
                Attribute.LABEL: "secret",
                Attribute.TOKEN: True,
                Attribute.ENCRYPT: True,
            }
        )
        der = await signer.public_key_der()
        load = _Load(pool, signer, pool.key(label="secret"), der)
        before = pool.stats()
        async with anyio.create_task_group() as tasks:
            for number in range(_TASKS):
                tasks.start_soon(load.task, number)
        after = pool.stats()
        assert load.checked == _TASKS * _EACH
        assert after.operations_total - before.operations_total == _TASKS * _EACH
        assert after.operations_failed == before.operations_failed == 0
        assert after.logins_total == 1
        assert after.calls_lost == 0
        await eventually(lambda: pool.stats().sessions_open == 0)
