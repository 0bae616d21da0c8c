"""What a key does to other keys: wrap, unwrap, derive, encapsulate, decapsulate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pkcs11.constants import Attribute, ObjectClass

from pkcs11_pool.cryptoki import objects, operations
from pkcs11_pool.errors import InvalidType
from pkcs11_pool.faces import arguments, changes
from pkcs11_pool.faces.arguments import DEFAULT, Template, Timeout
from pkcs11_pool.faces.objectref import ObjectRef

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11.constants import MechanismFlag
    from pkcs11.mechanisms import KeyType, Mechanism

    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.jobs import Change


class KeyMaker(ObjectRef):
    """A reference to a key, with the operations whose data is another key."""

    async def wrap_key(
        self,
        key: KeyRef,
        *,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        timeout: Timeout = DEFAULT,
    ) -> bytes:
        """Wrap another key with this one, for export.

        Args:
            key: The key to wrap, with ``CKA_EXTRACTABLE``.
            mechanism: How; None: the usual one for the type.
            mechanism_param: As python-pkcs11 takes it.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            The wrapped key.

        Raises:
            KeyNotFound, KeyAmbiguous: By the name of either key.
            KeyFunctionNotPermitted: ``CKA_WRAP`` is false.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_WrapKey``, twice: for the size, and for the key.

        Source:
            PKCS#11 v3.1, "Key management functions".
        """
        if not isinstance(key, KeyMaker):
            message = f"key must be a KeyRef, not {type(key).__name__}"
            raise InvalidType(message)
        result: bytes = await self._perform(
            objects.wrap_key,
            key._target,  # noqa: SLF001  # one package
            timeout=timeout,
            mechanism=arguments.mechanism(mechanism),
            param=mechanism_param,
        )
        return result

    async def unwrap_key(
        self,
        object_class: ObjectClass,
        key_type: KeyType,
        key_data: bytes,
        *,
        id: bytes | None = None,  # noqa: A002
        label: str | None = None,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        store: bool = False,
        capabilities: MechanismFlag | None = None,
        template: Template | None = None,
        timeout: Timeout = DEFAULT,
    ) -> KeyRef:
        """Unwrap a key: into the token with ``store=True``, else into a session.

        Args:
            object_class: What comes out: a secret or a private key.
            key_type: Its type.
            key_data: The wrapped key.
            id: Its ``CKA_ID``.
            label: Its ``CKA_LABEL``.
            mechanism: How; None: the usual one for the type.
            mechanism_param: As python-pkcs11 takes it.
            store: True: a token object, which stays. False: a session object.
            capabilities: What the key may do; None: what python-pkcs11 gives its type.
            template: Further attributes; they win over those that follow from the rest.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            A reference to the new key.

        Raises:
            SessionObjectNeedsSession: ``store`` is false and the key is not bound to
                an open session (``key.on(session)``).

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_UnwrapKey``.

        Source:
            PKCS#11 v3.1, "Key management functions".
        """
        if not isinstance(object_class, ObjectClass):
            message = "object_class must be a pkcs11.ObjectClass"
            raise InvalidType(message)
        given = None if template is None else arguments.template(template)
        kind = arguments.key_type(key_type)
        octets = arguments.octets(key_data, "key_data")
        options = {
            **arguments.making(id, label, store, capabilities),
            "mechanism": arguments.mechanism(mechanism),
            "mechanism_param": mechanism_param,
            "template": given,
        }
        _, (ref,) = await self._make(
            operations.PRIVATE_OR_SECRET,
            Attribute.UNWRAP,
            changes.making("unwrap_key", given, label=label, id_=id),
            lambda key: key.unwrap_key(object_class, kind, octets, **options),
            store=store,
            template=given,
            timeout=timeout,
        )
        return ref

    async def derive_key(
        self,
        key_type: KeyType,
        key_length: int,
        *,
        id: bytes | None = None,  # noqa: A002
        label: str | None = None,
        store: bool = False,
        capabilities: MechanismFlag | None = None,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        template: Template | None = None,
        timeout: Timeout = DEFAULT,
    ) -> KeyRef:
        """Derive a key; ``key_length`` in bits.

        Args:
            key_type: Of the new key: its type.
            key_length: Its length in bits.
            id: Its ``CKA_ID``.
            label: Its ``CKA_LABEL``.
            store: True: a token object, which stays. False: a session object.
            capabilities: What the key may do; None: what python-pkcs11 gives its type.
            mechanism: How; None: the usual one for the type.
            mechanism_param: As python-pkcs11 takes it.
            template: Further attributes; they win over those that follow from the rest.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            A reference to the new key.

        Raises:
            SessionObjectNeedsSession: As for :meth:`unwrap_key`.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_DeriveKey``.

        Source:
            PKCS#11 v3.1, "Key management functions".
        """
        given = None if template is None else arguments.template(template)
        kind = arguments.key_type(key_type)
        length = arguments.count(key_length, "key_length", "bits")
        options = {
            **arguments.making(id, label, store, capabilities),
            "mechanism": arguments.mechanism(mechanism),
            "mechanism_param": mechanism_param,
            "template": given,
        }
        _, (ref,) = await self._make(
            operations.PRIVATE_OR_SECRET,
            Attribute.DERIVE,
            changes.making("derive_key", given, label=label, id_=id),
            lambda key: key.derive_key(kind, length, **options),
            store=store,
            template=given,
            timeout=timeout,
        )
        return ref

    async def encapsulate_key(
        self,
        key_type: KeyType,
        key_length: int | None = None,
        *,
        id: bytes | None = None,  # noqa: A002
        label: str | None = None,
        store: bool = False,
        capabilities: MechanismFlag | None = None,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        template: Template | None = None,
        timeout: Timeout = DEFAULT,
    ) -> tuple[bytes, KeyRef]:
        """Encapsulate a fresh secret (ML-KEM): its ciphertext, and the secret key.

        Args:
            key_type: Of the secret.
            key_length: Its length in bits; None: where the type has only one.
            id: Its ``CKA_ID``.
            label: Its ``CKA_LABEL``.
            store: True: a token object, which stays. False: a session object.
            capabilities: What the key may do; None: what python-pkcs11 gives its type.
            mechanism: How; None: the usual one for the type.
            mechanism_param: As python-pkcs11 takes it.
            template: Further attributes; they win over those that follow from the rest.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            The ciphertext, and a reference to the secret key.

        Raises:
            SessionObjectNeedsSession: As for :meth:`unwrap_key`.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_EncapsulateKey`` (PKCS#11 v3.2).

        Source:
            PKCS#11 v3.2, "Key management functions". Not tried: none of the modules
            that the tests run on has it.
        """
        given = None if template is None else arguments.template(template)
        kind = arguments.key_type(key_type)
        length = arguments.key_length(key_length)
        options = {
            **arguments.making(id, label, store, capabilities),
            "mechanism": arguments.mechanism(mechanism),
            "mechanism_param": mechanism_param,
            "template": given,
        }
        result, (ref,) = await self._make(
            operations.PUBLIC_OR_SECRET,
            Attribute.ENCAPSULATE,
            changes.making("encapsulate_key", given, label=label, id_=id),
            lambda key: key.encapsulate_key(kind, length, **options),
            store=store,
            template=given,
            timeout=timeout,
        )
        return result[0], ref

    async def decapsulate_key(
        self,
        ciphertext: bytes,
        key_type: KeyType,
        key_length: int | None = None,
        *,
        id: bytes | None = None,  # noqa: A002
        label: str | None = None,
        store: bool = False,
        capabilities: MechanismFlag | None = None,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        template: Template | None = None,
        timeout: Timeout = DEFAULT,
    ) -> KeyRef:
        """Recover an encapsulated secret (ML-KEM).

        Args:
            ciphertext: What :meth:`encapsulate_key` gave.
            key_type: Of the secret.
            key_length: Its length in bits; None: where the type has only one.
            id: Its ``CKA_ID``.
            label: Its ``CKA_LABEL``.
            store: True: a token object, which stays. False: a session object.
            capabilities: What the key may do; None: what python-pkcs11 gives its type.
            mechanism: How; None: the usual one for the type.
            mechanism_param: As python-pkcs11 takes it.
            template: Further attributes; they win over those that follow from the rest.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            A reference to the secret key.

        Raises:
            SessionObjectNeedsSession: As for :meth:`unwrap_key`.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_DecapsulateKey`` (PKCS#11 v3.2).

        Source:
            PKCS#11 v3.2, "Key management functions". Not tried: none of the modules
            that the tests run on has it.
        """
        given = None if template is None else arguments.template(template)
        kind = arguments.key_type(key_type)
        length = arguments.key_length(key_length)
        octets = arguments.octets(ciphertext, "ciphertext")
        options = {
            **arguments.making(id, label, store, capabilities),
            "mechanism": arguments.mechanism(mechanism),
            "mechanism_param": mechanism_param,
            "template": given,
        }
        _, (ref,) = await self._make(
            operations.PRIVATE_OR_SECRET,
            Attribute.DECAPSULATE,
            changes.making("decapsulate_key", given, label=label, id_=id),
            lambda key: key.decapsulate_key(octets, kind, length, **options),
            store=store,
            template=given,
            timeout=timeout,
        )
        return ref

    async def public_key_der(self, *, timeout: Timeout = DEFAULT) -> bytes:
        """The public key as SubjectPublicKeyInfo (RFC 5280), also of a private key.

        Args:
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            DER.

        Raises:
            KeyNotFound: There is no such key, or its public half is not on the token.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_GetAttributeValue``; for a private key a search by its id or label.

        Source:
            RFC 5280, "Subject Public Key Info".
        """
        der: bytes = await self._perform(objects.public_key_der, timeout=timeout)
        return der

    async def _make(
        self,
        classes: tuple[int, ...],
        capability: Attribute,
        change: Change,
        make: Callable[[Any], Any],
        *,
        store: bool,
        template: Template | None,
        timeout: Timeout,
    ) -> tuple[Any, list[KeyRef]]:
        calls = self._calls
        token = arguments.makes_token_object(store=store, given=[template])
        calls._check_home(token=token)  # noqa: SLF001  # one package
        result, entries = await self._perform(
            objects.make_with_key,
            timeout=timeout,
            rw=token,
            changes=change,
            public=arguments.makes_public_object([template]),
            classes=classes,
            capability=capability,
            make=make,
        )
        return result, [calls._ref(entry) for entry in entries]  # noqa: SLF001
