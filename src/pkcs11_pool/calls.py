"""The operations that a pool and an open session have in common.

On a pool each runs in a fresh session of its own; on a ``PooledSession`` all run
in that one session, one at a time. Both only differ in :meth:`Calls._perform`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

from pkcs11.constants import Attribute, ObjectClass

from pkcs11_pool import arguments, config, cryptoki, objects, operations
from pkcs11_pool.arguments import DEFAULT, Data, Template, Timeout
from pkcs11_pool.errors import InvalidOption, SessionObjectNeedsSession
from pkcs11_pool.keyref import KeyRef, ObjectRef
from pkcs11_pool.keys import KeySpec, SessionObject
from pkcs11_pool.mapping import Results, Work
from pkcs11_pool.multipart import DIGEST, Plan
from pkcs11_pool.parameters import LocalParameters, ParametersRef
from pkcs11_pool.streams import Task, consume

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Sequence

    from pkcs11.constants import MechanismFlag
    from pkcs11.mechanisms import KeyType, Mechanism

    from pkcs11_pool.engine import TokenEngine
    from pkcs11_pool.jobs import Job
    from pkcs11_pool.keys import Entry, ObjectOwner, Target
    from pkcs11_pool.leases import Hold, Lease, Loan
    from pkcs11_pool.multipart import MultiPart
    from pkcs11_pool.session import Session
    from pkcs11_pool.waiting import FaceWaiter

T = TypeVar("T")
Item = TypeVar("Item")

_KEYS = frozenset(
    {ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY, ObjectClass.SECRET_KEY}
)


class Calls(ABC):
    """What can be done on a token, in whichever session."""

    _engine: TokenEngine

    @abstractmethod
    async def _perform(
        self,
        work: Callable[[Session], T],
        timeout: Timeout,
        *,
        rw: bool = False,
        changes: bool = False,
        restart: bool = True,
        home: Calls | None = None,
        target: SessionObject | None = None,
    ) -> T:
        """Run ``work`` on a worker thread, with a session."""

    @abstractmethod
    def _job(
        self,
        work: Callable[[Session], Any],
        timeout: Timeout,
        *,
        waiter: FaceWaiter,
        rw: bool = False,
        changes: bool = False,
        restart: bool = True,
        target: SessionObject | None = None,
    ) -> Job:
        """A job that runs ``work`` on a worker thread, with a session."""

    @abstractmethod
    async def _seat(
        self,
        chain: MultiPart,
        deadline: float | None,
        *,
        nowait: bool,
        home: Calls | None,
    ) -> tuple[Lease, Hold | Loan]:
        """A session for a chain of calls, and what lets go of it when forgotten."""

    @property
    @abstractmethod
    def _owner(self) -> ObjectOwner | None:
        """Who owns the session objects that are made here, or None."""

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
            repeat: Call it again after a lost login or token.
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
        """
        config.check_flag("rw", rw)
        config.check_flag("repeat", repeat)
        work = self._calling(arguments.function(func), args)
        return await self._perform(work, timeout, rw=rw, changes=rw, restart=repeat)

    def _calling(
        self, func: Callable[..., T], args: tuple[Any, ...]
    ) -> Callable[[Session], T]:
        """The work of a caller's function."""
        cache = self._engine.cache
        one_shot = self._owner is None

        def work(session: Session) -> T:
            # The caller may change any object: no number is sure meanwhile.
            with cache.changing():
                try:
                    result: T = arguments.no_awaitable(func(session.lend(), *args))
                    return result
                finally:
                    cryptoki.end_operations(session.p11)
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

        Cryptoki:
            For each item as :meth:`run`.
        """
        config.check_flag("rw", rw)
        config.check_flag("repeat", repeat)
        config.check_flag("return_errors", return_errors)
        called = arguments.function(func)

        def make(item: Any) -> Callable[[Session], Any]:
            return self._calling(called, (item,))

        work = Work(self, make, timeout=timeout, rw=rw, changes=rw, restart=repeat)
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

        Raises:
            InvalidOption: Nothing names the key, or a value has the wrong type.
        """
        spec = KeySpec.of(*arguments.name(label, id, object_class, key_type))
        return KeyRef(self, spec)

    async def find(
        self, template: Template | None = None, *, timeout: Timeout = DEFAULT
    ) -> list[KeyRef | ObjectRef]:
        """All objects that match a template; all that are visible without one.

        Cancellation:
            The caller goes at once; a search changes nothing.

        Cryptoki:
            ``C_FindObjectsInit``, ``C_FindObjects``, ``C_FindObjectsFinal``, and one
            ``C_GetAttributeValue`` for each object.
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

        Cancellation:
            The caller goes at once; a digest changes nothing.

        Cryptoki:
            ``C_DigestInit``, ``C_Digest``; for data in parts ``C_DigestUpdate``,
            ``C_DigestKey`` and ``C_DigestFinal``.
        """
        kind = arguments.needed_mechanism(mechanism)

        async def digest(whole: bytes, timeout: Timeout) -> bytes:
            return await self._perform(
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

        Cancellation:
            The caller goes at once.

        Cryptoki:
            ``C_GenerateRandom``.
        """
        size = arguments.bits(nbits)
        return await self._perform(
            lambda session: operations.generate_random(session, size), timeout
        )

    async def generate_key(
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
    ) -> KeyRef:
        """Make a secret key; ``key_length`` in bits.

        Raises:
            SessionObjectNeedsSession: ``store`` is false and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_GenerateKey``.
        """
        kind = arguments.key_type(key_type)
        length = arguments.key_length(key_length)
        given = None if template is None else arguments.template(template)
        call = partial(
            _generate_key,
            kind,
            length,
            **arguments.making(id, label, store, capabilities),
            mechanism=arguments.mechanism(mechanism),
            mechanism_param=mechanism_param,
            template=given,
        )
        (ref,) = await self._make(call, timeout, store=store, given=[given])
        return ref

    async def generate_keypair(
        self,
        key_type: KeyType,
        key_length: int | None = None,
        *,
        curve: str | None = None,
        id: bytes | None = None,  # noqa: A002
        label: str | None = None,
        store: bool = False,
        capabilities: MechanismFlag | None = None,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        public_template: Template | None = None,
        private_template: Template | None = None,
        timeout: Timeout = DEFAULT,
    ) -> tuple[KeyRef, KeyRef]:
        """Make a key pair: (public, private). ``curve`` names an EC curve.

        Raises:
            SessionObjectNeedsSession: ``store`` is false and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_GenerateKeyPair``.
        """
        public = arguments.curve(curve, public_template)
        given = [
            public,
            arguments.template(
                {} if private_template is None else private_template, "private_template"
            ),
        ]
        call = partial(
            _generate_keypair,
            arguments.key_type(key_type),
            arguments.key_length(key_length),
            **arguments.making(id, label, store, capabilities),
            mechanism=arguments.mechanism(mechanism),
            mechanism_param=mechanism_param,
            public_template=given[0],
            private_template=given[1],
        )
        made = await self._make(call, timeout, store=store, given=given)
        return made[0], made[1]

    async def generate_domain_parameters(
        self,
        key_type: KeyType,
        param_length: int,
        *,
        store: bool = False,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        template: Template | None = None,
        timeout: Timeout = DEFAULT,
    ) -> ParametersRef:
        """Make domain parameters (DSA, DH); ``param_length`` in bits of the prime.

        Slow: the token looks for primes. ``timeout=None`` gives it the time it takes.

        Raises:
            SessionObjectNeedsSession: ``store`` is false and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_GenerateKey``.
        """
        config.check_flag("store", store)
        kind = arguments.key_type(key_type)
        length = arguments.count(param_length, "param_length", "bits")
        given = None if template is None else arguments.template(template)
        options = {
            "store": store,
            "mechanism": arguments.mechanism(mechanism),
            "mechanism_param": mechanism_param,
            "template": given,
        }
        (ref,) = await self._make(
            lambda session: session.generate_domain_parameters(kind, length, **options),
            timeout,
            store=store,
            given=[given],
        )
        made: Any = ref
        return cast("ParametersRef", made)

    @overload
    async def create_domain_parameters(
        self,
        key_type: KeyType,
        attrs: Template,
        *,
        local: Literal[True],
        timeout: Timeout = DEFAULT,
    ) -> LocalParameters: ...

    @overload
    async def create_domain_parameters(
        self,
        key_type: KeyType,
        attrs: Template,
        *,
        local: Literal[False] = False,
        store: bool = False,
        timeout: Timeout = DEFAULT,
    ) -> ParametersRef: ...

    async def create_domain_parameters(
        self,
        key_type: KeyType,
        attrs: Template,
        *,
        local: bool = False,
        store: bool = False,
        timeout: Timeout = DEFAULT,
    ) -> ParametersRef | LocalParameters:
        """Domain parameters from their values, to generate key pairs from.

        Args:
            key_type: Of the keys.
            attrs: ``Attribute.PRIME``, ``BASE``, ``SUBPRIME`` or ``EC_PARAMS``.
            local: Make no object: nothing is sent before a key pair is made.
            store: Make a token object; a session object otherwise.
            timeout: Seconds.

        Raises:
            SessionObjectNeedsSession: It would be a session object and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_CreateObject``; nothing with ``local``.
        """
        config.check_flag("local", local)
        config.check_flag("store", store)
        kind, given = arguments.key_type(key_type), arguments.template(attrs, "attrs")
        if local and store:
            message = "local parameters are no object: give local= or store=, not both"
            raise InvalidOption(message)
        if local:
            return LocalParameters(self, kind, given)
        made: Any = await self.create_object(
            {
                **given,
                Attribute.CLASS: ObjectClass.DOMAIN_PARAMETERS,
                Attribute.KEY_TYPE: kind,
                Attribute.TOKEN: store,
            },
            timeout=timeout,
        )
        return cast("ParametersRef", made)

    async def create_object(
        self, template: Template, *, timeout: Timeout = DEFAULT
    ) -> KeyRef | ObjectRef:
        """Make an object from its attributes.

        Raises:
            InvalidOption: The template is empty, or has no ``CKA_CLASS``.
            SessionObjectNeedsSession: ``CKA_TOKEN`` is not true and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_CreateObject``.
        """
        given = arguments.template(template)
        if Attribute.CLASS not in given:
            message = "the template of a new object needs at least Attribute.CLASS"
            raise InvalidOption(message)
        (ref,) = await self._make(
            lambda session: session.create_object(given),
            timeout,
            store=False,
            given=[given],
        )
        return ref

    async def _make(
        self,
        call: Callable[[Any], Any],
        timeout: Timeout,
        *,
        store: bool,
        given: Sequence[Template | None],
    ) -> list[KeyRef]:
        token = arguments.makes_token_object(store=store, given=given)
        self._check_home(token=token)
        cache = self._engine.cache
        entries = await self._perform(
            lambda session: objects.make(session, cache, call),
            timeout,
            rw=token,
            changes=True,
        )
        return [self._ref(entry) for entry in entries]

    def _check_home(self, *, token: bool) -> None:
        """Refuse a session object that would end with its call."""
        if not token and self._owner is None:
            message = (
                "a session object lives as long as its session, and here that ends "
                "with the call: use `async with pool.session()`, or store=True"
            )
            raise SessionObjectNeedsSession(message)

    def _found(self, entry: Entry) -> KeyRef | ObjectRef | None:
        """The reference of an object that a search found.

        A search sees the session objects of every session. One that was made
        through the pool keeps its owner; one of unknown origin counts as this
        session's, and a pool, that owns none, leaves it out.
        """
        if _is_token_object(entry):
            return self._ref(entry)
        known = self._engine.session_object(entry.handle)
        if known is not None:
            ref: ObjectRef = _kind(known.entry)(self._pool(), known, home=self._home())
            return ref
        return None if self._owner is None else self._ref(entry)

    def _ref(self, entry: Entry) -> KeyRef:
        """The reference of an object that was made or found here."""
        target: Target
        if _is_token_object(entry):
            target = entry.spec()
            self._engine.cache.remember(target, entry)
        else:
            owner = self._owner
            assert owner is not None  # noqa: S101  # _check_home
            target = owner.objects[entry.handle] = SessionObject(entry, owner)
        ref: KeyRef = _kind(entry)(self._pool(), target, home=self._home())
        return ref

    def _home(self) -> Calls | None:
        return None if self._owner is None else self

    @abstractmethod
    def _pool(self) -> Calls:
        """The pool that this belongs to."""


def _key_of(chunk: object) -> Target | None:
    return chunk._target if isinstance(chunk, KeyRef) else None  # noqa: SLF001


def _is_token_object(entry: Entry) -> bool:
    return entry.seen.get(Attribute.TOKEN) == b"\x01"


def _kind(entry: Entry) -> Any:
    if entry.object_class == ObjectClass.DOMAIN_PARAMETERS:
        return ParametersRef
    return KeyRef if entry.object_class in _KEYS else ObjectRef


def _generate_key(kind: KeyType, length: int | None, session: Any, **o: Any) -> Any:
    return session.generate_key(kind, length, **o)


def _generate_keypair(kind: KeyType, length: int | None, session: Any, **o: Any) -> Any:
    return session.generate_keypair(kind, length, **o)
