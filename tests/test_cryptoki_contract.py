"""What the pool leans on inside python-pkcs11 0.10, with the upstream line of each.

When one of these turns red, upstream has moved something: mend ``cryptoki``. The
lines are those of 0.10.1, in the sources that its wheels bring along.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pkcs11
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass, defaults, exceptions

from faultmodule import CKR
from pkcs11_pool.cryptoki import interface, lent, rv
from poolkit import LAST_RESORT, hangs

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

_DIGEST = b"d" * 32
_BLOCK = b"b" * 16
_DATA = b"data" * 25
_AES = bytes(range(16))
# What python-pkcs11 raises of its own accord, with no code behind it.
_WITHOUT_CODE = {"MultipleObjectsReturned", "MultipleTokensReturned"}
_WITHOUT_CODE |= {"NoSuchKey", "NoSuchToken"}

_LINES = {
    "_pkcs11.pyx:37": "cdef CK_FUNCTION_LIST *funclist",
    "_pkcs11.pyx:145": "cdef CK_MECHANISM *data",
    "_pkcs11.pyx:161": "self._python_param = param",
    "_pkcs11.pyx:164": "mechanism = mapping[key_type]",
    "_pkcs11.pyx:525": "c_user_type = CKU_USER_NOBODY",
    "_pkcs11.pyx:550": "mapper=attribute_mapper or AttributeMapper(),",
    "_pkcs11.pyx:578": "self.session.operation_lock.acquire()",
    "_pkcs11.pyx:602": "def _finalize(self, silent=False):",
    "_pkcs11.pyx:881": "cdef readonly CK_SESSION_HANDLE handle",
    "_pkcs11.pyx:909": "session.operation_lock = RLock()",
    "_pkcs11.pyx:936": "if self._user_type != CKU_USER_NOBODY:",
    "_pkcs11.pyx:1225": "obj.funclist = session.funclist",
    "_pkcs11.pyx:1359": "return self.wrapper.session",
    "_pkcs11.pyx:1363": "return self.wrapper.handle",
    "_pkcs11.pyx:1850": "cdef CK_OBJECT_HANDLE key_to_wrap = key.handle",
    "_pkcs11.pyx:2049": "_CLASS_MAP = {",
    "_pkcs11.pyx:2107": (
        'raise PKCS11Error(f"OS exception while loading {so}: {err}")'
    ),
    "_pkcs11.pyx:2115": "def __cinit__(self, so):",
    "_pkcs11.pyx:2122": "cpdef initialize(self):",
    "_pkcs11.pyx:2132": "if self.funclist != NULL and self.initialized:",
    "_pkcs11.pyx:2150": "self.initialize()",
    "_pkcs11.pxd:809": (
        "cdef inline object map_rv_to_error(CK_RV rv):  # pragma: nocover"
    ),
    "attributes.py:200": (
        "def pack_attribute(self, key: Attribute, value: Any) -> bytes:"
    ),
    "attributes.py:205": (
        "def unpack_attributes(self, key: Attribute, value: bytes) -> Any:"
    ),
    "types.py:739": "def key_type(self) -> KeyType:",
}


def test_the_version_is_the_one_whose_inside_is_known() -> None:
    """``pyproject.toml`` pins the minor version; this says that it came."""
    assert version("python-pkcs11").startswith("0.10.")


@pytest.mark.parametrize("place", _LINES)
def test_the_line_is_still_there(place: str) -> None:
    """In 0.10.1 at its number, in a later 0.10 wherever."""
    file, number = place.split(":")
    source = Path(pkcs11.__file__).with_name(file).read_text(encoding="utf-8")
    lines = [line.strip() for line in source.splitlines()]
    if version("python-pkcs11") == "0.10.1":
        assert lines[int(number) - 1] == _LINES[place]
    else:
        assert _LINES[place] in lines


# -- The library ------------------------------------------------------------------


def _forever(library: interface.Library) -> interface.Library:
    # As the pool does: its __dealloc__ would unload the module.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(library))
    return library


def test_a_library_is_initialised_by_our_own_call(fault: FaultModule) -> None:
    """``_pkcs11.pyx:2150, lib.__init__`` calls ``initialize``, which is ``cpdef``.

    ``__cinit__`` (2115) loads the file, and does not initialise it.
    """
    path, fault.hide_reserved = str(fault.path), True
    library = _forever(interface.Library.__new__(interface.Library, path))
    assert fault.count("C_Initialize") == 0
    assert library.functions.pointer
    library.__init__(path, b"words")  # type: ignore[misc]
    assert fault.count("C_Initialize") == 1
    assert fault.init_flags == interface.CKF_OS_LOCKING_OK
    assert fault.init_reserved == "words"
    assert library.so == path
    library.finalize()
    assert fault.count("C_Finalize") == 1


def test_upstream_does_not_finalise_what_it_did_not_initialise(
    fault: FaultModule,
) -> None:
    """``_pkcs11.pyx:2132, lib._finalize`` looks at ``initialized``, that stays False.

    ``__dealloc__`` and ``unload`` go that way, too.
    """
    fault.hide_reserved = True
    library = _forever(interface.Library(str(fault.path), b"words"))
    assert library.initialized is False
    pkcs11._pkcs11.lib.finalize(library)  # noqa: SLF001
    assert fault.count("C_Finalize") == 0
    library.finalize()
    assert fault.count("C_Finalize") == 1


def test_a_refused_initialisation_can_be_tried_again(fault: FaultModule) -> None:
    """``_pkcs11.pyx:2115``: what ``__cinit__`` loaded stays loaded."""
    library = _forever(interface.Library.__new__(interface.Library, str(fault.path)))
    fault.on("C_Initialize", answer=CKR.GENERAL_ERROR)
    with pytest.raises(exceptions.GeneralError):
        library.__init__(str(fault.path))  # type: ignore[misc]
    library.initialize()
    assert library.get_slots()
    library.finalize()


def test_a_file_that_cannot_be_loaded_is_told_with_the_reason() -> None:
    """``_pkcs11.pyx:2107``: behind the path and a colon comes the loader's word."""
    with pytest.raises(exceptions.PKCS11Error) as caught:
        interface.Library.__new__(interface.Library, "/nowhere/to/be/found.so")
    words = str(caught.value).split(": ")
    assert words[0] == "OS exception while loading /nowhere/to/be/found.so"
    assert len(words) > 1


