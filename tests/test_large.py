"""Large files, long batches and full tokens: in bounded memory, and in order.

``PKCS11_POOL_TEST_ITEMS=1000000`` makes the batches as long as that.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from pkcs11 import Attribute, ObjectClass

from pkcs11_pool import ObjectRef, softhsm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakePool
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken

_MIB = 1024 * 1024
_FILE = 200 * _MIB
_ITEMS = int(os.environ.get("PKCS11_POOL_TEST_ITEMS", "20000"))
_MANY = 3000


@pytest.fixture
def anyio_backend() -> str:
    """What is large is so on every loop: one is enough."""
    return "asyncio"


# -- A file that is larger than what the process may take --------------------------

_STREAM = """
import hashlib, resource, sys
import anyio
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11_pool import TokenPool

module, pin, file, size = sys.argv[1:]


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


async def chunks(data, left):
    while left:
        chunk = data.read(min(left, 1 << 20))
        left -= len(chunk)
        yield chunk


async def run(pool, key, size):
    with open(file, "rb") as data:
        digest = await pool.digest(chunks(data, size), mechanism=Mechanism.SHA256)
    sealed = hashlib.sha256()
    how = {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": bytes(16)}
    with open(file, "rb") as data:
        async for piece in key.encrypt_stream(chunks(data, size), **how):
            sealed.update(piece)
    return digest.hex(), sealed.hexdigest()


async def main():
    async with TokenPool(module, token_label="demo", pin=pin) as pool:
        async with pool.session() as session:
            key = await session.create_object({
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.AES,
                Attribute.VALUE: bytes(32),
                Attribute.ENCRYPT: True,
            })
            await run(pool, key, 4 << 20)
            before = memory()
            print(*await run(pool, key, int(size)))
            print(memory() - before)


anyio.run(main)
"""


def test_a_file_of_200_mb_takes_no_memory(
    token: ThrowawayToken, tmp_path: Path
) -> None:
    """Digested and encrypted in a process of its own: that grows by 16 MiB at most.

    Decrypted it would: SoftHSM2 keeps all data of a decryption until its end.
    """
    file = tmp_path / "large"
    with file.open("wb") as data:
        data.truncate(_FILE)
        data.seek(_FILE // 2)
        data.write(b"not only zeros")
    done = subprocess.run(
        [
            *(sys.executable, "-c", _STREAM, str(token.module), token.user_pin),
            *(str(file), str(_FILE)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    digest, sealed, more = done.stdout.split()
    assert (digest, sealed) == _by_others(file)
    assert int(more) < 16


def _by_others(file: Path) -> tuple[str, str]:
    """The digest, and that of the ciphertext, as others make them."""
    digest, sealed = hashlib.sha256(), hashlib.sha256()
    padder = padding.PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(bytes(32)), modes.CBC(bytes(16))).encryptor()
    with file.open("rb") as data:
        while chunk := data.read(_MIB):
            digest.update(chunk)
            sealed.update(encryptor.update(padder.update(chunk)))
    sealed.update(encryptor.update(padder.finalize()) + encryptor.finalize())
    return digest.hexdigest(), sealed.hexdigest()


# -- Batches ----------------------------------------------------------------------

_BATCH = """
import hmac, resource, sys
import anyio
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11_pool import TokenPool

module, pin, what, count = sys.argv[1:]
count, secret = int(count), bytes(range(32))
taken = answered = most = 0


def items():
    global taken, most
    for number in range(count):
        taken += 1
        most = max(most, taken - answered)
        yield b"%d" % number


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


async def results(pool, session):
    if what == "map":
        return pool.map(lambda _, item: int(item) + 1, items(), limit=5)
    key = await session.create_object({
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
        Attribute.VALUE: secret,
        Attribute.SIGN: True,
    })
    return key.sign_many(items(), mechanism=Mechanism.SHA256_HMAC)


def expected(number):
    if what == "map":
        return number + 1
    return hmac.digest(secret, b"%d" % number, "sha256")


async def main():
    global answered
    async with TokenPool(module, token_label="demo", pin=pin, max_sessions=8) as pool:
        async with pool.session() as session:
            async for result in await results(pool, session):
                assert result == expected(answered), answered
                answered += 1
                if answered == 2000:
                    before = memory()
            print(answered, taken, most, pool.stats().sessions_max, memory() - before)


anyio.run(main)
"""


def _batch(token: ThrowawayToken, what: str) -> tuple[int, int]:
    """Run a batch in a process of its own; how many were there at once, of sessions.

    What else the tests took would hide what a batch takes.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-c", _BATCH, str(token.module), token.user_pin),
            *(what, str(_ITEMS)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + _ITEMS / 1000,
    )
    assert done.returncode == 0, done.stderr
    answered, taken, most, sessions, more = map(int, done.stdout.split())
    assert answered == taken == _ITEMS
    assert more < 16
    return most, sessions


@pytest.mark.timeout(120 + _ITEMS // 1000)
def test_a_long_batch_of_signatures_is_in_order_and_in_a_window(
    token: ThrowawayToken,
) -> None:
    """However many there are, twice ``max_sessions`` of them are there at once."""
    most, sessions = _batch(token, "sign_many")
    assert most == 2 * sessions


@pytest.mark.timeout(120 + _ITEMS // 1000)
def test_a_long_map_is_in_order_and_in_a_window(token: ThrowawayToken) -> None:
    """The same for any function, with a window that the caller gave."""
    most, _ = _batch(token, "map")
    assert most == 5


# -- A full token -----------------------------------------------------------------


@pytest.fixture
def token(soft_hsm: SoftHSM, tmp_path: Path) -> Iterator[ThrowawayToken]:
    """A token in memory, if there is such a place: each object is a file of its own."""
    memory = Path("/dev/shm")  # noqa: S108  # a directory of our own in it
    parent = memory if os.access(memory, os.W_OK) else tmp_path
    with softhsm.token_directory(parent, softhsm=soft_hsm) as directory:
        yield directory.add_token("demo")


async def test_thousands_of_objects_are_found(make_pool: MakePool) -> None:
    """All of them, once each; and one by its name among them."""

    def fill(session: Any) -> None:
        for number in range(_MANY):
            session.create_object(
                {
                    Attribute.CLASS: ObjectClass.DATA,
                    Attribute.TOKEN: True,
                    Attribute.PRIVATE: False,
                    Attribute.LABEL: f"data {number}",
                }
            )

    async with make_pool() as pool:
        await pool.run(fill, rw=True, timeout=100)
        found = await pool.find({Attribute.CLASS: ObjectClass.DATA})
        assert {type(ref) for ref in found} == {ObjectRef}
        assert len(found) == len(set(found)) == _MANY
        for number in (0, 2345, _MANY - 1):
            (one,) = await pool.find({Attribute.LABEL: f"data {number}"})
            assert await one.attributes([Attribute.LABEL]) == {
                Attribute.LABEL: f"data {number}"
            }
