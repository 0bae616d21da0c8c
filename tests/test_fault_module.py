"""The fault module itself: it forwards faithfully, and misbehaves only as told.

Each scenario runs in a process of its own: the module's state belongs to the process,
and a crash must fail one test, not the run. So this file is also a script.
"""

import contextlib
import ctypes
import ctypes.util
import functools
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, NamedTuple

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11._pkcs11 import lib as PythonPKCS11  # noqa: N812 - a class, spelt as a function
from pkcs11.types import SignMixin, VerifyMixin

from faultmodule import CKR, FaultError, FaultModule, OpenSession
from faultmodule import build as building
from faultmodule.build import NoCompilerError, build
from pkcs11_pool import softhsm

USER_PIN, SO_PIN = b"1234", b"12345678"
CKU_SO, CKU_USER = 0, 1
CKF_RW, CKF_SERIAL, CKF_OS_LOCKING_OK, CKF_DONT_BLOCK = 2, 4, 2, 1
CKF_PROTECTED_AUTHENTICATION_PATH, CKF_USER_PIN_LOCKED = 0x100, 0x40000
P256 = bytes.fromhex("06082a8648ce3d030107")
BLOCK = b"b" * 16


class Setup(NamedTuple):
    """What a scenario has to work with."""

    library: Path
    target: Path
    directory: Path


SCENARIOS: dict[str, Callable[[Setup], None]] = {}


def own_process(scenario: Callable[[Setup], None]) -> Callable[[Setup], None]:
    """Make a test of a scenario: it runs in a fresh interpreter."""
    SCENARIOS[scenario.__name__] = scenario

    @functools.wraps(scenario)
    def test(setup: Setup) -> None:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", __file__, scenario.__name__]
            + [str(path) for path in setup],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=os.environ | {"SOFTHSM2_CONF": str(setup.directory / "softhsm2.conf")},
        )
        if done.returncode or done.stderr:
            pytest.fail(f"{done.returncode}: {done.stderr}", pytrace=False)

    return test


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module, compiled once."""
    return build(tmp_path_factory.mktemp("fault"))


@pytest.fixture
def setup(library: Path, tmp_path: Path) -> Setup:
    """A real token in a directory of its own."""
    real = softhsm.ensure()
    softhsm.TokenDirectory(real, tmp_path).add_token(
        "demo", user_pin=USER_PIN.decode(), so_pin=SO_PIN.decode()
    )
    return Setup(library, real.module, tmp_path)


# An application in terms of C


class InitializeArgs(ctypes.Structure):
    """``CK_C_INITIALIZE_ARGS``."""

    _fields_ = (
        ("mutexes", ctypes.c_void_p * 4),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_char_p),
    )


class CkAttribute(ctypes.Structure):
    """``CK_ATTRIBUTE``."""

    _fields_ = (
        ("type", ctypes.c_ulong),
        ("value", ctypes.c_char_p),
        ("length", ctypes.c_ulong),
    )


class CkMechanism(ctypes.Structure):
    """``CK_MECHANISM``."""

    _fields_ = (
        ("mechanism", ctypes.c_ulong),
        ("parameter", ctypes.c_void_p),
        ("length", ctypes.c_ulong),
    )
    keep: ctypes.Structure
    """The parameter, which C knows by its address alone."""


class StringData(ctypes.Structure):
    """``CK_KEY_DERIVATION_STRING_DATA``."""

    _fields_ = (("data", ctypes.c_char_p), ("length", ctypes.c_ulong))


class TokenInfo(ctypes.Structure):
    """``CK_TOKEN_INFO``."""

    _fields_ = (
        ("label", ctypes.c_char * 32),
        ("manufacturer", ctypes.c_char * 32),
        ("model", ctypes.c_char * 16),
        ("serial", ctypes.c_char * 16),
        ("flags", ctypes.c_ulong),
        ("max_sessions", ctypes.c_ulong),
        ("session_count", ctypes.c_ulong),
        ("max_rw", ctypes.c_ulong),
        ("rw_count", ctypes.c_ulong),
        ("max_pin", ctypes.c_ulong),
        ("min_pin", ctypes.c_ulong),
        ("rest", ctypes.c_ubyte * 64),
    )


def template(
    values: Mapping[Attribute, object],
) -> tuple[ctypes.Array[CkAttribute], int]:
    """Return attributes as a C array and their number."""
    packed = [
        value
        if isinstance(value, bytes)
        else bytes([value])
        if isinstance(value, bool)
        else int(str(value)).to_bytes(8, sys.byteorder)
        for value in (v.value if hasattr(v, "value") else v for v in values.values())
    ]
    array = (CkAttribute * len(packed))(
        *(CkAttribute(t, v, len(v)) for t, v in zip(values, packed, strict=True))
    )
    return array, len(packed)


def mechanism(code: int, parameter: ctypes.Structure | None = None) -> object:
    """Return a mechanism to pass by reference."""
    made = CkMechanism(code)
    if parameter is not None:
        made.parameter = ctypes.addressof(parameter)
        made.length = ctypes.sizeof(parameter)
        made.keep = parameter
    return ctypes.byref(made)


AES_KEY: dict[Attribute, object] = {
    Attribute.CLASS: ObjectClass.SECRET_KEY,
    Attribute.KEY_TYPE: KeyType.AES,
    # Public, so that no login is needed.
    Attribute.PRIVATE: False,
    Attribute.ENCRYPT: True,
    Attribute.DECRYPT: True,
    Attribute.WRAP: True,
    Attribute.UNWRAP: True,
    Attribute.DERIVE: True,
    Attribute.SENSITIVE: False,
    Attribute.EXTRACTABLE: True,
}


class Application:
    """A Cryptoki application: calls functions by name, gets return codes."""

    def __init__(self, library: Path, names: tuple[str, ...]) -> None:
        """Load a module; *names* are those of its function list."""
        self._library = ctypes.CDLL(str(library))
        pointer = ctypes.c_void_p()
        got = self._library.C_GetFunctionList(ctypes.byref(pointer))
        assert got == CKR.OK
        assert pointer.value is not None
        size = ctypes.sizeof(ctypes.c_void_p)
        self._functions = {
            name: ctypes.CFUNCTYPE(ctypes.c_ulong)(
                ctypes.c_void_p.from_address(pointer.value + size * place).value or 0
            )
            for place, name in enumerate(names, start=1)
        }

    def __call__(self, function: str, *arguments: object) -> int:
        """Call a function; whole numbers are passed as ``CK_ULONG``."""
        passed = (ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments)
        return int(self._functions[function](*passed))

    def ok(self, function: str, *arguments: object) -> None:
        """Call a function that must succeed."""
        assert (function, self(function, *arguments)) == (function, CKR.OK)

    def initialize(self, flags: int | None = CKF_OS_LOCKING_OK) -> int:
        """Call ``C_Initialize``, with NULL for no flags."""
        args = None if flags is None else ctypes.byref(InitializeArgs(flags=flags))
        return self("C_Initialize", args)

    @functools.cached_property
    def slot(self) -> int:
        """The slot of the token."""
        slots, count = (ctypes.c_ulong * 8)(), ctypes.c_ulong(8)
        self.ok("C_GetSlotList", 1, slots, ctypes.byref(count))
        return slots[0]

    def open(self, flags: int = CKF_RW) -> int:
        """Open a session."""
        session = ctypes.c_ulong()
        self.ok(
            "C_OpenSession",
            self.slot,
            flags | CKF_SERIAL,
            None,
            None,
            ctypes.byref(session),
        )
        return session.value

    def try_open(self, flags: int = CKF_RW) -> int:
        """Return the answer to opening a session."""
        session = ctypes.c_ulong()
        return self(
            "C_OpenSession",
            self.slot,
            flags | CKF_SERIAL,
            None,
            None,
            ctypes.byref(session),
        )

    def login(self, session: int, user: int = CKU_USER, pin: bytes = USER_PIN) -> int:
        """Log in."""
        return self("C_Login", session, user, pin, len(pin))

    def create_aes(self, session: int, value: bytes, **more: object) -> int:
        """Make an AES key with a known value."""
        given: dict[Attribute, object] = {Attribute.VALUE: value}
        given |= {Attribute[name.upper()]: v for name, v in more.items()}
        made = ctypes.c_ulong()
        self.ok(
            "C_CreateObject",
            session,
            *template(AES_KEY | given),
            ctypes.byref(made),
        )
        return made.value

    def value(self, session: int, number: int) -> bytes | int:
        """Return an object's value, or the code that it was refused with."""
        room = ctypes.create_string_buffer(64)
        wanted = CkAttribute(Attribute.VALUE, ctypes.addressof(room), len(room))
        rv = self("C_GetAttributeValue", session, number, ctypes.byref(wanted), 1)
        return rv if rv != CKR.OK else room.raw[: wanted.length]

    def find(self, session: int) -> list[int]:
        """Return the numbers of all objects that the session sees."""
        self.ok("C_FindObjectsInit", session, None, 0)
        found, count = (ctypes.c_ulong * 32)(), ctypes.c_ulong()
        self.ok("C_FindObjects", session, found, 32, ctypes.byref(count))
        self.ok("C_FindObjectsFinal", session)
        return list(found[: count.value])

    def token_info(self) -> TokenInfo:
        """Return ``CK_TOKEN_INFO`` of the token."""
        info = TokenInfo()
        self.ok("C_GetTokenInfo", self.slot, ctypes.byref(info))
        return info


def start(setup: Setup, **numbers: bool) -> tuple[FaultModule, Application]:
    """Load the module in front of SoftHSM2 and initialise it."""
    fault = FaultModule(setup.library, setup.target)
    if numbers:
        fault.reuse_numbers(**numbers)
    app = Application(fault.path, fault.functions)
    assert app.initialize() == CKR.OK
    return fault, app