def test_the_functions_have_the_places_of_the_standard(fault: FaultModule) -> None:
    """``pkcs11f.h``; the fault module has its list from there by itself."""
    assert len(fault.functions) == interface.COUNT
    for name, (index, _) in interface.FUNCTIONS.items():
        assert fault.functions[index] == name


def test_token_info_has_the_fields_of_the_standard(fault: FaultModule) -> None:
    """``CK_TOKEN_INFO``, whose counts python-pkcs11 leaves out."""
    library = _forever(interface.Library(str(fault.path)))
    slot = library.get_slots(token_present=True)[0]
    token = slot.get_token()
    fault.token_info(
        max_sessions=11,
        session_count=12,
        max_rw=13,
        rw_count=14,
        max_pin=15,
        min_pin=16,
    )
    raw = interface.RawTokenInfo()
    assert library.functions.C_GetTokenInfo(slot.slot_id, ctypes.byref(raw)) == 0
    library.finalize()
    assert raw.label.decode().rstrip() == token.label
    assert raw.serial.rstrip() == token.serial
    assert raw.model.decode().rstrip() == token.model
    assert raw.manufacturer.decode().rstrip() == token.manufacturer_id
    assert raw.flags == token.flags
    found = (raw.max_sessions, raw.sessions, raw.max_rw_sessions, raw.rw_sessions)
    assert found == (11, 12, 13, 14)
    assert (raw.max_pin_len, raw.min_pin_len) == (15, 16)
    versions = [
        (v.major, v.minor) for v in (raw.hardware_version, raw.firmware_version)
    ]
    assert versions == [token.hardware_version, token.firmware_version]


async def test_the_function_list_is_the_first_field_of_the_library(
    pool: TokenPool,
) -> None:
    """``_pkcs11.pyx:37, cdef class HasFuncList: funclist`` comes first."""
    loaded = ctypes.CDLL(pool.lib.so)
    pointer = ctypes.c_void_p()
    assert loaded.C_GetFunctionList(ctypes.byref(pointer)) == 0
    assert pool.lib.functions.pointer == pointer.value


def test_a_pointer_to_something_else_is_refused() -> None:
    """A function list begins with its version, so a moved field is noticed."""
    nothing = ctypes.create_string_buffer(64)
    with pytest.raises(RuntimeError, match=r"elsewhere than in 0\.10"):
        interface.FunctionList(ctypes.addressof(nothing))


# -- Sessions ---------------------------------------------------------------------


