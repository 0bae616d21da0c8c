"""Every public coroutine and block: how it is called, and what must hold afterwards.

A case that changes the token says how often it did so; the tests compare that with
what the module was asked.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import pkcs11
from pkcs11 import KDF, Attribute, KeyType, Mechanism, ObjectClass

import pkcs11_pool
from keykit import IV, PIECE, awaited, hmac_sha256, sha256
from pkcs11_pool import LoginState, PoolState, faces, init_token, list_tokens

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import ModuleType

    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, PooledSession, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

NEW_PIN = "98765"
_BLOCK = b"sixteen bytes..."
_DATA = bytes(range(200))
_LARGE = [bytes(PIECE), bytes(PIECE), b"end"]
_CBC: dict[str, Any] = {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": IV}
_HMAC: dict[str, Any] = {"mechanism": Mechanism.SHA256_HMAC}
_WRAP: dict[str, Any] = {"mechanism": Mechanism.AES_KEY_WRAP}
_MADE = "made"
"""The label of what a case makes, and of nothing else."""
_GROUP = {
    Attribute.PRIME: bytes.fromhex(
        "85b83bb8528c460645863c9c2140a435e4990d64191347bdbd19e00bd4dd67b2956e28e3aeb8"
        "2b516d83e00e72b78d4eae95e92ee8f393a2c545499f4f2b752f"
    ),
    Attribute.BASE: b"\x02",
}


@dataclass
class Ground:
    """What a case stands on.

    Attributes:
        pool: An open pool on ``token``.
        calls: The pool, or an open session of it.
        other: A token that no pool is open on.
        blank: Another one, to be initialised again and again.
        state: What a case remembers.
    """

    pool: TokenPool
    calls: Any
    fault: FaultModule
    token: ThrowawayToken
    other: ThrowawayToken
    blank: ThrowawayToken
    make_pool: Callable[..., TokenPool]
    signer_der: bytes
    point: bytes
    wrapped: bytes
    session: PooledSession | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def key(self, label: str) -> KeyRef:
        """A key of the token, used where the case is run."""
        key = self.pool.key(label=label)
        return key if self.session is None else key.on(self.session)

    @property
    def store(self) -> dict[str, Any]:
        """Where what is made goes: into the token, or into the session."""
        return {"store": self.session is None, "label": _MADE}

    @property
    def template(self) -> dict[Attribute, Any]:
        """The same, as attributes."""
        return {Attribute.TOKEN: self.session is None, Attribute.LABEL: _MADE}


Step = "Callable[[Ground], Awaitable[Any]]"


@dataclass(frozen=True)
class Case:
    """One public coroutine, or block.

    Attributes:
        covers: The coroutines that it awaits, by class and name.
        call: Gives the coroutine.
        function: What it asks of the module: at most so often as uncancelled.
        waits: Its outcome is waited for.
        door: Cancelled before it begins, nothing is sent.
        most: How often it may ask for ``function``; None: as often as uncancelled.
        before: Made ready before each run.
        after: Looked at after each run; how often the change is there, or None.
        alone: It is no matter of an open pool.
        in_session: It is run in a session as well.
        asyncio_only: What it stands on knows no other loop.
    """

    covers: str
    call: Callable[[Ground], Coroutine[Any, Any, Any]]
    function: str = ""
    waits: bool = False
    door: bool = True
    most: int | None = None
    before: Callable[[Ground], Awaitable[Any]] | None = None
    after: Callable[[Ground], Awaitable[int | None]] | None = None
    alone: bool = False
    in_session: bool = False
    asyncio_only: bool = False

    def __str__(self) -> str:
        """The first of what it covers, for the names of tests."""
        return self.covers.split()[0]


# -- What is there afterwards -----------------------------------------------------


async def _made(ground: Ground) -> int:
    """How many objects with the label there are; none of them remains."""
    found = await ground.calls.find({Attribute.LABEL: _MADE})
    for made in found:
        await made.destroy()
    return len(found)


async def _pairs(ground: Ground) -> int:
    """The same for pairs, of which nobody may see one half."""
    halves = await _made(ground)
    assert halves % 2 == 0
    return halves // 2


async def _make_key(ground: Ground) -> None:
    """An object to be changed."""
    key = await ground.calls.generate_key(
        KeyType.AES, 128, id=b"before", **ground.store
    )
    ground.state["key"] = key if ground.session is None else key.on(ground.session)


async def _changed(ground: Ground) -> int:
    """Whether its ``CKA_ID`` is another."""
    (found,) = await ground.calls.find({Attribute.LABEL: _MADE})
    told = await found.attributes([Attribute.ID])
    await found.destroy()
    return int(told[Attribute.ID] != b"before")


async def _copied(ground: Ground) -> int:
    """How many there are beside the first."""
    return await _made(ground) - 1


async def _destroyed(ground: Ground) -> int:
    """Whether it is gone."""
    return 1 - await _made(ground)


async def _make_parameters(ground: Ground) -> None:
    """Domain parameters to make keys from."""
    group = await ground.calls.create_object(
        {
            Attribute.CLASS: ObjectClass.DOMAIN_PARAMETERS,
            Attribute.KEY_TYPE: KeyType.DH,
            **_GROUP,
            **ground.template,
        }
    )
    ground.state["group"] = (
        group if ground.session is None else group.on(ground.session)
    )


async def _parameters_and_pairs(ground: Ground) -> int:
    """Pairs, beside the parameters."""
    objects = await _made(ground) - 1
    assert objects % 2 == 0
    return objects // 2


async def _log_out(ground: Ground) -> None:
    await ground.pool.logout()


async def _logged_in(ground: Ground) -> None:
    """Whatever became of a login or a logout, the next ones work."""
    await ground.pool.login(ground.token.user_pin)
    assert ground.pool.login_state is LoginState.USER


async def _logged_in_by_source(ground: Ground) -> None:
    """The next login is sent for the PIN, whoever was sent for it and went."""
    await ground.pool.login()
    assert ground.pool.login_state is LoginState.USER


async def _pin_changed(ground: Ground) -> int:
    """Which PIN the user has; the pool knows it, and it is the old one afterwards."""
    old, new = ground.token.user_pin, NEW_PIN
    happened = [c for c in ground.fault.calls("C_SetPIN") if c.rv == 0]
    if happened:
        await ground.pool.set_pin(new, old)
    await ground.pool.logout()
    await ground.pool.login()
    return len(happened)


async def _officer_gone(ground: Ground) -> None:
    """The user is logged in again, with the PIN that is the pool's."""
    assert ground.pool.login_state is LoginState.USER
    pins = [c for c in ground.fault.calls("C_InitPIN") if c.rv == 0]
    assert len(pins) <= 1


