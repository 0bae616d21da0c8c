"""Keys whose values the tests know, and other code's word on what they made.

``cryptography`` makes the same independently, so that a token and the pool cannot
be wrong together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import anyio.lowlevel
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, hmac, padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, KeyType, ObjectClass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pkcs11_pool import KeyRef

SECRET = bytes(range(32))
IV = b"an iv, 16 bytes."
NONCE = b"nonce, 12 b."
PIECE = 64 * 1024
"""What goes to the token in one call at most."""


async def make_secret(
    calls: Any, key_type: KeyType = KeyType.AES, label: str = "secret", **options: Any
) -> KeyRef:
    """A secret key with the value ``SECRET``: a token object, unless told otherwise."""
    template = {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: key_type,
        Attribute.LABEL: label,
        Attribute.VALUE: SECRET,
        Attribute.TOKEN: True,
        Attribute.PRIVATE: True,
        Attribute.SIGN: True,
        Attribute.VERIFY: True,
        Attribute.ENCRYPT: True,
        Attribute.DECRYPT: True,
    }
    key: KeyRef = await calls.create_object(
        template | {getattr(Attribute, k.upper()): v for k, v in options.items()}
    )
    return key


def data_of(size: int) -> bytes:
    """So many bytes, in which no two places look alike."""
    return b"".join(i.to_bytes(4, "big") for i in range(size // 4 + 1))[:size]


def chunks(data: bytes, size: int = 1000) -> list[bytes]:
    """The data cut into pieces."""
    return [data[i : i + size] for i in range(0, len(data), size)]


class awaited:  # noqa: N801  # used as a function
    """The items one after another, as an async iterable that may be left unread."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)

    def __aiter__(self) -> Self:
        """Itself."""
        return self

    async def __anext__(self) -> Any:
        """The next item."""
        await anyio.lowlevel.checkpoint()
        try:
            return next(self._items)
        except StopIteration:
            raise StopAsyncIteration from None


async def collected(stream: Any) -> bytes:
    """All that a stream gives, as one."""
    return b"".join([piece async for piece in stream])


def sha256(data: bytes) -> bytes:
    """The digest of data."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize()


def hmac_sha256(data: bytes) -> bytes:
    """The HMAC of data under ``SECRET``."""
    maker = hmac.HMAC(SECRET, hashes.SHA256())
    maker.update(data)
    return maker.finalize()


def aes_cbc_pad(data: bytes) -> bytes:
    """What AES-CBC with padding makes of data under ``SECRET`` and ``IV``."""
    padder = padding.PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(SECRET), modes.CBC(IV)).encryptor()
    padded = padder.update(data) + padder.finalize()
    return encryptor.update(padded) + encryptor.finalize()


def aes_gcm(data: bytes) -> bytes:
    """What AES-GCM makes of data under ``SECRET`` and ``NONCE``, the tag at its end."""
    return AESGCM(SECRET).encrypt(NONCE, data, None)


def is_signature(public_der: bytes, signature: bytes, data: bytes, *how: Any) -> bool:
    """Whether ``cryptography`` takes a signature for one of this key over data."""
    key: Any = load_der_public_key(public_der)
    try:
        key.verify(signature, data, *how)
    except InvalidSignature:
        return False
    return True
