"""Many tasks that use a pool while it is mistreated, and the book of what came of it.

Every result is checked at once by somebody other than the token. What was acknowledged
is written down; at the end the token must have all of it, and nothing else. A caller
may be refused, and is told so; no caller may be left without an answer.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from pkcs11_pool.errors import (
    OutcomeUnknown,
    PoolTimeout,
    SessionClosed,
    SessionObjectDestroyed,
    TokenUnavailable,
    TooManyWaiting,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    import pkcs11

    from pkcs11_pool.faces.pool import TokenPool

SIGNER: Final = "chaos signer"
_REFUSALS: Final = (
    OutcomeUnknown,
    PoolTimeout,
    SessionClosed,
    SessionObjectDestroyed,
    TokenUnavailable,
    TooManyWaiting,
)
_GRACE: Final = 20.0
"""Seconds over its deadline after which a caller counts as left without an answer."""
_MOST_TEXTS: Final = 20


@dataclass
class Book:
    """What was acknowledged, refused and found wrong.

    Attributes:
        acknowledged: Results that came, and were right, by kind of operation.
        refused: Errors that tell a caller so, by type.
        cancelled: Callers who went before their result came.
        wrong: What must not be, as text.
        returns: Seconds from each return of the token to the next result.
        made: Labels of keys that are on the token, by what was acknowledged.
        unsure: Labels of keys of which nobody knows.
    """

    acknowledged: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    wrong: list[str] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)
    _back: float | None = None
    _more: anyio.Event | None = None

    async def one_more(self) -> None:
        """Wait until one more result has come."""
        self._more = anyio.Event()
        await self._more.wait()

    def token_is_back(self, when: float) -> None:
        """The token serves again since ``when``, on the monotonic clock."""
        self._back = when

    def acknowledge(self, kind: str) -> None:
        """A result came, and is right."""
        self.acknowledged[kind] += 1
        if self._more is not None:
            self._more.set()
        if self._back is not None:
            self.returns.append(time.monotonic() - self._back)
            self._back = None

    def blame(self, text: str) -> None:
        """Something is wrong."""
        if len(self.wrong) < _MOST_TEXTS:
            self.wrong.append(text)

    @property
    def total(self) -> int:
        """How many results came."""
        return sum(self.acknowledged.values())


class Load:
    """The tasks.

    Args:
        pool: An open pool, with the key that :func:`prepare` made.
        public: The signer's public key, as DER.
        rng: What each task does, and when it gives up.
        pause: Seconds that a task rests between two operations, at most.
        unruly: Whether callers go early, or have little time, now and then.
    """

    def __init__(
        self,
        pool: TokenPool,
        public: bytes,
        rng: random.Random,
        *,
        pause: float = 0.02,
        unruly: bool = True,
    ) -> None:
        self.book = Book()
        self.stopping = False
        self._pool = pool
        self._rng = rng
        self._pause = pause
        self._unruly = unruly
        self._number = 0
        key = load_der_public_key(public)
        assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101  # prepare()
        self._public = key
        self._signer = pool.key(label=SIGNER)
        self._kinds: Sequence[tuple[Callable[..., Any], int]] = (
            (self._sign, 60),
            (self._verify, 8),
            (self._digest, 8),
            (self._random, 8),
            (self._make, 6),
            (self._session, 6),
            (self._stream, 4),
        )

    async def task(self) -> None:
        """One caller, until the load stops."""
        kinds, weights = zip(*self._kinds, strict=True)
        while not self.stopping:
            (kind,) = self._rng.choices(kinds, weights)
            await self._once(kind)
            await anyio.sleep(self._rng.uniform(0, self._pause))

    async def _once(self, kind: Callable[..., Any]) -> None:
        self._number += 1
        data = f"{self._number}".encode()
        options, patience = self._manners()
        limit = (options.get("timeout") or 30.0) + _GRACE
        try:
            with anyio.fail_after(limit), anyio.move_on_after(patience) as scope:
                await kind(data, options)
        except _REFUSALS as error:
            self.book.refused[type(error).__name__] += 1
        except TimeoutError:
            self.book.blame(f"{kind.__name__}: no answer in {limit:.0f} s")
        except Exception as error:  # noqa: BLE001  # that is what is looked for
            self.book.blame(f"{kind.__name__}: {type(error).__name__}: {error}")
        else:
            self.book.cancelled += scope.cancelled_caught

    def _manners(self) -> tuple[dict[str, Any], float]:
        """Options for the call, and when its caller goes."""
        if self._unruly and self._rng.random() < 0.04:  # noqa: PLR2004
            if self._rng.random() < 0.5:  # noqa: PLR2004
                return {"timeout": self._rng.uniform(0.001, 0.2)}, float("inf")
            return {}, self._rng.uniform(0, 0.01)
        return {}, float("inf")

    # -- The kinds of operations --------------------------------------------------

    async def _sign(self, data: bytes, options: dict[str, Any]) -> None:
        digest = hashlib.sha256(data).digest()
        signature = await self._signer.sign(
            digest, mechanism=Mechanism.ECDSA, signature_format="der", **options
        )
        if self._is_right(signature, digest):
            self.book.acknowledge("sign")
        else:
            self.book.blame(f"a wrong signature of {data!r}")

    def _is_right(self, signature: bytes, digest: bytes) -> bool:
        try:
            scheme = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
            self._public.verify(signature, digest, scheme)
        except InvalidSignature:
            return False
        return True

    async def _verify(self, data: bytes, options: dict[str, Any]) -> None:
        right = await self._signer.verify(
            hashlib.sha256(data).digest(),
            b"\1" * 64,
            mechanism=Mechanism.ECDSA,
            **options,
        )
        if right:
            self.book.blame("a signature that nobody made was called right")
        else:
            self.book.acknowledge("verify")

    async def _digest(self, data: bytes, options: dict[str, Any]) -> None:
        found = await self._pool.digest(data, mechanism=Mechanism.SHA256, **options)
        self._compare("digest", found, hashlib.sha256(data).digest())

    async def _stream(self, data: bytes, options: dict[str, Any]) -> None:
        parts = [data * 10_000] * 3
        found = await self._pool.digest(parts, mechanism=Mechanism.SHA256, **options)
        self._compare("stream", found, hashlib.sha256(b"".join(parts)).digest())

    async def _random(self, _data: bytes, options: dict[str, Any]) -> None:
        found = await self._pool.generate_random(128, **options)
        self._compare("random", len(found), 16)

    async def _session(self, data: bytes, options: dict[str, Any]) -> None:
        async with self._pool.session(**options) as session:
            key = await session.generate_key(KeyType.AES, 256)
            block = data.rjust(16)
            # p11-kit passes no mechanism with an IV on.
            sealed = await key.encrypt(block, mechanism=Mechanism.AES_ECB)
            opened = await key.decrypt(sealed, mechanism=Mechanism.AES_ECB)
        self._compare("session", opened, block)

    async def _make(self, data: bytes, options: dict[str, Any]) -> None:
        label = f"chaos {data.decode()}"
        # Until it is known, also when the caller is cancelled or refused.
        self.book.unsure.add(label)
        key = await self._pool.generate_key(
            KeyType.AES, 128, label=label, store=True, **options
        )
        self.book.unsure.discard(label)
        self.book.made.add(label)
        self.book.acknowledge("make")
        if self._rng.random() < 0.9:  # noqa: PLR2004  # the token stays small
            self.book.made.discard(label)
            self.book.unsure.add(label)
            await key.destroy(**options)
            self.book.unsure.discard(label)
            self.book.acknowledge("destroy")

    def _compare(self, kind: str, found: object, expected: object) -> None:
        if found == expected:
            self.book.acknowledge(kind)
        else:
            self.book.blame(f"{kind}: {found!r} and not {expected!r}")


async def prepare(pool: TokenPool) -> bytes:
    """Make the key that signs; its public half, as DER."""
    await pool.generate_keypair(KeyType.EC, curve="secp256r1", label=SIGNER, store=True)
    return await pool.key(label=SIGNER).public_key_der()


def _labels(session: pkcs11.Session) -> list[str]:
    template = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.TOKEN: True}
    return [found.label for found in session.get_objects(template)]  # type: ignore[attr-defined]


async def compare(pool: TokenPool, book: Book) -> tuple[list[str], list[str]]:
    """What is lost from the token, and what is there that nobody was told of."""
    found = Counter(await pool.run(_labels, repeat=True))
    lost = sorted(book.made - found.keys())
    twice = [label for label, count in found.items() if count > 1]
    strange = sorted(found.keys() - book.made - book.unsure) + twice
    return lost, strange
