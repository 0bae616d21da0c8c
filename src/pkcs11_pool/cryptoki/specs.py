"""How an object is named, and what it was when it was last seen on the token.

A spec is what a reference keeps, for ever; an entry is a number with what was read of
it, and holds as long as the cache trusts it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import KeyType

from pkcs11_pool.cryptoki import interface
from pkcs11_pool.errors import KeyFunctionNotPermitted

if TYPE_CHECKING:
    from pkcs11_pool.state import Epoch, Generation

_TRUE: Final = b"\x01"
_NOT_FOR: Final = {
    **dict.fromkeys(
        (Attribute.SIGN, Attribute.DECRYPT, Attribute.UNWRAP, Attribute.DECAPSULATE),
        ObjectClass.PUBLIC_KEY,
    ),
    **dict.fromkeys(
        (Attribute.VERIFY, Attribute.ENCRYPT, Attribute.WRAP, Attribute.ENCAPSULATE),
        ObjectClass.PRIVATE_KEY,
    ),
}
"""The half of a key pair that has no such attribute by the standard."""

IDENTITY: Final = (
    Attribute.CLASS,
    Attribute.KEY_TYPE,
    Attribute.ID,
    Attribute.LABEL,
    Attribute.UNIQUE_ID,
    Attribute.MODULUS,
    Attribute.EC_POINT,
    Attribute.CERTIFICATE_TYPE,
    Attribute.APPLICATION,
    Attribute.SERIAL_NUMBER,
)
"""What tells one object from another: what identifies it by the standard, and
the public value where the object has one."""

_CAPABILITIES: Final = (
    Attribute.SIGN,
    Attribute.VERIFY,
    Attribute.ENCRYPT,
    Attribute.DECRYPT,
    Attribute.WRAP,
    Attribute.UNWRAP,
    Attribute.DERIVE,
)
DESCRIBED: Final = (
    *IDENTITY,
    *_CAPABILITIES,
    Attribute.TOKEN,
    Attribute.PRIVATE,
    Attribute.ALWAYS_AUTHENTICATE,
)
_SHOWN: Final = (Attribute.LABEL, Attribute.ID, Attribute.KEY_TYPE)


class Origin:
    """Tells one object from its namesakes, for a reference that was made from it.

    Attributes:
        destroyed: It was destroyed through this process.
        entry: The object as it was last seen. Kept here and not in the cache: a search
            that finds thousands must not push out what is in use.
    """

    __slots__ = ("destroyed", "entry")

    def __init__(self) -> None:
        self.destroyed = False
        self.entry: Entry | None = None


@dataclass(frozen=True, slots=True)
class KeySpec:
    """How to find a token object: packed attributes, and the classes it may have.

    With an origin it stands for one object, the one that it was made from: within a
    login that is known by its number, and a namesake never takes its place.
    """

    attributes: tuple[tuple[int, bytes], ...]
    classes: tuple[int, ...] | None = None
    origin: Origin | None = None
    # The same with the classes of an operation: made once, used by each operation.
    _narrowed: dict[tuple[int, ...] | None, KeySpec] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _hash: list[int] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __hash__(self) -> int:
        """By what it says; computed once."""
        known = self._hash
        if not known:
            known.append(hash((self.attributes, self.classes, self.origin)))
        return known[0]

    @classmethod
    def of(
        cls,
        label: str | None,
        id_: bytes | None,
        object_class: ObjectClass | None,
        key_type: KeyType | None,
    ) -> KeySpec:
        """The spec of a key as a user names it."""
        given = {
            Attribute.LABEL: label,
            Attribute.ID: id_,
            Attribute.KEY_TYPE: key_type,
        }
        packed = tuple(
            (int(kind), interface.MAPPER.pack_attribute(kind, value))
            for kind, value in given.items()
            if value is not None
        )
        return cls(packed, None if object_class is None else (int(object_class),))

    def __str__(self) -> str:
        """As the user would write it."""
        parts = []
        for kind, value in self.attributes:
            if kind not in _SHOWN:
                continue
            name = Attribute(kind).name.lower()
            shown = value.hex() if name != "label" else repr(value.decode())
            if name == "key_type":
                shown = _enum_name(KeyType, value)
            parts.append(f"{name}={shown}")
        if self.classes:
            parts.append("/".join(ObjectClass(c).name.lower() for c in self.classes))
        return " ".join(parts) or "any object"


@dataclass(slots=True)
class Entry:
    """An object as it was last seen on the token."""

    handle: int
    seen: dict[int, bytes]
    epoch: Epoch
    generation: Generation
    mark: int
    checked_at: float
    object_class: int = field(init=False)
    key_type: Any = field(init=False)
    private: bool = field(init=False)
    #: Whether each use wants a login of its own (``CKA_ALWAYS_AUTHENTICATE``).
    always_authenticate: bool = field(init=False)
    #: Mechanisms packed for uses that the key allows; see ``operations.way``.
    ways: dict[tuple[Any, Any], tuple[object, int]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Unpack what every operation asks."""
        unpack = interface.MAPPER.unpack_attributes
        self.object_class = interface.unpack_ulong(self.seen[Attribute.CLASS])
        packed = self.seen.get(Attribute.KEY_TYPE)
        try:
            self.key_type = (
                None if packed is None else unpack(Attribute.KEY_TYPE, packed)
            )
        except ValueError:
            self.key_type = interface.unpack_ulong(packed or b"")
        self.private = self.seen.get(Attribute.PRIVATE) == _TRUE
        always = self.seen.get(Attribute.ALWAYS_AUTHENTICATE)
        self.always_authenticate = always == _TRUE

    @property
    def identity(self) -> dict[int, bytes]:
        """The attributes that tell this object from others."""
        return {k: v for k, v in self.seen.items() if k in IDENTITY}

    def require(self, capability: Attribute | None, what: object) -> None:
        """Refuse an operation that the key's attributes rule out.

        Raises:
            KeyFunctionNotPermitted: The attribute is there and false, or the key is
                the other half of its pair.
        """
        if capability is None:
            return
        wrong = _NOT_FOR.get(capability)
        if wrong is not None and self.object_class == wrong:
            half = wrong.name.lower().replace("_", " ")
            raise KeyFunctionNotPermitted(
                f"key {what} is a {half}, which has no CKA_{capability.name}: use the "
                "other half of its pair"
            )
        if self.seen.get(capability, _TRUE) == _TRUE:
            return
        message = (
            f"key {what} has CKA_{capability.name} false: use another key, or make "
            "one with that capability"
        )
        raise KeyFunctionNotPermitted(message)

    def fits(self, spec: KeySpec) -> bool:
        """Whether this is an object that the spec describes, as far as it tells."""
        return (spec.classes is None or self.object_class in spec.classes) and all(
            self.seen.get(kind, value) == value for kind, value in spec.attributes
        )

    def spec(self, origin: Origin | None = None) -> KeySpec:
        """How to find this very object again."""
        kept = (
            (kind, value)
            for kind, value in self.seen.items()
            if kind in IDENTITY and kind != Attribute.CLASS and value
        )
        return KeySpec(tuple(sorted(kept)), (self.object_class,), origin or Origin())


def narrowed(spec: KeySpec, classes: tuple[int, ...] | None) -> KeySpec:
    """The spec with the classes that an operation can use, unless it names its own."""
    if spec.classes is not None:
        return spec
    made = spec._narrowed.get(classes)  # noqa: SLF001  # its own module
    if made is None:
        made = KeySpec(spec.attributes, classes, spec.origin)
        spec._narrowed[classes] = made  # noqa: SLF001
    return made


def _enum_name(enum: Any, packed: bytes) -> str:
    value = interface.unpack_ulong(packed)
    try:
        return str(enum(value).name)
    except ValueError:
        return hex(value)
