"""The form of an envelope's blobs, and what is authenticated beside the message.

Bytes alone: no token, no key. ``docs/how-to/envelope-encryption.md`` has it as a table.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pkcs11_pool.errors import InvalidCiphertext, InvalidType
from pkcs11_pool.faces.arguments import octets

Context = Mapping[str, str] | bytes | bytearray | memoryview | None

NONCE: Final = 12
_MAGIC: Final = b"P11E\x01"
"""What every blob begins with; the last byte is the version of the format."""
_TAG: Final = 16
_WRAPS: Final = range(1, 5)
"""The ways to wrap that this version knows, by their numbers."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A message and what it takes to open it."""

    kek: str
    wrap: int
    wrapped: bytes
    nonce: bytes
    sealed: bytes

    def packed(self) -> bytes:
        """As it is stored."""
        name = self.kek.encode()
        sizes = struct.pack(">BBH", self.wrap, len(name), len(self.wrapped))
        return b"".join((_MAGIC, sizes, name, self.wrapped, self.nonce, self.sealed))

    @classmethod
    def parse(cls, blob: object) -> Blob:
        """Read one.

        Raises:
            InvalidCiphertext: It is none, or of a later version.
        """
        data = octets(blob, "blob")
        if not data.startswith(_MAGIC):
            raise InvalidCiphertext("this is no blob of an Envelope of this version")
        start = len(_MAGIC) + struct.calcsize(">BBH")
        if len(data) < start:
            raise InvalidCiphertext("the blob is cut off")
        wrap, of_name, of_key = struct.unpack(">BBH", data[len(_MAGIC) : start])
        at = [start, start + of_name, start + of_name + of_key]
        if wrap not in _WRAPS or len(data) < at[2] + NONCE + _TAG:
            raise InvalidCiphertext("the blob is cut off, or of a later version")
        try:
            kek = data[at[0] : at[1]].decode()
        except UnicodeDecodeError:
            raise InvalidCiphertext("the blob names its key in no UTF-8") from None
        nonce = data[at[2] : at[2] + NONCE]
        return cls(kek, wrap, data[at[1] : at[2]], nonce, data[at[2] + NONCE :])


def kek_of(blob: bytes) -> str:
    """The name of the KEK that wrapped a blob: what is still to be rewrapped.

    Raises:
        InvalidCiphertext: It is no blob.
    """
    return Blob.parse(blob).kek


def authenticated(context: Context) -> bytes:
    """What is authenticated beside the message: the format, and the context.

    Each name and value has its length in front, so that no two contexts are alike.
    """
    if isinstance(context, (bytes, bytearray, memoryview)):
        return _MAGIC + b"b" + bytes(context)
    if context is None:
        context = {}
    if not isinstance(context, Mapping):
        kind = type(context).__name__
        raise InvalidType(f"context must be a mapping of texts, or bytes, not {kind}")
    parts = [_MAGIC, b"m"]
    for name in sorted(context):
        for text in (name, context[name]):
            if not isinstance(text, str):
                raise InvalidType(f"context must hold texts, not {text!r}")
            encoded = text.encode()
            parts.append(struct.pack(">I", len(encoded)) + encoded)
    return b"".join(parts)