class LockingLib(PythonPKCS11):
    """python-pkcs11's library object, initialised so that threads may use it."""

    def initialize(self) -> None:
        """Call ``C_Initialize`` with OS locking, through python-pkcs11's own list."""
        place = id(self) + object.__basicsize__
        functions = ctypes.c_void_p.from_address(place).value
        assert functions is not None
        first = ctypes.c_void_p.from_address(functions + 8).value
        assert first is not None
        args = InitializeArgs(flags=CKF_OS_LOCKING_OK)
        assert ctypes.CFUNCTYPE(ctypes.c_ulong)(first)(ctypes.byref(args)) == CKR.OK


def python_token(fault: FaultModule) -> pkcs11.Token:
    """Return the token as python-pkcs11 sees it."""
    label = "demo"
    return LockingLib(str(fault.path)).get_token(token_label=label)


def sign(key: object) -> bytes:
    """Sign a fixed digest."""
    assert isinstance(key, SignMixin)
    return bytes(key.sign(BLOCK, mechanism=Mechanism.ECDSA))


def fits(signature: bytes, key: object) -> bool:
    """Whether a signature of that digest was made with the other half of *key*."""
    assert isinstance(key, VerifyMixin)
    return key.verify(BLOCK, signature, mechanism=Mechanism.ECDSA)


class Thread:
    """Work on a thread of its own, whose result or error is not lost."""

    def __init__(self, work: Callable[[], object]) -> None:
        """Start it."""
        self._future: Future[object] = Future()
        # A daemon: a failed assertion must not wait for what still hangs.
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            self._future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised in `result`
            self._future.set_exception(error)

    @property
    def done(self) -> bool:
        """Whether the work has ended."""
        return self._future.done()

    def result(self) -> object:
        """Wait for the end."""
        return self._future.result(timeout=10)


def refused(work: Callable[[], object]) -> str:
    """Return what the fault module's control says against *work*."""
    try:
        work()
    except (FaultError, TimeoutError) as error:
        return str(error)
    raise AssertionError("not refused")


# Faithful, until told otherwise


class Transcript:
    """All 68 functions, called on one token; all answers that name no number."""

    def __init__(self, app: Application) -> None:
        """Call them."""
        self.app = app
        self.said: list[tuple[object, ...]] = []
        self.room, self._length = ctypes.create_string_buffer(512), ctypes.c_ulong()
        self.out = ctypes.byref(self._length)
        self.made, self.count = ctypes.c_ulong(), ctypes.c_ulong()
        self.to_made, self.to_count = ctypes.byref(self.made), ctypes.byref(self.count)

        self._module()
        # From here on our own numbers and the real ones differ.
        for session in [app.open() for _ in range(3)]:
            self.say("C_CloseSession", session)
        self.session = app.open()
        self._login()
        self.key = app.create_aes(self.session, b"k" * 16)
        self.other = app.create_aes(self.session, b"o" * 16)
        self.hmac = self._objects()
        self._ciphers()
        self._digests()
        self._signatures()
        self._keys()
        self._ends()

    def say(self, function: str, *arguments: object) -> bytes:
        """Call a function and note its answer and what it wrote."""
        self._length.value = len(self.room)
        rv = self.app(function, *arguments)
        wrote = rv == CKR.OK and self.out in arguments and self.room in arguments
        written = self.room.raw[: self._length.value] if wrote else b""
        self.said.append((function, rv, written))
        return written

    def _module(self) -> None:
        app, room = self.app, self.room
        self.said.append(("C_Initialize", app.initialize()))
        self.say("C_GetFunctionList", None)
        self.say("C_GetInfo", room)
        self.say("C_GetSlotList", 1, None, self.to_count)
        self.say("C_GetSlotInfo", app.slot, room)
        self.say("C_GetTokenInfo", app.slot, room)
        self.say("C_GetMechanismList", app.slot, None, self.to_count)
        self.said.append(("mechanisms", self.count.value))
        self.say("C_GetMechanismInfo", app.slot, Mechanism.AES_ECB.value, room)
        self.say("C_WaitForSlotEvent", CKF_DONT_BLOCK, self.to_made, None)

    def _login(self) -> None:
        app, s = self.app, self.session
        self.say("C_GetSessionInfo", s, self.room)
        self.said.append(("SO", app.login(s, CKU_SO, SO_PIN)))
        self.say("C_InitPIN", s, USER_PIN, len(USER_PIN))
        self.say("C_Logout", s)
        self.said.append(("user", app.login(s)))
        self.say("C_SetPIN", s, USER_PIN, 4, b"56789", 5)
        self.say("C_SetPIN", s, b"56789", 5, USER_PIN, 4)

    def _objects(self) -> int:
        app, s, made = self.app, self.session, self.made
        hmac_key: dict[Attribute, object] = {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
            Attribute.SIGN: True,
            Attribute.VERIFY: True,
            Attribute.VALUE: b"h" * 32,
        }
        self.say("C_CreateObject", s, *template(hmac_key), self.to_made)
        hmac = made.value
        label = template({Attribute.LABEL: b"copy"})
        self.say("C_CopyObject", s, self.key, *label, self.to_made)
        copy = made.value
        self.say("C_SetAttributeValue", s, copy, *template({Attribute.ID: b"1"}))
        self.said.append((app.value(s, copy), app.value(s, self.other)))
        self.say("C_GetObjectSize", s, copy, self.to_count)
        self.said.append(("size", self.count.value))
        self.say("C_FindObjectsInit", s, *template({Attribute.ID: b"1"}))
        self.say("C_FindObjects", s, self.to_made, 1, self.to_count)
        self.say("C_FindObjectsFinal", s)
        self.said.append(("found", self.count.value, made.value == copy))
        return hmac

    def _ciphers(self) -> None:
        s, room, out = self.session, self.room, self.out
        ecb = mechanism(Mechanism.AES_ECB)
        self.say("C_EncryptInit", s, ecb, self.key)
        secret = self.say("C_Encrypt", s, BLOCK, 16, room, out)
        self.say("C_EncryptInit", s, ecb, self.other)
        self.say("C_EncryptUpdate", s, BLOCK, 16, room, out)
        self.say("C_EncryptFinal", s, room, out)
        self.say("C_DecryptInit", s, ecb, self.key)
        self.say("C_Decrypt", s, secret, 16, room, out)
        self.say("C_DecryptInit", s, ecb, self.key)
        self.say("C_DecryptUpdate", s, secret, 16, room, out)
        self.say("C_DecryptFinal", s, room, out)
        self.say("C_DigestEncryptUpdate", s, BLOCK, 16, room, out)
        self.say("C_DecryptDigestUpdate", s, BLOCK, 16, room, out)
        self.say("C_SignEncryptUpdate", s, BLOCK, 16, room, out)
        self.say("C_DecryptVerifyUpdate", s, BLOCK, 16, room, out)

    def _digests(self) -> None:
        s, room, out = self.session, self.room, self.out
        self.say("C_DigestInit", s, mechanism(Mechanism.SHA256))
        self.say("C_Digest", s, BLOCK, 16, room, out)
        self.say("C_DigestInit", s, mechanism(Mechanism.SHA256))
        self.say("C_DigestUpdate", s, BLOCK, 16)
        self.say("C_DigestKey", s, self.hmac)
        self.say("C_GetOperationState", s, room, out)
        self.say("C_SetOperationState", s, room, 16, self.key, 0)
        self.say("C_DigestFinal", s, room, out)

    def _signatures(self) -> None:
        s, room, out = self.session, self.room, self.out
        sha = mechanism(Mechanism.SHA256_HMAC)
        self.say("C_SignInit", s, sha, self.hmac)
        mac = self.say("C_Sign", s, BLOCK, 16, room, out)
        self.say("C_SignInit", s, sha, self.hmac)
        self.say("C_SignUpdate", s, BLOCK, 16)
        self.say("C_SignFinal", s, room, out)
        self.say("C_VerifyInit", s, sha, self.hmac)
        self.say("C_Verify", s, BLOCK, 16, mac, 32)
        self.say("C_VerifyInit", s, sha, self.hmac)
        self.say("C_VerifyUpdate", s, BLOCK, 16)
        self.say("C_VerifyFinal", s, mac, 32)
        rsa = mechanism(Mechanism.RSA_X_509)
        self.say("C_SignRecoverInit", s, rsa, self.hmac)
        self.say("C_SignRecover", s, BLOCK, 16, room, out)
        self.say("C_VerifyRecoverInit", s, rsa, self.hmac)
        self.say("C_VerifyRecover", s, BLOCK, 16, room, out)

    def _keys(self) -> None:
        app, s, to_made = self.app, self.session, self.to_made
        aes = mechanism(Mechanism.AES_KEY_GEN)
        sized: dict[Attribute, object] = {Attribute.VALUE_LEN: 32}
        self.say("C_GenerateKey", s, aes, *template(AES_KEY | sized), to_made)
        self.said.append(("generated", len(bytes(app.value(s, self.made.value)))))
        curve = template({Attribute.EC_PARAMS: P256, Attribute.VERIFY: True})
        signs, second = template({Attribute.SIGN: True}), ctypes.c_ulong()
        ec, ecdsa = mechanism(Mechanism.EC_KEY_PAIR_GEN), mechanism(Mechanism.ECDSA)
        pair = (to_made, ctypes.byref(second))
        self.say("C_GenerateKeyPair", s, ec, *curve, *signs, *pair)
        self.say("C_SignInit", s, ecdsa, second.value)
        app.ok("C_Sign", s, BLOCK, 16, self.room, self.out)
        self.say("C_VerifyInit", s, ecdsa, self.made.value)
        self.say("C_Verify", s, BLOCK, 16, self.room.raw[:64], 64)

        wrap, known = mechanism(Mechanism.AES_KEY_WRAP), template(AES_KEY)
        keys = (self.key, self.other)
        wrapped = self.say("C_WrapKey", s, wrap, *keys, self.room, self.out)
        self.say("C_UnwrapKey", s, wrap, self.key, wrapped, 24, *known, to_made)
        self.said.append((app.value(s, self.made.value),))
        derive = mechanism(Mechanism.AES_ECB_ENCRYPT_DATA, StringData(BLOCK, 16))
        derived = template(AES_KEY | {Attribute.VALUE_LEN: 16})
        self.say("C_DeriveKey", s, derive, self.key, *derived, to_made)
        self.said.append((app.value(s, self.made.value),))

    def _ends(self) -> None:
        app, s = self.app, self.session
        self.say("C_SeedRandom", s, BLOCK, 16)
        self.said.append(("C_GenerateRandom", app("C_GenerateRandom", s, self.room, 9)))
        self.say("C_GetFunctionStatus", s)
        self.say("C_CancelFunction", s)
        self.say("C_DestroyObject", s, self.other)
        self.said.append((app.value(s, self.other), app.value(s, self.key)))
        self.say("C_CloseAllSessions", app.slot)
        self.say("C_InitToken", app.slot, SO_PIN, len(SO_PIN), b"anew".ljust(32))
        self.say("C_Finalize", None)


