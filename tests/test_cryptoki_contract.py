"""What the pool leans on inside python-pkcs11 0.10, with the upstream line of each.

When one of these turns red, upstream has moved something: mend ``cryptoki``.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pkcs11
import pytest
from pkcs11 import KeyType, Mechanism, exceptions

from pkcs11_pool import cryptoki, rv

if TYPE_CHECKING:
    from pkcs11_pool import TokenPool

_DIGEST = b"d" * 32
# What python-pkcs11 raises of its own accord, with no code behind it.
_WITHOUT_CODE = {"MultipleObjectsReturned", "MultipleTokensReturned"}
_WITHOUT_CODE |= {"NoSuchKey", "NoSuchToken"}


def test_the_version_is_the_one_whose_inside_is_known() -> None:
    """``pyproject.toml`` pins the minor version; this says that it came."""
    assert version("python-pkcs11").startswith("0.10.")


async def test_the_function_list_is_the_first_field_of_the_library(
    pool: TokenPool,
) -> None:
    """``pkcs11/_pkcs11.pyx:36, cdef class HasFuncList: funclist`` comes first."""
    loaded = ctypes.CDLL(pool.lib.so)
    pointer = ctypes.c_void_p()
    assert loaded.C_GetFunctionList(ctypes.byref(pointer)) == 0
    assert pool.lib.functions.pointer == pointer.value


def test_a_pointer_to_something_else_is_refused() -> None:
    """A function list begins with its version, so a moved field is noticed."""
    nothing = ctypes.create_string_buffer(64)
    with pytest.raises(RuntimeError, match=r"elsewhere than in 0\.10"):
        cryptoki.FunctionList(ctypes.addressof(nothing))


async def test_a_session_gives_up_its_number(pool: TokenPool) -> None:
    """``_pkcs11.pyx:878, cdef class Session: handle`` is the field after its table."""

    def work(session: Any) -> None:
        other = session.token.open()
        handle = other.handle
        assert cryptoki.take_handle(other) == handle
        assert other.handle == 0
        with pytest.raises(exceptions.SessionHandleInvalid):
            other.generate_random(8)
        assert pool.lib.functions.C_CloseSession(handle) == 0

    await pool.run(work)


@pytest.mark.parametrize(
    "mechanism", [Mechanism.ECDSA, Mechanism.SHA256_RSA_PKCS_PSS, Mechanism.AES_CBC_PAD]
)
def test_a_packed_mechanism_begins_with_its_structure(mechanism: Mechanism) -> None:
    """``_pkcs11.pyx:140, cdef class MechanismWithParam: data`` comes first."""
    param = b"i" * 16 if mechanism is Mechanism.AES_CBC_PAD else None
    packed = cryptoki.pack_mechanism(None, {}, mechanism, param)
    address = cryptoki.mechanism_address(packed)
    assert ctypes.c_ulong.from_address(address).value == mechanism


async def test_a_key_works_on_a_session_that_did_not_find_it(pool: TokenPool) -> None:
    """``_pkcs11.pyx:1740, SignMixin._sign`` uses session, handle and key_type only."""
    await pool.generate_keypair(KeyType.EC, curve="secp256r1", label="k", store=True)

    def work(session: Any) -> bool:
        found = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, label="k")
        with session.token.open() as other:
            key = cryptoki.bind_key(other, found.handle, 3, KeyType.EC)
            signature = key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        public = session.get_key(object_class=pkcs11.ObjectClass.PUBLIC_KEY, label="k")
        valid: bool = public.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)
        return valid

    assert await pool.run(work)


_CLASSES = [
    cls
    for cls in exceptions.PKCS11Error.__subclasses__()
    if cls.__module__ == "pkcs11.exceptions"
]


@pytest.mark.parametrize("cls", _CLASSES, ids=lambda cls: cls.__name__)
def test_each_exception_has_its_code(cls: type[exceptions.PKCS11Error]) -> None:
    """``_pkcs11.pxd:809, map_rv_to_error``: a class for a code, and back."""
    code = rv.code_of(cls())
    if cls.__name__ in _WITHOUT_CODE:
        assert code is None
    else:
        assert code is not None
        assert type(rv.error_of(code, "C_Sign")) is cls


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Buffer was too small. Should never see this.", "CKR_BUFFER_TOO_SMALL"),
        (
            "Initialisation error (not initialized). Should never see this.",
            "CKR_CRYPTOKI_NOT_INITIALIZED",
        ),
        (
            "Initialisation error (already initialized). Should never see this.",
            "CKR_CRYPTOKI_ALREADY_INITIALIZED",
        ),
        ("User type invalid. Should never see this.", "CKR_USER_TYPE_INVALID"),
        ("Unmapped error code 0x68", "CKR_KEY_FUNCTION_NOT_PERMITTED"),
    ],
)
def test_a_code_without_a_class_is_read_from_its_text(text: str, name: str) -> None:
    """``_pkcs11.pxd:809, map_rv_to_error``: some codes have a text only."""
    assert rv.code_of(exceptions.PKCS11Error(text)) == rv.CODES[name]