async def test_a_session_gives_up_its_number(pool: TokenPool) -> None:
    """``_pkcs11.pyx:881, cdef class Session: handle`` is the field after its table."""

    def work(session: Any) -> None:
        other = session.token.open()
        handle = other.handle
        assert interface.take_handle(other) == handle
        assert other.handle == 0
        with pytest.raises(exceptions.SessionHandleInvalid):
            other.generate_random(8)
        assert pool.lib.functions.C_CloseSession(handle) == 0

    await pool.run(work)


async def test_a_session_calls_through_its_own_list(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``_pkcs11.pyx:37``: the first field again, and ``Session.close`` goes by it.

    What is made from the session has the same list (1225).
    """
    told: list[int] = []

    def work(session: Any) -> list[int]:
        other = session.token.open()
        library = pool.lib
        watched = lent.LentList(library.functions, told.append)
        kept.append(watched)
        watched.watch(other)
        key = other.generate_key(KeyType.AES, 128)
        assert key[Attribute.KEY_TYPE] is KeyType.AES
        assert key.encrypt(_BLOCK, mechanism=Mechanism.AES_ECB)
        assert told == []
        other.close()
        return [other.handle]

    kept: list[object] = []
    async with make_pool(module=fault.path) as pool:
        assert await pool.run(work) == told
        assert len(told) == 1
        assert [c.rv for c in fault.calls("C_CloseSession") if c.session in told] == [0]


async def test_a_session_without_a_pin_logs_nobody_out(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``_pkcs11.pyx:936, Session.close`` sends ``C_Logout`` after a login only.

    ``Token.open`` (525) notes that there was none.
    """
    async with make_pool(module=fault.path) as pool:
        await pool.run(lambda session: session.token.open().close())
        assert fault.count("C_Logout") == 0


def test_all_sessions_may_share_what_packs_attributes() -> None:
    """``attributes.py:200, 205``, given at ``Token.open`` (``_pkcs11.pyx:550``)."""
    values: dict[Attribute, Any] = {
        Attribute.LABEL: "a label",
        Attribute.ID: b"\1\2",
        Attribute.TOKEN: True,
        Attribute.KEY_TYPE: KeyType.EC,
        Attribute.CLASS: ObjectClass.PRIVATE_KEY,
        Attribute.VALUE_LEN: 32,
    }
    for kind, value in values.items():
        packed = interface.MAPPER.pack_attribute(kind, value)
        assert interface.MAPPER.unpack_attributes(kind, packed) == value
    number = interface.MAPPER.pack_attribute(Attribute.VALUE_LEN, 32)
    assert number == interface.pack_ulong(32)
    assert interface.unpack_ulong(number) == 32


async def test_a_session_knows_what_packs_its_attributes(pool: TokenPool) -> None:
    """``_pkcs11.pyx:550``: the one that was given, and none of its own."""

    def work(session: Any) -> bool:
        return any(o is interface.MAPPER for o in gc.get_referents(session))

    assert await pool.run(work)


_LOCK = type(threading.RLock())


def _is_locked(session: Any) -> bool:
    (lock,) = (o for o in gc.get_referents(session) if isinstance(o, _LOCK))
    owned: bool = lock._is_owned()  # type: ignore[attr-defined]  # noqa: SLF001
    return owned


async def test_an_operation_locks_its_session_until_it_is_finalised(
    pool: TokenPool,
) -> None:
    """``_pkcs11.pyx:909, 578, 602``: one RLock, and ``_finalize`` lets it go.

    Both are found by the garbage collector: the lock from the session, and the
    operation to the session.
    """

    def work(session: Any) -> None:
        for _ in range(2):
            session.generate_key(KeyType.AES, 128)
        key, _ = session.get_objects()
        ecb = Mechanism.AES_ECB
        for operation in (
            session.get_objects({}, batch_size=1),
            key.encrypt(iter([_BLOCK] * 2), mechanism=ecb),
        ):
            assert not _is_locked(session)
            assert next(operation)
            assert _is_locked(session)
            interface.end_operations(session)
            assert not _is_locked(session)
            with pytest.raises((exceptions.PKCS11Error, RuntimeError)):
                list(operation)
        # The module has nothing under way either.
        assert session.digest(_BLOCK, mechanism=Mechanism.SHA256)
        assert len(list(session.get_objects())) == 2

    await pool.run(work)


def _by_upstream(session: Any) -> None:
    session.generate_random(64)


def _by_our_list(session: Any, functions: interface.FunctionList) -> None:
    buffer = ctypes.create_string_buffer(8)
    assert functions.C_GenerateRandom(session.handle, buffer, 8) == 0


async def test_a_call_inside_lets_other_threads_run(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``with nogil`` around each call of upstream's (1151), as around all of ours."""
    async with make_pool(module=fault.path) as pool:
        ours = partial(_by_our_list, functions=pool.lib.functions)
        for work in (_by_upstream, ours):
            fault.on("C_GenerateRandom", hang="before")
            thread = threading.Thread(target=pool.run_sync, args=(work,))
            thread.start()
            await hangs(fault, "C_GenerateRandom")
            fault.clear()
            thread.join(LAST_RESORT)
            assert not thread.is_alive()


# -- Mechanisms -------------------------------------------------------------------


@pytest.mark.parametrize(
    "mechanism", [Mechanism.ECDSA, Mechanism.SHA256_RSA_PKCS_PSS, Mechanism.AES_CBC_PAD]
)
def test_a_packed_mechanism_begins_with_its_structure(mechanism: Mechanism) -> None:
    """``_pkcs11.pyx:145, cdef class MechanismWithParam: data`` comes first."""
    param = b"i" * 16 if mechanism is Mechanism.AES_CBC_PAD else None
    packed = interface.pack_mechanism(None, {}, mechanism, param)
    address = interface.mechanism_address(packed)
    assert ctypes.c_ulong.from_address(address).value == mechanism


def test_a_packed_mechanism_is_the_default_where_none_is_named() -> None:
    """``_pkcs11.pyx:164``: by the type of the key, from the table that is given."""
    table = defaults.DEFAULT_SIGN_MECHANISMS
    packed = interface.pack_mechanism(KeyType.EC, table, None, None)
    address = interface.mechanism_address(packed)
    assert ctypes.c_ulong.from_address(address).value == table[KeyType.EC]
    with pytest.raises(exceptions.ArgumentsBad):
        interface.pack_mechanism(KeyType.EC, {}, None, None)


def _raw(pool: TokenPool, session: Any, name: str, key: int, packed: object) -> bytes:
    """``C_…Init`` and the call itself, through the function list."""
    functions = pool.lib.functions
    address = interface.mechanism_address(packed)
    code = getattr(functions, f"{name}Init")(session.handle, address, key)
    rv.check(code, f"{name}Init")
    buffer, length = ctypes.create_string_buffer(1024), ctypes.c_ulong(1024)
    code = getattr(functions, name)(
        session.handle, _DATA, len(_DATA), buffer, ctypes.byref(length)
    )
    rv.check(code, name)
    return buffer.raw[: length.value]


async def test_a_pss_signature_with_a_packed_mechanism_verifies(
    pool: TokenPool,
) -> None:
    """``_pkcs11.pyx:145``: parameters are packed there, and may be used again."""
    mechanism = Mechanism.SHA256_RSA_PKCS_PSS
    param = (Mechanism.SHA256, pkcs11.MGF.SHA256, 20)

    def work(session: Any) -> tuple[bytes, bytes, list[bytes]]:
        public, private = session.generate_keypair(KeyType.RSA, 2048)
        packed = interface.pack_mechanism(KeyType.RSA, {}, mechanism, param)
        signatures = [
            _raw(pool, session, "C_Sign", private.handle, packed) for _ in range(2)
        ]
        numbers = public[Attribute.MODULUS], public[Attribute.PUBLIC_EXPONENT]
        return *numbers, signatures

    modulus, exponent, signatures = await pool.run(work)
    n, e = (int.from_bytes(number, "big") for number in (modulus, exponent))
    public = rsa.RSAPublicNumbers(e, n).public_key()
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=20)
    for signature in signatures:
        public.verify(signature, _DATA, scheme, hashes.SHA256())
    assert signatures[0] != signatures[1]


async def test_a_ciphertext_with_a_packed_mechanism_opens(pool: TokenPool) -> None:
    """``_pkcs11.pyx:161``: what a parameter points to lives as long as it does."""
    aes, gcm = Mechanism.AES_CBC_PAD, Mechanism.AES_GCM

    def work(session: Any) -> None:
        key = session.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.AES,
                Attribute.VALUE: _AES,
                Attribute.ENCRYPT: True,
            }
        ).handle
        iv = os.urandom(16)
        copy = bytes(bytearray(iv))
        packed = interface.pack_mechanism(KeyType.AES, {}, aes, bytes(bytearray(iv)))
        others = [os.urandom(16) for _ in range(1000)]
        sealed = _raw(pool, session, "C_Encrypt", key, packed)
        decryptor = Cipher(algorithms.AES(_AES), modes.CBC(copy)).decryptor()
        assert decryptor.update(sealed).startswith(_DATA[:96])
        assert len(others) == 1000

        nonce = os.urandom(12)
        param = pkcs11.GCMParams(nonce, b"aad", 128)
        packed = interface.pack_mechanism(KeyType.AES, {}, gcm, param)
        sealed = _raw(pool, session, "C_Encrypt", key, packed)
        assert AESGCM(_AES).decrypt(nonce, sealed, b"aad") == _DATA

    await pool.run(work)


