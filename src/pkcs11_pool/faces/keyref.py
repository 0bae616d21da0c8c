"""References to keys, and what they do with data."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from pkcs11_pool import config, pins
from pkcs11_pool.cryptoki import operations
from pkcs11_pool.cryptoki.keys import SessionObject
from pkcs11_pool.engine.multipart import DECRYPT, ENCRYPT, SIGN, VERIFY, Plan
from pkcs11_pool.errors import InvalidType
from pkcs11_pool.faces import arguments
from pkcs11_pool.faces.arguments import DEFAULT, Data, Timeout
from pkcs11_pool.faces.hiding import hides_pins
from pkcs11_pool.faces.keymaking import KeyMaker
from pkcs11_pool.faces.mapping import Results, Work
from pkcs11_pool.faces.streams import CryptStream, Task, consume
from pkcs11_pool.faces.sync import SyncKey
from pkcs11_pool.login.reaffirm import Reaffirm

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping

    from pkcs11.mechanisms import Mechanism

    from pkcs11_pool.cryptoki.keys import KeySpec
    from pkcs11_pool.engine.multipart import Operation
    from pkcs11_pool.faces.calls import Calls
    from pkcs11_pool.pins import NoPin, Pin

SignatureFormat = Literal["raw", "der"]
_RAW: Final = "raw"


class KeyRef(KeyMaker):
    """A reference to a key, with the operations that python-pkcs11 has on keys.

    Parameters are python-pkcs11's. ``mechanism`` defaults to that of the key type.

    Example:
        .. code-block:: python

            key = pool.key(label="signer")  # no I/O; it may be kept for ever
            signature = await key.sign(b"data")
            assert await key.verify(b"data", signature)
    """

    _signings: Mapping[Mechanism | None, operations.Signing] = MappingProxyType({})

    def on(self, session: Calls) -> KeyRef:
        """The same key, used in one open session: its session objects stay there.

        Args:
            session: A ``PooledSession`` of the same pool.

        Raises:
            InvalidType: It is no session, or of another pool.
        """
        bound: KeyRef = super().on(session)
        return bound

    @property
    def sync(self) -> SyncKey:
        """The blocking twins of this key's operations."""
        return SyncKey(self)

    @hides_pins
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

        Returns:
            The signature, or the MAC.

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

        Source:
            PKCS#11 v3.1, "Signing and MACing functions".
        """
        if (
            type(data) is bytes
            and mechanism_param is None
            and pin is None
            and signature_format is _RAW
            and not isinstance(self._target, SessionObject)
        ):
            # As below, with less to do for each signature.
            work = partial(self._signing(arguments.mechanism(mechanism)).sign, data)
            return await self._calls._read(work, timeout, self._home)  # noqa: SLF001
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
            "login": None if pin is None else self._login(pin),  # type: ignore[arg-type]
            "der": arguments.der(signature_format),
        }
        result: bytes = await self._with_data(
            SIGN, operations.sign, data, timeout, options
        )
        return result

    @hides_pins
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

        Returns:
            To iterate over with ``async for``; ``aclose()`` breaks off.

        Cancellation:
            As for :class:`Results`: what is under way is finished and dropped.

        Cryptoki:
            For each item as :meth:`sign`.

        Source:
            PKCS#11 v3.1, "Signing and MACing functions".
        """
        config.check_flag("return_errors", return_errors)
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
            "login": None if pin is None else self._login(pin),  # type: ignore[arg-type]
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

        Args:
            data: As for :meth:`sign`.
            signature: The signature, in the given format.
            mechanism: As for :meth:`sign`.
            mechanism_param: As for :meth:`sign`.
            signature_format: As for :meth:`sign`.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Raises:
            KeyNotFound, KeyAmbiguous: By the name of the key.
            KeyFunctionNotPermitted: ``CKA_VERIFY`` is false.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_VerifyInit``, ``C_Verify``; for data in parts ``C_VerifyUpdate`` and
            ``C_VerifyFinal``.

        Source:
            PKCS#11 v3.1, "Functions for verifying signatures and MACs".
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

        Args:
            data: As for :meth:`sign`.
            mechanism: How.
            mechanism_param: As python-pkcs11 takes it: the IV where there is one.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            The ciphertext.

        Raises:
            KeyNotFound, KeyAmbiguous: By the name of the key.
            KeyFunctionNotPermitted: ``CKA_ENCRYPT`` is false.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_EncryptInit``, ``C_Encrypt``; for data in parts ``C_EncryptUpdate``
            and ``C_EncryptFinal``.

        Source:
            PKCS#11 v3.1, "Encryption functions".
        """
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
        }
        result: bytes = await self._with_data(
            ENCRYPT, operations.encrypt, data, timeout, options
        )
        return result

    @hides_pins
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

        Args:
            data: As for :meth:`sign`.
            mechanism: How.
            mechanism_param: As python-pkcs11 takes it: the IV where there is one.
            pin: For keys with ``CKA_ALWAYS_AUTHENTICATE``.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            The plaintext.

        Raises:
            KeyNotFound, KeyAmbiguous: By the name of the key.
            KeyFunctionNotPermitted: ``CKA_DECRYPT`` is false.
            LoginRequired, PinRefused: As for :meth:`sign`.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_DecryptInit``, ``C_Decrypt``; for data in parts ``C_DecryptUpdate``
            and ``C_DecryptFinal``. With ``pin`` as :meth:`sign`.

        Source:
            PKCS#11 v3.1, "Decryption functions".
        """
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
            "login": None if pin is None else self._login(pin),  # type: ignore[arg-type]
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

        Returns:
            To iterate over with ``async for``; ``aclose()`` breaks off.

        Cancellation:
            The caller goes at once, and the stream is over.

        Cryptoki:
            ``C_EncryptInit``, ``C_EncryptUpdate``, ``C_EncryptFinal`` in one session;
            ``C_Encrypt`` for what fits into 64 KiB.

        Source:
            PKCS#11 v3.1, "Encryption functions".
        """
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
        }
        task = self._task(ENCRYPT, operations.encrypt, timeout, options)
        return CryptStream(task, data)

    @hides_pins
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

        Returns:
            To iterate over with ``async for``; ``aclose()`` breaks off.

        Cancellation:
            The caller goes at once, and the stream is over.

        Cryptoki:
            ``C_DecryptInit``, ``C_DecryptUpdate``, ``C_DecryptFinal`` in one session;
            ``C_Decrypt`` for what fits into 64 KiB.

        Source:
            PKCS#11 v3.1, "Decryption functions".
        """
        options: dict[str, Any] = {
            "mechanism": arguments.mechanism(mechanism),
            "param": mechanism_param,
            "login": None if pin is None else self._login(pin),  # type: ignore[arg-type]
        }
        task = self._task(DECRYPT, operations.decrypt, timeout, options)
        return CryptStream(task, data)

    def _signing(self, mechanism: Mechanism | None) -> operations.Signing:
        """What this key's signatures have in common; kept, for it is all the same."""
        made = self._signings.get(mechanism)
        if made is None:
            cache, spec = self._calls._engine.cache, self._target  # noqa: SLF001
            made = operations.Signing(cache, cast("KeySpec", spec), mechanism)
            # A new dictionary: references share the empty one.
            self._signings = {**self._signings, mechanism: made}
        return made

    def _login(self, pin: Pin | NoPin) -> Reaffirm:
        """The login for a use of this key, with a PIN that is out of sight."""
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

    def _with_data(
        self,
        operation: Operation,
        whole: Callable[..., Any],
        data: Data,
        timeout: Timeout,
        options: dict[str, Any],
    ) -> Awaitable[Any]:
        """An operation on data: in one call, or in parts."""
        given = data if type(data) is bytes else arguments.whole(data)
        target = self._target
        if given is not None and not isinstance(target, SessionObject):
            calls = self._calls
            cache = calls._engine.cache  # noqa: SLF001  # one package
            return calls._read(  # noqa: SLF001
                lambda session: whole(session, cache, target, given, **options),
                timeout,
                self._home,
            )
        if given is not None:
            return self._perform(whole, given, timeout=timeout, **options)
        return consume(self._task(operation, whole, timeout, options), data)
