"""What a call changes on the token, in words: for when nobody knows whether it did.

Labels and ids are named, and nothing else of a template: it may hold a key's value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pkcs11.constants import Attribute

from pkcs11_pool.cryptoki.keys import SessionObject
from pkcs11_pool.jobs import Change

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pkcs11_pool.cryptoki.keys import Target

_NAMES: Final = (Attribute.LABEL, Attribute.ID)
_LONGEST: Final = 64
"""Of a label or an id so much is shown; a longer one is named without it."""

SET_PIN: Final = Change(
    "set_pin",
    "One of the two is the PIN now, the old one or the new one, and the pool sends "
    "neither by itself. Try the new one with await pool.login(pin), after await "
    "pool.logout() if the user is still logged in; if that is PinRefused, the old one. "
    "A wrong one costs a try",
)
INIT_PIN: Final = Change(
    "init_pin",
    "The user's PIN is this one or the one before, and the pool sends neither by "
    "itself. Set it again with await so.init_pin(pin), in a new period if this one is "
    "over: that may be done twice. Or try it with await pool.login(pin), which costs a "
    "try if it is wrong",
)
SET_SO_PIN: Final = Change(
    "set_pin of the security officer",
    "One of the two is his PIN now, the old one or the new one; the pool keeps "
    "neither. Begin the next period with the new one, and if that is PinRefused, with "
    "the old one. A wrong one costs a try, and when it is locked only init_token helps",
)


def making(
    call: str,
    *given: Mapping[Attribute, Any] | None,
    label: str | None = None,
    id_: bytes | None = None,
) -> Change:
    """A call that makes objects; templates have the last word on their names."""
    names: dict[Attribute, Any] = {Attribute.LABEL: label, Attribute.ID: id_}
    for template in given:
        names |= {k: v for k, v in (template or {}).items() if k in _NAMES}
    shown = _shown(names)
    if not shown:
        look = (
            "It has neither label nor id to look for: compare await pool.find() with "
            "what was there before, and name what you make"
        )
        return Change(f"{call}()", look)
    look = f"Before it is made again, look whether it is there: {_find(shown)}"
    return Change(f"{call}({_told(shown)})", look)


def destroying(target: Target) -> Change:
    """``destroy`` of an object."""
    return _of("destroy", target, "Look whether it is still there")


def altering(target: Target, values: Iterable[tuple[int, bytes]]) -> Change:
    """``set_attributes`` of an object."""
    renames = any(kind in _NAMES for kind, _ in values)
    by = ", by its old name and its new one" if renames else ""
    return _of("set_attributes", target, f"Look at what it is now{by}")


def running(func: Any) -> Change:
    """A caller's own function, in a R/W session."""
    name = getattr(func, "__name__", None)
    shown = name if isinstance(name, str) else type(func).__name__
    return Change(
        f"run({shown[:_LONGEST]})", "Look at the token for what the function makes"
    )


def _of(call: str, target: Target, look: str) -> Change:
    if isinstance(target, SessionObject):
        named, seen = "a session object", target.entry.seen
    else:
        named, seen = "", dict(target.attributes)
    names: dict[Attribute, Any] = {
        kind: seen[kind] for kind in _NAMES if seen.get(kind)
    }
    if Attribute.LABEL in names:
        names[Attribute.LABEL] = names[Attribute.LABEL].decode(errors="replace")
    shown = _shown(names)
    call = f"{call} of {_told(shown) or named or target}"
    return Change(call, f"{look}: {_find(shown)}" if shown else look)


def _shown(names: Mapping[Attribute, Any]) -> dict[str, str]:
    return {
        kind.name: repr(value)
        for kind, value in names.items()
        if value and type(value) in (str, bytes) and len(value) <= _LONGEST
    }


def _told(shown: Mapping[str, str]) -> str:
    return ", ".join(f"{name.lower()}={value}" for name, value in shown.items())


def _find(shown: Mapping[str, str]) -> str:
    inside = ", ".join(f"Attribute.{name}: {value}" for name, value in shown.items())
    return f"await pool.find({{{inside}}})"
