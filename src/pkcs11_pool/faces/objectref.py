"""References to objects on the token, whatever they are.

A reference says how to find an object; it holds no session and no number of its
own. Each operation runs in a fresh session, or in the session it is bound to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from pkcs11.constants import Attribute

from pkcs11_pool.cryptoki import objects
from pkcs11_pool.cryptoki.keys import SessionObject
from pkcs11_pool.errors import InvalidOption, InvalidType
from pkcs11_pool.faces import arguments, changes
from pkcs11_pool.faces.arguments import DEFAULT, Template, Timeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from pkcs11_pool.cryptoki.keys import Entry, Target
    from pkcs11_pool.faces.calls import Calls
    from pkcs11_pool.jobs import Change

_PRIVATE: Final = (int(Attribute.PRIVATE), b"\x01")
"""What a packed template has in it that makes an object private."""


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
        """The same object, used in one open session from now on.

        Args:
            session: A ``PooledSession`` of the same pool.

        Raises:
            InvalidType: It is no session, or of another pool.
        """
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

        Returns:
            By attribute, each as python-pkcs11 gives it.

        Cancellation:
            The caller goes at once; reading changes nothing.

        Cryptoki:
            ``C_GetAttributeValue``.

        Source:
            PKCS#11 v3.1, "Object management functions".
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

        Source:
            PKCS#11 v3.1, "Object management functions".
        """
        packed = arguments.packed(values, "values")
        if not packed:
            message = "which attributes? Give at least one to change"
            raise InvalidOption(message)
        target = self._target
        token = not isinstance(target, SessionObject)
        changed: Entry = await self._perform(
            objects.set_attributes,
            packed,
            timeout=timeout,
            rw=token,
            changes=changes.altering(target, packed),
            public=_PRIVATE not in packed,
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

        Args:
            template: The attributes that differ; None: an exact copy.
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Returns:
            A reference to the copy.

        Raises:
            SessionObjectNeedsSession: The copy would be a session object, and this is
                not bound to an open session (``key.on(session)``).

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            ``C_CopyObject``.

        Source:
            PKCS#11 v3.1, "Object management functions".
        """
        given = {} if template is None else template
        packed = arguments.packed(given)
        calls, target = self._calls, self._target
        token = arguments.makes_token_object(
            store=not isinstance(target, SessionObject), given=[given]
        )
        calls._check_home(token=token)  # noqa: SLF001  # one package
        entry = await self._perform(
            objects.copy,
            packed,
            timeout=timeout,
            rw=token,
            changes=changes.making("copy", given),
            public=_PRIVATE not in packed,
        )
        made: Self = calls._ref(entry)  # type: ignore[assignment]  # noqa: SLF001
        return made

    async def destroy(self, *, timeout: Timeout = DEFAULT) -> None:
        """Destroy the object.

        Args:
            timeout: Seconds, waiting included; None: no limit; 0: do not wait.

        Raises:
            KeyNotFound, KeyAmbiguous: By the name of the object.

        Cancellation:
            The outcome is waited for, then the cancellation raised.

        Cryptoki:
            A search or ``C_GetAttributeValue`` to be sure, ``C_DestroyObject``.

        Source:
            PKCS#11 v3.1, "Object management functions".
        """
        token = not isinstance(self._target, SessionObject)
        await self._perform(
            objects.destroy,
            timeout=timeout,
            rw=token,
            changes=changes.destroying(self._target),
        )

    def _perform(
        self,
        operation: Callable[..., Any],
        *arguments_: Any,
        timeout: Timeout,
        rw: bool = False,
        changes: Change | bool = False,
        public: bool = True,
        **options: Any,
    ) -> Awaitable[Any]:
        # `public`: whether no private object is made.
        calls, target = self._calls, self._target
        cache = calls._engine.cache  # noqa: SLF001  # one package
        used = target if isinstance(target, SessionObject) else None
        self._check_alive((target, *arguments_))

        def work(session: Any) -> Any:
            cache.check_making(public=public)
            return operation(session, cache, target, *arguments_, **options)

        # Not awaited here: each coroutine on the way is passed twice.
        return calls._perform(  # noqa: SLF001
            work, timeout, rw=rw, changes=changes, home=self._home, target=used
        )

    def _check_alive(self, items: tuple[object, ...]) -> None:
        """At the door: where a session object is gone, nothing is opened or sent."""
        for item in items:
            if isinstance(item, SessionObject):
                engine = self._calls._engine  # noqa: SLF001  # one package
                engine.check_open()
                actor = engine.actor
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
        # In a traceback with locals it may be half made: that must not raise.
        return f"<{type(self).__name__} {getattr(self, '_target', 'not made')}>"
