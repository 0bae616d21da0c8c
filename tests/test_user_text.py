"""The user's text on PKCS#11 sessions, sentence by sentence.

Every sentence of it that states a fact is quoted in the docstring of the test that
shows it, behind the word *Text*: here, or in the file that tests it anyway. The last
test counts them.
"""

from __future__ import annotations

import ast
import ctypes
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from faultmodule import CKR
from pkcs11_pool import (
    Access,
    LoginState,
    SessionClosed,
    SessionObjectDestroyed,
    SessionState,
    init_token,
)
from poolkit import settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import MakePool
    from faultmodule import Call, FaultModule
    from pkcs11_pool import KeyRef, PooledSession, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken, TokenDirectory

_BLOCK = b"sixteen bytes---"
_IV = bytes(16)
_CKU_SO, _CKU_USER = 0, 1


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments)


async def _make_pair(pool: TokenPool, label: str = "pair") -> KeyRef:
    await pool.generate_keypair(KeyType.EC, curve="secp256r1", label=label, store=True)
    return pool.key(label=label)


async def _sign(key: KeyRef) -> bytes:
    return await key.sign(bytes(32), mechanism=Mechanism.ECDSA)


async def _encrypt(key: KeyRef) -> bytes:
    return await key.encrypt(_BLOCK, mechanism_param=_IV)


def _data(label: str, *, private: bool) -> dict[Attribute, Any]:
    return {
        Attribute.CLASS: ObjectClass.DATA,
        Attribute.TOKEN: True,
        Attribute.PRIVATE: private,
        Attribute.LABEL: label,
        Attribute.VALUE: label.encode(),
    }


async def _labels(calls: TokenPool | PooledSession) -> set[str]:
    """The labels of all that is visible."""
    return {
        (await ref.attributes([Attribute.LABEL]))[Attribute.LABEL]
        for ref in await calls.find()
    }


# -- Sessions and their handles ---------------------------------------------------


async def test_a_session_connects_the_application_to_one_token(
    make_pool: MakePool, token_directory: TokenDirectory, token: ThrowawayToken
) -> None:
    """What is made in sessions with one token is not seen in those with another.

    Text: Session represents a logical connection between an application and a token.
    """
    other = token_directory.add_token("other")
    async with (
        make_pool() as first,
        make_pool(token_label=None, token_serial=other.serial) as second,
        first.session() as here,
        second.session() as there,
    ):
        assert (await here.info()).slot_id == first.token.slot_id
        assert (await there.info()).slot_id == second.token.slot_id
        assert first.token.slot_id != second.token.slot_id
        await first.create_object(_data("mine", private=True))
        assert await _labels(here) == {"mine"}
        assert await _labels(there) == set()
    assert token.label == "demo"


