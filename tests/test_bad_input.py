"""What cannot work is refused at the door, with what is wrong and what to do.

Most of it is refused by a pool that is not even open: nothing can have been sent.
"""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
import anyio.to_thread
import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass, TokenFlag

from faultmodule import CKR
from pkcs11_pool import (
    InvalidOption,
    InvalidType,
    InvalidURI,
    KeyFunctionNotPermitted,
    LoginState,
    ModuleError,
    ModuleInUse,
    PinLengthInvalid,
    PinRefused,
    PoolClosed,
    PoolState,
    TokenAmbiguous,
    TokenInUse,
    TokenNotFound,
    TokenPool,
    WouldBlockLoop,
    init_token,
    list_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenInfo
    from pkcs11_pool.softhsm import ThrowawayToken, TokenDirectory

_DATA = b"sixteen bytes---"


def _labelled(label: str) -> dict[str, Any]:
    """The option that names a token."""
    return {"token_label": label}


async def _enter(block: Any) -> object:
    """Enter a block, and leave it at once."""
    async with block as inner:
        return inner


# -- The module -------------------------------------------------------------------


async def test_a_module_that_is_missing(tmp_path: Path) -> None:
    """The message has the path and says that it does not exist."""
    path = tmp_path / "nothing.so"
    pool = TokenPool(path, **_labelled("demo"))
    with pytest.raises(ModuleError, match="does not exist") as caught:
        await pool.open()
    assert str(path) in str(caught.value)
    assert pool.state is PoolState.CLOSED


async def test_a_module_that_is_a_directory(tmp_path: Path) -> None:
    """The message says so, and asks for a file."""
    with pytest.raises(ModuleError, match=r"is a directory.*file"):
        await TokenPool(tmp_path, slot_id=0).open()


async def test_a_module_that_is_text(tmp_path: Path) -> None:
    """A file that the loader refuses is named, with the loader's reason."""
    path = tmp_path / "module.so"
    path.write_text("this is no module\n")
    with pytest.raises(ModuleError, match="cannot be loaded") as caught:
        await TokenPool(path, slot_id=0).open()
    assert str(path) in str(caught.value)
    assert str(caught.value).count(str(path)) <= 2


def _a_library() -> str:
    """A library of this process that is no Cryptoki module."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123  # no path of ours
        return next(line.split()[-1] for line in maps if "/libc" in line)


async def test_a_module_that_is_no_cryptoki_module() -> None:
    """A library without C_GetFunctionList is told so."""
    with pytest.raises(ModuleError, match="C_GetFunctionList"):
        await TokenPool(_a_library(), slot_id=0).open()
    with pytest.raises(ModuleError, match="C_GetFunctionList"):
        await list_tokens(_a_library())


async def test_a_bad_module_can_be_mended_and_opened(
    make_pool: MakePool, tmp_path: Path, token: ThrowawayToken
) -> None:
    """A path that failed is tried anew by the next pool."""
    path = tmp_path / "module.so"
    with pytest.raises(ModuleError):
        await make_pool(module=path).open()
    path.symlink_to(token.module)
    async with make_pool(module=path) as pool:
        assert pool.state is PoolState.READY


def _entries(path: Path) -> tuple[Callable[..., int], Callable[..., int]]:
    """C_Initialize and C_Finalize of a module, as other code would find them."""
    listed = ctypes.POINTER(ctypes.c_void_p * 3)()
    assert ctypes.CDLL(str(path)).C_GetFunctionList(ctypes.byref(listed)) == 0
    function = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)
    # The version stands in the place of the first pointer.
    _, initialize, finalize = listed.contents
    return function(initialize or 0), function(finalize or 0)


async def test_a_module_initialised_by_others_is_in_use(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It is ModuleInUse with what to do; finalised there, it opens here."""
    initialize, finalize = _entries(fault.path)
    assert initialize(None) == 0
    try:
        pool = make_pool(module=fault.path)
        with pytest.raises(ModuleInUse, match=r"pool\.lib"):
            await pool.open()
        assert pool.state is PoolState.CLOSED
        with pytest.raises(ModuleInUse):
            await list_tokens(fault.path)
        # It is the others' to finalise.
        assert fault.count("C_Finalize") == 0
    finally:
        assert finalize(None) == 0
    async with make_pool(module=fault.path) as pool:
        assert pool.login_state is LoginState.USER


_TAKEN = """
import asyncio, sys
import pkcs11
from pkcs11_pool import ModuleInUse, TokenPool
library = pkcs11.lib(sys.argv[1])
async def main():
    try:
        async with TokenPool(sys.argv[1], token_label="demo"):
            print("> opened")
    except ModuleInUse as error:
        print("> in use:", error)
asyncio.run(main())
print(">", [token.label for token in library.get_tokens() if token.label == "demo"])
"""


def test_a_module_in_use_by_python_pkcs11_itself(token: ThrowawayToken) -> None:
    """Code that called pkcs11.lib() keeps its module, and the pool says what to do."""
    done = subprocess.run(
        [sys.executable, "-c", _TAKEN, str(token.module)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    # Log events stand between.
    first, second = (o for o in done.stdout.splitlines() if o.startswith("> "))
    assert first.startswith("> in use: ")
    assert "pool.lib" in first
    assert second == "> ['demo']"


# -- The token --------------------------------------------------------------------


async def test_no_such_token_lists_what_is_there(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """The message has what was wanted, and the label and serial of what there is."""
    pool = make_pool(**_labelled("dmeo"))
    with pytest.raises(TokenNotFound) as caught:
        await pool.open()
    assert isinstance(caught.value, pkcs11.NoSuchToken)
    text = str(caught.value)
    assert "dmeo" in text
    assert "'demo'" in text
    assert token.serial.decode() in text
    assert pool.state is PoolState.CLOSED


async def test_each_way_to_name_a_token_must_match(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """A right label does not make up for a wrong serial or slot."""
    async with make_pool() as pool:
        slot = pool.token.slot_id
    for wrong in ({"token_serial": b"0"}, {"slot_id": slot + 1}):
        with pytest.raises(TokenNotFound):
            await make_pool(**wrong).open()
    right = {"token_serial": token.serial, "slot_id": slot}
    async with make_pool(**right) as pool:
        assert pool.token.serial == token.serial


async def test_two_tokens_that_match_are_ambiguous(
    make_pool: MakePool, token_directory: TokenDirectory, token: ThrowawayToken
) -> None:
    """The message lists both, and says what tells them apart."""
    other = token_directory.add_token(token.label)
    pool = make_pool()
    with pytest.raises(TokenAmbiguous, match="token_serial") as caught:
        await pool.open()
    assert isinstance(caught.value, pkcs11.MultipleTokensReturned)
    assert token.serial.decode() in str(caught.value)
    assert other.serial.decode() in str(caught.value)
    assert pool.state is PoolState.CLOSED
    async with make_pool(token_serial=other.serial) as pool:
        assert pool.token.serial == other.serial


async def test_a_token_in_use_names_the_first_pool(
    make_pool: MakePool, token: ThrowawayToken, tmp_path: Path
) -> None:
    """One process has one pool per token; by another path it is the same module."""
    link = tmp_path / "module.so"
    link.symlink_to(token.module)
    async with make_pool(name="signing service") as first:
        for module in (token.module, link):
            second = make_pool(module=module)
            with pytest.raises(TokenInUse, match="signing service"):
                await second.open()
            assert second.state is PoolState.CLOSED
        assert len(await first.generate_random(64)) == 8
        assert first.login_state is LoginState.USER
    async with make_pool(name="second") as pool:
        assert pool.state is PoolState.READY


async def test_two_tokens_of_one_module_have_a_pool_each(
    make_pool: MakePool, token_directory: TokenDirectory, token: ThrowawayToken
) -> None:
    """The module is shared, and the one that closes last finalises it."""
    token_directory.add_token("other")
    async with make_pool() as first:
        async with make_pool(**_labelled("other")) as second:
            assert first.lib is second.lib
            await first.logout()
            assert second.login_state is LoginState.USER
        assert len(await first.generate_random(64)) == 8
        await first.login()
    assert token.label == "demo"


# -- Wrong values -----------------------------------------------------------------


async def _nothing() -> None:
    return None


_OPTIONS: dict[str, list[object]] = {
    "module": [None, 7, b"/m", "", "/m\0"],
    "token_label": [7, b"demo", "x" * 33],
    "token_serial": ["0", 7],
    "slot_id": ["0", -1, 1.5, True],
    "pin": [7, b"1234", "", ["1234"]],
    "max_sessions": ["8", 0, -1, 1.5, None, True],
    "timeout": ["1", -1, math.nan, True, b"1"],
    "max_waiting": ["1", -1, 1.5, True],
    "open_timeout": ["1", -1, math.nan],
    "close_timeout": ["1", -1, math.nan, None],
    "recovery_timeout": ["1", -1, math.nan, None],
    "handle_max_age": ["1", -1, math.nan],
    "init_reserved": [7, ["x"]],
    "serialize": ["yes", 1, 0],
    "rw_sessions_only": ["yes", 1, None],
    "login_per_session": ["yes", 1, None],
    "login_ignored": ["yes", 1, None],
    "session_max_idle": ["1", -1, 0, math.nan, True],
    "name": [7, b"x"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}={value!r}"[:60])
        for name, values in _OPTIONS.items()
        for value in values
    ],
)
def test_a_wrong_option_of_the_pool_is_named(name: str, value: object) -> None:
    """The constructor refuses it, and the message has its name."""
    options: dict[str, Any] = {"module": "/m", "slot_id": 0, name: value}
    with pytest.raises(InvalidOption, match=name):
        TokenPool(options.pop("module"), **options)


def test_a_pool_without_a_token_is_told_how_to_name_one() -> None:
    """Label, serial and slot are all missing."""
    with pytest.raises(InvalidOption, match=r"token_label.*token_serial.*slot_id"):
        TokenPool("/m")


def test_an_unknown_option_is_a_type_error() -> None:
    """As with every Python function."""
    with pytest.raises(TypeError, match="max_session"):
        TokenPool("/m", slot_id=0, max_session=3)  # type: ignore[call-arg]


_URIS: dict[str, object] = {
    "no text": 7,
    "another scheme": "https://example.org",
    "no module": "pkcs11:token=demo",
    "no token": "pkcs11:?module-path=/m",
    "no value": "pkcs11:token?module-path=/m",
    "twice": "pkcs11:token=a;token=b?module-path=/m",
    "slot": "pkcs11:slot-id=one?module-path=/m",
    "empty query": "pkcs11:token=demo?",
    "two sources": "pkcs11:token=demo?module-path=/m&pin-value=1&pin-source=/p",
    "a program": "pkcs11:token=demo?module-path=/m&pin-source=|cat",
    "no UTF-8": "pkcs11:token=%FF?module-path=/m",
    "PIN no UTF-8": "pkcs11:token=demo?module-path=/m&pin-value=%FF",
    "bad escape": "pkcs11:token=%ZZ?module-path=/m",
}


@pytest.mark.parametrize("uri", _URIS)
def test_a_wrong_uri_is_refused(uri: str) -> None:
    """It is InvalidURI or, where an option is missing, InvalidOption."""
    with pytest.raises(InvalidOption) as caught:
        TokenPool.from_uri(_URIS[uri])  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    if uri not in ("no token", "a program"):
        assert isinstance(caught.value, InvalidURI)


@pytest.mark.parametrize("name", ["token", "serial", "model", "manufacturer"])
async def test_each_part_of_a_uri_must_match(
    make_pool: MakePool, token: ThrowawayToken, name: str
) -> None:
    """All that a URI says of the token: with its own words it opens, else not."""
    async with make_pool() as pool:
        info = pool.token
    told = {
        "token": info.label,
        "serial": info.serial.decode(),
        "model": info.model,
        "manufacturer": info.manufacturer,
    }

    def uri(parts: dict[str, str]) -> str:
        path = ";".join(f"{key}={quote(value)}" for key, value in parts.items())
        return f"pkcs11:{path}?module-path={quote(str(token.module))}"

    async with TokenPool.from_uri(uri(told)) as pool:
        assert pool.token == info
    with pytest.raises(TokenNotFound, match="other"):
        await TokenPool.from_uri(uri(told | {name: "other"})).open()


_WRONG_CALLS: dict[str, Callable[[Any], Any]] = {
    "run: no function": lambda p: p.run(7),
    "run: rw": lambda p: p.run(print, rw="yes"),
    "run: repeat": lambda p: p.run(print, repeat=1),
    "key: nothing": lambda p: p.key(),
    "key: label": lambda p: p.key(label=7),
    "key: id": lambda p: p.key(id="7"),
    "key: class": lambda p: p.key(label="x", object_class="private"),
    "key: type": lambda p: p.key(label="x", key_type="AES"),
    "find: template": lambda p: p.find([7]),
    "find: attribute": lambda p: p.find({"label": "x"}),
    "find: value": lambda p: p.find({Attribute.LABEL: object()}),
    "digest: data": lambda p: p.digest(7, mechanism=Mechanism.SHA256),
    "digest: items": lambda p: p.digest([7], mechanism=Mechanism.SHA256),
    "digest: mapping": lambda p: p.digest({b"x": 1}, mechanism=Mechanism.SHA256),
    "digest: mechanism": lambda p: p.digest(b"x", mechanism="SHA256"),
    "digest: no mechanism": lambda p: p.digest(b"x", mechanism=None),
    "random: text": lambda p: p.generate_random("8"),
    "random: none": lambda p: p.generate_random(0),
    "random: negative": lambda p: p.generate_random(-8),
    "random: no bytes": lambda p: p.generate_random(7),
    "random: bool": lambda p: p.generate_random(nbits=True),
    "seed: text": lambda p: p.seed_random("seed"),
    "seed: number": lambda p: p.seed_random(8),
    "seed: empty": lambda p: p.seed_random(b""),
    "generate_key: type": lambda p: p.generate_key("AES", 128, store=True),
    "generate_key: length": lambda p: p.generate_key(KeyType.AES, "128", store=True),
    "generate_key: no length": lambda p: p.generate_key(KeyType.AES, 0, store=True),
    "generate_key: id": lambda p: p.generate_key(KeyType.AES, 128, id="7", store=True),
    "generate_key: label": lambda p: p.generate_key(
        KeyType.AES, 128, label=b"x", store=True
    ),
    "generate_key: store": lambda p: p.generate_key(KeyType.AES, 128, store="yes"),
    "generate_key: capabilities": lambda p: p.generate_key(
        KeyType.AES, 128, capabilities="sign", store=True
    ),
    "generate_key: mechanism": lambda p: p.generate_key(
        KeyType.AES, 128, mechanism="AES", store=True
    ),
    "generate_key: template": lambda p: p.generate_key(
        KeyType.AES, 128, template=[], store=True
    ),
    "generate_key: value": lambda p: p.generate_key(
        KeyType.AES, 128, template={Attribute.LABEL: 7}, store=True
    ),
    "generate_keypair: type": lambda p: p.generate_keypair("EC", store=True),
    "generate_keypair: curve": lambda p: p.generate_keypair(
        KeyType.EC, curve=7, store=True
    ),
    "generate_keypair: unknown curve": lambda p: p.generate_keypair(
        KeyType.EC, curve="secp007", store=True
    ),
    "generate_keypair: length": lambda p: p.generate_keypair(
        KeyType.RSA, "2048", store=True
    ),
    "generate_keypair: id": lambda p: p.generate_keypair(
        KeyType.RSA, 2048, id="7", store=True
    ),
    "generate_keypair: label": lambda p: p.generate_keypair(
        KeyType.RSA, 2048, label=7, store=True
    ),
    "generate_keypair: store": lambda p: p.generate_keypair(KeyType.RSA, 2048, store=1),
    "generate_keypair: capabilities": lambda p: p.generate_keypair(
        KeyType.RSA, 2048, capabilities=object(), store=True
    ),
    "generate_keypair: public": lambda p: p.generate_keypair(
        KeyType.RSA, 2048, public_template=[7], store=True
    ),
    "generate_keypair: private": lambda p: p.generate_keypair(
        KeyType.RSA, 2048, private_template={"x": 7}, store=True
    ),
    "create_object: empty": lambda p: p.create_object({}),
    "create_object: no template": lambda p: p.create_object(None),
    "create_object: no class": lambda p: p.create_object({Attribute.TOKEN: True}),
    "create_object: attribute": lambda p: p.create_object({"class": 1}),
    "session: rw": lambda p: _enter(p.session(rw="yes")),
    "officer: no PIN": lambda p: _enter(p.security_officer(None)),
    "officer: empty PIN": lambda p: _enter(p.security_officer("")),
    "officer: PIN": lambda p: _enter(p.security_officer(b"12345678")),
    "login: PIN": lambda p: p.login(7),
    "login: empty PIN": lambda p: p.login(""),
    "login: force": lambda p: p.login("1234", force="yes"),
    "set_pin: old": lambda p: p.set_pin(None, "1234"),
    "set_pin: new": lambda p: p.set_pin("1234", 7),
    "set_pin: empty": lambda p: p.set_pin("1234", ""),
    "sign: data": lambda p: p.key(label="x").sign(7),
    "sign: items": lambda p: p.key(label="x").sign([b"x", 7]),
    "sign: mechanism": lambda p: p.key(label="x").sign(b"x", mechanism="ECDSA"),
    "sign: format": lambda p: p.key(label="x").sign(b"x", signature_format="pem"),
    "sign: PIN": lambda p: p.key(label="x").sign(b"x", pin=7),
    "verify: data": lambda p: p.key(label="x").verify(7, b"s"),
    "verify: signature": lambda p: p.key(label="x").verify(b"x", "s"),
    "verify: mechanism": lambda p: p.key(label="x").verify(b"x", b"s", mechanism=7.0),
    "verify: format": lambda p: p.key(label="x").verify(
        b"x", b"s", signature_format=None
    ),
    "encrypt: data": lambda p: p.key(label="x").encrypt(7),
    "encrypt: mechanism": lambda p: p.key(label="x").encrypt(b"x", mechanism="AES"),
    "decrypt: data": lambda p: p.key(label="x").decrypt(7),
    "decrypt: mechanism": lambda p: p.key(label="x").decrypt(b"x", mechanism="AES"),
    "decrypt: PIN": lambda p: p.key(label="x").decrypt(b"x", pin=7),
    "wrap: key": lambda p: p.key(label="x").wrap_key("y"),
    "wrap: mechanism": lambda p: p.key(label="x").wrap_key(
        p.key(label="y"), mechanism="AES"
    ),
    "unwrap: class": lambda p: p.key(label="x").unwrap_key(
        "secret", KeyType.AES, b"x", store=True
    ),
    "unwrap: type": lambda p: p.key(label="x").unwrap_key(
        ObjectClass.SECRET_KEY, "AES", b"x", store=True
    ),
    "unwrap: data": lambda p: p.key(label="x").unwrap_key(
        ObjectClass.SECRET_KEY, KeyType.AES, "x", store=True
    ),
    "unwrap: id": lambda p: p.key(label="x").unwrap_key(
        ObjectClass.SECRET_KEY, KeyType.AES, b"x", id="7", store=True
    ),
    "unwrap: label": lambda p: p.key(label="x").unwrap_key(
        ObjectClass.SECRET_KEY, KeyType.AES, b"x", label=7, store=True
    ),
    "unwrap: store": lambda p: p.key(label="x").unwrap_key(
        ObjectClass.SECRET_KEY, KeyType.AES, b"x", store="yes"
    ),
    "derive: type": lambda p: p.key(label="x").derive_key("AES", 128, store=True),
    "derive: length": lambda p: p.key(label="x").derive_key(
        KeyType.AES, None, store=True
    ),
    "derive: label": lambda p: p.key(label="x").derive_key(
        KeyType.AES, 128, label=7, store=True
    ),
    "attributes: names": lambda p: p.key(label="x").attributes(["LABEL"]),
    "attributes: text": lambda p: p.key(label="x").attributes("LABEL"),
    "attributes: one": lambda p: p.key(label="x").attributes(Attribute.LABEL),
    "on: number": lambda p: p.key(label="x").on(7),
    "on: another pool": lambda p: p.key(label="x").on(TokenPool("/m", slot_id=1)),
}


@pytest.mark.parametrize("call", _WRONG_CALLS)
@pytest.mark.parametrize(
    "anyio_backend",
    [pytest.param(("asyncio", {"debug": True}), id="asyncio")],
    indirect=True,
)
async def test_a_wrong_argument_is_refused_at_the_door(call: str) -> None:
    """By InvalidOption, though the pool is not even open; its text says what to do."""
    pool = TokenPool("/m", slot_id=0)
    with pytest.raises(InvalidOption) as caught:
        # Some are refused before there is anything to await.
        await _WRONG_CALLS[call](pool)
    assert len(str(caught.value)) > 20


async def test_a_wrong_type_is_a_type_error_too(pool: TokenPool) -> None:
    """Whoever catches TypeError or ValueError, as Python's own, catches it."""
    with pytest.raises(InvalidType) as caught:
        await pool.generate_random("8")  # type: ignore[arg-type]
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)
    assert "str" in str(caught.value)


async def test_an_open_session_refuses_the_same(pool: TokenPool) -> None:
    """A PooledSession and the officer check at their doors, and go on afterwards."""
    async with pool.session() as session:
        with pytest.raises(InvalidOption):
            await session.create_object({})
        with pytest.raises(InvalidOption):
            await session.generate_random(7)
        with pytest.raises(InvalidOption):
            await session.info(timeout=-1)
        with pytest.raises(InvalidOption):
            await session.run(_COROUTINE_FUNCTIONS["function"])
        assert len(await session.generate_random(64)) == 8


async def test_the_officer_refuses_the_same(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """PINs that are none, and time limits that are none."""
    async with pool.security_officer(token.so_pin) as so:
        for pin in (None, 7, "", b"1234"):
            with pytest.raises(InvalidOption):
                await so.init_pin(pin)  # type: ignore[arg-type]
            with pytest.raises(InvalidOption):
                await so.set_pin(token.so_pin, pin)  # type: ignore[arg-type]
        with pytest.raises(InvalidOption):
            await so.init_pin("1234", timeout=-1)


_ODD: dict[str, Callable[[Any], Any]] = {
    "bytes by their number": lambda p: p.find({Attribute.ID: 10**9}),
    "a truth in words": lambda p: p.find({Attribute.EXTRACTABLE: "no"}),
    "no truth": lambda p: p.find({Attribute.TOKEN: None}),
    "a number in words": lambda p: p.find({Attribute.CLASS: "3"}),
    "a number that is none": lambda p: p.find({Attribute.VALUE_LEN: 16.0}),
    "a number that is too large": lambda p: p.find({Attribute.VALUE_LEN: 2**64}),
    "a label that is no text": lambda p: p.find({Attribute.LABEL: "tOp\ud800"}),
    "a template in a template": lambda p: p.find({Attribute.WRAP_TEMPLATE: bytes(24)}),
    "a key's label": lambda p: p.key(label="tOp\ud800"),
    "a new key's label": lambda p: p.generate_key(
        KeyType.AES, 128, store=True, label="tOp\ud800"
    ),
    "data": lambda p: p.digest("tOp\ud800", mechanism=Mechanism.SHA256),
    "a view": lambda p: p.digest(_released(), mechanism=Mechanism.SHA256),
    "a length": lambda p: p.generate_key(KeyType.AES, 2**70, store=True),
    "random numbers": lambda p: p.generate_random(2**40),
    "a mechanism": lambda p: p.digest(b"x", mechanism=10**5000),
}


def _released() -> memoryview:
    view = memoryview(bytearray(b"x"))
    view.release()
    return view


@pytest.mark.parametrize("odd", _ODD)
@pytest.mark.parametrize(
    "anyio_backend",
    [pytest.param(("asyncio", {"debug": True}), id="asyncio")],
    indirect=True,
)
async def test_an_odd_value_is_refused_at_the_door(odd: str) -> None:
    """What fuzzing found: zeros for bytes, true for "no", addresses of nothing."""
    with pytest.raises(InvalidOption) as caught:
        await _ODD[odd](TokenPool("/m", slot_id=0))
    assert "tOp" not in str(caught.value)


@pytest.mark.parametrize("name", ["DSA", "DSA_SHA1", "RSA_X_509", "RSA_PKCS"])
async def test_a_mechanism_for_other_keys_never_reaches_the_module(
    make_pool: MakePool, fault: FaultModule, name: str
) -> None:
    """SoftHSM2 takes an EC key for a DSA key, and the process is gone."""
    async with make_pool(module=fault.path) as pool:
        _, key = await pool.generate_keypair(KeyType.EC, curve="secp256r1", store=True)
        for data in (bytes(32), [bytes(40_000), bytes(40_000)]):
            with pytest.raises(InvalidOption, match=r"for (RSA|DSA) keys"):
                await key.sign(data, mechanism=Mechanism[name])
        assert fault.count("C_SignInit") == 0


async def test_a_slot_is_not_taken_for_another(token: ThrowawayToken) -> None:
    """A number that is cut off on its way into C would be that of a token to wipe."""
    (info, *_) = await list_tokens(token.module)
    for slot_id in (info.slot_id + 2**64, 2**64, 10**5000):
        with pytest.raises(InvalidOption, match="slot"):
            await init_token(
                token.module, slot_id=slot_id, label="x", so_pin="87654321", wipe=True
            )
        with pytest.raises(InvalidOption, match="slot_id"):
            TokenPool(token.module, slot_id=slot_id)


async def test_a_wrong_mechanism_parameter_is_told(pool: TokenPool) -> None:
    """A parameter that cannot be packed is no riddle of the library below."""
    key = await pool.generate_key(KeyType.AES, 128, label="aes", store=True)
    for odd in (object(), [1], ({}, 2), "x", 7):
        with pytest.raises((InvalidOption, pkcs11.PKCS11Error)):
            await key.encrypt(_DATA, mechanism=Mechanism.AES_GCM, mechanism_param=odd)
        with pytest.raises((InvalidOption, pkcs11.PKCS11Error)):
            await key.wrap_key(
                key, mechanism=Mechanism.AES_ECB_ENCRYPT_DATA, mechanism_param=odd
            )
    sealed = await pool.key(label="aes").encrypt(_DATA, mechanism_param=bytes(16))
    assert len(sealed) >= 16


# -- Time limits ------------------------------------------------------------------

_TIMED: dict[str, Callable[[TokenPool, Any], Any]] = {
    "run": lambda p, t: p.run(_no_session, timeout=t),
    "find": lambda p, t: p.find(timeout=t),
    "digest": lambda p, t: p.digest(b"x", mechanism=Mechanism.SHA256, timeout=t),
    "generate_random": lambda p, t: p.generate_random(8, timeout=t),
    "seed_random": lambda p, t: p.seed_random(b"x", timeout=t),
    "generate_key": lambda p, t: p.generate_key(
        KeyType.AES, 128, store=True, timeout=t
    ),
    "generate_keypair": lambda p, t: p.generate_keypair(
        KeyType.EC, curve="secp256r1", store=True, timeout=t
    ),
    "create_object": lambda p, t: p.create_object(
        {
            Attribute.CLASS: ObjectClass.DATA,
            Attribute.TOKEN: True,
            Attribute.LABEL: "x",
        },
        timeout=t,
    ),
    "session": lambda p, t: _enter(p.session(timeout=t)),
    "security_officer": lambda p, t: _enter(p.security_officer("12345678", timeout=t)),
    "set_pin": lambda p, t: p.set_pin("1234", "1234", timeout=t),
    "sign": lambda p, t: p.key(label="x").sign(b"x", timeout=t),
    "verify": lambda p, t: p.key(label="x").verify(b"x", b"s", timeout=t),
    "encrypt": lambda p, t: p.key(label="x").encrypt(b"x", timeout=t),
    "decrypt": lambda p, t: p.key(label="x").decrypt(b"x", timeout=t),
    "wrap_key": lambda p, t: p.key(label="x").wrap_key(p.key(label="y"), timeout=t),
    "unwrap_key": lambda p, t: p.key(label="x").unwrap_key(
        ObjectClass.SECRET_KEY, KeyType.AES, b"x", store=True, timeout=t
    ),
    "derive_key": lambda p, t: p.key(label="x").derive_key(
        KeyType.AES, 128, store=True, timeout=t
    ),
    "attributes": lambda p, t: p.key(label="x").attributes(timeout=t),
    "public_key_der": lambda p, t: p.key(label="x").public_key_der(timeout=t),
    "destroy": lambda p, t: p.key(label="x").destroy(timeout=t),
}


def _no_session(_session: pkcs11.Session) -> str:
    return "done"


@pytest.mark.parametrize("call", _TIMED)
@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, "1", True, b"1"], ids=repr)
@pytest.mark.parametrize(
    "anyio_backend",
    [pytest.param(("asyncio", {"debug": True}), id="asyncio")],
    indirect=True,
)
async def test_a_wrong_time_limit_is_refused(call: str, timeout: object) -> None:
    """Negative, not a number, and of a wrong type, for each operation."""
    pool = TokenPool("/m", slot_id=0)
    with pytest.raises(InvalidOption, match="timeout"):
        await _TIMED[call](pool, timeout)


@pytest.mark.parametrize(
    "timeout", [math.inf, 1e300, 1.7e308, 10**12, 10**400], ids=["inf", *"1234"]
)
async def test_a_time_limit_that_never_comes_is_none(
    make_pool: MakePool, timeout: float
) -> None:
    """What passes for a number of seconds works, however large."""
    async with make_pool(timeout=timeout) as pool:
        assert len(await pool.generate_random(64)) == 8
        assert len(await pool.generate_random(64, timeout=timeout)) == 8
        async with pool.session(timeout=timeout) as session:
            assert len(await session.generate_random(64, timeout=timeout)) == 8
        await pool.logout()
        await pool.login()
        assert pool.login_state is LoginState.USER


# -- Functions for a worker -------------------------------------------------------


async def _coroutine_function(_session: pkcs11.Session) -> None:
    pytest.fail("it ran")


async def _async_generator_function(_session: pkcs11.Session) -> Any:
    yield pytest.fail("it ran")


class _AsyncCallable:
    async def __call__(self, _session: pkcs11.Session) -> None:
        pytest.fail("it ran")

    async def method(self, _session: pkcs11.Session) -> None:
        pytest.fail("it ran")


_COROUTINE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "function": _coroutine_function,
    "generator": _async_generator_function,
    "partial": functools.partial(_coroutine_function),
    "partial of partial": functools.partial(functools.partial(_coroutine_function)),
    "object": _AsyncCallable(),
    "method": _AsyncCallable().method,
    "partial of object": functools.partial(_AsyncCallable()),
}


@pytest.mark.parametrize("kind", _COROUTINE_FUNCTIONS)
async def test_a_coroutine_function_is_refused(
    make_pool: MakePool, fault: FaultModule, kind: str
) -> None:
    """It would run on no loop: the message says to await outside, nothing is sent."""
    async with make_pool(module=fault.path) as pool:
        fault.reset_counts()
        with pytest.raises(InvalidType, match="coroutine function"):
            await pool.run(_COROUTINE_FUNCTIONS[kind])
        async with pool.session() as session:
            with pytest.raises(InvalidType, match="coroutine function"):
                await session.run(_COROUTINE_FUNCTIONS[kind])
        assert fault.count("C_OpenSession") == 1  # the session's own


async def test_a_function_that_gives_a_coroutine_is_refused(pool: TokenPool) -> None:
    """It shows after the call only; what it gave is closed, so nothing warns."""
    gives: Callable[..., Any] = lambda _session: _nothing()  # noqa: E731  # as users do
    with pytest.raises(InvalidType, match="coroutine"):
        await pool.run(gives)
    assert await pool.run(_no_session) == "done"


# -- Keys -------------------------------------------------------------------------


async def test_the_wrong_half_of_a_pair_is_not_used(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Neither half has the other's attributes: refused here, and nothing is sent."""
    async with make_pool(module=fault.path) as pool:
        public, private = await pool.generate_keypair(
            KeyType.RSA, 2048, label="pair", store=True
        )
        sealed = bytes(256)
        await private.attributes()  # each number is known from here on
        await public.attributes()
        fault.reset_counts()
        refused: dict[str, Callable[[], Awaitable[object]]] = {
            "CKA_SIGN": lambda: public.sign(_DATA),
            "CKA_DECRYPT": lambda: public.decrypt(sealed),
            "CKA_UNWRAP": lambda: public.unwrap_key(
                ObjectClass.SECRET_KEY, KeyType.AES, sealed, store=True
            ),
            "CKA_VERIFY": lambda: private.verify(_DATA, sealed),
            "CKA_ENCRYPT": lambda: private.encrypt(_DATA),
            "CKA_WRAP": lambda: private.wrap_key(private),
        }
        for name, call in refused.items():
            with pytest.raises(KeyFunctionNotPermitted, match=name):
                await call()
        sent = ("Sign", "Decrypt", "Verify", "Encrypt")
        for function in [*(f"C_{name}Init" for name in sent), "C_UnwrapKey"]:
            assert fault.count(function) == 0
        assert fault.count("C_WrapKey") == 0


async def test_a_key_without_the_capability_is_not_used(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The message names the missing attribute, and nothing is sent with the key."""
    async with make_pool(module=fault.path) as pool:
        await pool.generate_key(
            KeyType.AES,
            128,
            label="aes",
            capabilities=MechanismFlag.ENCRYPT,
            store=True,
        )
        key, iv = pool.key(label="aes"), bytes(16)
        await key.encrypt(_DATA, mechanism_param=iv)
        fault.reset_counts()
        refused: dict[str, Callable[[], Awaitable[object]]] = {
            "CKA_DECRYPT": lambda: key.decrypt(_DATA, mechanism_param=iv),
            "CKA_SIGN": lambda: key.sign(_DATA, mechanism=Mechanism.AES_CMAC),
            "CKA_VERIFY": lambda: key.verify(
                _DATA, bytes(16), mechanism=Mechanism.AES_CMAC
            ),
            "CKA_WRAP": lambda: key.wrap_key(key, mechanism=Mechanism.AES_KEY_WRAP),
            "CKA_UNWRAP": lambda: key.unwrap_key(
                ObjectClass.SECRET_KEY,
                KeyType.AES,
                bytes(24),
                mechanism=Mechanism.AES_KEY_WRAP,
                store=True,
            ),
            "CKA_DERIVE": lambda: key.derive_key(
                KeyType.AES,
                128,
                mechanism=Mechanism.AES_ECB_ENCRYPT_DATA,
                mechanism_param=bytes(16),
                store=True,
            ),
        }
        for attribute, call in refused.items():
            with pytest.raises(KeyFunctionNotPermitted, match=attribute) as caught:
                await call()
            assert isinstance(caught.value, InvalidOption)
        sent = set(fault.counts())
        assert sent.isdisjoint(
            {
                *("C_DecryptInit", "C_SignInit", "C_VerifyInit"),
                *("C_WrapKey", "C_UnwrapKey", "C_DeriveKey"),
            }
        )


# -- The pool's life --------------------------------------------------------------


@pytest.mark.parametrize("call", _TIMED)
async def test_a_pool_that_is_not_open_does_nothing(
    make_pool: MakePool, fault: FaultModule, call: str
) -> None:
    """Before it is opened and after it is closed, every operation is PoolClosed."""
    pool = make_pool(module=fault.path)
    with pytest.raises(PoolClosed, match="not open"):
        await _TIMED[call](pool, 1)
    assert fault.counts() == {}
    async with pool:
        pass
    fault.reset_counts()
    with pytest.raises(PoolClosed, match="closed"):
        await _TIMED[call](pool, 1)
    assert fault.counts() == {}


async def test_a_pool_is_opened_once(make_pool: MakePool) -> None:
    """A second opening is PoolClosed: while it is open, and when it is closed."""
    pool = make_pool()
    async with pool:
        with pytest.raises(PoolClosed, match="once"):
            await pool.open()
        assert len(await pool.generate_random(64)) == 8
    with pytest.raises(PoolClosed, match="once"):
        await pool.open()
    await pool.close()
    assert pool.state is PoolState.CLOSED


async def test_a_pool_that_failed_to_open_is_not_opened_again(
    make_pool: MakePool,
) -> None:
    """It is closed: make a new one."""
    pool = make_pool(**_labelled("nobody"))
    with pytest.raises(TokenNotFound):
        await pool.open()
    with pytest.raises(PoolClosed, match="once"):
        await pool.open()


async def test_a_pool_closed_before_it_was_opened_stays_closed(
    make_pool: MakePool,
) -> None:
    """Closing what was never open is harmless."""
    pool = make_pool()
    await pool.close()
    assert pool.state is PoolState.CLOSED
    with pytest.raises(PoolClosed):
        await pool.open()


async def test_an_unopened_pool_knows_neither_token_nor_module(
    make_pool: MakePool,
) -> None:
    """Both are PoolClosed, and the rest of it can be looked at."""
    pool = make_pool()
    for name in ("token", "lib"):
        with pytest.raises(PoolClosed):
            getattr(pool, name)
    assert pool.state is PoolState.NEW
    assert pool.stats().sessions_open == 0
    assert "demo" in repr(pool)


async def test_a_blocking_call_on_a_loop_is_refused(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The loop would stand still: the message says what to do, and nothing is sent."""
    async with make_pool(module=fault.path) as pool:
        key = pool.key(label="x").sync
        fault.reset_counts()
        blocking: list[Callable[[], object]] = [
            lambda: pool.run_sync(_no_session),
            lambda: key.sign(b"x"),
            lambda: key.verify(b"x", b"s"),
            lambda: key.encrypt(b"x"),
            lambda: key.decrypt(b"x"),
            key.attributes,
            key.public_key_der,
            key.destroy,
        ]
        for call in blocking:
            with pytest.raises(WouldBlockLoop, match="await"):
                call()
        assert fault.counts() == {}
        assert await anyio.to_thread.run_sync(pool.run_sync, _no_session) == "done"


# -- list_tokens and init_token ---------------------------------------------------


async def _blank(module: Path) -> TokenInfo:
    """The slot that SoftHSM2 keeps for a new token."""
    (blank,) = (
        info
        for info in await list_tokens(module)
        if not info.flags & TokenFlag.TOKEN_INITIALIZED
    )
    return blank


async def test_list_tokens_tells_what_is_there(
    token_directory: TokenDirectory, token: ThrowawayToken
) -> None:
    """Label, serial, slot, flags, lengths of PINs and mechanisms of each."""
    other = token_directory.add_token("other")
    told = {info.label: info for info in await list_tokens(token.module)}
    assert told["demo"].serial == token.serial
    assert told["other"].serial == other.serial
    assert told["demo"].slot_id != told["other"].slot_id
    assert told["demo"].flags & TokenFlag.USER_PIN_INITIALIZED
    assert Mechanism.ECDSA in told["demo"].mechanisms
    assert (told["demo"].min_pin_len, told["demo"].max_pin_len) == (4, 255)


async def test_list_tokens_works_beside_a_pool(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """It shares the module, and does not finalise it under the pool."""
    async with make_pool() as pool:
        labels = [info.label for info in await list_tokens(token.module)]
        assert "demo" in labels
        assert pool.login_state is LoginState.USER
        assert len(await pool.generate_random(64)) == 8


async def test_a_blank_token_is_initialised(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """The information afterwards is the new token's, and a pool opens it."""
    blank = await _blank(token.module)
    info = await init_token(
        token.module,
        slot_id=blank.slot_id,
        label="fresh",
        so_pin="87654321",
        user_pin="4321",
    )
    assert info.label == "fresh"
    assert info.flags & TokenFlag.TOKEN_INITIALIZED
    assert info.flags & TokenFlag.USER_PIN_INITIALIZED
    async with make_pool(pin="4321", **_labelled("fresh")) as pool:
        assert pool.token.serial == info.serial
        assert pool.token.slot_id == info.slot_id
        async with pool.security_officer("87654321"):
            pass


async def test_a_blank_token_is_told_at_once(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """It is not down, and no wait makes it a token: init_token does."""
    blank = await _blank(token.module)
    pool = make_pool(token_label=None, slot_id=blank.slot_id)
    with pytest.raises(TokenNotFound, match="init_token"):
        await pool.open()
    assert pool.state is PoolState.CLOSED


async def test_a_token_without_a_users_pin_waits_for_the_officer(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """Without user_pin nobody can log in until so.init_pin."""
    blank = await _blank(token.module)
    info = await init_token(
        token.module, slot_id=blank.slot_id, label="fresh", so_pin="87654321"
    )
    assert not info.flags & TokenFlag.USER_PIN_INITIALIZED
    async with make_pool(pin=None, **_labelled("fresh")) as pool:
        with pytest.raises(pkcs11.PKCS11Error):
            await pool.login("4321")
        assert pool.state is PoolState.READY
        async with pool.security_officer("87654321") as so:
            await so.init_pin("4321")
        await pool.login()
        assert pool.login_state is LoginState.USER


async def test_a_used_token_is_not_initialised_by_accident(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """Without wipe=True it is refused with what it would destroy, and all is there."""
    async with make_pool() as pool:
        await pool.generate_key(KeyType.AES, 128, label="aes", store=True)
        slot = pool.token.slot_id
    with pytest.raises(InvalidOption, match=r"wipe=True.*destroys"):
        await init_token(token.module, slot_id=slot, label="demo", so_pin=token.so_pin)
    async with make_pool() as pool:
        assert len(await pool.find({Attribute.LABEL: "aes"})) == 1


async def test_a_wiped_token_has_no_objects_left(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """With wipe=True its objects are gone, and its label and user's PIN are new."""
    async with make_pool() as pool:
        await pool.generate_key(KeyType.AES, 128, label="aes", store=True)
        slot = pool.token.slot_id
    info = await init_token(
        token.module,
        slot_id=slot,
        label="again",
        so_pin=token.so_pin,
        user_pin="4321",
        wipe=True,
    )
    assert info.label == "again"
    async with make_pool(pin="4321", **_labelled("again")) as pool:
        assert await pool.find() == []


async def test_a_wipe_with_a_wrong_so_pin_destroys_nothing(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """It is PinRefused, and the objects and PINs are as before."""
    async with make_pool() as pool:
        await pool.generate_key(KeyType.AES, 128, label="aes", store=True)
        slot = pool.token.slot_id
    with pytest.raises(PinRefused):
        await init_token(
            token.module, slot_id=slot, label="demo", so_pin="99999999", wipe=True
        )
    async with make_pool() as pool:
        assert len(await pool.find({Attribute.LABEL: "aes"})) == 1


@pytest.mark.parametrize("which", ["so_pin", "user_pin"])
@pytest.mark.parametrize("pin", ["1", "7" * 256], ids=["short", "long"])
async def test_init_token_refuses_a_pin_of_a_wrong_length_before_it_wipes(
    make_pool: MakePool,
    fault: FaultModule,
    token: ThrowawayToken,
    which: str,
    pin: str,
) -> None:
    """Neither PIN is found wrong when the objects are gone already."""
    async with make_pool(module=fault.path) as pool:
        await pool.generate_key(KeyType.AES, 128, label="aes", store=True)
        slot = pool.token.slot_id
    pins = {"so_pin": token.so_pin, "user_pin": "4321", which: pin}
    with pytest.raises(PinLengthInvalid):
        await init_token(fault.path, slot_id=slot, label="demo", wipe=True, **pins)
    assert fault.count("C_InitToken") == 0
    async with make_pool(module=fault.path) as pool:
        assert len(await pool.find({Attribute.LABEL: "aes"})) == 1


async def test_a_token_of_an_open_pool_is_not_initialised(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """It is TokenInUse and names the pool, wipe or not."""
    async with make_pool(name="signing service") as pool:
        with pytest.raises(TokenInUse, match="signing service"):
            await init_token(
                token.module,
                slot_id=pool.token.slot_id,
                label="demo",
                so_pin=token.so_pin,
                wipe=True,
            )
        assert len(await pool.generate_random(64)) == 8


async def test_another_token_is_initialised_beside_a_pool(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """A pool on one token of the module is not disturbed."""
    async with make_pool() as pool:
        blank = await _blank(token.module)
        await init_token(
            token.module,
            slot_id=blank.slot_id,
            label="fresh",
            so_pin="87654321",
            user_pin="4321",
        )
        assert pool.login_state is LoginState.USER
        async with pool.session() as session:
            assert (await session.info()).rw is False


async def test_a_slot_that_is_not_there_lists_those_that_are(
    token: ThrowawayToken,
) -> None:
    """The numbers of slots are nothing that one can guess."""
    (demo,) = (t for t in await list_tokens(token.module) if t.label == "demo")
    with pytest.raises(TokenNotFound, match=str(demo.slot_id)):
        await init_token(
            token.module, slot_id=987654321, label="x", so_pin=token.so_pin
        )


_WRONG_INIT: dict[str, dict[str, object]] = {
    "module": {"module": 7},
    "slot": {"slot_id": "0"},
    "no slot": {"slot_id": -1},
    "label": {"label": 7},
    "empty label": {"label": ""},
    "long label": {"label": "é" * 17},
    "so_pin": {"so_pin": 12345678},
    "no so_pin": {"so_pin": ""},
    "user_pin": {"user_pin": b"1234"},
    "empty user_pin": {"user_pin": ""},
    "wipe": {"wipe": "yes"},
    "init_reserved": {"init_reserved": 7},
}


@pytest.mark.parametrize("wrong", _WRONG_INIT)
async def test_wrong_arguments_of_init_token_are_refused(wrong: str) -> None:
    """Before the module is even loaded."""
    options: dict[str, Any] = {
        "module": "/nowhere/module.so",
        "slot_id": 0,
        "label": "x",
        "so_pin": "12345678",
    }
    with pytest.raises(InvalidOption):
        await init_token(**(options | _WRONG_INIT[wrong]))


@pytest.mark.parametrize("wrong", [{"module": 7}, {"init_reserved": 7}], ids=str)
async def test_wrong_arguments_of_list_tokens_are_refused(
    wrong: dict[str, Any],
) -> None:
    """Before the module is even loaded."""
    with pytest.raises(InvalidOption):
        await list_tokens(**({"module": "/nowhere/module.so"} | wrong))


async def test_refused_input_counts_as_no_operation(pool: TokenPool) -> None:
    """What was refused at the door neither ran nor failed, nor holds a session."""
    before = pool.stats()
    for call in (
        lambda: pool.generate_random(7),
        lambda: pool.create_object({}),
        lambda: pool.generate_random(8, timeout=-1),
    ):
        with pytest.raises(InvalidOption):
            await call()
    after = pool.stats()
    assert after.operations_total == before.operations_total
    assert after.operations_failed == before.operations_failed
    assert after.sessions_open == before.sessions_open


async def test_a_key_that_the_token_refuses_for_its_capability_is_named(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Not every token tells a key's capabilities before it is used."""
    async with make_pool(module=fault.path) as pool:
        await pool.generate_key(KeyType.AES, 128, label="secret", store=True)
        fault.on("C_EncryptInit", answer=CKR.KEY_FUNCTION_NOT_PERMITTED)
        with pytest.raises(KeyFunctionNotPermitted, match="label='secret'") as caught:
            await pool.key(label="secret").encrypt(bytes(16), mechanism_param=bytes(16))
    assert isinstance(caught.value.__cause__, pkcs11.PKCS11Error)


async def test_what_python_pkcs11_says_without_a_word_gets_a_text(
    pool: TokenPool,
) -> None:
    """The code's name, and what to do where the name does not say it."""

    def write(session: Any) -> None:
        session.generate_key(KeyType.AES, 128, store=True)

    with pytest.raises(pkcs11.SessionReadOnly, match=r"CKR_SESSION_READ_ONLY.*rw=True"):
        await pool.run(write)
    async with pool.session() as session:
        with pytest.raises(pkcs11.SessionReadOnly, match="rw=True"):
            await session.generate_key(KeyType.AES, 128, store=True)
    with pytest.raises(pkcs11.TemplateIncomplete, match="curve="):
        await pool.generate_keypair(KeyType.EC, store=True)
