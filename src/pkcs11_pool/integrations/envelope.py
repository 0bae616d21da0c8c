"""Envelope encryption: each message under a data key of its own, wrapped on the token.

.. code-block:: python

    from pkcs11_pool.integrations.envelope import Envelope

    envelope = Envelope({"2026": pool.key(label="master")})
    blob = await envelope.encrypt(b"data", {"tenant": "7"})
    data = await envelope.decrypt(blob, {"tenant": "7"})

The data key is made on the token, encrypts one message (AES-256-GCM) and is gone with
its session; what is kept is its wrapped form, in the blob. Nothing but the token can
open it. It needs no other library.

**Nonces.** A data key encrypts exactly one message, under one random nonce, so no nonce
is ever used twice with a key: there is no counter to keep and no limit on messages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pkcs11 import (
    Attribute,
    GCMParams,
    KeyType,
    Mechanism,
    MechanismFlag,
    PKCS11Error,
)

from pkcs11_pool.cryptoki import rv
from pkcs11_pool.errors import InvalidCiphertext, InvalidOption, InvalidType
from pkcs11_pool.faces.arguments import DEFAULT, Timeout, octets
from pkcs11_pool.integrations import algorithms, wrapping
from pkcs11_pool.integrations.blob import (
    NONCE,
    Blob,
    Context,
    authenticated,
    kek_of,
)
from pkcs11_pool.integrations.time_left import TimeLeft
from pkcs11_pool.integrations.wrapping import WrapName

if TYPE_CHECKING:
    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.faces.pool import TokenPool
    from pkcs11_pool.faces.pooled_session import SessionBlock

__all__ = ["Context", "DataKey", "Envelope", "WrapName", "kek_of"]

_BITS: Final = 256
_LONGEST_NAME: Final = 255
_ENCRYPTS: Final = MechanismFlag.ENCRYPT
_DECRYPTS: Final = MechanismFlag.DECRYPT
# What tokens say to a ciphertext or a wrapped key that was changed. SoftHSM2 has only
# CKR_GENERAL_ERROR for it.
_NOT_OURS: Final = frozenset(
    rv.CODES[name]
    for name in (
        "CKR_AEAD_DECRYPT_FAILED",
        "CKR_DATA_INVALID",
        "CKR_DATA_LEN_RANGE",
        "CKR_ENCRYPTED_DATA_INVALID",
        "CKR_ENCRYPTED_DATA_LEN_RANGE",
        "CKR_FUNCTION_FAILED",
        "CKR_GENERAL_ERROR",
        "CKR_KEY_TYPE_INCONSISTENT",
        "CKR_MECHANISM_INVALID",
        "CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT",
        "CKR_WRAPPED_KEY_INVALID",
        "CKR_WRAPPED_KEY_LEN_RANGE",
    )
)


@dataclass(frozen=True, slots=True)
class DataKey:
    """A key to encrypt with outside the token, in the clear and sealed.

    Attributes:
        plaintext: Use it, then forget it.
        sealed: Keep it with what was encrypted; ``Envelope.decrypt`` opens it.
    """

    plaintext: bytes = field(repr=False)
    sealed: bytes


class Envelope:
    """Encrypts with data keys that a key encryption key (KEK) on the token wraps.

    To rotate, put a new KEK in front: it wraps from now on, the older ones still open
    what they wrapped, and :meth:`rewrap` moves blobs to the new one.
    """

    def __init__(
        self, keks: Mapping[str, KeyRef], *, wrap: WrapName = "aes-kw"
    ) -> None:
        """Take the KEKs; nothing is sent.

        Args:
            keks: The KEKs by the names that blobs hold for them, at most 255 bytes of
                UTF-8 each. The first one wraps; all of them unwrap. Never give the name
                of one to another key.
            wrap: How the first one wraps: with an AES key ``"aes-kw"`` (RFC 3394) or
                ``"aes-kwp"`` (RFC 5649), with an RSA pair ``"rsa-oaep-sha256"`` or
                ``"rsa-oaep-sha1"`` (RFC 8017). SoftHSM2 has no OAEP with SHA-256.

        Raises:
            InvalidOption: There is no KEK, or a name or ``wrap`` cannot be used.
        """
        if not isinstance(keks, Mapping):
            kind = type(keks).__name__
            raise InvalidType(f"keks must be a mapping of names to keys, not {kind}")
        if not keks:
            raise InvalidOption("an envelope needs a KEK: {'2026': pool.key(...)}")
        for name, kek in keks.items():
            if not isinstance(name, str) or len(name.encode()) > _LONGEST_NAME:
                raise InvalidOption(f"{name!r} must be a text of at most 255 bytes")
            algorithms.check_key(kek)
        if len({_pool(kek) for kek in keks.values()}) > 1:
            raise InvalidOption("the KEKs must be keys of one pool")
        if wrap not in wrapping.NUMBERS:
            raise InvalidOption(f"wrap must be one of {', '.join(wrapping.NUMBERS)}")
        self._keks = dict(keks)
        self._current = next(iter(keks))
        self._wrap = wrapping.NUMBERS[wrap]

    async def encrypt(
        self, data: bytes, context: Context = None, *, timeout: Timeout = DEFAULT
    ) -> bytes:
        """Encrypt ``data``.

        Args:
            data: The message.
            context: What must be given again to decrypt: it is authenticated, and not
                in the blob. Text by name, or bytes.
            timeout: Seconds for all of it; None: no limit; 0: wait for no session.

        Raises:
            InvalidOption: ``context`` or ``data`` cannot be used; or the KEK does not
                wrap as ``wrap`` says, and the text names the ways that it does.
            KeyNotFound: The KEK is not on the token.
            PoolTimeout: The time has passed; nothing is left of it on the token.

        Cancellation:
            The caller goes when a call that is inside has returned, at most after
            ``close_timeout``: the data key goes with its session.

        Cryptoki:
            ``C_GenerateKey``, ``C_WrapKey``, ``C_EncryptInit``, ``C_Encrypt``, in a
            session of its own.
        """
        time_left = TimeLeft(self._pool, timeout)
        return await self._encrypt(octets(data, "data"), context, time_left)

    async def _encrypt(
        self, message: bytes, context: Context, time_left: TimeLeft
    ) -> bytes:
        aad, kek = authenticated(context), self._keks[self._current]
        # Some HSMs choose the nonce themselves and write it over this one, into these
        # very bytes: so it is an object of its own, and stored after it was used.
        nonce = os.urandom(NONCE)
        async with self._session(time_left) as session:
            key = await session.generate_key(
                KeyType.AES,
                _BITS,
                capabilities=_ENCRYPTS,
                template={Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: True},
                timeout=time_left.now(),
            )
            wrapped = await wrapping.wrap(self._wrap, kek, key, session, time_left)
            sealed = await key.encrypt(
                message,
                mechanism=Mechanism.AES_GCM,
                mechanism_param=GCMParams(nonce, aad),
                timeout=time_left.now(),
            )
        return Blob(self._current, self._wrap, wrapped, nonce, sealed).packed()

    async def decrypt(
        self, blob: bytes, context: Context = None, *, timeout: Timeout = DEFAULT
    ) -> bytes:
        """The message, if neither it nor its context was changed.

        Args:
            blob: What :meth:`encrypt` or :meth:`rewrap` gave, or a sealed data key.
            context: As it was given to encrypt.
            timeout: Seconds for all of it; None: no limit; 0: wait for no session.

        Raises:
            InvalidCiphertext: It was changed, has another context, or was wrapped by
                a KEK that this envelope does not have.
            PoolTimeout: The time has passed; nothing is left of it on the token.

        Cancellation:
            The caller goes when a call that is inside has returned, at most after
            ``close_timeout``: the data key goes with its session.

        Cryptoki:
            ``C_UnwrapKey``, ``C_DecryptInit``, ``C_Decrypt``, in a session of its own.
        """
        parsed, aad = Blob.parse(blob), authenticated(context)
        kek, time_left = self._kek_of(parsed), TimeLeft(self._pool, timeout)
        async with self._session(time_left) as session:
            try:
                key = await wrapping.unwrap(
                    kek, parsed, session, time_left, capabilities=_DECRYPTS
                )
                return await key.decrypt(
                    parsed.sealed,
                    mechanism=Mechanism.AES_GCM,
                    mechanism_param=GCMParams(parsed.nonce, aad),
                    timeout=time_left.now(),
                )
            except PKCS11Error as error:
                raise _classified(error) from error

    async def rewrap(self, blob: bytes, *, timeout: Timeout = DEFAULT) -> bytes:
        """The same message with its data key wrapped by the current KEK.

        Neither the message nor the data key leaves the token; the context stays as it
        is. A blob of the current KEK is given back as it is.

        Args:
            blob: What :meth:`encrypt` or :meth:`rewrap` gave.
            timeout: Seconds for all of it; None: no limit; 0: wait for no session.

        Raises:
            InvalidCiphertext: As :meth:`decrypt`, for the wrapped key alone.
            PoolTimeout: The time has passed; nothing was changed.

        Cancellation:
            The caller goes when a call that is inside has returned, at most after
            ``close_timeout``; nothing was changed.

        Cryptoki:
            ``C_UnwrapKey``, ``C_WrapKey``, in a session of its own.
        """
        parsed = Blob.parse(blob)
        old, new = self._kek_of(parsed), self._keks[self._current]
        time_left = TimeLeft(self._pool, timeout)
        if (parsed.kek, parsed.wrap) == (self._current, self._wrap):
            return parsed.packed()
        async with self._session(time_left) as session:
            try:
                key = await wrapping.unwrap(
                    old, parsed, session, time_left, extractable=True
                )
            except PKCS11Error as error:
                raise _classified(error) from error
            wrapped = await wrapping.wrap(self._wrap, new, key, session, time_left)
        return Blob(
            self._current, self._wrap, wrapped, parsed.nonce, parsed.sealed
        ).packed()

    async def generate_data_key(
        self,
        context: Context = None,
        *,
        nbits: int = 256,
        timeout: Timeout = DEFAULT,
    ) -> DataKey:
        """A key for use outside the token, and its sealed form.

        For what is too large to send to the token: encrypt with ``plaintext`` where you
        are, keep ``sealed`` with it, and get the key again by ``decrypt(sealed)``.
        Whoever uses the key must see to its nonces.

        Args:
            context: As for :meth:`encrypt`.
            nbits: Its length in bits.
            timeout: Seconds for all of it; None: no limit; 0: wait for no session.

        Raises:
            InvalidOption: ``nbits`` is no multiple of 8.
            PoolTimeout: The time has passed; nothing is left of it on the token.

        Cancellation:
            As :meth:`encrypt`.

        Cryptoki:
            ``C_GenerateRandom``, then as :meth:`encrypt`.
        """
        if not isinstance(nbits, int) or nbits <= 0 or nbits % 8:
            raise InvalidOption(f"nbits must be a multiple of 8, not {nbits!r}")
        time_left = TimeLeft(self._pool, timeout)
        key = await self._pool.generate_random(nbits, timeout=time_left.at_first())
        return DataKey(key, await self._encrypt(key, context, time_left))

    @property
    def _pool(self) -> TokenPool:
        return _pool(self._keks[self._current])

    def _session(self, time_left: TimeLeft) -> SessionBlock:
        return self._pool.session(timeout=time_left.at_first())

    def _kek_of(self, blob: Blob) -> KeyRef:
        try:
            return self._keks[blob.kek]
        except KeyError:
            known = ", ".join(map(repr, self._keks))
            message = f"it was wrapped by the KEK {blob.kek!r}; here are only {known}"
            raise InvalidCiphertext(message) from None

    def __repr__(self) -> str:
        """The names of its KEKs, the one that wraps first."""
        return f"<Envelope {', '.join(map(repr, self._keks))}>"


def _pool(kek: KeyRef) -> TokenPool:
    """The pool that has this key, also when the key is bound to a session."""
    pool: TokenPool = kek._calls._pool()  # type: ignore[assignment]  # noqa: SLF001  # one package
    return pool


def _classified(error: PKCS11Error) -> PKCS11Error | InvalidCiphertext:
    """What a token answered to a blob: whether that means that it is not ours."""
    if rv.code_of(error) not in _NOT_OURS:
        return error
    return InvalidCiphertext(
        "the token does not open this: it was changed, or has another context or KEK"
    )