# -- Keys -------------------------------------------------------------------------


async def test_a_key_works_on_a_session_that_did_not_find_it(pool: TokenPool) -> None:
    """``_pkcs11.pyx:1737, SignMixin``: it uses session, handle and key_type only."""
    await pool.generate_keypair(KeyType.EC, curve="secp256r1", label="k", store=True)

    def work(session: Any) -> bool:
        found = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, label="k")
        with session.token.open() as other:
            key = interface.bind_key(other, found.handle, _PRIVATE, KeyType.EC)
            signature = key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        public = session.get_key(object_class=pkcs11.ObjectClass.PUBLIC_KEY, label="k")
        valid: bool = public.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)
        return valid

    assert await pool.run(work)


_PRIVATE, _SECRET = int(ObjectClass.PRIVATE_KEY), int(ObjectClass.SECRET_KEY)


async def test_a_key_is_bound_without_a_call(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``types.py:739``: the type of a key is remembered, so the token is not asked.

    Session and handle come from its ``wrapper`` (``_pkcs11.pyx:1359, 1363``).
    """

    def work(session: Any) -> None:
        fault.reset_counts()
        key = interface.bind_key(session, 77, _PRIVATE, KeyType.EC)
        assert isinstance(key, pkcs11.PrivateKey)
        assert (key.session, key.handle, key.key_type) == (session, 77, KeyType.EC)
        assert fault.counts() == {}

    async with make_pool(module=fault.path) as pool:
        await pool.run(work)


@pytest.mark.parametrize("object_class", [2, 3, 4])
def test_a_bound_key_can_do_whatever_a_key_can(object_class: int) -> None:
    """``_pkcs11.pyx:2049, _CLASS_MAP``, and the mixins beside it."""
    key = interface.bind_key(None, 1, object_class, KeyType.AES)  # type: ignore[arg-type]
    assert key.object_class == object_class
    for name in (
        *("sign", "verify", "encrypt", "decrypt", "wrap_key", "unwrap_key"),
        *("derive_key", "encapsulate_key", "decapsulate_key"),
    ):
        assert callable(getattr(key, name))


async def test_bound_keys_wrap_unwrap_and_derive(pool: TokenPool) -> None:
    """``_pkcs11.pyx:1850``: of the other key its handle is enough.

    What is made belongs to the session that the key is bound to.
    """

    def work(session: Any) -> None:
        template = {
            Attribute.EXTRACTABLE: True,
            Attribute.SENSITIVE: False,
            Attribute.DERIVE: True,
        }
        first, second = (
            session.generate_key(KeyType.AES, 128, template=template) for _ in "ab"
        )
        other = session.token.open()
        key, wrapped = (
            interface.bind_key(other, found.handle, _SECRET, KeyType.AES)
            for found in (first, second)
        )
        packed = key.wrap_key(wrapped, mechanism=Mechanism.AES_KEY_WRAP)
        copy = key.unwrap_key(
            ObjectClass.SECRET_KEY,
            KeyType.AES,
            packed,
            mechanism=Mechanism.AES_KEY_WRAP,
            template=template,
        )
        assert copy[Attribute.VALUE] == second[Attribute.VALUE]
        derived = key.derive_key(
            KeyType.AES,
            128,
            mechanism=Mechanism.AES_ECB_ENCRYPT_DATA,
            mechanism_param=_BLOCK,
            template=template,
        )
        sealed = first.encrypt(_BLOCK, mechanism=Mechanism.AES_ECB)
        assert derived[Attribute.VALUE] == sealed
        assert len(list(session.get_objects())) == 4
        other.close()
        assert len(list(session.get_objects())) == 2

    await pool.run(work)


# -- Errors -----------------------------------------------------------------------


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
