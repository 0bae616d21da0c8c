"""Domain parameters: what keys of one group are generated from (DH, DSA, EC)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pkcs11_pool.cryptoki import objects
from pkcs11_pool.faces import arguments, changes
from pkcs11_pool.faces.arguments import DEFAULT, Template, Timeout
from pkcs11_pool.faces.objectref import ObjectRef

if TYPE_CHECKING:
    from pkcs11.constants import Attribute, MechanismFlag
    from pkcs11.mechanisms import KeyType, Mechanism

    from pkcs11_pool.faces.calls import Calls
    from pkcs11_pool.faces.keyref import KeyRef


class ParametersRef(ObjectRef):
    """A reference to domain parameters on the token, or in an open session."""

    async def generate_keypair(
        self,
        *,
        id: bytes | None = None,  # noqa: A002  # as python-pkcs11 names it
        label: str | None = None,
        store: bool = False,
        capabilities: MechanismFlag | None = None,
        mechanism: Mechanism | None = None,
        mechanism_param: Any = None,
        public_template: Template | None = None,
        private_template: Template | None = None,
        timeout: Timeout = DEFAULT,
    ) -> tuple[KeyRef, KeyRef]:
        """Make a key pair from these parameters: (public, private).

        Args:
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
            SessionObjectNeedsSession: ``store`` is false and this is not bound to an
                open session (``parameters.on(session)``).

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_GetAttributeValue``, ``C_GenerateKeyPair``.

        Source:
            PKCS#11 v3.1, "Key management functions".
        """
        pair = _Pair(
            arguments.making(id, label, store, capabilities),
            mechanism,
            mechanism_param,
            public_template,
            private_template,
        )
        calls = self._calls
        calls._check_home(token=pair.token)  # noqa: SLF001  # one package
        entries = await self._perform(
            objects.make_from_parameters,
            timeout=timeout,
            rw=pair.token,
            changes=pair.change,
            public=arguments.makes_public_object(pair.given),
            make=pair.make,
        )
        public, private = (calls._ref(entry) for entry in entries)  # noqa: SLF001
        return public, private


class LocalParameters:
    """Domain parameters that are no object: they only lend their values to a key."""

    def __init__(
        self, calls: Calls, key_type: KeyType, values: dict[Attribute, Any]
    ) -> None:
        self._calls = calls
        self.key_type = key_type
        self.values = values

    def on(self, session: Calls) -> LocalParameters:
        """The same, with keys made in one open session from now on.

        Args:
            session: A ``PooledSession`` of the same pool.
        """
        return LocalParameters(session, self.key_type, self.values)

    async def generate_keypair(
        self,
        *,
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
        """See :meth:`ParametersRef.generate_keypair`.

        Args:
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
            SessionObjectNeedsSession: ``store`` is false and this is not bound to an
                open session.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_GenerateKeyPair``.

        Source:
            PKCS#11 v3.1, "Key management functions".
        """
        pair = _Pair(
            arguments.making(id, label, store, capabilities),
            mechanism,
            mechanism_param,
            public_template,
            private_template,
        )
        made = await self._calls._make(  # one package
            partial(pair.make, key_type=self.key_type, values=self.values),
            timeout,
            pair.change,
            store=store,
            given=pair.given,
        )
        return made[0], made[1]


class _Pair:
    """What a key pair shall be, apart from its parameters."""

    def __init__(
        self,
        options: dict[str, Any],
        mechanism: object,
        mechanism_param: Any,
        public: Template | None,
        private: Template | None,
    ) -> None:
        self.given = [
            arguments.template({} if public is None else public, "public_template"),
            arguments.template({} if private is None else private, "private_template"),
        ]
        self.token = arguments.makes_token_object(
            store=options["store"], given=self.given
        )
        self.change = changes.making(
            "generate_keypair", *self.given, label=options["label"], id_=options["id"]
        )
        self._options = {
            **options,
            "mechanism": arguments.mechanism(mechanism),
            "mechanism_param": mechanism_param,
            "private_template": self.given[1],
        }

    def make(
        self, session: Any, *, key_type: KeyType, values: dict[Attribute, Any]
    ) -> Any:
        """``C_GenerateKeyPair``, on a worker.

        Not by python-pkcs11's ``generate_keypair``: that makes parameters of its own.
        """
        return session._generate_keypair(  # noqa: SLF001
            key_type, public_template={**values, **self.given[0]}, **self._options
        )