async def _closed(ground: Ground) -> None:
    """It is closed, nothing of it is left, and the token can be had again."""
    pool: TokenPool = ground.state.pop("pool")
    assert pool.state in {PoolState.NEW, PoolState.READY, PoolState.CLOSED}
    await pool.close()
    assert pool.state is PoolState.CLOSED
    stats = pool.stats()
    assert (stats.sessions_open, stats.operations_running) == (0, 0)
    async with _another(ground) as again:
        assert await again.generate_random(64)


def _another(ground: Ground, **options: Any) -> TokenPool:
    other: dict[str, Any] = {
        "token_label": ground.other.label,
        "pin": ground.other.user_pin,
    }
    pool = ground.make_pool(**(other | options))
    ground.state["pool"] = pool
    return pool


async def _opened(ground: Ground) -> None:
    await _another(ground).open()
    await ground.state["pool"].generate_random(64)


async def _find_blank(ground: Ground) -> None:
    tokens = await list_tokens(ground.fault.path)
    (found,) = [t for t in tokens if t.label in {ground.blank.label, "one", "two"}]
    ground.state["slot"] = found.slot_id
    ground.state["label"] = "one" if found.label != "one" else "two"


async def _initialised(ground: Ground) -> int:
    tokens = await list_tokens(ground.fault.path)
    return len([t for t in tokens if t.label == ground.state["label"]])


# -- Calls that are more than one line --------------------------------------------


def _refused(*errors: type[Exception]) -> Any:
    """A coroutine whose error is what is expected of it."""

    def decorate(call: Any) -> Any:
        async def expected(ground: Ground) -> Any:
            try:
                return await call(ground)
            except errors:
                return None

        return expected

    return decorate


