"""The blocking twins of a key's operations, for code that is not async by nature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pkcs11_pool.faces.arguments import DEFAULT, Data, Template, Timeout
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.faces.mapping import SyncResults
from pkcs11_pool.faces.streams import SyncStream
from pkcs11_pool.faces.waiting import blocking

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pkcs11.constants import Attribute, ObjectClass
    from pkcs11.mechanisms import KeyType

    from pkcs11_pool.faces.keyref import KeyRef


class SyncKey:
    """The blocking twins of a :class:`KeyRef`, for code that is not async.

    On a thread that runs an event loop they raise ``WouldBlockLoop``.

    Example:
        .. code-block:: python

            signature = pool.key(label="signer").sync.sign(b"data")
    """

    def __init__(self, key: KeyRef) -> None:
        self._key = key

    @hides_pins
    def sign(self, data: Data, **options: Any) -> bytes:
        """See :meth:`KeyRef.sign`."""
        return blocking(self._key.sign(data, **options))

    @hides_pins
    def sign_many(self, items: Iterable[Any], **options: Any) -> SyncResults[Any]:
        """See :meth:`KeyRef.sign_many`; for a plain ``for`` loop."""
        return SyncResults(self._key.sign_many(items, **options))

    def verify(self, data: Data, signature: bytes, **options: Any) -> bool:
        """See :meth:`KeyRef.verify`."""
        return blocking(self._key.verify(data, signature, **options))

    def encrypt(self, data: Data, **options: Any) -> bytes:
        """See :meth:`KeyRef.encrypt`."""
        return blocking(self._key.encrypt(data, **options))

    @hides_pins
    def decrypt(self, data: Data, **options: Any) -> bytes:
        """See :meth:`KeyRef.decrypt`."""
        return blocking(self._key.decrypt(data, **options))

    def encrypt_stream(self, data: Data, **options: Any) -> SyncStream:
        """See :meth:`KeyRef.encrypt_stream`; for a plain ``for`` loop."""
        return SyncStream(self._key.encrypt_stream(data, **options))

    @hides_pins
    def decrypt_stream(self, data: Data, **options: Any) -> SyncStream:
        """See :meth:`KeyRef.decrypt_stream`; for a plain ``for`` loop."""
        return SyncStream(self._key.decrypt_stream(data, **options))

    def wrap_key(self, key: KeyRef, **options: Any) -> bytes:
        """See :meth:`KeyRef.wrap_key`."""
        return blocking(self._key.wrap_key(key, **options))

    def unwrap_key(
        self,
        object_class: ObjectClass,
        key_type: KeyType,
        key_data: bytes,
        **options: Any,
    ) -> KeyRef:
        """See :meth:`KeyRef.unwrap_key`."""
        return blocking(
            self._key.unwrap_key(object_class, key_type, key_data, **options)
        )

    def derive_key(self, key_type: KeyType, key_length: int, **options: Any) -> KeyRef:
        """See :meth:`KeyRef.derive_key`."""
        return blocking(self._key.derive_key(key_type, key_length, **options))

    def encapsulate_key(
        self, key_type: KeyType, key_length: int | None = None, **options: Any
    ) -> tuple[bytes, KeyRef]:
        """See :meth:`KeyRef.encapsulate_key`."""
        return blocking(self._key.encapsulate_key(key_type, key_length, **options))

    def decapsulate_key(
        self,
        ciphertext: bytes,
        key_type: KeyType,
        key_length: int | None = None,
        **options: Any,
    ) -> KeyRef:
        """See :meth:`KeyRef.decapsulate_key`."""
        return blocking(
            self._key.decapsulate_key(ciphertext, key_type, key_length, **options)
        )

    def set_attributes(self, values: Template, **options: Any) -> KeyRef:
        """See :meth:`KeyRef.set_attributes`."""
        return blocking(self._key.set_attributes(values, **options))

    def copy(self, template: Template | None = None, **options: Any) -> KeyRef:
        """See :meth:`KeyRef.copy`."""
        return blocking(self._key.copy(template, **options))

    def attributes(
        self, names: Iterable[Attribute] | None = None, *, timeout: Timeout = DEFAULT
    ) -> dict[Attribute, Any]:
        """See :meth:`KeyRef.attributes`."""
        return blocking(self._key.attributes(names, timeout=timeout))

    def public_key_der(self, *, timeout: Timeout = DEFAULT) -> bytes:
        """See :meth:`KeyRef.public_key_der`."""
        return blocking(self._key.public_key_der(timeout=timeout))

    def destroy(self, *, timeout: Timeout = DEFAULT) -> None:
        """See :meth:`KeyRef.destroy`."""
        blocking(self._key.destroy(timeout=timeout))