@own_process
def test_all_functions_answer_as_the_real_module_does(setup: Setup) -> None:
    """The same calls get the same answers, also with numbers of our own."""
    fault = FaultModule(setup.library, setup.target)
    names = fault.functions
    # It ends with C_InitToken, so the second run starts like the first.
    real = Transcript(Application(setup.target, names)).said
    fault.reuse_numbers()
    through = Transcript(Application(fault.path, names)).said

    assert through == real
    assert set(fault.counts()) == set(names)
    assert fault.inside() == 0
    assert len(names) == 68


@own_process
def test_python_pkcs11_works_through_it(setup: Setup) -> None:
    """A signature made through it verifies, with numbers of our own."""
    fault = FaultModule(setup.library, setup.target)
    fault.reuse_numbers()
    token = python_token(fault)
    with token.open(rw=True, user_pin=USER_PIN.decode()) as session:
        parameters = session.create_domain_parameters(
            KeyType.EC, {Attribute.EC_PARAMS: P256}, local=True
        )
        public, private = parameters.generate_keypair(store=True, label="ours")
        again = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="ours")
        assert fits(sign(again), public)
        assert again.handle == private.handle
    assert fault.count("C_Sign") == 2  # One asks for the size.


@own_process
def test_two_copies_in_one_process_are_two_modules(setup: Setup) -> None:
    """A copy has counts, rules and a state of its own; a copy is never overwritten."""
    copy = setup.directory / "second.so"
    one = FaultModule(setup.library, setup.target)
    two = FaultModule(setup.library, setup.target, copy_to=copy)
    one.on("C_Initialize", answer=CKR.HOST_MEMORY, every=True)
    assert Application(one.path, one.functions).initialize() == CKR.HOST_MEMORY
    assert Application(two.path, two.functions).initialize() == CKR.OK
    assert (one.count("C_Initialize"), two.count("C_Initialize")) == (1, 1)
    assert (one.init_flags, two.init_flags) == (2, 2)
    assert two.path == copy
    try:
        FaultModule(setup.library, copy_to=copy)
    except FileExistsError:
        pass
    else:
        raise AssertionError("a loaded file was overwritten")


@own_process
def test_the_target_comes_from_the_environment_too(setup: Setup) -> None:
    """Without `target` the variable is read; without either nothing is initialised."""
    fault = FaultModule(setup.library)
    app = Application(fault.path, fault.functions)
    assert app.initialize() == CKR.CRYPTOKI_NOT_INITIALIZED
    os.environ["PKCS11_FAULT_TARGET"] = str(setup.target)
    assert app.initialize() == CKR.OK
    assert app.token_info().label.rstrip() == b"demo"


@own_process
def test_a_bad_target_is_refused(setup: Setup) -> None:
    """A file that is missing, or no Cryptoki module, is named in the error."""
    missing = setup.directory / "missing.so"
    assert str(missing) in refused(lambda: FaultModule(setup.library, missing))
    # Any extension of this interpreter is a library without Cryptoki.
    other = ctypes.util.find_library("c")
    assert "C_GetFunctionList" in refused(lambda: FaultModule(setup.library, other))


# Counts


@own_process
def test_a_call_that_was_let_go_does_not_hang_any_more(setup: Setup) -> None:
    """At once, though its thread may wake late: the next one can be waited for."""
    fault, app = start(setup)
    session = app.open()

    def info() -> int:
        return app("C_GetSessionInfo", session, ctypes.create_string_buffer(64))

    for let_go in (fault.release, fault.clear):
        for _ in range(50):
            fault.on("C_GetSessionInfo", hang="before")
            thread = Thread(info)
            fault.wait_until_hanging("C_GetSessionInfo")
            let_go()
            assert "not 1 hanging" in refused(
                lambda: fault.wait_until_hanging("C_GetSessionInfo", timeout=0.001)
            )
            assert "not 1 hanging" in refused(
                lambda: fault.wait_until_hanging(timeout=0.001)
            )
            assert thread.result() == CKR.OK


@own_process
def test_calls_are_counted(setup: Setup) -> None:
    """Counts, those inside and the maximum follow the calls, and can be set back."""
    fault, app = start(setup)
    session = app.open()
    fault.reset_counts()
    fault.on("C_GetSessionInfo", hang="before", every=True)

    def info() -> int:
        return app("C_GetSessionInfo", session, ctypes.create_string_buffer(64))

    threads = [Thread(info)]
    fault.wait_until_hanging("C_GetSessionInfo")
    assert (fault.max_inside, fault.overlaps) == (1, 0)
    threads.append(Thread(info))
    fault.wait_until_hanging("C_GetSessionInfo", n=2)
    assert (fault.max_inside, fault.overlaps) == (2, 1)
    assert (fault.inside("C_GetSessionInfo"), fault.inside()) == (2, 2)
    assert fault.inside("C_Sign") == 0
    fault.reset_counts()
    assert (fault.max_inside, fault.overlaps) == (2, 0)
    app.token_info()
    assert (fault.max_inside, fault.overlaps) == (3, 1)
    fault.clear()
    assert [thread.result() for thread in threads] == [CKR.OK, CKR.OK]
    fault.wait_until_idle()
    # C_GetSlotList is asked anew by nobody: the slot is cached.
    assert fault.counts() == {"C_GetTokenInfo": 1}
    assert fault.count("C_GetTokenInfo") == 1
    fault.reset_counts()
    assert (fault.max_inside, fault.overlaps, fault.counts()) == (0, 0, {})


@own_process
def test_one_call_at_a_time_is_no_overlap(setup: Setup) -> None:
    """The detector sees nothing while callers take turns, and something when not."""
    fault, app = start(setup)
    turns = threading.Lock()
    fault.latency_us = 200

    def load(guard: contextlib.AbstractContextManager[object]) -> None:
        with guard:
            session = app.open()
        room = ctypes.create_string_buffer(16)
        for _ in range(50):
            with guard:
                app.ok("C_GenerateRandom", session, room, 16)

    fault.reset_counts()
    for thread in [Thread(lambda: load(turns)) for _ in range(4)]:
        thread.result()
    assert (fault.count("C_GenerateRandom"), fault.overlaps) == (200, 0)
    assert fault.max_inside == 1
    for thread in [Thread(lambda: load(contextlib.nullcontext())) for _ in range(4)]:
        thread.result()
    assert fault.overlaps > 0
    assert 2 <= fault.max_inside <= 4


# Rules


@own_process
def test_an_answer_keeps_the_call_from_the_real_module(setup: Setup) -> None:
    """With `answer` nothing happens; with `replace` it happens and is not told."""
    fault, app = start(setup, sessions=True, objects=True)
    session = app.open()
    made = ctypes.c_ulong(99)
    arguments = (session, *template(AES_KEY | {Attribute.VALUE: b"v" * 16}))
    fault.on("C_CreateObject", answer=CKR.DEVICE_ERROR)
    answered = app("C_CreateObject", *arguments, ctypes.byref(made))
    assert (answered, made.value) == (CKR.DEVICE_ERROR, 99)
    assert app.find(session) == []

    fault.on("C_CreateObject", replace=CKR.DEVICE_ERROR)
    answered = app("C_CreateObject", *arguments, ctypes.byref(made))
    assert (answered, made.value) == (CKR.DEVICE_ERROR, 99)
    assert app.find(session) == [1]
    assert app.value(session, 1) == b"v" * 16

    app.ok("C_CreateObject", *arguments, ctypes.byref(made))
    assert app.find(session) == [1, 2]


@own_process
def test_a_lost_open_leaves_a_session_behind(setup: Setup) -> None:
    """The application has no handle, the token has a session more."""
    fault, app = start(setup)
    first = app.open()
    fault.on("C_OpenSession", replace=CKR.DEVICE_ERROR)
    assert app.try_open(0) == CKR.DEVICE_ERROR
    left = [session for session in fault.sessions() if session.number != first]
    assert [(session.slot, session.rw) for session in left] == [(app.slot, False)]
    app.ok("C_CloseSession", left[0].number)
    assert [session.number for session in fault.sessions()] == [first]