async def _session_block(ground: Ground) -> bytes:
    held: PooledSession | None = None
    try:
        async with ground.pool.session(rw=True) as held:
            await held.generate_key(KeyType.AES, 128, label=_MADE)
            return await held.digest(_DATA, mechanism=Mechanism.SHA256)
    finally:
        if held is not None:
            assert held.closed
            assert ground.pool.stats().sessions_leased == 0, "not closed by its block"


async def _officer_block(ground: Ground) -> None:
    token = ground.token
    async with ground.pool.security_officer(token.so_pin) as so:
        await so.init_pin(token.user_pin)
        await so.set_pin(token.so_pin, token.so_pin)
        await so.session.info()


async def _pool_block(ground: Ground) -> bytes:
    async with _another(ground) as pool:
        return await pool.digest(_DATA, mechanism=Mechanism.SHA256)


async def _read_stream(ground: Ground) -> bytes:
    key, found = ground.key("secret"), b""
    async with key.encrypt_stream(awaited(_LARGE), **_CBC) as stream:
        async for piece in stream:
            found += piece
    async with key.decrypt_stream([found], **_CBC) as stream:
        assert await anext(stream)
        lease = stream._feed._lease  # noqa: SLF001
        await stream.aclose()
        if ground.session is None:
            # It alone: the session of the stream before may be on its way yet.
            leases = ground.pool._engine._room.leases  # noqa: SLF001
            assert lease not in leases, "not closed yet"
    return found


async def _keep_stream(ground: Ground) -> None:
    # Neither closed nor forgotten: it must let the session go by itself.
    stream = ground.key("secret").encrypt_stream(awaited(_LARGE), **_CBC)
    ground.state["stream"] = stream
    async for piece in stream:
        assert piece


async def _keep_results(ground: Ground) -> None:
    results = ground.key("mac").sign_many([b"%d" % i for i in range(40)], **_HMAC)
    ground.state["results"] = results
    async for result in results:
        assert result


async def _sign_parts(ground: Ground) -> None:
    signature = await ground.key("mac").sign(awaited(_LARGE), **_HMAC)
    assert signature == hmac_sha256(b"".join(_LARGE))
    assert await ground.key("mac").verify(_LARGE, signature, **_HMAC)


async def _digest_parts(ground: Ground) -> None:
    found = await ground.calls.digest(awaited(_LARGE), mechanism=Mechanism.SHA256)
    assert found == sha256(b"".join(_LARGE))


async def _sign_many(ground: Ground) -> None:
    many = ground.key("mac").sign_many(awaited([b"%d" % i for i in range(9)]), **_HMAC)
    async with many as results:
        found = [signature async for signature in results]
    assert found == [hmac_sha256(b"%d" % i) for i in range(9)]


async def _map(ground: Ground) -> None:
    inside: list[int] = ground.state["inside"]
    begun: list[int] = ground.state["begun"]

    def work(session: pkcs11.Session, item: int) -> int:
        begun.append(item)
        inside.append(item)
        session.generate_random(64)
        inside.remove(item)
        return item

    results = ground.calls.map(work, range(7), rw=True, limit=4)
    async for result in results:
        if result == 5:
            break
    await results.aclose()


async def _map_begins(ground: Ground) -> None:
    ground.state.update(inside=[], begun=[])


async def _map_ended(ground: Ground) -> None:
    begun = ground.state["begun"]
    assert ground.state["inside"] == []
    assert len(set(begun)) == len(begun)


async def _lose_login(ground: Ground) -> None:
    ground.fault.lose_login()


async def _sign(ground: Ground) -> bytes:
    signature: bytes = await ground.key("mac").sign(_DATA, **_HMAC)
    assert signature == hmac_sha256(_DATA)
    return signature


async def _sign_each_time(ground: Ground) -> bytes:
    pin = ground.token.user_pin
    return await ground.key("each time").sign(
        _DATA, pin=pin, mechanism=Mechanism.SHA256_RSA_PKCS
    )


def _write(session: pkcs11.Session, template: dict[Attribute, Any]) -> None:
    session.create_object(
        {Attribute.CLASS: ObjectClass.DATA, Attribute.VALUE: b"run", **template}
    )


async def _encapsulate(ground: Ground) -> Any:
    return await ground.key("signer").encapsulate_key(
        KeyType.GENERIC_SECRET, 256, mechanism=Mechanism.ML_KEM, **ground.store
    )