async def test_a_session_is_identified_by_its_handle(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The handle is a CK_ULONG, the module's own, and no other open session has it.

    Text: Every session is identified by its session handle, a `ulong` identifier
    stored inside `ISession` in Pkcs11Interop.
    """
    async with (
        make_pool(module=fault.path) as pool,
        pool.session() as first,
        pool.session() as second,
        pool.session(rw=True) as third,
    ):
        handles = [session.handle for session in (first, second, third)]
        for handle in handles:
            assert isinstance(handle, int)
            assert 0 < handle <= ctypes.c_ulong(-1).value
        assert len(set(handles)) == 3
        known = {session.number: session.rw for session in fault.sessions()}
        assert [known[handle] for handle in handles] == [False, False, True]


@pytest.mark.usefixtures("never_idle")
async def test_the_handle_says_which_session_a_function_acts_on(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """All calls of an operation in a session have that session's handle.

    Text: The session handle is passed to PKCS#11 functions as a parameter to specify
    which session the function should act on.
    """
    async with make_pool(module=fault.path) as pool:
        key = await _make_pair(pool)
        await _sign(key)
        async with pool.session() as first, pool.session() as second:
            # What is done behind a caller's back is not of these operations.
            await settled(pool)
            for session in (first, second, first):
                fault.clear_log()
                await _sign(key.on(session))
                calls = [(call.function, call.session) for call in fault.calls()]
                assert calls == [
                    ("C_SignInit", session.handle),
                    ("C_Sign", session.handle),
                ]


async def test_no_session_is_used_by_two_threads_at_once(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Tasks and threads that share a session take turns in it.

    Text: While a session can theoretically be used by multiple application threads
    with proper locking mechanisms, it is better to avoid this.
    """
    async with make_pool(module=fault.path) as pool:
        key = await _make_pair(pool)
        fault.latency_us = 300
        fault.clear_log()
        async with pool.session() as session:
            bound = key.on(session)

            def sign_blocking() -> bytes:
                return bound.sync.sign(bytes(32), mechanism=Mechanism.ECDSA)

            async with anyio.create_task_group() as group:
                for _ in range(10):
                    group.start_soon(_sign, bound)
                    group.start_soon(_sign, key)
                    group.start_soon(_in_thread, sign_blocking)
            shared = session.handle
        used: dict[int, list[Call]] = defaultdict(list)
        for call in fault.calls():
            if call.session is not None and call.function != "C_OpenSession":
                used[call.session].append(call)
        assert sum(call.function == "C_Sign" for call in used[shared]) == 20
        for calls in used.values():
            for before, after in pairwise(calls):
                assert before.ended_ns is not None
                assert before.ended_ns <= after.began_ns


async def test_each_operation_has_a_fresh_session(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A session is opened, used for one operation, and closed.

    Text: The safest approach is to create a new session for each cryptographic
    operation, regardless of the thread.
    """
    async with make_pool(module=fault.path) as pool:
        (anchor,) = fault.sessions()
        key = await _make_pair(pool)
        fault.clear_log()
        async with anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(_sign, key)
        await pool.close()
        operations = Counter(call.session for call in fault.calls("C_SignInit"))
        assert len(operations) == 60
        assert set(operations.values()) == {1}
        assert anchor.number not in operations
        closed = Counter(call.session for call in fault.calls("C_CloseSession"))
        assert set(closed.values()) == {1}
        assert set(operations) <= set(closed)


# -- Login ------------------------------------------------------------------------


async def test_by_default_only_public_objects_are_accessible(
    make_pool: MakePool,
) -> None:
    """Without a login the private object is not there.

    Text: By default, a session provides access only to public objects.
    """
    async with make_pool() as pool:
        await pool.create_object(_data("public", private=False))
        await pool.create_object(_data("private", private=True))
    async with make_pool(pin=None) as pool:
        assert await _labels(pool) == {"public"}
        async with pool.session() as reader, pool.session(rw=True) as writer:
            assert await _labels(reader) == {"public"}
            assert await _labels(writer) == {"public"}


async def test_private_objects_are_accessible_only_after_a_login(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """The same session sees the private object from the login to the logout.

    Text: Access to private objects is allowed only after a session login is performed.
    """
    async with make_pool() as pool:
        await pool.create_object(_data("private", private=True))
    async with make_pool(pin=None) as pool, pool.session() as session:
        assert await _labels(session) == set()
        await pool.login(token.user_pin)
        assert await _labels(session) == {"private"}
        await pool.logout()
        assert await _labels(session) == set()


async def test_two_types_of_users_log_in(
    make_pool: MakePool, fault: FaultModule, token: ThrowawayToken
) -> None:
    """Every C_Login of the pool is one of CKU_USER or of CKU_SO.

    Text: There are two basic user types that can perform a session login.
    """
    async with make_pool(module=fault.path, pin=None) as pool:
        users = fault.on("C_Login", delay_us=1, every=True, when_user=_CKU_USER)
        officers = fault.on("C_Login", delay_us=1, every=True, when_user=_CKU_SO)
        await pool.login(token.user_pin)
        assert (fault.fired(users), fault.fired(officers)) == (1, 0)
        assert pool.login_state is LoginState.USER
        async with pool.security_officer(token.so_pin):
            assert (fault.fired(users), fault.fired(officers)) == (1, 1)
        assert fault.count("C_Login") == fault.fired(users) + fault.fired(officers)
    assert {state.name for state in LoginState} == {"PUBLIC", "USER", "SO"}


async def test_the_normal_user_may_access_private_objects(pool: TokenPool) -> None:
    """The user reads a private object, and signs with a private key.

    Text: Normal user - `CKU_USER` - is allowed to access to private objects.
    """
    ref = await pool.create_object(_data("private", private=True))
    seen = await ref.attributes([Attribute.VALUE, Attribute.PRIVATE])
    assert seen == {Attribute.VALUE: b"private", Attribute.PRIVATE: True}
    key = await _make_pair(pool)
    signature = await _sign(key)
    assert await key.verify(bytes(32), signature, mechanism=Mechanism.ECDSA)


async def test_the_officer_initialises_tokens_and_resets_pins_but_sees_nothing_private(
    make_pool: MakePool, token: ThrowawayToken
) -> None:
    """A wrong SO PIN does neither; the right one does, and shows no private object.

    Text: Security officer - `CKU_SO` - is not allowed to access private objects but can
    perform token initialization and reset the PIN of Normal User.
    """
    async with make_pool() as pool:
        await pool.create_object(_data("private", private=True))
        await pool.create_object(_data("public", private=False))
        slot = pool.token.slot_id
        async with pool.security_officer(token.so_pin) as so:
            assert await _labels(so.session) == {"public"}
            await so.init_pin("reset")
    async with make_pool(pin="reset") as pool:
        assert await _labels(pool) == {"private", "public"}
    for so_pin in ("99999999", token.so_pin):
        initialise = init_token(
            token.module,
            slot_id=slot,
            label="demo",
            so_pin=so_pin,
            user_pin="again",
            wipe=True,
        )
        if so_pin != token.so_pin:
            with pytest.raises(pkcs11.PinIncorrect):
                await initialise
        else:
            await initialise
    async with make_pool(pin="again") as pool:
        assert await _labels(pool) == set()


def _open_another(session: pkcs11.Session) -> Any:
    return session.token.open()


def _state_of_another(module: ctypes.CDLL, handle: int) -> int:
    info = (ctypes.c_ulong * 4)()
    assert module.C_GetSessionInfo(ctypes.c_ulong(handle), info) == CKR.OK
    return info[1]


async def test_all_sessions_of_the_application_share_the_login(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """A session that other code opened, and that never logged in, follows the pool.

    Text: It is important to note that all sessions that an application has open with a
    token share the same login status.
    """
    module = ctypes.CDLL(str(token.module))
    other = await pool.run(_open_another)
    try:
        states = [_state_of_another(module, other.handle)]
        await pool.logout()
        states.append(_state_of_another(module, other.handle))
        await pool.login()
        states.append(_state_of_another(module, other.handle))
    finally:
        other.close()
    assert states == [
        SessionState.RO_USER_FUNCTIONS,
        SessionState.RO_PUBLIC_SESSION,
        SessionState.RO_USER_FUNCTIONS,
    ]
    # Closed by its own code: the pool's login is not touched.
    async with pool.session() as session:
        assert (await session.info()).state is SessionState.RO_USER_FUNCTIONS


# -- States -----------------------------------------------------------------------

_STATES = {
    SessionState.RO_PUBLIC_SESSION: (
        "The session is read-only and no user is logged in.",
        (
            "The application has read-only access to public token objects "
            "and read-write access to public session objects."
        ),
    ),
    SessionState.RO_USER_FUNCTIONS: (
        "The session is read-only and a normal user is logged in.",
        (
            "The application has read-only access to all token objects "
            "and read-write access to all session objects."
        ),
    ),
    SessionState.RW_PUBLIC_SESSION: (
        "The session is read-write and no user is logged in.",
        (
            "The application has read-write access to public token objects "
            "and read-write access to public session objects."
        ),
    ),
    SessionState.RW_USER_FUNCTIONS: (
        "The session is read-write and a normal user is logged in.",
        (
            "The application has read-write access to all token objects "
            "and read-write access to all session objects."
        ),
    ),
    SessionState.RW_SO_FUNCTIONS: (
        "The session is read-write and a security officer is logged in.",
        (
            "The application has read-write access to public token objects "
            "and read-write access to public session objects."
        ),
    ),
}
_ACCESS = {"read-only": Access.READ, "read-write": Access.READ_WRITE}
_WHO = {
    "no user": LoginState.PUBLIC,
    "a normal user": LoginState.USER,
    "a security officer": LoginState.SO,
}


@pytest.mark.parametrize("state", _STATES, ids=lambda state: state.name)
async def test_what_the_text_says_of_a_state_is_reached(
    pool: TokenPool, token: ThrowawayToken, state: SessionState
) -> None:
    """A session of the type in the text, with the text's user in, is in this state.

    Text: The session is read-only and no user is logged in.
    Text: The session is read-only and a normal user is logged in.
    Text: The session is read-write and no user is logged in.
    Text: The session is read-write and a normal user is logged in.
    Text: The session is read-write and a security officer is logged in.
    """
    said, _ = _STATES[state]
    read = re.fullmatch(r"The session is (\S+) and (.+) is logged in\.", said)
    assert read is not None
    rw, who = read[1] == "read-write", _WHO[read[2]]
    if who is LoginState.SO:
        async with pool.security_officer(token.so_pin) as so:
            assert (await so.session.info()).state is state
            assert so.session.rw is rw
        return
    if who is LoginState.PUBLIC:
        await pool.logout()
    async with pool.session(rw=rw) as session:
        assert (await session.info()).state is state


@pytest.mark.parametrize("state", _STATES, ids=lambda state: state.name)
def test_what_the_text_says_of_a_states_access_is_in_the_table(
    state: SessionState,
) -> None:
    """The sentence on each state says the same as its line; the token is tested there.

    Text: The application has read-only access to public token objects and read-write
    access to public session objects.
    Text: The application has read-only access to all token objects and read-write
    access to all session objects.
    Text: The application has read-write access to public token objects and read-write
    access to public session objects.
    Text: The application has read-write access to all token objects and read-write
    access to all session objects.
    """
    _, text = _STATES[state]
    said = re.findall(r"(\S+) access to (all|public) (token|session)", text)
    assert len(said) == 2
    for access, which, kind in said:
        token = kind == "token"
        private = _ACCESS[access] if which == "all" else Access.NONE
        assert state.access(token=token, private=False) is _ACCESS[access]
        assert state.access(token=token, private=True) is private


def test_each_state_gives_different_access() -> None:
    """Only the SO's is that of a public R/W session: what sets him apart are PINs.

    Text: Each session state provides different access levels to both session and token
    objects.
    """
    levels = defaultdict(set)
    for state in SessionState:
        row = tuple(
            state.access(token=token, private=private)
            for token in (False, True)
            for private in (False, True)
        )
        levels[row].add(state)
    same = [states for states in levels.values() if len(states) > 1]
    assert same == [{SessionState.RW_PUBLIC_SESSION, SessionState.RW_SO_FUNCTIONS}]
    assert len(levels) == 4


# -- Lifetime and visibility ------------------------------------------------------


async def test_all_threads_have_the_same_sessions_and_session_objects(
    pool: TokenPool,
) -> None:
    """Two plain threads, and an event loop of its own in a third, use one of each.

    Text: All threads of a given application have access to the same sessions and
    session objects.
    """
    async with pool.session() as session:
        secret = await session.generate_key(KeyType.AES, 128)
        expected = await _encrypt(secret)
        results: list[bytes] = []

        def use_object() -> None:
            for _ in range(10):
                result = secret.sync.encrypt(_BLOCK, mechanism_param=_IV)
                assert result == expected
                results.append(result)

        async def use_session() -> None:
            for _ in range(10):
                result = await _encrypt(secret.on(session))
                assert result == expected
                results.append(result)

        async with anyio.create_task_group() as group:
            group.start_soon(_in_thread, use_object)
            group.start_soon(_in_thread, use_object)
            group.start_soon(_in_thread, anyio.run, use_session)
            group.start_soon(use_session)
        assert results == [expected] * 40


@pytest.mark.usefixtures("never_idle")
async def test_closing_a_session_destroys_its_objects(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """They are gone from the token, refused here without a call; others' stay.

    Text: When a session is closed, any session objects created in that session are
    destroyed.
    """
    async with make_pool(module=fault.path) as pool, pool.session() as other:
        kept = await other.generate_key(KeyType.AES, 128, label="kept")
        async with pool.session() as owner:
            gone = await owner.generate_key(KeyType.AES, 128, label="gone")
            assert await _labels(other) == {"kept", "gone"}
        assert await _labels(other) == {"kept"}
        fault.reset_counts()
        with pytest.raises(SessionObjectDestroyed):
            await _encrypt(gone.on(other))
        assert fault.counts() == {}
        assert len(await _encrypt(kept)) >= 16
        with pytest.raises(SessionClosed):
            await owner.generate_random(8)


async def test_an_object_in_use_by_another_session_is_destroyed_all_the_same(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The owner lets the call inside finish; then the object is gone for its user.

    Text: This is true even for session objects being used by other sessions.
    """
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Encrypt", hang="before")
        results = []
        closed = anyio.Event()

        async with pool.session() as user:
            holds = anyio.Event()
            made: list[KeyRef] = []
            go = anyio.Event()

            async def own() -> None:
                async with pool.session() as owner:
                    made.append(await owner.generate_key(KeyType.AES, 128))
                    holds.set()
                    await go.wait()
                closed.set()

            async def use() -> None:
                results.append(await _encrypt(made[0].on(user)))

            async with anyio.create_task_group() as group:
                group.start_soon(own)
                await holds.wait()
                group.start_soon(use)
                await _in_thread(fault.wait_until_hanging, "C_Encrypt")
                go.set()
                await anyio.wait_all_tasks_blocked()
                assert not closed.is_set()
                with pytest.raises(SessionObjectDestroyed):
                    await _encrypt(made[0])
                fault.clear()
            assert len(results) == 1
            fault.reset_counts()
            with pytest.raises(SessionObjectDestroyed):
                await _encrypt(made[0].on(user))
            assert fault.counts() == {}


async def test_a_session_object_is_visible_through_any_session(
    pool: TokenPool,
) -> None:
    """Sessions of each kind find it and use it: opened before, after, and for once.

    Text: For example, if an application has multiple sessions open with a token and
    creates a session object using one of them, that session object is visible through
    any of the application's sessions.
    """
    async with pool.session(rw=True) as before, pool.session() as owner:
        secret = await owner.generate_key(KeyType.AES, 128, label="visible")
        expected = await _encrypt(secret.on(owner))
        async with pool.session() as after:
            for session in (before, owner, after):
                assert await _labels(session) == {"visible"}
                assert await _encrypt(secret.on(session)) == expected
        assert await _labels(pool) == {"visible"}
        assert await _encrypt(secret) == expected


async def test_the_object_ends_at_once_with_the_session_that_made_it(
    pool: TokenPool,
) -> None:
    """When the block of the owner has ended, no session finds it any more.

    Text: However, as soon as the session that created the object is closed, the object
    is destroyed.
    """
    async with pool.session() as other:
        for number in range(10):
            label = f"number {number}"
            async with pool.session() as owner:
                await owner.generate_key(KeyType.AES, 128, label=label)
                assert await _labels(other) == {label}
            assert await _labels(other) == await _labels(pool) == set()


# -- The same, below the pool -----------------------------------------------------

_CKO_SECRET_KEY, _CKK_GENERIC_SECRET, _CKM_SHA256_HMAC = 4, 0x10, 0x251
_CKF_SERIAL, _CKF_RW = 4, 2
_CKA = {"class": 0, "token": 1, "value": 0x11, "key_type": 0x100, "sign": 0x108}


class _RawAttribute(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_ulong),
        ("value", ctypes.c_void_p),
        ("length", ctypes.c_ulong),
    )


class _RawMechanism(ctypes.Structure):
    _fields_ = (
        ("mechanism", ctypes.c_ulong),
        ("parameter", ctypes.c_void_p),
        ("length", ctypes.c_ulong),
    )


class _Bare:
    """SoftHSM2 itself: neither the pool nor python-pkcs11 in between."""

    def __init__(self, module: ctypes.CDLL, slot: int) -> None:
        self._module = module
        self._slot = slot

    def call(self, function: str, *arguments: Any) -> int:
        """Call a function; a number is a CK_ULONG. Gives the return code."""
        given = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
        return int(getattr(self._module, function)(*given))

    def open(self) -> int:
        """Open a R/W session."""
        handle = ctypes.c_ulong()
        flags = _CKF_SERIAL | _CKF_RW
        code = self.call(
            "C_OpenSession", self._slot, flags, None, None, ctypes.byref(handle)
        )
        assert code == CKR.OK
        return handle.value

    def make_key(self, session: int) -> int:
        """Make a session object in a session: an HMAC key."""
        values = {
            "class": ctypes.c_ulong(_CKO_SECRET_KEY),
            "key_type": ctypes.c_ulong(_CKK_GENERIC_SECRET),
            "token": ctypes.c_ubyte(0),
            "sign": ctypes.c_ubyte(1),
            "value": ctypes.create_string_buffer(_BLOCK * 2, 32),
        }
        template = (_RawAttribute * len(values))()
        for item, (name, value) in zip(template, values.items(), strict=True):
            item.type, item.value = _CKA[name], ctypes.addressof(value)
            item.length = ctypes.sizeof(value)
        handle = ctypes.c_ulong()
        code = self.call(
            "C_CreateObject", session, template, len(values), ctypes.byref(handle)
        )
        assert code == CKR.OK
        return handle.value

    def sign_init(self, session: int, key: int) -> int:
        """Begin an HMAC."""
        mechanism = _RawMechanism(_CKM_SHA256_HMAC, None, 0)
        return self.call("C_SignInit", session, ctypes.byref(mechanism), key)

    def sign(self, session: int) -> tuple[int, bytes]:
        """Finish it: the return code and the HMAC."""
        room, length = ctypes.create_string_buffer(64), ctypes.c_ulong(64)
        code = self.call(
            "C_Sign", session, _BLOCK, len(_BLOCK), room, ctypes.byref(length)
        )
        return code, room.raw[: length.value]


@pytest.fixture
def bare(token: ThrowawayToken) -> Iterator[_Bare]:
    """The module as any C program has it, with the user logged in."""
    module = ctypes.CDLL(str(token.module))
    assert module.C_Initialize(None) == CKR.OK
    try:
        slots, count = (ctypes.c_ulong * 16)(), ctypes.c_ulong(16)
        assert module.C_GetSlotList(1, slots, ctypes.byref(count)) == CKR.OK
        info = ctypes.create_string_buffer(512)
        for slot in slots[: count.value]:
            assert module.C_GetTokenInfo(ctypes.c_ulong(slot), info) == CKR.OK
            if info.raw.startswith(token.label.encode().ljust(32)):
                found = _Bare(module, slot)
        keeper, pin = found.open(), token.user_pin.encode()
        assert found.call("C_Login", keeper, _CKU_USER, pin, len(pin)) == CKR.OK
        yield found
    finally:
        assert module.C_Finalize(None) == CKR.OK


def test_below_the_pool_a_session_object_is_used_from_another_session(
    bare: _Bare,
) -> None:
    """A handle from one session is good in the other, with the same result."""
    owner, user = bare.open(), bare.open()
    key = bare.make_key(owner)
    results = []
    for session in (owner, user):
        assert bare.sign_init(session, key) == CKR.OK
        results.append(bare.sign(session))
    assert results[0] == results[1]
    assert results[0][0] == CKR.OK
    assert len(results[0][1]) == 32


def test_below_the_pool_the_owners_end_destroys_an_object_in_use(bare: _Bare) -> None:
    """What another session has begun it may finish; it can begin nothing new.

    A signature is under way in one session when the owner of its key is closed:
    SoftHSM2, NSS and opencryptoki all copy the key when the operation begins.
    """
    owner, user = bare.open(), bare.open()
    key = bare.make_key(owner)
    assert bare.sign_init(user, key) == CKR.OK
    expected = bare.sign(user)
    assert bare.sign_init(user, key) == CKR.OK
    assert bare.call("C_CloseSession", owner) == CKR.OK
    assert bare.sign(user) == expected
    refused = bare.sign_init(user, key)
    assert refused in (CKR.OBJECT_HANDLE_INVALID, CKR.KEY_HANDLE_INVALID)
    assert bare.call("C_DestroyObject", user, key) == CKR.OBJECT_HANDLE_INVALID


def test_below_the_pool_other_sessions_objects_stay(bare: _Bare) -> None:
    """Closing one session ends its own objects, and no others."""
    first, second, user = bare.open(), bare.open(), bare.open()
    gone, kept = bare.make_key(first), bare.make_key(second)
    assert bare.call("C_CloseSession", first) == CKR.OK
    assert bare.sign_init(user, gone) != CKR.OK
    assert bare.sign_init(user, kept) == CKR.OK
    assert bare.sign(user)[0] == CKR.OK


# -- The text is whole ------------------------------------------------------------

_FACTS = """
Session represents a logical connection between an application and a token.
Every session is identified by its session handle, a `ulong` identifier stored inside `ISession` in Pkcs11Interop.
The session handle is passed to PKCS#11 functions as a parameter to specify which session the function should act on.
While a session can theoretically be used by multiple application threads with proper locking mechanisms, it is better to avoid this.
The safest approach is to create a new session for each cryptographic operation, regardless of the thread.
There are two basic session types.
Provides read-only access to token objects and read-write access to session objects.
Provides read-write access to token objects and read-write access to session objects.
By default, a session provides access only to public objects.
Access to private objects is allowed only after a session login is performed.
There are two basic user types that can perform a session login.
Normal user - `CKU_USER` - is allowed to access to private objects.
Security officer - `CKU_SO` - is not allowed to access private objects but can perform token initialization and reset the PIN of Normal User.
It is important to note that all sessions that an application has open with a token share the same login status.
When an application's session logs into a token, all of that application's sessions with that token become logged in.
Conversely, when an application's session logs out of a token, all of that application's sessions with that token become logged out.
Session can be in one of the five states, depending on the session type and whether a login has been performed.
The session is read-only and no user is logged in.
The application has read-only access to public token objects and read-write access to public session objects.
The session is read-only and a normal user is logged in.
The application has read-only access to all token objects and read-write access to all session objects.
The session is read-write and no user is logged in.
The application has read-write access to public token objects and read-write access to public session objects.
The session is read-write and a normal user is logged in.
The application has read-write access to all token objects and read-write access to all session objects.
The session is read-write and a security officer is logged in.
Each session state provides different access levels to both session and token objects.
The following table summarizes session states and their characteristics.
All threads of a given application have access to the same sessions and session objects.
When a session is closed, any session objects created in that session are destroyed.
This is true even for session objects being used by other sessions.
For example, if an application has multiple sessions open with a token and creates a session object using one of them, that session object is visible through any of the application's sessions.
However, as soon as the session that created the object is closed, the object is destroyed.
"""  # noqa: E501  # the user's lines; what ends with a colon there ends with a dot


def test_every_sentence_of_the_text_has_its_test() -> None:
    """Each is quoted in the docstring of exactly one test of this directory."""
    quoted: Counter[str] = Counter()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_test = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if is_test and node.name.startswith("test_"):  # type: ignore[attr-defined]
                text = ast.get_docstring(node) or ""  # type: ignore[arg-type]
                for sentence in text.split("Text:")[1:]:
                    quoted[" ".join(sentence.split("\n\n")[0].split())] += 1
    facts = _FACTS.strip().splitlines()
    assert len(facts) == 33
    assert quoted == Counter(facts)