@own_process
def test_a_rule_fires_on_the_calls_that_it_names(setup: Setup) -> None:
    """`nth`, `times` and `every` count from the rule on; removed rules are gone."""
    fault, app = start(setup)
    session = app.open()
    room = ctypes.create_string_buffer(16)

    def six() -> list[int]:
        return [app("C_GenerateRandom", session, room, 16) for _ in range(6)]

    ok, bad, removed = CKR.OK, CKR.FUNCTION_FAILED, CKR.DEVICE_REMOVED
    once = fault.on("C_GenerateRandom", answer=bad)
    assert six() == [bad, ok, ok, ok, ok, ok]
    third = fault.on("C_GenerateRandom", nth=3, times=2, answer=removed)
    assert six() == [ok, ok, removed, removed, ok, ok]
    always = fault.on("C_GenerateRandom", nth=5, every=True, answer=bad)
    assert six() == [ok, ok, ok, ok, bad, bad]
    assert [fault.fired(rule) for rule in (once, third, always)] == [1, 2, 2]
    fault.remove(always)
    assert six() == [ok] * 6
    assert f"no rule {always}" in refused(lambda: fault.fired(always))
    assert f"no rule {always}" in refused(lambda: fault.remove(always))
    assert fault.fired(third) == 2

    # The first answer wins, every rule that fires is counted.
    first = fault.on("C_GenerateRandom", answer=bad)
    second = fault.on("C_GenerateRandom", answer=removed)
    assert six()[:2] == [bad, ok]
    assert (fault.fired(first), fault.fired(second)) == (1, 1)
    # No other function is meant.
    fault.on("C_SeedRandom", every=True, answer=bad)
    assert six() == [ok] * 6
    fault.clear()
    assert app("C_SeedRandom", session, room, 16) == ok


@own_process
def test_a_rule_may_look_at_flags_and_users(setup: Setup) -> None:
    """A module without R/O sessions, and one on which only the SO cannot log in."""
    fault, app = start(setup)
    fault.on("C_OpenSession", every=True, answer=2, when_flags_clear=CKF_RW)
    assert app.try_open(0) == 2
    assert app.try_open(CKF_RW) == CKR.OK
    fault.clear()
    fault.on("C_OpenSession", every=True, answer=2, when_flags_set=CKF_RW)
    assert app.try_open(CKF_RW) == 2
    assert app.try_open(0) == CKR.OK
    for left in fault.sessions():
        app.ok("C_CloseSession", left.number)
    fault.clear()

    session = app.open()
    fault.on("C_Login", every=True, answer=CKR.PIN_LOCKED, when_user=CKU_SO)
    assert app.login(session, CKU_SO, SO_PIN) == CKR.PIN_LOCKED
    assert app.login(session) == CKR.OK
    fault.on("C_Initialize", answer=CKR.ARGUMENTS_BAD, when_flags_clear=2)
    assert app.initialize() == CKR.CRYPTOKI_ALREADY_INITIALIZED
    assert app.initialize(None) == CKR.ARGUMENTS_BAD


@own_process
def test_a_rule_that_contradicts_itself_is_refused(setup: Setup) -> None:
    """So are names that PKCS#11 2.40 does not have."""
    fault = FaultModule(setup.library, setup.target)
    assert "C_LoginUser" in refused(lambda: fault.on("C_LoginUser"))
    assert "C_Sing" in refused(lambda: fault.count("C_Sing"))
    assert "either" in refused(lambda: fault.on("C_Sign", answer=5, replace=5))
    assert "no times" in refused(lambda: fault.on("C_Sign", every=True, times=2))
    assert "start at 1" in refused(lambda: fault.on("C_Sign", nth=0))
    assert "flags" in refused(lambda: fault.on("C_Sign", when_flags_set=2))
    assert "user" in refused(lambda: fault.on("C_Sign", when_user=0))


@own_process
def test_calls_can_be_slow(setup: Setup) -> None:
    """A rule's delay and the latency of every call add up."""
    fault, app = start(setup)
    session = app.open()
    room = ctypes.create_string_buffer(64)

    def took() -> float:
        start = time.monotonic()
        app.ok("C_GetSessionInfo", session, room)
        return time.monotonic() - start

    fault.latency_us = 20_000
    assert fault.latency_us == 20_000
    assert took() >= 0.02
    fault.on("C_GetSessionInfo", delay_us=30_000)
    assert took() >= 0.05
    # Beyond a second: the seconds and the rest are two fields of a timespec.
    fault.latency_us = 0
    fault.on("C_GetSessionInfo", delay_us=1_010_000)
    assert took() >= 1.01
    assert fault.inside() == 0


# Hanging


@own_process
def test_calls_hang_before_or_after_the_real_one(setup: Setup) -> None:
    """Before: nothing happened yet. After: it did, and only the answer is missing."""
    fault, app = start(setup)
    session = app.open()
    fault.on("C_Login", hang="before")
    thread = Thread(lambda: app.login(session))
    fault.wait_until_hanging("C_Login")
    assert app.login(session) == CKR.OK  # So the first has not logged in.
    assert not thread.done
    fault.release("C_Login")
    assert thread.result() == CKR.USER_ALREADY_LOGGED_IN

    fault.on("C_Logout", hang="after")
    thread = Thread(lambda: app("C_Logout", session))
    fault.wait_until_hanging("C_Logout")
    assert app.login(session) == CKR.OK  # So it has logged out.
    assert not thread.done
    fault.release()
    assert thread.result() == CKR.OK
    assert fault.inside() == 0


@own_process
def test_a_release_is_for_those_that_hang(setup: Setup) -> None:
    """Not for other functions, and not for later calls: the rule stays."""
    fault, app = start(setup)
    session = app.open()
    room = ctypes.create_string_buffer(64)
    fault.on("C_GetSessionInfo", every=True, hang="after")
    fault.on("C_GenerateRandom", every=True, hang="before", answer=CKR.DEVICE_ERROR)
    info = Thread(lambda: app("C_GetSessionInfo", session, room))
    random = Thread(lambda: app("C_GenerateRandom", session, room, 8))
    fault.wait_until_hanging(n=2)
    fault.release("C_GetSessionInfo")
    assert info.result() == CKR.OK
    assert "not 2 hanging" in refused(
        lambda: fault.wait_until_hanging(n=2, timeout=0.01)
    )
    assert not random.done
    again = Thread(lambda: app("C_GetSessionInfo", session, room))
    fault.wait_until_hanging("C_GetSessionInfo")
    fault.clear()
    assert (again.result(), random.result()) == (CKR.OK, CKR.DEVICE_ERROR)
    app.ok("C_GetSessionInfo", session, room)


@own_process
def test_clear_reaches_calls_on_their_way_into_a_hang(setup: Setup) -> None:
    """A call whose rule has fired does not hang for ever after the rule is gone."""
    fault, app = start(setup)
    session = app.open()
    fault.on("C_Logout", hang="before", delay_us=100_000)
    thread = Thread(lambda: app("C_Logout", session))
    fault.wait_until_inside("C_Logout")
    fault.clear()
    assert thread.result() == CKR.OK
    # A later rule is a new one.
    fault.on("C_Logout", hang="before")
    thread = Thread(lambda: app("C_Logout", session))
    fault.wait_until_hanging("C_Logout")
    fault.clear()
    assert thread.result() == CKR.OK


@own_process
def test_waiting_ends_in_time_and_says_what_is_inside(setup: Setup) -> None:
    """Waits of all kinds are met by calls, else they end with a text."""
    fault, app = start(setup)
    session = app.open()
    fault.reset_counts()
    counted = Thread(lambda: fault.wait_until_count("C_GetTokenInfo", 2))
    app.token_info()
    assert not counted.done
    app.token_info()
    counted.result()
    fault.on("C_Logout", hang="before")
    thread = Thread(lambda: app("C_Logout", session))
    fault.wait_until_inside("C_Logout")
    started = time.monotonic()
    text = refused(lambda: fault.wait_until_idle(timeout=0.2))
    assert time.monotonic() - started >= 0.2
    assert "inside: C_Logout" in text
    assert "'C_GetTokenInfo': 2" in text
    idle = Thread(lambda: fault.wait_until_idle("C_Logout"))
    assert not idle.done
    fault.release()
    assert thread.result() == CKR.OK
    idle.result()


# Numbers of our own


@own_process
def test_session_numbers_are_used_again_at_once(setup: Setup) -> None:
    """The lowest free one goes to the next session; an unknown one is refused."""
    fault, app = start(setup, sessions=True, objects=False)
    assert [app.open() for _ in range(4)] == [1, 2, 3, 4]
    assert app("C_CloseSession", 2) == CKR.OK
    assert app("C_CloseSession", 2) == CKR.SESSION_HANDLE_INVALID
    assert app("C_CloseSession", 1) == CKR.OK
    assert [app.open(), app.open(), app.open()] == [1, 2, 5]
    room = ctypes.create_string_buffer(64)
    for unknown in (0, 6, 10_000, 2**63):
        answer = app("C_GetSessionInfo", unknown, room)
        assert answer == CKR.SESSION_HANDLE_INVALID
    # A session that somebody kept is now a stranger's: this closes it.
    assert app("C_CloseSession", 2) == CKR.OK
    assert [session.number for session in fault.sessions()] == [1, 3, 4, 5]
    assert "while a session is open" in refused(fault.reuse_numbers)
    app.ok("C_CloseAllSessions", app.slot)
    assert fault.sessions() == []
    assert app.open() == 1


@own_process
def test_numbers_start_again_after_finalize(setup: Setup) -> None:
    """In between every number is dead, as the module is."""
    fault, app = start(setup, sessions=True, objects=True)
    session = app.open()
    app.create_aes(session, b"1" * 16)
    app.ok("C_Finalize", None)
    assert fault.sessions() == []
    room = ctypes.create_string_buffer(64)
    answer = app("C_GetSessionInfo", session, room)
    assert answer == CKR.CRYPTOKI_NOT_INITIALIZED
    assert app.initialize() == CKR.OK
    assert app("C_GetSessionInfo", session, room) == CKR.SESSION_HANDLE_INVALID
    assert app.open() == 1
    assert app.create_aes(1, b"2" * 16) == 1
    fault.lose_sessions(app.slot)
    fault.reuse_numbers(sessions=False, objects=False)
    assert app.open() != app.open()


