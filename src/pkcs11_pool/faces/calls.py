"""The operations that a pool and an open session have in common.

On a pool each runs in a fresh session of its own; on a ``PooledSession`` all run
in that one session, one at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from pkcs11_pool import config
from pkcs11_pool.cryptoki import interface, objects, operations
from pkcs11_pool.cryptoki.keys import KeySpec
from pkcs11_pool.engine.multipart import DIGEST, Plan
from pkcs11_pool.faces import arguments, changes
from pkcs11_pool.faces.arguments import DEFAULT, Data, Template, Timeout
from pkcs11_pool.faces.keyref import KeyRef
from pkcs11_pool.faces.making import Making
from pkcs11_pool.faces.mapping import Results, Work
from pkcs11_pool.faces.streams import Task, consume

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable

    from pkcs11.constants import ObjectClass
    from pkcs11.mechanisms import KeyType, Mechanism

    from pkcs11_pool.cryptoki.keys import Target
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.faces.objectref import ObjectRef

T = TypeVar("T")
Item = TypeVar("Item")


class Calls(Making):
    """What can be done on a token, in whichever session."""

    async def run(
        self,
        func: Callable[..., T],
        *args: Any,
        rw: bool = False,
        repeat: bool = False,
        timeout: Timeout = DEFAULT,
    ) -> T:
        """Call ``func(session, *args)`` on a worker thread, with a real session.

        The session is a ``pkcs11.Session`` that is open for this one call (on a
        ``PooledSession``: as long as that is open). Everything that python-pkcs11
        can do, it can do. Kept beyond its end it is harmless: its use raises.

        Args:
            func: A plain function.
            *args: Its further arguments.
            rw: Use a R/W session; counted as changing the token.
            repeat: Call it again after a lost login or token, also where it may have
                done its work by then.
            timeout: Seconds; keyword arguments of ``func`` go by ``functools.partial``.

        Returns:
            What ``func`` returned.

        Raises:
            PoolError: See :mod:`pkcs11_pool.errors`.
            pkcs11.PKCS11Error: What the token answered.

        Cancellation:
            Before the call: nothing happened. During it: the caller goes at once and
            the result is dropped; with ``rw=True`` the outcome is waited for first.

        Cryptoki:
            ``C_OpenSession``, what ``func`` calls, ``C_CloseSession``.

        Source:
            PKCS#11 v3.1, "Session management functions".
        """
        config.check_flag("rw", rw)
        config.check_flag("repeat", repeat)
        work = self._calling(arguments.function(func), args)
        return await self._perform(
            work,
            timeout,
            rw=rw,
            changes=changes.running(func) if rw else False,
            restart=repeat,
            repeat=repeat,
        )

    def _calling(
        self, func: Callable[..., T], args: tuple[Any, ...]
    ) -> Callable[[Session], T]:
        """The work of a caller's function."""
        cache = self._engine.cache
        one_shot = self._owner is None

        def work(session: Session) -> T:
            cache.check_login(
                "await pool.login(), or nobody knows what a function does"
            )
            # The caller may change any object: no number is sure meanwhile.
            with cache.changing():
                try:
                    result: T = arguments.no_awaitable(func(session.lend(), *args))
                    return result
                finally:
                    interface.end_operations(session.p11)
                    if one_shot:
                        # Before the caller has what the function returned: it may be
                        # an object of the session, which is still open.
                        session.disarm()

        return work

    @overload
    def map(
        self,
        func: Callable[[Any, Item], T],
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        rw: bool = False,
        limit: int | None = None,
        return_errors: Literal[False] = False,
        repeat: bool = False,
        timeout: Timeout = DEFAULT,
    ) -> Results[T]: ...

    @overload
    def map(
        self,
        func: Callable[[Any, Item], T],
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        rw: bool = False,
        limit: int | None = None,
        return_errors: bool,
        repeat: bool = False,
        timeout: Timeout = DEFAULT,
    ) -> Results[T | Exception]: ...

    def map(
        self,
        func: Callable[[Any, Any], Any],
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        rw: bool = False,
        limit: int | None = None,
        return_errors: bool = False,
        repeat: bool = False,
        timeout: Timeout = DEFAULT,
    ) -> Results[Any]:
        """``func(session, item)`` for each item: ``async for result in pool.map(…)``.

        Results come in the order of the items, while many operations are under way,
        each in a session of its own as by :meth:`run`. Nothing grows with the number
        of items. An async iterable is awaited between two results: while it gives
        nothing, no result is given either. With ``limit=1`` each result is given
        before the next item is taken.

        Args:
            func: A plain function of a session and an item.
            items: An iterable or async iterable; taken as results are.
            rw: Use R/W sessions; counted as changing the token.
            limit: The most operations under way and results not yet taken; None: twice
                ``max_sessions``.
            return_errors: Give an operation's error in its place, not raise it.
            repeat: Call it again after a lost login or token.
            timeout: Seconds for each operation.

        Returns:
            To iterate over with ``async for``; ``aclose()`` breaks off.

        Cancellation:
            As for :class:`Results`: what is under way is finished and dropped; with
            ``rw=True`` it is waited for.

        Cryptoki:
            For each item as :meth:`run`.

        Source:
            PKCS#11 v3.1, "Session management functions".
        """
        config.check_flag("rw", rw)
        config.check_flag("repeat", repeat)
        config.check_flag("return_errors", return_errors)
        called = arguments.function(func)

        def make(item: Any) -> Callable[[Session], Any]:
            return self._calling(called, (item,))

        work = Work(
            self,
            make,
            timeout=timeout,
            rw=rw,
            changes=changes.running(func) if rw else False,
            restart=repeat,
            repeat=repeat,
        )
        return Results(work, items, limit=limit, return_errors=return_errors)

    def key(
        self,
        label: str | None = None,
        id: bytes | None = None,  # noqa: A002  # as python-pkcs11 names it
        object_class: ObjectClass | None = None,
        key_type: KeyType | None = None,
    ) -> KeyRef:
        """A reference to a token object. No I/O; it may be kept for ever.

        Without ``object_class`` the operation chooses: private or secret to sign,
        decrypt, unwrap and derive; public or secret to verify, encrypt and wrap.

        Args:
            label: Its ``CKA_LABEL``.
            id: Its ``CKA_ID``; the label, the id, or both.
            object_class: What it must be; None: what the operation needs.
            key_type: Its type, if that must match as well.

        Returns:
            A reference; it may be made before the pool opens.

        Raises:
            InvalidOption: Nothing names the key, or a value has the wrong type.
        """
        spec = KeySpec.of(*arguments.name(label, id, object_class, key_type))
        return KeyRef(self, spec)

    async def find(
        self, template: Template | None = None, *, timeout: Timeout = DEFAULT
    ) -> list[KeyRef | ObjectRef]:
        """All objects that match a template; all that are visible without one.

        Args:
            template: Attributes that must match; None: any.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            References in the token's order: ``KeyRef`` to keys, else ``ObjectRef``.

        Cancellation:
            The caller goes at once; a search changes nothing.

        Cryptoki:
            ``C_FindObjectsInit``, ``C_FindObjects``, ``C_FindObjectsFinal``, and one
            ``C_GetAttributeValue`` for each object.

        Source:
            PKCS#11 v3.1, "Object management functions".
        """
        packed = arguments.packed({} if template is None else template)
        cache = self._engine.cache

        def work(session: Session) -> list[KeyRef | ObjectRef]:
            # Thousands of references are made here, not on the caller's loop.
            found = map(self._found, objects.find(session, cache, packed))
            return [ref for ref in found if ref is not None]

        return await self._perform(work, timeout)

    async def digest(
        self,
        data: Data | KeyRef | Iterable[bytes | KeyRef] | AsyncIterable[bytes | KeyRef],
        *,
        mechanism: Mechanism,
        mechanism_param: Any = None,
        timeout: Timeout = DEFAULT,
    ) -> bytes:
        """The digest of ``data``: bytes, text, a file, or an iterable of bytes.

        A secret key, or an iterable with keys among its bytes, is digested by the
        token: the value of a key is not read.

        Args:
            data: As for :meth:`KeyRef.sign`; or a key, or keys among the bytes.
            mechanism: How.
            mechanism_param: As python-pkcs11 takes it.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            The digest.

        Cancellation:
            The caller goes at once; a digest changes nothing.

        Cryptoki:
            ``C_DigestInit``, ``C_Digest``; for data in parts ``C_DigestUpdate``,
            ``C_DigestKey`` and ``C_DigestFinal``.

        Source:
            PKCS#11 v3.1, "Message digesting functions".
        """
        kind = arguments.needed_mechanism(mechanism)

        async def digest(whole: bytes, timeout: Timeout) -> bytes:
            return await self._read(
                lambda session: operations.digest(
                    session, whole, kind, mechanism_param
                ),
                timeout,
            )

        if (whole := arguments.whole(data)) is not None:
            return await digest(whole, timeout)
        plan = Plan(
            operation=DIGEST,
            cache=self._engine.cache,
            target=None,
            mechanism=kind,
            param=mechanism_param,
        )
        task = Task(self, plan, digest, timeout=timeout, key_of=_key_of)
        parts: Any = [data] if isinstance(data, KeyRef) else data
        result: bytes = await consume(task, parts)
        return result

    async def generate_random(self, nbits: int, *, timeout: Timeout = DEFAULT) -> bytes:
        """Random bytes from the token; ``nbits`` is their number in bits.

        Args:
            nbits: How many bits; a multiple of 8.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            ``nbits / 8`` bytes.

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_GenerateRandom``.

        Source:
            PKCS#11 v3.1, "Random number generation functions".
        """
        size = arguments.bits(nbits)
        return await self._read(
            lambda session: operations.generate_random(session, size), timeout
        )

    async def seed_random(self, seed: bytes, *, timeout: Timeout = DEFAULT) -> None:
        """Mix bytes into the random numbers of the token.

        They are the token's and not a session's: every session has their effect.

        Args:
            seed: The bytes, one at least.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Raises:
            pkcs11.RandomSeedNotSupported: The token takes none; many do not.
            pkcs11.RandomNoRNG: It has no random numbers.

        Cancellation:
            The caller goes at once; the bytes may be mixed in all the same.

        Cryptoki:
            ``C_SeedRandom``.

        Source:
            PKCS#11 v3.1, "Random number generation functions".
        """
        given = arguments.seed(seed)
        await self._read(
            lambda session: operations.seed_random(session, given), timeout
        )


def _key_of(chunk: object) -> Target | None:
    return chunk._target if isinstance(chunk, KeyRef) else None  # noqa: SLF001
