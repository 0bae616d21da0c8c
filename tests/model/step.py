"""What a step is: two halves, what must come of it, and the act; and what all need.

``expect`` changes the model and gives the results that are right (None: any), or
raises ``Refused``. ``act`` does it with the real pool and gives the real result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from keykit import IV, sha256
from model.spec import Kind, Model, Thing

if TYPE_CHECKING:
    from collections.abc import Hashable

    from model.world import World


class Error(str):
    """Among the results that are right: an error, by the name of its class."""

    __slots__ = ()


Right = frozenset[Any] | Callable[[Any], bool] | None
"""What is right: one of these; what this says yes to; or anything."""


class Step:
    """Something that somebody does with the pool."""

    #: Whether its caller waits for its outcome when cancelled.
    changes: ClassVar[bool] = False

    def expect(self, model: Model) -> Right:
        """Change the model; the results that are right.

        Raises:
            Refused: It comes to an error.
        """
        raise NotImplementedError

    async def act(self, world: World) -> Hashable:
        """Do it; the result."""
        raise NotImplementedError


def value_of(name: str) -> bytes:
    """The value of a secret key that the test makes: another one for each."""
    return sha256(name.encode())[:16]


def sealed(value: bytes, data: bytes) -> bytes:
    """What AES-CBC with padding makes of data, by ``cryptography``."""
    padder = padding.PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(value), modes.CBC(IV)).encryptor()
    return encryptor.update(padder.update(data) + padder.finalize())


CBC: Final[dict[str, Any]] = {
    "mechanism": Mechanism.AES_CBC_PAD,
    "mechanism_param": IV,
}


def template(name: str, label: str, *, private: bool, token: bool) -> Any:
    """The attributes of a secret key that the test makes."""
    return {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.AES,
        Attribute.VALUE: value_of(name),
        **common(name, label),
        Attribute.TOKEN: token,
        Attribute.PRIVATE: private,
    }


def common(name: str, label: str) -> Any:
    """What all secret keys of the test have."""
    return {
        Attribute.LABEL: label,
        Attribute.ID: name.encode(),
        Attribute.SENSITIVE: False,
        Attribute.EXTRACTABLE: True,
        Attribute.ENCRYPT: True,
        Attribute.UNWRAP: True,
    }


def secret(name: str, label: str, *, private: bool, token: bool) -> Thing:
    """The same for the model."""
    value = value_of(name)
    return Thing(name, Kind.AES, label, private, token, None, 0, value)


async def ids_of(found: list[Any], calls: Any) -> tuple[str, ...]:
    """The CKA_ID of each object that was found; sorted."""
    ids = []
    for ref in found:
        seen = await ref.on(calls).attributes([Attribute.ID])
        ids.append(seen[Attribute.ID].decode())
    return tuple(sorted(ids))
