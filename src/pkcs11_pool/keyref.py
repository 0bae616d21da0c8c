"""References to objects on the token, and what can be done with them.

A reference says how to find an object; it holds no session and no number of its
own. Each operation runs in a fresh session, or in the session it is bound to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pkcs11.constants import Attribute, ObjectClass

from pkcs11_pool import arguments, config, objects, operations, pins
from pkcs11_pool.arguments import DEFAULT, Data, Template, Timeout
from pkcs11_pool.errors import InvalidOption, InvalidType
from pkcs11_pool.keys import SessionObject
from pkcs11_pool.mapping import Results, Work
from pkcs11_pool.multipart import DECRYPT, ENCRYPT, SIGN, VERIFY, Plan
from pkcs11_pool.reaffirm import Reaffirm
from pkcs11_pool.streams import CryptStream, Task, consume
from pkcs11_pool.sync import SyncKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable

    from pkcs11.constants import MechanismFlag
    from pkcs11.mechanisms import KeyType, Mechanism

    from pkcs11_pool.calls import Calls
    from pkcs11_pool.keys import Entry, Target
    from pkcs11_pool.multipart import Operation
    from pkcs11_pool.pins import NoPin, Pin

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

    async def set_attributes(
        self, values: Template, *, timeout: Timeout = DEFAULT
    ) -> Self:
        """Change attributes of the object, and give a reference to what it is now.

        A reference that names the object by what was changed does not find it any
        more; the one that is returned does.

        Args:
            values: The attributes to change: ``{Attribute.LABEL: "new"}``.
            timeout: Seconds.

        Raises:
            InvalidOption: There is nothing to change, or a value does not fit.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            A search or ``C_GetAttributeValue`` to be sure, ``C_SetAttributeValue``.
        """
        packed = arguments.packed(values, "values")
        if not packed:
            message = "which attributes? Give at least one to change"
            raise InvalidOption(message)
        target = self._target
        token = not isinstance(target, SessionObject)
        changed: Entry = await self._perform(
            objects.set_attributes, packed, timeout=timeout, rw=token, changes=True
        )
        if isinstance(target, SessionObject):
            return self
        spec = changed.spec(target.origin)
        self._calls._engine.cache.remember(spec, changed)  # noqa: SLF001  # one package
        return type(self)(self._calls, spec, home=self._home)

    async def copy(
        self, template: Template | None = None, *, timeout: Timeout = DEFAULT
    ) -> Self:
        """Copy the object, with other values for the attributes in ``template``.

        A copy of a token object is a token object, and one of a session object is a
        session object of the session that makes it, unless ``CKA_TOKEN`` says so.

        Raises:
            SessionObjectNeedsSession: The copy would be a session object, and this is
                not bound to an open session (``key.on(session)``).

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_CopyObject``.
        """
        given = {} if template is None else template
        packed = arguments.packed(given)
        calls, target = self._calls, self._target
        token = arguments.makes_token_object(
            store=not isinstance(target, SessionObject), given=[given]
        )
        calls._check_home(token=token)  # noqa: SLF001  # one package
        entry = await self._perform(
            objects.copy, packed, timeout=timeout, rw=token, changes=True
        )
        made: Self = calls._ref(entry)  # type: ignore[assignment]  # noqa: SLF001
        return made

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
        cache = calls._engine.cache  # noqa: SLF001  # one package
        used = target if isinstance(target, SessionObject) else None
        self._check_alive((target, *arguments_))

        def work(session: Any) -> Any:
            return operation(session, cache, target, *arguments_, **options)

        return await calls._perform(  # noqa: SLF001
            work, timeout, rw=rw, changes=changes, home=self._home, target=used
        )

    def _check_alive(self, items: tuple[object, ...]) -> None:
        """At the door: where a session object is gone, nothing is opened or sent."""
        objects = [item for item in items if isinstance(item, SessionObject)]
        if objects:
            engine = self._calls._engine  # noqa: SLF001  # one package
            engine.check_open()
            actor = engine.actor
            for item in objects:
                item.check(actor.login.epoch, actor.attached.generation)

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
            data: Bytes, text (as UTF-8), a binary file, or an iterable or async
                iterable of bytes. What does not fit into 64 KiB goes to the token in
                parts, and is never in memory as a whole.
            mechanism: How; ``CKM_ECDSA`` takes a digest, not the message.
            mechanism_param: As python-pkcs11 takes it.
            pin: For keys with ``CKA_ALWAYS_AUTHENTICATE``; or ``PROTECTED_AUTH``.
            signature_format: ``"raw"`` is r‖s for ECDSA and DSA, ``"der"`` is DER.
            timeout: Seconds; for reading the data, too.

        Raises:
            KeyNotFound, KeyAmbiguous: By the name of the key.
            KeyFunctionNotPermitted: ``CKA_SIGN`` is false.
            LoginRequired: The key may be private and nobody is logged in; or it wants
                the PIN each time, and there is no ``pin``.
            PinRefused: The token refused ``pin``, now or earlier.
            StreamInterrupted: Data in parts was cut off, and cannot be read again.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            ``C_SignInit``, ``C_Sign``; for data in parts ``C_SignUpdate`` and
            ``C_SignFinal``. With ``pin`` also ``C_GetTokenInfo`` and ``C_Login``.
        """
        pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
            "login": self._login(pin),  # type: ignore[arg-type]
            "der": arguments.der(signature_format),
        }
        result: bytes = await self._with_data(
            SIGN, operations.sign, data, timeout, options
        )
        return result

    def sign_many(
        self,
        items: Iterable[bytes | str] | AsyncIterable[bytes | str],
        *,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        pin: str | None = None,
        signature_format: SignatureFormat = "raw",
        limit: int | None = None,
        return_errors: bool = False,
        timeout: Timeout = DEFAULT,
    ) -> Results[Any]:
        """Sign each item: ``async for signature in key.sign_many(items)``.

        Signatures come in the order of the items, while many are under way, each in a
        session of its own. Nothing grows with the number of items: see
        :meth:`TokenPool.map`.

        Args:
            items: Bytes or text each; an iterable or async iterable, taken as
                signatures are.
            mechanism: As for :meth:`sign`.
            mechanism_param: As for :meth:`sign`.
            pin: As for :meth:`sign`; it is sent for each item.
            signature_format: As for :meth:`sign`.
            limit: The most under way and not yet taken; None: twice ``max_sessions``.
            return_errors: Give the error of an item in its place, not raise it.
            timeout: Seconds for each item.

        Cryptoki:
            For each item as :meth:`sign`.
        """
        pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
        config.check_flag("return_errors", return_errors)
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
            "login": self._login(pin),  # type: ignore[arg-type]
            "der": arguments.der(signature_format),
        }
        calls, target = self._calls, self._target
        cache = calls._engine.cache  # noqa: SLF001  # one package

        def make(item: Any) -> Callable[[Any], bytes]:
            data = arguments.whole(item)
            if data is None:
                message = f"an item must be bytes, not {type(item).__name__}"
                raise InvalidType(message)
            self._check_alive((target,))
            return lambda session: operations.sign(
                session, cache, target, data, **options
            )

        used = target if isinstance(target, SessionObject) else None
        work = Work(calls, make, timeout=timeout, home=self._home, target=used)
        return Results(work, items, limit=limit, return_errors=return_errors)

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
            ``C_VerifyInit``, ``C_Verify``; for data in parts ``C_VerifyUpdate`` and
            ``C_VerifyFinal``.
        """
        options: dict[str, Any] = {
            "signature": arguments.octets(signature, "signature"),
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
            "der": arguments.der(signature_format),
        }
        result: bool = await self._with_data(
            VERIFY, operations.verify, data, timeout, options
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

        Data as for :meth:`sign`. The result is in memory as a whole:
        :meth:`encrypt_stream` gives it in parts.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_EncryptInit``, ``C_Encrypt``; for data in parts ``C_EncryptUpdate``
            and ``C_EncryptFinal``.
        """
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
        }
        result: bytes = await self._with_data(
            ENCRYPT, operations.encrypt, data, timeout, options
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

        Data as for :meth:`sign`.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_DecryptInit``, ``C_Decrypt``; for data in parts ``C_DecryptUpdate``
            and ``C_DecryptFinal``. With ``pin`` as :meth:`sign`.
        """
        pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
            "login": self._login(pin),  # type: ignore[arg-type]
        }
        result: bytes = await self._with_data(
            DECRYPT, operations.decrypt, data, timeout, options
        )
        return result

    def encrypt_stream(
        self,
        data: Data,
        *,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        timeout: Timeout = DEFAULT,
    ) -> CryptStream:
        """Encrypt ``data`` and give the output as it comes: ``async for``.

        Args:
            data: As for :meth:`sign`. Of an async iterable each chunk goes on at once.
            mechanism: How.
            mechanism_param: As python-pkcs11 takes it: the IV where there is one.
            timeout: Seconds for the whole of it, from the first output asked for.

        Cryptoki:
            ``C_EncryptInit``, ``C_EncryptUpdate``, ``C_EncryptFinal`` in one session;
            ``C_Encrypt`` for what fits into 64 KiB.
        """
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
        }
        task = self._task(ENCRYPT, operations.encrypt, timeout, options)
        return CryptStream(task, data)

    def decrypt_stream(
        self,
        data: Data,
        *,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        pin: str | None = None,
        timeout: Timeout = DEFAULT,
    ) -> CryptStream:
        """Decrypt ``data`` and give the output as it comes: ``async for``.

        With a mechanism that authenticates (AES-GCM), what comes before the end is
        not authenticated yet: do not act on it before the stream has ended well.

        Args:
            data: As for :meth:`encrypt_stream`.
            mechanism: How.
            mechanism_param: As python-pkcs11 takes it: the IV where there is one.
            pin: For keys with ``CKA_ALWAYS_AUTHENTICATE``.
            timeout: Seconds for the whole of it, from the first output asked for.

        Cryptoki:
            ``C_DecryptInit``, ``C_DecryptUpdate``, ``C_DecryptFinal`` in one session;
            ``C_Decrypt`` for what fits into 64 KiB.
        """
        pin = None if pin is None else pins.hide(pin)  # type: ignore[assignment]  # hides it
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
            "login": self._login(pin),  # type: ignore[arg-type]
        }
        task = self._task(DECRYPT, operations.decrypt, timeout, options)
        return CryptStream(task, data)

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
        options = {
            **arguments.making(id, label, store, capabilities),
            "mechanism": arguments.mechanism(mechanism),
            "mechanism_param": mechanism_param,
            "template": given,
        }
        result, (ref,) = await self._make(
            operations.PUBLIC_OR_SECRET,
            Attribute.ENCAPSULATE,
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
        options = {
            **arguments.making(id, label, store, capabilities),
            "mechanism": arguments.mechanism(mechanism),
            "mechanism_param": mechanism_param,
            "template": given,
        }
        _, (ref,) = await self._make(
            operations.PRIVATE_OR_SECRET,
            Attribute.DECAPSULATE,
            lambda key: key.decapsulate_key(octets, kind, length, **options),
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

    def _login(self, pin: Pin | NoPin | None) -> Reaffirm | None:
        """The login for a use of this key, with a PIN that is out of sight."""
        if pin is None:
            return None
        engine = self._calls._engine  # noqa: SLF001  # one package
        return Reaffirm(engine.actor, pins.checked(pin))

    def _task(
        self,
        operation: Operation,
        whole: Callable[..., Any],
        timeout: Timeout,
        options: dict[str, Any],
    ) -> Task:
        calls = self._calls
        plan = Plan(
            operation=operation,
            cache=calls._engine.cache,  # noqa: SLF001  # one package
            target=self._target,
            **options,
        )

        def in_one_call(data: bytes, left: float | None) -> Any:
            return self._perform(whole, data, timeout=left, **options)

        self._check_alive((self._target,))
        return Task(calls, plan, in_one_call, timeout=timeout, home=self._home)

    async def _with_data(
        self,
        operation: Operation,
        whole: Callable[..., Any],
        data: Data,
        timeout: Timeout,
        options: dict[str, Any],
    ) -> Any:
        """An operation on data: in one call, or in parts."""
        if (given := arguments.whole(data)) is not None:
            return await self._perform(whole, given, timeout=timeout, **options)
        return await consume(self._task(operation, whole, timeout, options), data)

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