@own_process
def test_an_old_number_signs_with_the_new_key(setup: Setup) -> None:
    """What opencryptoki does: a destroyed key's handle is the next key's handle."""
    fault = FaultModule(setup.library, setup.target)
    fault.reuse_numbers()
    token = python_token(fault)
    with token.open(rw=True, user_pin=USER_PIN.decode()) as session:

        def keypair(label: str) -> tuple[pkcs11.PublicKey, pkcs11.PrivateKey]:
            parameters = session.create_domain_parameters(
                KeyType.EC, {Attribute.EC_PARAMS: P256}, local=True
            )
            return parameters.generate_keypair(store=True, label=label)

        old_public, old_private = keypair("old")
        assert fits(sign(old_private), old_public)
        # Destroyed through another session, as by another part of a program.
        with token.open(rw=True) as other:
            for found in list(other.get_objects({Attribute.LABEL: "old"})):
                found.destroy()
        new_public, new_private = keypair("new")
        assert new_private.handle == old_private.handle

        assert fits(sign(old_private), new_public)


@own_process
def test_object_numbers_are_used_again_at_once(setup: Setup) -> None:
    """They are stable while the object lives, and refused once it is gone."""
    _, app = start(setup, sessions=True, objects=True)
    one, two = app.open(), app.open()
    app.login(one)
    keys = [app.create_aes(one, bytes([65 + n]) * 16, token=True) for n in range(3)]
    assert keys == [1, 2, 3]
    assert app.find(two) == app.find(one) == [1, 2, 3]
    app.ok("C_DestroyObject", two, 2)
    assert app.value(one, 2) == CKR.OBJECT_HANDLE_INVALID
    ecb = mechanism(Mechanism.AES_ECB)
    for unknown in (0, 2, 4, 2**63):
        assert app("C_EncryptInit", one, ecb, unknown) == CKR.KEY_HANDLE_INVALID
    room, length = ctypes.create_string_buffer(64), ctypes.c_ulong(64)
    out = ctypes.byref(length)
    wrap, made = mechanism(Mechanism.AES_KEY_WRAP), ctypes.c_ulong()
    answers = [
        app("C_WrapKey", one, wrap, 9, 1, room, out),
        app("C_WrapKey", one, wrap, 1, 9, room, out),
        app("C_UnwrapKey", one, wrap, 9, room, 24, None, 0, ctypes.byref(made)),
        app("C_DeriveKey", one, wrap, 9, None, 0, ctypes.byref(made)),
        app("C_CopyObject", one, 9, None, 0, ctypes.byref(made)),
        app("C_DestroyObject", one, 9),
        app("C_DigestKey", one, 9),
        app("C_SetOperationState", one, room, 1, 0, 9),
    ]
    assert answers == [
        CKR.WRAPPING_KEY_HANDLE_INVALID,
        CKR.KEY_HANDLE_INVALID,
        CKR.UNWRAPPING_KEY_HANDLE_INVALID,
        CKR.KEY_HANDLE_INVALID,
        CKR.OBJECT_HANDLE_INVALID,
        CKR.OBJECT_HANDLE_INVALID,
        CKR.KEY_HANDLE_INVALID,
        CKR.KEY_HANDLE_INVALID,
    ]
    # An unknown session is said first.
    assert app("C_EncryptInit", 9, ecb, 9) == CKR.SESSION_HANDLE_INVALID
    assert app.create_aes(two, b"new" + b"." * 13, token=True) == 2
    assert app.value(one, 2) == b"new" + b"." * 13
    assert sorted(app.find(one)) == [1, 2, 3]


@own_process
def test_session_objects_free_their_numbers_with_their_owner(setup: Setup) -> None:
    """With nobody else's session, and whichever function made them."""
    fault, app = start(setup, sessions=True, objects=True)
    keeper, owner = app.open(), app.open()
    app.login(keeper)
    kept = app.create_aes(keeper, b"k" * 16)
    stored = app.create_aes(owner, b"s" * 16, token=True)
    made = [app.create_aes(owner, b"c" * 16)]

    def make(function: str, *arguments: object, keys: int = 1) -> None:
        numbers = [ctypes.c_ulong() for _ in range(keys)]
        app.ok(function, owner, *arguments, *(ctypes.byref(n) for n in numbers))
        made.extend(number.value for number in numbers)

    sized = AES_KEY | {Attribute.VALUE_LEN: 16}
    aes = mechanism(Mechanism.AES_KEY_GEN)
    make("C_GenerateKey", aes, *template(sized))
    curve, signs = {Attribute.EC_PARAMS: P256}, {Attribute.SIGN: True}
    ec = mechanism(Mechanism.EC_KEY_PAIR_GEN)
    make("C_GenerateKeyPair", ec, *template(curve), *template(signs), keys=2)
    make("C_CopyObject", kept, *template({}))
    wrap = mechanism(Mechanism.AES_KEY_WRAP)
    room, length = ctypes.create_string_buffer(64), ctypes.c_ulong(64)
    app.ok("C_WrapKey", owner, wrap, kept, stored, room, ctypes.byref(length))
    make("C_UnwrapKey", wrap, kept, room, length.value, *template(AES_KEY))
    # A copy of a token object is one too, unless its template says no.
    make("C_CopyObject", stored, *template({}))
    copied = made.pop()
    make("C_CopyObject", stored, *template({Attribute.TOKEN: False}))

    assert sorted([kept, stored, copied, *made]) == list(range(1, 11))
    assert sorted(app.find(keeper)) == list(range(1, 11))
    app.ok("C_CloseSession", owner)
    assert sorted(app.find(keeper)) == sorted([kept, stored, copied])
    for number in made:
        assert app.value(keeper, number) == CKR.OBJECT_HANDLE_INVALID
    assert [app.create_aes(keeper, b"n" * 16) for _ in made] == sorted(made)

    # With its last session an application has no handle at all.
    app.ok("C_CloseSession", keeper)
    session = app.open()
    assert app.value(session, stored) == CKR.OBJECT_HANDLE_INVALID
    app.login(session)
    assert sorted(app.find(session)) == [1, 2]
    fault.forget_objects()
    assert app.value(session, 1) == CKR.OBJECT_HANDLE_INVALID
    assert sorted(app.find(session)) == [1, 2]


@own_process
def test_a_number_is_good_on_its_own_token_only(setup: Setup) -> None:
    """Real modules may number each token by itself; here the numbers are one row."""
    directory = setup.directory / "two"
    directory.mkdir()
    tokens = softhsm.TokenDirectory(softhsm.ensure(), directory)
    tokens.add_token("a")
    tokens.add_token("b")
    os.environ["SOFTHSM2_CONF"] = str(tokens.configuration)
    fault, app = start(setup, sessions=True, objects=True)
    slots, count = (ctypes.c_ulong * 8)(), ctypes.c_ulong(8)
    app.ok("C_GetSlotList", 1, slots, ctypes.byref(count))
    sessions = []
    for slot in slots[:2]:
        app.slot = slot
        sessions.append(app.open())
        app.create_aes(sessions[-1], b"v" * 16)
    assert app.value(sessions[0], 1) == app.value(sessions[1], 2) == b"v" * 16
    assert app.value(sessions[0], 2) == CKR.OBJECT_HANDLE_INVALID
    # Closing all on one token leaves the other alone.
    fault.lose_sessions(slots[0])
    assert fault.sessions() == [OpenSession(2, slots[1], rw=True)]
    assert app.value(sessions[1], 2) == b"v" * 16


# Losing things


@own_process
def test_sessions_can_be_lost(setup: Setup) -> None:
    """Behind the application's back, with what they owned; numbers become free."""
    fault, app = start(setup, sessions=True, objects=True)
    session = app.open()
    app.open()
    app.create_aes(session, b"k" * 16)
    fault.lose_sessions(app.slot)
    assert fault.count("C_CloseAllSessions") == 0
    assert app.value(session, 1) == CKR.SESSION_HANDLE_INVALID
    assert app.open() == 1
    assert app.find(1) == []
    assert "CKR_SLOT_ID_INVALID" in refused(lambda: fault.lose_sessions(app.slot + 1))


@own_process
def test_the_real_modules_numbers_can_be_lost_too(setup: Setup) -> None:
    """A lost session's number is then the real module's dead one."""
    fault, app = start(setup)
    session = app.open()
    fault.lose_sessions(app.slot)
    room = ctypes.create_string_buffer(64)
    assert app("C_GetSessionInfo", session, room) == CKR.SESSION_HANDLE_INVALID
    assert app("C_CloseSession", session) == CKR.SESSION_HANDLE_INVALID
    assert fault.sessions() == []

    # One that died unseen is noticed when its owner closes it.
    session = app.open()
    unseen = Application(setup.target, fault.functions)
    unseen.ok("C_CloseSession", session)
    assert len(fault.sessions()) == 1
    assert app("C_CloseSession", session) == CKR.SESSION_HANDLE_INVALID
    assert fault.sessions() == []

    # With numbers for objects alone, an unknown session is still said first.
    fault.reuse_numbers(sessions=False)
    session, ecb = app.open(), mechanism(Mechanism.AES_ECB)
    assert app("C_EncryptInit", session, ecb, 9) == CKR.KEY_HANDLE_INVALID
    assert app("C_EncryptInit", session + 1, ecb, 9) == CKR.SESSION_HANDLE_INVALID
    assert app.create_aes(session, b"k" * 16) == 1
    assert app.value(session, 1) == b"k" * 16