async def _decapsulate(ground: Ground) -> Any:
    return await ground.key("signer").decapsulate_key(
        b"c", KeyType.GENERIC_SECRET, 256, mechanism=Mechanism.ML_KEM, **ground.store
    )


async def _generate_parameters(ground: Ground) -> Any:
    return await ground.calls.generate_domain_parameters(
        KeyType.DSA, 512, store=ground.session is None
    )


async def _parameters_refused(ground: Ground) -> None:
    # To look for primes takes the token long: it answers at once that it has none.
    ground.fault.on("C_GenerateKey", answer=0x006)


async def _local_parameters(ground: Ground) -> Any:
    group = await ground.calls.create_domain_parameters(KeyType.DH, _GROUP, local=True)
    return await group.generate_keypair(**ground.store)


def _both(name: str) -> str:
    return f"TokenPool.{name} PooledSession.{name}"


def _objects(name: str) -> str:
    return f"KeyRef.{name} ObjectRef.{name} ParametersRef.{name}"


CASES = [
    # Without a pool
    Case(
        "list_tokens",
        lambda g: list_tokens(g.fault.path),
        "C_GetMechanismList",
        waits=True,
        alone=True,
    ),
    Case(
        "init_token",
        lambda g: init_token(
            g.fault.path,
            slot_id=g.state["slot"],
            label=g.state["label"],
            so_pin=g.blank.so_pin,
            user_pin=g.blank.user_pin,
            wipe=True,
        ),
        "C_InitToken",
        waits=True,
        before=_find_blank,
        after=_initialised,
        alone=True,
    ),
    # The life of a pool
    Case(
        "TokenPool.open",
        lambda g: _another(g).open(),
        "C_Login",
        after=_closed,
        alone=True,
    ),
    Case(
        "TokenPool.close",
        lambda g: g.state["pool"].close(),
        "C_Logout",
        waits=True,
        door=False,
        before=_opened,
        after=_closed,
        alone=True,
    ),
    Case(
        "TokenPool.__aenter__ TokenPool.__aexit__",
        _pool_block,
        after=_closed,
        alone=True,
    ),
    # Login
    Case(
        "TokenPool.login",
        lambda g: g.pool.login(g.token.user_pin),
        "C_Login",
        before=_log_out,
        after=_logged_in,
    ),
    Case("TokenPool.logout", lambda g: g.pool.logout(), "C_Logout", after=_logged_in),
    Case(
        "TokenPool.set_pin",
        lambda g: g.pool.set_pin(g.token.user_pin, NEW_PIN),
        "C_SetPIN",
        waits=True,
        after=_pin_changed,
    ),
    Case(
        "SecurityOfficerBlock.__aenter__ SecurityOfficerBlock.__aexit__"
        " SecurityOfficer.init_pin SecurityOfficer.set_pin",
        _officer_block,
        after=_officer_gone,
    ),
    # Sessions
    Case("SessionBlock.__aenter__ SessionBlock.__aexit__", _session_block),
    Case(
        "PooledSession.info",
        lambda g: g.calls.info(),
        "C_GetSessionInfo",
        in_session=True,
    ),
    # Operations
    Case(
        _both("run"),
        lambda g: g.calls.run(_write, g.template, rw=True),
        "C_CreateObject",
        waits=True,
        after=_made,
        in_session=True,
    ),
    Case(
        _both("run"),
        lambda g: g.calls.run(lambda s: s.generate_random(64)),
        "C_GenerateRandom",
        in_session=True,
    ),
    Case(
        _both("digest"),
        lambda g: g.calls.digest(_DATA, mechanism=Mechanism.SHA256),
        "C_Digest",
        in_session=True,
    ),
    Case(_both("digest"), _digest_parts, "C_DigestUpdate", in_session=True),
    Case(
        _both("generate_random"),
        lambda g: g.calls.generate_random(64),
        "C_GenerateRandom",
        in_session=True,
    ),
    Case(
        _both("seed_random"),
        lambda g: g.calls.seed_random(_DATA),
        "C_SeedRandom",
        in_session=True,
    ),
    Case(_both("find"), lambda g: g.calls.find(), "C_FindObjects", in_session=True),
    Case(
        _both("generate_key"),
        lambda g: g.calls.generate_key(KeyType.AES, 128, **g.store),
        "C_GenerateKey",
        waits=True,
        after=_made,
        in_session=True,
    ),
    Case(
        _both("generate_keypair"),
        lambda g: g.calls.generate_keypair(KeyType.EC, curve="secp256r1", **g.store),
        "C_GenerateKeyPair",
        waits=True,
        after=_pairs,
        in_session=True,
    ),
    Case(
        _both("create_object"),
        lambda g: g.calls.create_object(
            {Attribute.CLASS: ObjectClass.DATA, Attribute.VALUE: b"x", **g.template}
        ),
        "C_CreateObject",
        waits=True,
        after=_made,
        in_session=True,
    ),
    Case(
        _both("create_domain_parameters"),
        lambda g: g.calls.create_domain_parameters(
            KeyType.DH, {**_GROUP, Attribute.LABEL: _MADE}, store=g.session is None
        ),
        "C_CreateObject",
        waits=True,
        after=_made,
        in_session=True,
    ),
    Case(
        _both("generate_domain_parameters"),
        _refused(pkcs11.FunctionFailed)(_generate_parameters),
        "C_GenerateKey",
        waits=True,
        before=_parameters_refused,
        in_session=True,
    ),
    Case(
        "LocalParameters.generate_keypair",
        _local_parameters,
        "C_GenerateKeyPair",
        waits=True,
        after=_pairs,
        in_session=True,
    ),
    Case(
        "ParametersRef.generate_keypair",
        lambda g: g.state["group"].generate_keypair(**g.store),
        "C_GenerateKeyPair",
        waits=True,
        before=_make_parameters,
        after=_parameters_and_pairs,
        in_session=True,
    ),
    # Many
    Case("Results.__anext__ Results.__aenter__ Results.__aexit__", _sign_many),
    Case("Results.__anext__", _keep_results),
    Case(
        "Results.aclose",
        _map,
        "C_GenerateRandom",
        waits=True,
        door=False,
        most=7,
        before=_map_begins,
        after=_map_ended,
    ),
    # Objects
    Case(
        _objects("attributes"),
        lambda g: g.key("mac").attributes([Attribute.LABEL]),
        "C_GetAttributeValue",
        in_session=True,
    ),
    Case(
        _objects("set_attributes"),
        lambda g: g.state["key"].set_attributes({Attribute.ID: b"after"}),
        "C_SetAttributeValue",
        waits=True,
        before=_make_key,
        after=_changed,
        in_session=True,
    ),
    Case(
        _objects("copy"),
        lambda g: g.state["key"].copy(),
        "C_CopyObject",
        waits=True,
        before=_make_key,
        after=_copied,
        in_session=True,
    ),
    Case(
        _objects("destroy"),
        lambda g: g.state["key"].destroy(),
        "C_DestroyObject",
        waits=True,
        before=_make_key,
        after=_destroyed,
        in_session=True,
    ),
    # Keys
    Case("KeyRef.sign", _sign, "C_Sign", in_session=True),
    # The PIN goes between C_SignInit and C_Sign.
    Case("KeyRef.sign", _sign_each_time, "C_Login", in_session=True),
    Case("KeyRef.sign KeyRef.verify", _sign_parts, in_session=True),
    Case(
        "KeyRef.verify",
        lambda g: g.key("mac").verify(_DATA, hmac_sha256(_DATA), **_HMAC),
        "C_Verify",
        in_session=True,
    ),
    Case(
        "KeyRef.encrypt",
        lambda g: g.key("secret").encrypt(_DATA, **_CBC),
        "C_Encrypt",
        in_session=True,
    ),
    Case(
        "KeyRef.decrypt",
        lambda g: g.key("secret").decrypt(_BLOCK, mechanism=Mechanism.AES_ECB),
        "C_Decrypt",
        in_session=True,
    ),
    Case(
        "CryptStream.__anext__ CryptStream.aclose"
        " CryptStream.__aenter__ CryptStream.__aexit__",
        _read_stream,
        in_session=True,
    ),
    Case("CryptStream.__anext__", _keep_stream, in_session=True),
    Case(
        "KeyRef.wrap_key",
        lambda g: g.key("secret").wrap_key(g.pool.key("plain"), **_WRAP),
        "C_WrapKey",
        in_session=True,
    ),
    Case(
        "KeyRef.unwrap_key",
        lambda g: g.key("secret").unwrap_key(
            ObjectClass.SECRET_KEY, KeyType.AES, g.wrapped, **_WRAP, **g.store
        ),
        "C_UnwrapKey",
        waits=True,
        after=_made,
        in_session=True,
    ),
    Case(
        "KeyRef.derive_key",
        lambda g: g.key("signer").derive_key(
            KeyType.AES, 256, mechanism_param=(KDF.NULL, None, g.point), **g.store
        ),
        "C_DeriveKey",
        waits=True,
        after=_made,
        in_session=True,
    ),
    Case(
        "KeyRef.encapsulate_key",
        _refused(pkcs11.FunctionNotSupported)(_encapsulate),
        waits=True,
        after=_made,
        in_session=True,
    ),
    Case(
        "KeyRef.decapsulate_key",
        _refused(pkcs11.FunctionNotSupported)(_decapsulate),
        waits=True,
        after=_made,
        in_session=True,
    ),
    Case(
        "KeyRef.public_key_der",
        lambda g: g.key("signer").public_key_der(),
        "C_GetAttributeValue",
        in_session=True,
    ),
]

