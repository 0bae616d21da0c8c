"""References to objects on the token, and what can be done with them.

A reference says how to find an object; it holds no session and no number of its
own. Each operation runs in a fresh session, or in the session it is bound to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pkcs11.constants import Attribute, ObjectClass

from pkcs11_pool import arguments, objects, operations, pins
from pkcs11_pool.arguments import DEFAULT, Data, Template, Timeout
from pkcs11_pool.errors import InvalidType
from pkcs11_pool.keys import SessionObject
from pkcs11_pool.sync import SyncKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pkcs11.constants import MechanismFlag
    from pkcs11.mechanisms import KeyType, Mechanism

    from pkcs11_pool.calls import Calls
    from pkcs11_pool.keys import Target

SignatureFormat = Literal["raw", "der"]


class ObjectRef:
    """A reference to an object: a certificate, data, domain parameters, or a key."""

    def __init__(
        self, calls: Calls, target: Target, *, home: Calls | None = None
    ) -> None:
        self._calls = calls
        self._target = target
        # Where it was made or found: used when all sessions are lent to the caller.
        self._home = home

    def on(self, session: Calls) -> Any:
        """The same object, used in one open session from now on."""
        if getattr(session, "_engine", None) is not self._calls._engine:  # noqa: SLF001  # one package
            message = "on() takes a PooledSession of the same pool"
            raise InvalidType(message)
        return type(self)(session, self._target)

    async def attributes(
        self, names: Iterable[Attribute] | None = None, *, timeout: Timeout = DEFAULT
    ) -> dict[Attribute, Any]:
        """Attributes of the object; those that the token does not tell are left out.

        Args:
            names: Which; None for those that name the object and its uses.
            timeout: Seconds.

        Cancellation:
            The caller goes at once; reading changes nothing.

        Cryptoki:
            ``C_GetAttributeValue``.
        """
        wanted = arguments.names(names)
        found: dict[Attribute, Any] = await self._perform(
            objects.attributes, wanted, timeout=timeout
        )
        return found

    async def destroy(self, *, timeout: Timeout = DEFAULT) -> None:
        """Destroy the object.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            A search or ``C_GetAttributeValue`` to be sure, ``C_DestroyObject``.
        """
        token = not isinstance(self._target, SessionObject)
        await self._perform(objects.destroy, timeout=timeout, rw=token, changes=True)

    async def _perform(
        self,
        operation: Callable[..., Any],
        *arguments_: Any,
        timeout: Timeout,
        rw: bool = False,
        changes: bool = False,
        **options: Any,
    ) -> Any:
        calls, target = self._calls, self._target
        engine = calls._engine  # noqa: SLF001  # one package
        cache = engine.cache
        used = target if isinstance(target, SessionObject) else None
        for item in (target, *arguments_):
            if isinstance(item, SessionObject):
                # At the door: where the object is gone, nothing is opened or sent.
                engine.check_open()
                actor = engine.actor
                item.check(actor.login.epoch, actor.attached.generation)

        def work(session: Any) -> Any:
            return operation(session, cache, target, *arguments_, **options)

        return await calls._perform(  # noqa: SLF001
            work, timeout, rw=rw, changes=changes, home=self._home, target=used
        )

    def __eq__(self, other: object) -> bool:
        """Equal references name the same object in the same pool."""
        return (
            isinstance(other, ObjectRef)
            and self._target == other._target
            and self._calls._engine is other._calls._engine
        )

    def __hash__(self) -> int:
        """By what it names."""
        return hash(self._target)

    def __repr__(self) -> str:
        """What it names."""
        return f"<{type(self).__name__} {self._target}>"


class KeyRef(ObjectRef):
    """A reference to a key, with the operations that python-pkcs11 has on keys.

    Parameters are python-pkcs11's. ``mechanism`` defaults to that of the key type.
    """

    def on(self, session: Calls) -> KeyRef:
        """The same key, used in one open session: its session objects stay there."""
        bound: KeyRef = super().on(session)
        return bound

    @property
    def sync(self) -> SyncKey:
        """The blocking twins of this key's operations."""
        return SyncKey(self)

    async def sign(
        self,
        data: Data,
        *,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        pin: str | None = None,
        signature_format: SignatureFormat = "raw",
        timeout: Timeout = DEFAULT,
    ) -> bytes:
        """Sign ``data``.

        Args:
            data: Bytes, text (as UTF-8), or an iterable of bytes.
            mechanism: How; ``CKM_ECDSA`` takes a digest, not the message.
            mechanism_param: As python-pkcs11 takes it.
            pin: For keys with ``CKA_ALWAYS_AUTHENTICATE``.
            signature_format: ``"raw"`` is r‖s for ECDSA and DSA, ``"der"`` is DER.
            timeout: Seconds.

        Raises:
            KeyNotFound, KeyAmbiguous: By the name of the key.
            KeyFunctionNotPermitted: ``CKA_SIGN`` is false.
            LoginRequired: The key may be private and nobody is logged in.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``.
        """
        pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
        result: bytes = await self._perform(
            operations.sign,
            await arguments.data(data),
            timeout=timeout,
            mechanism=arguments.mechanism(mechanism),
            param=mechanism_param,
            pin=None if pin is None else pins.checked(pin),  # type: ignore[arg-type]
            der=arguments.der(signature_format),
        )
        return result

    async def verify(
        self,
        data: Data,
        signature: bytes,
        *,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        signature_format: SignatureFormat = "raw",
        timeout: Timeout = DEFAULT,
    ) -> bool:
        """Whether ``signature`` is one of this key over ``data``.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_VerifyInit``, ``C_Verify``.
        """
        result: bool = await self._perform(
            operations.verify,
            await arguments.data(data),
            arguments.octets(signature, "signature"),
            timeout=timeout,
            mechanism=arguments.mechanism(mechanism),
            param=mechanism_param,
            der=arguments.der(signature_format),
        )
        return result

    async def encrypt(
        self,
        data: Data,
        *,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        timeout: Timeout = DEFAULT,
    ) -> bytes:
        """Encrypt ``data``; ``mechanism_param`` is the IV where there is one.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_EncryptInit``, ``C_Encrypt``.
        """
        result: bytes = await self._perform(
            operations.encrypt,
            await arguments.data(data),
            timeout=timeout,
            mechanism=arguments.mechanism(mechanism),
            param=mechanism_param,
        )
        return result

    async def decrypt(
        self,
        data: Data,
        *,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        pin: str | None = None,
        timeout: Timeout = DEFAULT,
    ) -> bytes:
        """Decrypt ``data``; ``pin`` is for keys with ``CKA_ALWAYS_AUTHENTICATE``.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_DecryptInit``, ``C_Decrypt``.
        """
        pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
        result: bytes = await self._perform(
            operations.decrypt,
            await arguments.data(data),
            timeout=timeout,
            mechanism=arguments.mechanism(mechanism),
            param=mechanism_param,
            pin=None if pin is None else pins.checked(pin),  # type: ignore[arg-type]
        )
        return result

    async def wrap_key(
        self,
        key: KeyRef,
        *,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        timeout: Timeout = DEFAULT,
    ) -> bytes:
        """Wrap another key with this one, for export.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_WrapKey``, twice: for the size, and for the key.
        """
        if not isinstance(key, KeyRef):
            message = f"key must be a KeyRef, not {type(key).__name__}"
            raise InvalidType(message)
        result: bytes = await self._perform(
            objects.wrap_key,
            key._target,
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

        Raises:
            SessionObjectNeedsSession: ``store`` is false and the key is not bound to
                an open session (``key.on(session)``).

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_UnwrapKey``.
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

        Raises:
            SessionObjectNeedsSession: As for :meth:`unwrap_key`.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_DeriveKey``.
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
        store: bool = False,
        template: Template | None = None,
        timeout: Timeout = DEFAULT,
        **options: Any,
    ) -> tuple[bytes, KeyRef]:
        """Encapsulate a fresh secret (ML-KEM): its ciphertext, and the secret key.

        Raises:
            SessionObjectNeedsSession: As for :meth:`unwrap_key`.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_EncapsulateKey`` (PKCS#11 v3.2).
        """
        given = None if template is None else arguments.template(template)
        kind = arguments.key_type(key_type)
        length = arguments.key_length(key_length)
        result, (ref,) = await self._make(
            operations.PUBLIC_OR_SECRET,
            Attribute.ENCAPSULATE,
            lambda key: key.encapsulate_key(
                kind, length, store=store, template=given, **options
            ),
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
        store: bool = False,
        template: Template | None = None,
        timeout: Timeout = DEFAULT,
        **options: Any,
    ) -> KeyRef:
        """Recover an encapsulated secret (ML-KEM).

        Raises:
            SessionObjectNeedsSession: As for :meth:`unwrap_key`.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_DecapsulateKey`` (PKCS#11 v3.2).
        """
        given = None if template is None else arguments.template(template)
        kind = arguments.key_type(key_type)
        length = arguments.key_length(key_length)
        octets = arguments.octets(ciphertext, "ciphertext")
        _, (ref,) = await self._make(
            operations.PRIVATE_OR_SECRET,
            Attribute.DECAPSULATE,
            lambda key: key.decapsulate_key(
                octets, kind, length, store=store, template=given, **options
            ),
            store=store,
            template=given,
            timeout=timeout,
        )
        return ref

    async def public_key_der(self, *, timeout: Timeout = DEFAULT) -> bytes:
        """The public key as SubjectPublicKeyInfo (RFC 5280), also of a private key.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_GetAttributeValue``; for a private key a search by its id or label.
        """
        der: bytes = await self._perform(objects.public_key_der, timeout=timeout)
        return der

    async def _make(
        self,
        classes: tuple[int, ...],
        capability: Attribute,
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
            changes=True,
            classes=classes,
            capability=capability,
            make=make,
        )
        return result, [calls._ref(entry) for entry in entries]  # noqa: SLF001