@own_process
def test_a_real_module_may_use_numbers_again_itself(setup: Setup) -> None:
    """A session that died unseen is not taken for the one that got its number."""
    inner = FaultModule(
        setup.library, setup.target, copy_to=setup.directory / "inner.so"
    )
    inner.reuse_numbers()
    fault = FaultModule(setup.library, inner.path)
    app = Application(fault.path, fault.functions)
    assert app.initialize() == CKR.OK
    session = app.open()
    inner.lose_sessions(app.slot)
    assert app.open(0) == session
    assert fault.sessions() == [OpenSession(session, app.slot, rw=False)]


@own_process
def test_a_strike_answers_calls_whichever_they_are(setup: Setup) -> None:
    """From the one that is named on, so many in a row; they are not made."""
    fault, app = start(setup)
    session = app.open()
    room = ctypes.create_string_buffer(64)
    fault.strike("answer", CKR.DEVICE_ERROR, after=2, times=2)
    before = fault.calls()[-1].sequence
    app.ok("C_GenerateRandom", session, room, 8)
    assert app("C_SeedRandom", session, BLOCK, 16) == CKR.DEVICE_ERROR
    assert app.login(session) == CKR.DEVICE_ERROR
    app.ok("C_GenerateRandom", session, room, 8)
    assert fault.call_off() == (2, before + 2)
    assert app.login(session) == CKR.OK  # nobody was in


@own_process
def test_a_strike_loses_answers_to_what_was_done(setup: Setup) -> None:
    """But no operation begins by a call that is hit, and no session is opened."""
    fault, app = start(setup)
    session = app.open()
    fault.strike("replace", CKR.DEVICE_REMOVED)
    assert app.login(session) == CKR.DEVICE_REMOVED
    assert app.login(session) == CKR.USER_ALREADY_LOGGED_IN
    sha = mechanism(Mechanism.SHA256)
    fault.strike("replace", CKR.DEVICE_REMOVED)
    assert app("C_DigestInit", session, sha) == CKR.DEVICE_REMOVED
    app.ok("C_DigestInit", session, sha)
    fault.strike("replace", CKR.DEVICE_REMOVED)
    number = ctypes.c_ulong()
    opens = (app.slot, CKF_SERIAL, None, None, ctypes.byref(number))
    assert app("C_OpenSession", *opens) == CKR.DEVICE_REMOVED
    assert len(fault.sessions()) == 1


def _hangs_in_login(setup: Setup, what: Literal["hang before", "hang after"]) -> int:
    """What a second login is answered while the first one hangs."""
    fault, app = start(setup)
    session = app.open()
    fault.strike(what, after=2)
    app.ok("C_GetSessionInfo", session, ctypes.create_string_buffer(64))
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(app.login(session)))
    thread.start()
    fault.wait_until_hanging("C_Login")
    assert fault.hanging() == 1
    second = app.login(session)
    assert fault.call_off()[0] == 1
    fault.clear()
    thread.join(20)
    assert {second, *answers} == {CKR.OK, CKR.USER_ALREADY_LOGGED_IN}
    assert fault.hanging() == 0
    return second


@own_process
def test_a_strike_lets_a_call_hang_before_the_module_has_it(setup: Setup) -> None:
    """It is the only one, and ends by ``clear``."""
    assert _hangs_in_login(setup, "hang before") == CKR.OK


@own_process
def test_a_strike_lets_a_call_hang_when_the_module_has_done_it(setup: Setup) -> None:
    """Others find it done."""
    assert _hangs_in_login(setup, "hang after") == CKR.USER_ALREADY_LOGGED_IN


@own_process
def test_what_ends_an_operation_ends_it_whatever_a_strike_answers(setup: Setup) -> None:
    """As the standard has it of the last call, and no other is in the way there."""
    fault, app = start(setup)
    session = app.open()
    sha = mechanism(Mechanism.SHA256)
    app.ok("C_DigestInit", session, sha)
    room, length = ctypes.create_string_buffer(64), ctypes.c_ulong(64)
    fault.strike("answer", CKR.DEVICE_ERROR)
    answer = app("C_DigestFinal", session, room, ctypes.byref(length))
    assert answer == CKR.DEVICE_ERROR
    app.ok("C_DigestInit", session, sha)
    fault.strike("answer", CKR.DEVICE_ERROR)
    answer = app("C_Digest", session, b"data", 4, room, ctypes.byref(length))
    assert answer == CKR.DEVICE_ERROR
    app.ok("C_DigestInit", session, sha)


@own_process
def test_what_ends_a_session_or_a_search_ends_it_whatever_a_strike_answers(
    setup: Setup,
) -> None:
    """Or it would stay for ever: nobody closes one twice."""
    fault, app = start(setup)
    session = app.open()
    app.ok("C_FindObjectsInit", session, None, 0)
    fault.strike("answer", CKR.DEVICE_ERROR, times=1)
    assert app("C_FindObjectsFinal", session) == CKR.DEVICE_ERROR
    app.ok("C_DigestInit", session, mechanism(Mechanism.SHA256))
    fault.strike("answer", CKR.DEVICE_ERROR)
    assert app("C_CloseSession", session) == CKR.DEVICE_ERROR
    assert fault.sessions() == []


@own_process
def test_a_strike_loses_what_is_open_before_the_call_is_made(setup: Setup) -> None:
    """All sessions, the login, or the module's state; once, and then all is well."""
    fault, app = start(setup)
    session, room = app.open(), ctypes.create_string_buffer(64)
    random = ("C_GenerateRandom", session, room, 8)
    fault.strike("sessions")
    assert app(*random) == CKR.SESSION_HANDLE_INVALID
    assert fault.sessions() == []

    session = app.open()
    assert app.login(session) == CKR.OK
    fault.strike("login")
    assert app.login(session) == CKR.OK

    fault.strike("finalize")
    assert app("C_GenerateRandom", session, room, 8) == CKR.CRYPTOKI_NOT_INITIALIZED
    assert fault.call_off()[0] == 1
    assert app.initialize() == CKR.OK
    app.ok("C_GenerateRandom", app.open(), room, 8)


@own_process
def test_a_strike_that_is_called_off_or_spares_the_call_hits_nothing(
    setup: Setup,
) -> None:
    """``C_Initialize`` and ``C_Finalize`` are neither hit nor counted."""
    fault, app = start(setup)
    fault.strike("answer", CKR.DEVICE_ERROR)
    app.ok("C_Finalize", None)
    assert app.initialize() == CKR.OK
    assert fault.call_off() == (0, 0)
    app.open()


@own_process
def test_a_login_can_be_lost(setup: Setup) -> None:
    """Behind the application's back, by any session that is open on the token."""
    fault, app = start(setup)
    assert "CKR_SESSION_HANDLE_INVALID" in refused(fault.lose_login)
    session = app.open(0)
    assert app.login(session) == CKR.OK
    fault.lose_login()
    assert fault.count("C_Logout") == 0
    assert app.login(session) == CKR.OK
    fault.lose_login(app.slot)
    assert app.login(session) == CKR.OK
    assert "HANDLE_INVALID" in refused(lambda: fault.lose_login(app.slot + 1))


# Initialisation


@own_process
def test_the_way_of_initialising_is_noted(setup: Setup) -> None:
    """NULL, flags and module parameters, of calls that succeed and of refused ones."""
    fault = FaultModule(setup.library, setup.target)
    app = Application(fault.path, fault.functions)
    assert (fault.init_flags, fault.init_args) == (-1, False)
    assert app.initialize(None) == CKR.OK
    assert (fault.init_flags, fault.init_args, fault.init_reserved) == (0, False, None)
    assert app.initialize(2) == CKR.CRYPTOKI_ALREADY_INITIALIZED
    assert (fault.init_flags, fault.init_args) == (2, True)
    app.ok("C_Finalize", None)

    parameters = ctypes.byref(InitializeArgs(flags=2, reserved=b"configdir='x'"))
    assert app("C_Initialize", parameters) == CKR.ARGUMENTS_BAD  # SoftHSM2's word
    assert fault.init_reserved == "configdir='x'"
    fault.hide_reserved = True
    assert app("C_Initialize", parameters) == CKR.OK
    assert fault.init_reserved == "configdir='x'"
    assert "finalise it first" in refused(
        lambda: FaultModule(fault.path, setup.library)
    )


@own_process
def test_a_module_that_cannot_lock(setup: Setup) -> None:
    """It refuses OS locking and takes NULL; the real one locks all the same."""
    inner = FaultModule(
        setup.library, setup.target, copy_to=setup.directory / "inner.so"
    )
    fault = FaultModule(setup.library, inner.path)
    app = Application(fault.path, fault.functions)
    fault.cant_lock = True
    assert app.initialize() == CKR.CANT_LOCK
    assert (fault.init_flags, inner.init_flags) == (2, -1)
    for flags in (None, 0):
        assert app.initialize(flags) == CKR.OK
        assert (fault.init_flags, inner.init_flags) == (0, 2)
        app.ok("C_Finalize", None)
    fault.cant_lock = False
    assert app.initialize(None) == CKR.OK
    assert (inner.init_flags, inner.init_args) == (0, False)


# Settings


