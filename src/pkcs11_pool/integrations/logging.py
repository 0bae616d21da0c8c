"""A structlog processor that keeps PINs and template values out of a program's logs.

The pool itself logs none. But programs log their arguments, and tracebacks with the
values of variables, and those may hold a PIN.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute

from pkcs11_pool import pins

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

HIDDEN: Final = "***"
"""What stands in the place of what is hidden."""
_SECRET_WORDS: Final = frozenset(
    {
        *("pin", "pins", "pincode", "sopin", "userpin", "oldpin", "newpin", "puk"),
        *("password", "passwords", "passwd", "pwd", "passphrase", "secret", "secrets"),
    }
)
_TEMPLATE_WORDS: Final = frozenset({"template", "templates", "attrs"})
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_PIN_VALUE: Final = re.compile(r"(?i)(pin-value=)[^&\s\"'<>]*")
_PIN_VALUE_BYTES: Final = re.compile(rb"(?i)(pin-value=)[^&\s\"'<>]*")
_DEEPEST: Final = 12


class Redactor:
    """A structlog processor; put it last but for the renderer.

    So it sees what the processors before it have added, tracebacks too. Hidden are:
    the values of keys with a word like *pin* or *password* in them (``so_pin``,
    ``userPin``; not ``pinned``); the values of templates (mappings with
    ``pkcs11.Attribute`` or ``CKA_…`` keys, and whatever stands under *template*);
    secret objects (the pool's own PINs, pydantic's ``SecretStr``); and the
    ``pin-value`` of a PKCS#11 URI in any text. Nested mappings, lists, tuples and sets
    are copied; the program's own objects stay as they are.

    What it cannot know: a PIN in a text of another form, or inside of other objects.

    Args:
        words: More words that make the value of a key secret.
    """

    def __init__(self, words: Iterable[str] = ()) -> None:
        self._words = _SECRET_WORDS | {word.lower() for word in words}

    def __call__(
        self, logger: object, name: str, event_dict: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Hide what must not be logged, for structlog."""
        del logger, name
        for key, value in list(event_dict.items()):
            # Not yet rendered by another processor, which wants it as it is.
            if key != "exc_info":
                event_dict[key] = self._under(key, value, 0)
        return event_dict

    def _under(self, key: object, value: Any, depth: int) -> Any:
        """A value of a mapping, by its key."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(key, Attribute):
            return HIDDEN
        if isinstance(key, bytes):
            key = key.decode("latin-1")
        if isinstance(key, str):
            words = {word.lower() for word in _WORD.findall(key)}
            if key.startswith("CKA_") or words & self._words:
                return HIDDEN
            if words & _TEMPLATE_WORDS:
                return _shape(value)
        return self._clean(value, depth + 1)

    def _clean(self, value: Any, depth: int) -> Any:
        """A copy without what must not be logged. Never raises."""
        if isinstance(value, str):
            return _PIN_VALUE.sub(rf"\1{HIDDEN}", value)
        if isinstance(value, bytes):
            return _PIN_VALUE_BYTES.sub(rb"\1" + HIDDEN.encode(), value)
        if isinstance(value, pins.Secret) or hasattr(type(value), "get_secret_value"):
            return HIDDEN
        if isinstance(value, Mapping | list | tuple | AbstractSet):
            return HIDDEN if depth > _DEEPEST else self._nested(value, depth)
        return value

    def _nested(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return {
                self._clean(key, depth) if isinstance(key, str | bytes) else key: (
                    self._under(key, one, depth)
                )
                for key, one in value.items()
            }
        cleaned = [self._clean(one, depth + 1) for one in value]
        # A set, too, becomes a list: what is in it may not be hashable any more.
        return tuple(cleaned) if isinstance(value, tuple) else cleaned


def _shape(template: Any) -> Any:
    """Which attributes a template has, without their values."""
    if isinstance(template, Mapping):
        return dict.fromkeys(template, HIDDEN)
    return HIDDEN
