"""What makes objects, on a pool or in an open session, and the references to them.

On a pool each operation runs in a fresh session of its own; on a ``PooledSession``
all run in that one session, one at a time. Both only differ in how they make jobs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

from pkcs11.constants import Attribute, ObjectClass

from pkcs11_pool import config
from pkcs11_pool.cryptoki import objects
from pkcs11_pool.cryptoki.keys import SessionObject
from pkcs11_pool.errors import InvalidOption, SessionObjectNeedsSession
from pkcs11_pool.faces import arguments, changes
from pkcs11_pool.faces.arguments import DEFAULT, Template, Timeout
from pkcs11_pool.faces.keyref import KeyRef
from pkcs11_pool.faces.objectref import ObjectRef
from pkcs11_pool.faces.parameters import LocalParameters, ParametersRef

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pkcs11.constants import MechanismFlag
    from pkcs11.mechanisms import KeyType, Mechanism

    from pkcs11_pool.cryptoki.keys import Entry, ObjectOwner, Target
    from pkcs11_pool.cryptoki.session import Session
    from pkcs11_pool.engine.leases import Hold, Lease, Loan
    from pkcs11_pool.engine.multipart import MultiPart
    from pkcs11_pool.engine.token_engine import TokenEngine
    from pkcs11_pool.faces.calls import Calls
    from pkcs11_pool.faces.waiting import FaceWaiter
    from pkcs11_pool.jobs import Change, Job

T = TypeVar("T")

_KEYS = frozenset(
    {ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY, ObjectClass.SECRET_KEY}
)


class Making(ABC):
    """What makes objects, in whichever session."""

    _engine: TokenEngine

    @abstractmethod
    async def _perform(
        self,
        work: Callable[[Session], T],
        timeout: Timeout,
        *,
        rw: bool = False,
        changes: Change | bool = False,
        restart: bool = True,
        repeat: bool = False,
        home: Calls | None = None,
        target: SessionObject | None = None,
    ) -> T:
        """Run ``work`` on a worker thread, with a session."""

    def _read(
        self, work: Callable[[Session], T], timeout: Timeout, home: Calls | None = None
    ) -> Awaitable[T]:
        """Run ``work``, that changes nothing, as soon as this is called."""
        return self._perform(work, timeout, home=home)

    @abstractmethod
    def _job(
        self,
        work: Callable[[Session], Any],
        timeout: Timeout,
        *,
        waiter: FaceWaiter,
        rw: bool = False,
        changes: Change | bool = False,
        restart: bool = True,
        repeat: bool = False,
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

        Args:
            key_type: Its type.
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
            A reference to the new key.

        Raises:
            SessionObjectNeedsSession: ``store`` is false and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_GenerateKey``.

        Source:
            PKCS#11 v3.1, "Key management functions".
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
        change = changes.making("generate_key", given, label=label, id_=id)
        (ref,) = await self._make(call, timeout, change, store=store, given=[given])
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

        Args:
            key_type: Their type.
            key_length: Their length in bits; None: where the type or curve says it.
            curve: Name of an EC curve, such as ``"secp256r1"``.
            id: ``CKA_ID`` of both.
            label: ``CKA_LABEL`` of both.
            store: True: a token object, which stays. False: a session object.
            capabilities: What they may do; None: what python-pkcs11 gives their type.
            mechanism: How; None: the usual one for the type.
            mechanism_param: As python-pkcs11 takes it.
            public_template: Further attributes of the public key.
            private_template: Further attributes of the private key.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            References to the two keys.

        Raises:
            SessionObjectNeedsSession: ``store`` is false and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_GenerateKeyPair``.

        Source:
            PKCS#11 v3.1, "Key management functions".
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
        change = changes.making("generate_keypair", *given, label=label, id_=id)
        made = await self._make(call, timeout, change, store=store, given=given)
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

        Args:
            key_type: Of the keys that are made from them.
            param_length: Bits of the prime.
            store: True: a token object, which stays. False: a session object.
            mechanism: How; None: the usual one for the type.
            mechanism_param: As python-pkcs11 takes it.
            template: Further attributes; they win over those that follow from the rest.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            A reference to the parameters.

        Raises:
            SessionObjectNeedsSession: ``store`` is false and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_GenerateKey``.

        Source:
            PKCS#11 v3.1, "Key management functions".
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
            changes.making("generate_domain_parameters", given),
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

        Returns:
            A reference to the parameters.

        Raises:
            SessionObjectNeedsSession: It would be a session object and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_CreateObject``; nothing with ``local``.

        Source:
            PKCS#11 v3.1, "Object management functions".
        """
        config.check_flag("local", local)
        config.check_flag("store", store)
        kind, given = arguments.key_type(key_type), arguments.template(attrs, "attrs")
        if local and store:
            message = "local parameters are no object: give local= or store=, not both"
            raise InvalidOption(message)
        if local:
            return LocalParameters(cast("Calls", self), kind, given)
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

        Args:
            template: Its attributes, ``CKA_CLASS`` among them.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            A reference to the new object.

        Raises:
            InvalidOption: The template is empty, or has no ``CKA_CLASS``.
            SessionObjectNeedsSession: ``CKA_TOKEN`` is not true and this is a pool.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_CreateObject``.

        Source:
            PKCS#11 v3.1, "Object management functions".
        """
        given = arguments.template(template)
        if Attribute.CLASS not in given:
            message = "the template of a new object needs at least Attribute.CLASS"
            raise InvalidOption(message)
        (ref,) = await self._make(
            lambda session: session.create_object(given),
            timeout,
            changes.making("create_object", given),
            store=False,
            given=[given],
        )
        return ref

    async def _make(
        self,
        call: Callable[[Any], Any],
        timeout: Timeout,
        change: Change,
        *,
        store: bool,
        given: Sequence[Template | None],
    ) -> list[KeyRef]:
        token = arguments.makes_token_object(store=store, given=given)
        self._check_home(token=token)
        cache = self._engine.cache
        public = arguments.makes_public_object(given)

        def work(session: Session) -> list[Entry]:
            cache.check_making(public=public)
            return objects.make(session, cache, call)

        entries = await self._perform(
            work,
            timeout,
            rw=token,
            changes=change,
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
        return None if self._owner is None else cast("Calls", self)

    @abstractmethod
    def _pool(self) -> Calls:
        """The pool that this belongs to."""


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