@own_process
def test_token_info_can_be_changed(setup: Setup) -> None:
    """What is not named stays; a slot's own word goes over that for all."""
    fault, app = start(setup)
    before = bytes(app.token_info())
    fault.token_info(
        max_sessions=16,
        session_count=-1,
        max_rw=-2,
        rw_count=3,
        max_pin=9,
        min_pin=5,
        label="other",
        manufacturer="maker",
        model="mark",
        serial="0815",
        flags_set=CKF_USER_PIN_LOCKED,
        flags_clear=0x4,
    )
    info = app.token_info()
    assert info.label == b"other".ljust(32)
    assert info.manufacturer == b"maker".ljust(32)
    assert (info.model, info.serial) == (b"mark".ljust(16), b"0815".ljust(16))
    assert (info.max_sessions, info.rw_count) == (16, 3)
    assert (info.session_count, info.max_rw) == (2**64 - 1, 2**64 - 2)
    assert (info.min_pin, info.max_pin) == (5, 9)
    real_flags = TokenInfo.from_buffer_copy(before).flags
    assert real_flags & 0x4
    assert info.flags == (real_flags | CKF_USER_PIN_LOCKED) & ~0x4

    fault.token_info(label="all")
    fault.token_info(app.slot, label="mine", flags_set=CKF_USER_PIN_LOCKED)
    fault.token_info(app.slot + 1, label="not mine")
    fault.token_info(app.slot, label="mine")
    info = app.token_info()
    assert (info.label.rstrip(), info.flags) == (b"mine", real_flags)
    fault.token_info(app.slot)
    assert app.token_info().label.rstrip() == b"all"
    fault.token_info()
    assert bytes(app.token_info())[:160] == before[:160]
    assert "at most 16 bytes" in refused(lambda: fault.token_info(serial="x" * 17))
    for slot in range(15):
        fault.token_info(1000 + slot, label="x")
    assert "at most 16 slots" in refused(lambda: fault.token_info(2000, label="x"))


@own_process
def test_sessions_can_be_limited(setup: Setup) -> None:
    """In all and R/W, also when many threads open at once."""
    fault, app = start(setup)
    fault.session_limit(total=3, rw=1)
    first = app.open(CKF_RW)
    assert app.try_open(CKF_RW) == CKR.SESSION_COUNT
    app.open(0)
    app.open(0)
    assert app.try_open(0) == CKR.SESSION_COUNT
    app.ok("C_CloseSession", first)
    assert app.try_open(CKF_RW) == CKR.OK
    fault.session_limit(total=4)
    fault.latency_us = 500
    threads = [Thread(lambda: app.try_open(CKF_RW)) for _ in range(8)]
    answers = [thread.result() for thread in threads]
    assert sorted(map(str, answers)) == sorted(
        map(str, [CKR.OK.value] + [CKR.SESSION_COUNT.value] * 7)
    )
    # A refusal by the real module gives the place back.
    fault.session_limit(total=5)
    assert app("C_OpenSession", app.slot, 0, None, None, None) != CKR.OK
    fault.session_limit(total=6)
    assert [app.try_open(0) for _ in range(3)] == [0, 0, CKR.SESSION_COUNT]
    fault.session_limit()
    assert app.try_open() == CKR.OK


# Odd devices


STATES = {"ro_public": 0, "ro_user": 1, "rw_public": 2, "rw_user": 3, "rw_so": 4}


def state(app: Application, session: int) -> int:
    """Return the state that ``C_GetSessionInfo`` tells."""
    info = (ctypes.c_ulong * 4)()
    app.ok("C_GetSessionInfo", session, info)
    return info[1]


def private_aes(app: Application, session: int) -> int:
    """Make a private AES key on the token."""
    return app.create_aes(session, b"p" * 16, private=True, token=True)


@own_process
def test_a_login_for_each_session_is_played(setup: Setup) -> None:
    """One logs in and out for itself; the PIN is checked each time."""
    fault, app = start(setup)
    fault.play_login("per_session", USER_PIN)
    one, two = app.open(), app.open(0)
    assert [state(app, s) for s in (one, two)] == [2, 0]
    assert app("C_FindObjectsInit", one, None, 0) == CKR.USER_NOT_LOGGED_IN
    assert app("C_GenerateRandom", one, ctypes.create_string_buffer(4), 4) == CKR.OK
    assert app.login(one, pin=b"wrong") == CKR.PIN_INCORRECT
    assert app.login(one) == CKR.OK
    assert [state(app, s) for s in (one, two)] == [3, 0]
    key = private_aes(app, one)
    assert app.value(two, key) == CKR.USER_NOT_LOGGED_IN
    assert app.login(two, pin=b"wrong") == CKR.PIN_INCORRECT
    assert app.login(two) == CKR.OK
    assert app.value(two, key) == b"p" * 16
    assert app("C_Logout", one) == CKR.OK
    assert app("C_Logout", one) == CKR.USER_NOT_LOGGED_IN
    assert app.value(one, key) == CKR.USER_NOT_LOGGED_IN
    assert app.value(two, key) == b"p" * 16
    fault.lose_login()
    assert app.value(two, key) == CKR.USER_NOT_LOGGED_IN
    assert "with a session open" in refused(lambda: fault.play_login("real"))
    for session in (one, two):
        app.ok("C_CloseSession", session)
    fault.play_login("real")
    assert state(app, app.open()) == STATES["rw_public"]


@own_process
def test_a_security_officer_logs_in_where_logins_are_played(setup: Setup) -> None:
    """For real, and the user's new PIN is the one that counts from then on."""
    fault, app = start(setup)
    for way in ("kept", "per_session"):
        fault.play_login("kept" if way == "kept" else "per_session", USER_PIN)
        session = app.open()
        assert app.login(session, CKU_SO, b"wrong-so") == CKR.PIN_INCORRECT
        assert state(app, session) == STATES["rw_public"]
        assert app.login(session, CKU_SO, SO_PIN) == CKR.OK
        assert state(app, session) == STATES["rw_so"]
        assert app.login(session) == CKR.USER_ANOTHER_ALREADY_LOGGED_IN
        app.ok("C_InitPIN", session, b"98765", 5)
        app.ok("C_Logout", session)
        assert app.login(session) == CKR.PIN_INCORRECT
        assert app.login(session, pin=b"98765") == CKR.OK
        private_aes(app, session)
        app.ok("C_SetPIN", session, b"98765", 5, USER_PIN, len(USER_PIN))
        app.ok("C_Logout", session)
        assert app.login(session) == CKR.OK
        app.ok("C_CloseSession", session)


@own_process
def test_handles_that_live_across_logins_are_played(setup: Setup) -> None:
    """Out and in again, a private key keeps its number; the real module renews it."""
    fault, app = start(setup)
    session = app.open()
    assert app.login(session) == CKR.OK
    key = private_aes(app, session)
    app.ok("C_Logout", session)
    assert app.login(session) == CKR.OK
    assert app.value(session, key) == CKR.OBJECT_HANDLE_INVALID
    app.ok("C_CloseSession", session)

    fault.play_login("kept", USER_PIN)
    session, other = app.open(), app.open()
    assert app.login(session) == CKR.OK
    assert app.login(session) == CKR.USER_ALREADY_LOGGED_IN
    assert state(app, other) == STATES["rw_user"]
    key = private_aes(app, session)
    app.ok("C_Logout", session)
    assert app.value(other, key) == CKR.USER_NOT_LOGGED_IN
    assert app.login(other) == CKR.OK
    assert app.value(session, key) == b"p" * 16
    for one in (session, other):
        app.ok("C_CloseSession", one)
    assert state(app, app.open()) == STATES["rw_public"]


@own_process
def test_an_ignored_login_is_played(setup: Setup) -> None:
    """Any PIN will do, and none as well; nobody is the security officer."""
    fault, app = start(setup)
    for always, told in ((True, STATES["rw_user"]), (False, STATES["ro_public"])):
        fault.play_login("ignored", USER_PIN, always_user=always)
        session, writer = app.open(0), app.open()
        assert state(app, session) == told
        assert not app.token_info().flags & 0x4
        key = private_aes(app, writer)
        assert app.value(session, key) == b"p" * 16
        assert app.login(session, pin=b"anything") == CKR.OK
        assert app.login(session) == CKR.USER_ALREADY_LOGGED_IN
        assert app.login(writer, CKU_SO, SO_PIN) == CKR.PIN_LOCKED
        assert state(app, session) == told
        app.ok("C_Logout", session)
        assert app("C_Logout", session) == CKR.USER_NOT_LOGGED_IN
        assert app.value(session, key) == b"p" * 16
        # The last one ends the real login, and the next brings it back.
        app.ok("C_CloseSession", session)
        app.ok("C_CloseSession", writer)
        assert app.find(app.open())
        app.ok("C_CloseAllSessions", app.slot)


@own_process
def test_read_only_sessions_can_be_refused(setup: Setup) -> None:
    """Until the rule is removed; R/W ones are opened as ever."""
    fault, app = start(setup)
    rule = fault.no_ro_sessions()
    assert app.try_open(0) == CKR.FUNCTION_FAILED
    assert app.try_open(CKF_RW) == CKR.OK
    fault.remove(rule)
    assert app.try_open(0) == CKR.OK


@own_process
def test_idle_sessions_are_dropped(setup: Setup) -> None:
    """Those that nobody used in time, one that is used or inside a call is not."""
    fault, app = start(setup)
    fault.drop_idle_sessions(30)
    used, idle, busy = app.open(), app.open(), app.open()
    fault.pass_time(20)
    state(app, used)
    room = ctypes.create_string_buffer(4)
    fault.on("C_GenerateRandom", hang="after")
    inside = Thread(lambda: app("C_GenerateRandom", busy, room, 4))
    fault.wait_until_hanging("C_GenerateRandom")
    fault.pass_time(20)
    assert state(app, used) == STATES["rw_public"]
    assert app("C_GetSessionInfo", idle, room) == CKR.SESSION_HANDLE_INVALID
    assert {s.number for s in fault.sessions()} == {used, busy}
    fault.release()
    assert inside.result() == CKR.OK
    # All of them: the login is gone with the last.
    assert app.login(used) == CKR.OK
    fault.pass_time(31)
    assert state(app, app.open()) == STATES["rw_public"]
    assert len(fault.sessions()) == 1
    fault.drop_idle_sessions(None)
    fault.pass_time(100)
    assert len(fault.sessions()) == 1