ASYNC_PIN = [
    Case(
        "TokenPool.open",
        lambda g: _another(g, pin=awaited_pin(g.other.user_pin)).open(),
        "C_Login",
        after=_closed,
        alone=True,
    ),
    Case(
        "TokenPool.login",
        lambda g: g.pool.login(),
        "C_Login",
        before=_log_out,
        after=_logged_in_by_source,
    ),
    Case(
        "KeyRef.sign",
        _sign,
        "C_Sign",
        before=_lose_login,
        after=_logged_in_by_source,
    ),
    Case(
        "SecurityOfficerBlock.__aenter__ SecurityOfficerBlock.__aexit__",
        _officer_block,
        after=_logged_in_by_source,
    ),
]
"""The same with a PIN source that is awaited by whoever needs the login."""


def awaited_pin(pin: str) -> Callable[[], Awaitable[str]]:
    """A PIN source with checkpoints of its own."""

    async def source() -> str:
        for _ in range(2):
            await anyio.lowlevel.checkpoint()
        return pin

    return source


# -- What there is ----------------------------------------------------------------

_NOT_FOR_USERS = {
    "Calls": "what TokenPool and PooledSession have in common",
    "Making": "the base of that",
    "FreshCalls": "the base of TokenPool",
    "open_pool": "TokenPool.open",
    "close_pool": "TokenPool.close",
    "request": "inside whatever concerns the login",
    "KeyMaker": "a part of KeyRef",
    "Reader": "reads data inside an operation",
    "Task": "an operation before its data is read",
    "Feed": "a chain of calls inside an operation",
    "FaceWaiter": "how a caller waits",
    "consume": "an operation on data in parts",
    "fetch_pin": "what a caller does who is sent for the PIN",
    "checkpoint": "inside each coroutine",
    "ended": "inside each block",
    "aside": "a call on a thread of its own",
}


