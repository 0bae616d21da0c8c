"""Outputs of every size, without asking for the size first."""

from __future__ import annotations

import ctypes as c
from typing import Any

import pytest

from pkcs11_pool.cryptoki import operations, rv

_ROOM = 64 * 1024
_FUNCTION = c.CFUNCTYPE(
    c.c_ulong, c.c_ulong, c.c_char_p, c.c_ulong, c.c_void_p, c.POINTER(c.c_ulong)
)


class _Token:
    """Answers as the standard wants it of functions that give data."""

    def __init__(self, size: int) -> None:
        self.output = bytes(i % 251 for i in range(size))
        self.rooms: list[int] = []
        self.call = _FUNCTION(self._call)

    def _call(
        self, _handle: int, _data: bytes, _size: int, buffer: int, length: Any
    ) -> int:
        self.rooms.append(length[0])
        fits = length[0] >= len(self.output)
        length[0] = len(self.output)
        if not fits:
            return rv.CODES["CKR_BUFFER_TOO_SMALL"]
        c.memmove(buffer, self.output, len(self.output))
        return 0


@pytest.mark.parametrize(
    "size", [0, 64, 4_627, 49_856, _ROOM], ids=lambda n: f"{n} bytes"
)
def test_one_call_is_enough_up_to_the_largest_signature(size: int) -> None:
    """ML-DSA-87 has 4,627 bytes and SLH-DSA 49,856: both fit at once."""
    token = _Token(size)
    output = operations._output(token.call, "C_Sign", 1, b"data", _ROOM)  # noqa: SLF001
    assert output == token.output
    assert len(token.rooms) == 1


@pytest.mark.parametrize("size", [_ROOM + 1, 5 * _ROOM], ids=lambda n: f"{n} bytes")
@pytest.mark.parametrize("expected", [_ROOM, _ROOM + 1])
def test_what_is_larger_costs_one_call_more(size: int, expected: int) -> None:
    """The token says how much it needs, and the operation is still active."""
    token = _Token(size)
    output = operations._output(token.call, "C_Sign", 1, b"data", expected)  # noqa: SLF001
    assert output == token.output
    assert len(token.rooms) <= 2
    assert token.rooms[0] == expected


def test_one_output_does_not_show_in_the_next() -> None:
    """The buffer is used again, and each result is a copy."""
    long, short = _Token(1000), _Token(10)
    first = operations._output(long.call, "C_Sign", 1, b"", _ROOM)  # noqa: SLF001
    second = operations._output(short.call, "C_Sign", 1, b"", _ROOM)  # noqa: SLF001
    assert (first, second) == (long.output, short.output)