@own_process
def test_a_pin_pad_is_played(setup: Setup) -> None:
    """A NULL PIN is sent as the one typed; a given PIN goes as it is."""
    fault, app = start(setup)
    fault.token_info(flags_set=CKF_PROTECTED_AUTHENTICATION_PATH)
    # Initialised already, by `start`.
    fault.on("C_Initialize", answer=CKR.OK)
    token = python_token(fault)
    fault.pin_pad = USER_PIN
    assert fault.pin_pad == USER_PIN
    with token.open(user_pin=pkcs11.PROTECTED_AUTH):
        assert fault.calls("C_Login")[-1].rv == CKR.OK
    session = app.open()
    fault.pin_pad = b"wrong"
    assert app("C_Login", session, CKU_USER, None, 0) == CKR.PIN_INCORRECT
    assert app.login(session) == CKR.OK
    app.ok("C_Logout", session)
    fault.pin_pad = None
    assert fault.pin_pad is None
    assert app("C_Login", session, CKU_USER, None, 0) == CKR.ARGUMENTS_BAD
    assert "at most 256" in refused(lambda: setattr(fault, "pin_pad", b"x" * 257))


@own_process
def test_slots_can_be_hidden(setup: Setup) -> None:
    """As a client module shows them whose server is down."""
    fault, app = start(setup)
    count = ctypes.c_ulong()
    fault.no_slots = True
    app.ok("C_GetSlotList", 1, None, ctypes.byref(count))
    assert (fault.no_slots, count.value) == (True, 0)
    slots = (ctypes.c_ulong * 8)()
    app.ok("C_GetSlotList", 1, slots, ctypes.byref(count))
    assert (count.value, slots[0]) == (0, 0)
    fault.no_slots = False
    app.ok("C_GetSlotList", 1, None, ctypes.byref(count))
    assert count.value > 0


@own_process
def test_reset_makes_it_behave(setup: Setup) -> None:
    """Every setting, rule and count is as at the start; sessions stay."""
    fault, app = start(setup)
    session = app.open()
    fault.latency_us = 1
    fault.no_slots = fault.cant_lock = fault.hide_reserved = True
    fault.session_limit(0, 0)
    fault.token_info(label="x")
    fault.pin_pad = b"x"
    fault.on("C_Logout", hang="before", every=True)
    thread = Thread(lambda: app("C_Logout", session))
    fault.wait_until_hanging()
    fault.reset()
    assert thread.result() == CKR.OK
    fault.wait_until_idle()
    left = [fault.latency_us, fault.pin_pad, fault.no_slots, fault.cant_lock]
    assert [*left, fault.hide_reserved] == [0, None, False, False, False]
    assert fault.counts() == {}
    assert fault.calls() == []
    app.open()
    assert app.token_info().label.rstrip() == b"demo"
    assert len(fault.sessions()) == 2


# The log


@own_process
def test_the_log_tells_calls_in_order(setup: Setup) -> None:
    """Who called what with which numbers, when, and what came of it."""
    fault, app = start(setup, sessions=True, objects=True)
    fault.clear_log()
    before = time.monotonic_ns()
    session = app.open()
    key = app.create_aes(session, b"k" * 16)
    fault.on("C_EncryptInit", replace=CKR.DEVICE_ERROR)
    app("C_EncryptInit", session, mechanism(Mechanism.AES_ECB), key)
    fault.on("C_Logout", hang="before")
    thread = Thread(lambda: app("C_Logout", session))
    fault.wait_until_hanging()

    calls = [call for call in fault.calls() if call.function != "C_GetSlotList"]
    assert [(c.function, c.session, c.object, c.rv) for c in calls] == [
        ("C_OpenSession", 1, None, CKR.OK),
        ("C_CreateObject", 1, 1, CKR.OK),
        ("C_EncryptInit", 1, 1, CKR.DEVICE_ERROR),
        ("C_Logout", 1, None, None),
    ]
    assert calls[0].thread == threading.get_ident() != calls[3].thread
    times = [before]
    for call in calls[:3]:
        assert call.ended_ns is not None
        times += [call.began_ns, call.ended_ns]
    assert times == sorted(times)
    assert calls[3].ended_ns is None
    fault.release()
    thread.result()
    (logout,) = fault.calls("C_Logout")
    assert (logout.rv, logout.sequence) == (CKR.OK, calls[3].sequence)
    fault.clear_log()
    assert fault.calls() == []


@own_process
def test_the_log_keeps_the_last_4096_calls(setup: Setup) -> None:
    """A call that is inside while its place is taken does not disturb the later one."""
    fault, app = start(setup)
    session = app.open()
    room = ctypes.create_string_buffer(8)
    fault.on("C_Logout", hang="before", answer=CKR.DEVICE_ERROR)
    thread = Thread(lambda: app("C_Logout", session))
    fault.wait_until_hanging()
    for _ in range(5000):
        app("C_GenerateRandom", session, room, 8)
    fault.release()
    thread.result()
    calls = fault.calls()
    assert {(c.function, c.rv) for c in calls} == {("C_GenerateRandom", CKR.OK)}
    assert len(calls) == 4096
    first = calls[0].sequence
    assert [call.sequence for call in calls] == list(range(first, first + 4096))


# Threads and processes


@own_process
def test_a_forked_child_can_call(setup: Setup) -> None:
    """Although the parent's calls, and the lock, may be anywhere at the fork."""
    # Python 3.12 warns of what is tested here.
    warnings.simplefilter("ignore", DeprecationWarning)
    fault, app = start(setup)
    session = app.open()
    room = ctypes.create_string_buffer(8)
    fault.on("C_Logout", hang="before")
    hanging = Thread(lambda: app("C_Logout", session))
    fault.wait_until_hanging()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            app("C_GenerateRandom", session, room, 8)

    loading = Thread(load)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            idle = fault.inside() == 0
            # The real module's locks are its own affair.
            fault.on("C_GetInfo", answer=CKR.DEVICE_REMOVED)
            answered = app("C_GetInfo", room) == CKR.DEVICE_REMOVED
            os._exit(0 if idle and answered else 1)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    loading.result()
    assert fault.inside() == 1
    fault.clear()
    assert hanging.result() == CKR.OK


@own_process
def test_threads_keep_their_own_sessions_and_keys(setup: Setup) -> None:
    """Under load on 8 threads, every number leads to what its thread made there."""
    fault, app = start(setup, sessions=True, objects=True)
    keeper = app.open()
    app.login(keeper)
    until = time.monotonic() + 2
    ecb = mechanism(Mechanism.AES_ECB)
    fault.reset_counts()

    def load(name: int) -> int:
        rounds = 0
        while time.monotonic() < until or rounds <= 10:
            rounds += 1
            value = name.to_bytes(1, "big") + rounds.to_bytes(15, "big")
            session = app.open()
            key = app.create_aes(session, value)
            assert app.value(session, key) == value
            app.ok("C_EncryptInit", session, ecb, key)
            if rounds % 2:
                app.ok("C_DestroyObject", session, key)
            app.ok("C_CloseSession", session)
        return rounds

    def meddle() -> int:
        rounds = 0
        while time.monotonic() < until or rounds <= 10:
            rounds += 1
            fault.remove(fault.on("C_EncryptInit", delay_us=20))
            fault.token_info(label=str(rounds))
            fault.calls()
            fault.sessions()
        return rounds

    names = range(1, 9)
    threads = [Thread(functools.partial(load, name)) for name in names]
    threads.append(Thread(meddle))
    assert all(int(str(thread.result())) > 10 for thread in threads)
    assert fault.max_inside > 1
    assert fault.inside() == 0
    assert [session.number for session in fault.sessions()] == [keeper]
    assert app.find(keeper) == []
    assert app.create_aes(keeper, b"k" * 16) == 1


# Compiling


def append(file: Path, text: str) -> None:
    """Add a line to a copy of the sources."""
    file.write_text(file.read_text() + text)


def test_it_is_compiled_once(library: Path, tmp_path: Path) -> None:
    """The same sources are the same file, which is not touched again."""
    stamp = library.stat().st_mtime_ns
    assert build(library.parent) == library
    assert library.stat().st_mtime_ns == stamp
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    other = build(tmp_path)
    assert (other.name, other != library) == (library.name, True)


def test_changed_sources_are_another_file(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name holds a digest of what was compiled."""
    sources = tmp_path / "sources"
    shutil.copytree(building.HERE, sources)
    append(sources / "fault.h", "/* changed */\n")
    monkeypatch.setattr(building, "HERE", sources)
    changed = build(library.parent)
    assert changed != library
    assert changed.exists()
    assert library.exists()
    changed.unlink()


def test_a_compilers_complaint_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings are errors, and nothing half-done is left behind."""
    sources = tmp_path / "sources"
    shutil.copytree(building.HERE, sources)
    append(sources / "fault.c", "static int nobody_needs_me;\n")
    monkeypatch.setattr(building, "HERE", sources)
    with pytest.raises(RuntimeError, match="nobody_needs_me"):
        build(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_a_compiler_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the path nor as a package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(NoCompilerError, match="pip install ziglang"):
        build(tmp_path)


def test_the_package_from_the_index_compiles_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For machines without a compiler."""
    pytest.importorskip("ziglang")
    monkeypatch.setattr("shutil.which", lambda _: None)
    library = build(tmp_path)
    fault = FaultModule(library)
    assert fault.functions[-1] == "C_WaitForSlotEvent"


if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](Setup(*map(Path, sys.argv[2:])))