def public_coroutines() -> set[str]:
    """All that a user can await, found by looking."""
    found: set[str] = set()
    for info in pkgutil.iter_modules(faces.__path__):
        found |= coroutines_of(importlib.import_module(f"{faces.__name__}.{info.name}"))
    for name in pkcs11_pool.__all__:
        if _is_awaited(getattr(pkcs11_pool, name)):
            found.add(name)
    return found


def coroutines_of(module: ModuleType) -> set[str]:
    """Those of one module: its functions, and the methods of its classes."""
    found = set()
    for name, thing in vars(module).items():
        mine = getattr(thing, "__module__", "") == module.__name__
        if not mine or name.startswith("_") or name in _NOT_FOR_USERS:
            continue
        if _is_awaited(thing):
            found.add(name)
        elif inspect.isclass(thing):
            found |= {f"{name}.{method}" for method in _coroutines(thing)}
    return found


def _coroutines(thing: type) -> list[str]:
    return [
        name
        for name, member in inspect.getmembers(thing, _is_awaited)
        if not name.startswith("_") or name.startswith("__")
    ]


def _is_awaited(thing: object) -> bool:
    # What hides PINs is a plain function around a coroutine function.
    return callable(thing) and inspect.iscoroutinefunction(inspect.unwrap(thing))
