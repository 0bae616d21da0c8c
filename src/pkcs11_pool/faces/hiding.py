"""Takes the PINs among the arguments of a call out of sight before the call begins.

A function can hide a PIN in its first line, but a coroutine may have none: one that is
cancelled before its first step raises from a frame with its arguments as they were
given. So what is awaited is wrapped by a plain function.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from pkcs11_pool import pins

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

_PIN_NAMES: Final = frozenset({"pin", "so_pin", "user_pin", "old", "new"})
_no_pin: Final = _PIN_NAMES.isdisjoint


def hides_pins(func: Callable[P, T]) -> Callable[P, T]:
    """Hide the arguments of ``func`` that are PINs by their names.

    It gets what :func:`pkcs11_pool.pins.hide` gives, or the None that was given where
    that may be. What was hidden once is left as it is.
    """
    taken = inspect.signature(func).parameters
    needed = {name for name, one in taken.items() if one.default is one.empty}
    places = {place: name for place, name in enumerate(taken) if name in _PIN_NAMES}
    first = min(places, default=math.inf)

    def hidden(name: str, value: Any) -> Any:
        return value if value is None and name not in needed else pins.hide(value)

    @functools.wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # In their own places: no frame of ours holds a PIN as text.
        if not _no_pin(kwargs):
            for name in _PIN_NAMES & kwargs.keys():
                kwargs[name] = hidden(name, kwargs[name])
        if len(args) > first:
            args = tuple(  # type: ignore[assignment]
                hidden(places[place], value) if place in places else value
                for place, value in enumerate(args)
            )
        return func(*args, **kwargs)

    return _marked(call) if inspect.iscoroutinefunction(func) else call


def _marked(call: Callable[P, T]) -> Callable[P, T]:
    """Let those who ask take it for the coroutine function that it stands for."""
    if hasattr(inspect, "markcoroutinefunction"):  # since Python 3.12
        marked: Callable[P, T] = inspect.markcoroutinefunction(call)
        return marked
    # What asyncio.iscoroutinefunction() looks for before; mocks go by that.
    marker = getattr(asyncio.coroutines, "_is_coroutine", None)
    vars(call)["_is_coroutine"] = marker
    return call
