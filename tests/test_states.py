"""The five states of a session, and what each may do: as data, and on the token.

The table is that of the user's text. On the token each of its cells is tested twice:
reading an object of that kind, and writing one. Which error refuses a write is the
module's to choose where two would be right: what SoftHSM2 says stands here.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, ObjectClass

from faultmodule import CKR
from pkcs11_pool import (
    Access,
    LoginRequired,
    LoginState,
    SessionInfo,
    SessionObjectDestroyed,
    SessionState,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import ObjectRef, PooledSession, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

# Word for word from the user's text.
_TABLE = """
| Session State           | Session Type | Authenticated User | Public Session Objects | Private Session Objects | Public Token Objects | Private Token Objects |
| :---------------------- | :----------- | :----------------- | -----------------------| ------------------------|----------------------|-----------------------|
| `CKS_RO_PUBLIC_SESSION` | Read-Only    | None               | Read, Write            | None                    | Read                 | None                  |
| `CKS_RO_USER_FUNCTIONS` | Read-Only    | Normal User        | Read, Write            | Read, Write             | Read                 | Read                  |
| `CKS_RW_PUBLIC_SESSION` | Read-Write   | None               | Read, Write            | None                    | Read, Write          | None                  |
| `CKS_RW_USER_FUNCTIONS` | Read-Write   | Normal User        | Read, Write            | Read, Write             | Read, Write          | Read, Write           |
| `CKS_RW_SO_FUNCTIONS`   | Read-Write   | Security Officer   | Read, Write            | None                    | Read, Write          | None                  |
"""  # noqa: E501  # the user's lines

_ACCESS = {
    "None": Access.NONE,
    "Read": Access.READ,
    "Read, Write": Access.READ_WRITE,
}
_USERS = {
    "None": LoginState.PUBLIC,
    "Normal User": LoginState.USER,
    "Security Officer": LoginState.SO,
}


class _Kind:
    """One of the four kinds of objects."""

    def __init__(self, name: str, *, token: bool, private: bool) -> None:
        self.name = name
        self.token = token
        self.private = private

    def template(self, label: str) -> dict[Attribute, Any]:
        """A key of this kind whose value may be read."""
        return {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.AES,
            Attribute.TOKEN: self.token,
            Attribute.PRIVATE: self.private,
            Attribute.LABEL: label,
            Attribute.VALUE: _VALUE,
            Attribute.SENSITIVE: False,
            Attribute.EXTRACTABLE: True,
        }


_VALUE = b"sixteen bytes---"
_SESSION_PUBLIC = _Kind("session public", token=False, private=False)
_SESSION_PRIVATE = _Kind("session private", token=False, private=True)
_TOKEN_PUBLIC = _Kind("token public", token=True, private=False)
_TOKEN_PRIVATE = _Kind("token private", token=True, private=True)
# In the order of the table's columns.
_KINDS = (_SESSION_PUBLIC, _SESSION_PRIVATE, _TOKEN_PUBLIC, _TOKEN_PRIVATE)


class _Row:
    """One line of the table."""

    def __init__(self, cells: list[str]) -> None:
        name, kind, user, *access = cells
        self.name = name.strip("`").removeprefix("CKS_")
        self.rw = {"Read-Only": False, "Read-Write": True}[kind]
        self.user = _USERS[user]
        self.access = dict(zip(_KINDS, (_ACCESS[a] for a in access), strict=True))

    @property
    def state(self) -> SessionState:
        """The state that the line is about."""
        return SessionState[self.name]


_ROWS = [
    _Row([cell.strip() for cell in line.strip("|").split("|")])
    for line in _TABLE.strip().splitlines()[2:]
]
_CELLS = [
    pytest.param(row, kind, id=f"{row.name}-{kind.name}")
    for row in _ROWS
    for kind in _KINDS
]

# What SoftHSM2 says to the writes that the table rules out. Where two rules forbid a
# write, R/O comes first.
_REFUSED: dict[tuple[str, _Kind], type[pkcs11.PKCS11Error]] = {
    ("RO_PUBLIC_SESSION", _SESSION_PRIVATE): pkcs11.UserNotLoggedIn,
    ("RO_PUBLIC_SESSION", _TOKEN_PUBLIC): pkcs11.SessionReadOnly,
    ("RO_PUBLIC_SESSION", _TOKEN_PRIVATE): pkcs11.SessionReadOnly,
    ("RO_USER_FUNCTIONS", _TOKEN_PUBLIC): pkcs11.SessionReadOnly,
    ("RO_USER_FUNCTIONS", _TOKEN_PRIVATE): pkcs11.SessionReadOnly,
    ("RW_PUBLIC_SESSION", _SESSION_PRIVATE): pkcs11.UserNotLoggedIn,
    ("RW_PUBLIC_SESSION", _TOKEN_PRIVATE): pkcs11.UserNotLoggedIn,
    ("RW_SO_FUNCTIONS", _SESSION_PRIVATE): pkcs11.UserNotLoggedIn,
    ("RW_SO_FUNCTIONS", _TOKEN_PRIVATE): pkcs11.UserNotLoggedIn,
}
# What the pool says where a session may not even see the object of a reference.
_UNSEEN: dict[_Kind, type[Exception]] = {
    _SESSION_PRIVATE: SessionObjectDestroyed,
    _TOKEN_PRIVATE: LoginRequired,
}


# -- The data ---------------------------------------------------------------------


def test_there_are_five_states_with_the_values_of_the_standard() -> None:
    """Names without the prefix, and CKS_RO_PUBLIC_SESSION is 0."""
    assert {state.name: state.value for state in SessionState} == {
        "RO_PUBLIC_SESSION": 0,
        "RO_USER_FUNCTIONS": 1,
        "RW_PUBLIC_SESSION": 2,
        "RW_USER_FUNCTIONS": 3,
        "RW_SO_FUNCTIONS": 4,
    }
    assert [row.state for row in _ROWS] == list(SessionState)


def test_there_are_three_kinds_of_access() -> None:
    """Nobody may write what he may not read."""
    assert {access.name for access in Access} == {"NONE", "READ", "READ_WRITE"}


@pytest.mark.parametrize(("row", "kind"), _CELLS)
def test_the_table_as_data_is_the_users(row: _Row, kind: _Kind) -> None:
    """SessionState.access gives what stands in the text, for each of the 20 cells.

    Text: The following table summarizes session states and their characteristics.
    """
    access = row.state.access(token=kind.token, private=kind.private)
    assert access is row.access[kind]


def test_every_write_that_the_table_rules_out_has_its_error_here() -> None:
    """The list of errors is the table's complement, so no cell goes untested."""
    ruled_out = {
        (row.name, kind)
        for row in _ROWS
        for kind in _KINDS
        if row.access[kind] is not Access.READ_WRITE
    }
    assert set(_REFUSED) == ruled_out


# -- The table on the token -------------------------------------------------------


class _Scene:
    """A session in one of the states, and an object of each kind made before."""

    def __init__(self, session: PooledSession, refs: dict[_Kind, ObjectRef]) -> None:
        self.session = session
        #: By which the pool knows them; without those made by others.
        self.refs = refs

    async def find(self, label: str) -> list[Any]:
        """What the session sees under a label."""
        return list(await self.session.find({Attribute.LABEL: label}))

    async def value(self, ref: ObjectRef) -> object:
        """The value of an object, read in the session."""
        seen = await ref.on(self.session).attributes([Attribute.VALUE])
        return seen[Attribute.VALUE]


@asynccontextmanager
async def _scene(
    pool: TokenPool, token: ThrowawayToken, row: _Row
) -> AsyncIterator[_Scene]:
    """The objects are made by the logged-in user; then the state is taken on."""
    refs: dict[_Kind, ObjectRef] = {
        kind: await pool.create_object(kind.template(kind.name))
        for kind in (_TOKEN_PUBLIC, _TOKEN_PRIVATE)
    }
    if row.user is LoginState.SO:
        # The pool's own sessions are closed in a period of the SO. So other code of
        # the application owns the session objects, in a R/W session.
        other = await pool.run(_open_another)
        try:
            for kind in (_SESSION_PUBLIC, _SESSION_PRIVATE):
                other.create_object(kind.template(kind.name))
            async with pool.security_officer(token.so_pin) as so:
                yield _Scene(so.session, refs)
        finally:
            other.close()
        return
    async with pool.session() as owner:
        for kind in (_SESSION_PUBLIC, _SESSION_PRIVATE):
            refs[kind] = await owner.create_object(kind.template(kind.name))
        async with pool.session(rw=row.rw) as session:
            if row.user is LoginState.PUBLIC:
                await pool.logout()
            yield _Scene(session, refs)


def _open_another(session: pkcs11.Session) -> Any:
    return session.token.open(rw=True)


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row.name)
async def test_each_state_is_reached_and_told_by_the_token(
    pool: TokenPool, token: ThrowawayToken, row: _Row
) -> None:
    """The state follows from the session's type and from who is logged in.

    Text: Session can be in one of the five states, depending on the session type and
    whether a login has been performed.
    """
    async with _scene(pool, token, row) as scene:
        info = await scene.session.info()
        assert info.state is row.state
        assert info.rw is scene.session.rw is row.rw
        assert pool.login_state is row.user


@pytest.mark.parametrize(("row", "kind"), _CELLS)
async def test_reading_on_the_token(
    pool: TokenPool, token: ThrowawayToken, row: _Row, kind: _Kind
) -> None:
    """What the state may read is found with its value; what it may not is not there."""
    async with _scene(pool, token, row) as scene:
        found = await scene.find(kind.name)
        ref = scene.refs.get(kind)
        if row.access[kind] is Access.NONE:
            assert found == []
            if ref is not None:
                with pytest.raises(_UNSEEN[kind]):
                    await scene.value(ref)
            return
        assert len(found) == 1
        assert await scene.value(found[0]) == _VALUE
        if ref is not None:
            assert await scene.value(ref) == _VALUE


@pytest.mark.parametrize(("row", "kind"), _CELLS)
async def test_making_on_the_token(
    pool: TokenPool, token: ThrowawayToken, row: _Row, kind: _Kind
) -> None:
    """What the state may write can be made; else the error is the right one.

    Text: Provides read-only access to token objects and read-write access to session
    objects.
    Text: Provides read-write access to token objects and read-write access to session
    objects.
    """
    async with _scene(pool, token, row) as scene:
        template = kind.template("new")
        if row.access[kind] is not Access.READ_WRITE:
            with pytest.raises(_REFUSED[row.name, kind]) as caught:
                await scene.session.create_object(template)
            assert caught.type is not pkcs11.PKCS11Error
            assert await scene.find("new") == []
            return
        made = await scene.session.create_object(template)
        assert await scene.value(made) == _VALUE
        assert len(await scene.find("new")) == 1


@pytest.mark.parametrize(("row", "kind"), _CELLS)
async def test_destroying_on_the_token(
    pool: TokenPool, token: ThrowawayToken, row: _Row, kind: _Kind
) -> None:
    """What the state may write it may destroy; what it may not is still there after."""
    async with _scene(pool, token, row) as scene:
        ref = scene.refs.get(kind)
        if row.access[kind] is Access.READ_WRITE:
            mine = await scene.session.create_object(kind.template("mine"))
            await mine.on(scene.session).destroy()
            assert await scene.find("mine") == []
            if ref is not None:
                await ref.on(scene.session).destroy()
                assert await scene.find(kind.name) == []
            return
        if ref is not None:
            visible = row.access[kind] is Access.READ
            refused = pkcs11.SessionReadOnly if visible else _UNSEEN[kind]
            with pytest.raises(refused):
                await ref.on(scene.session).destroy()
    if kind.token:
        if pool.login_state is not LoginState.USER:
            await pool.login()
        assert len(await pool.find({Attribute.LABEL: kind.name})) == 1


def _change(session: pkcs11.Session, label: str) -> None:
    (found,) = session.get_objects({Attribute.LABEL: label})
    found[Attribute.LABEL] = "changed"


@pytest.mark.parametrize(("row", "kind"), _CELLS)
async def test_changing_on_the_token(
    pool: TokenPool, token: ThrowawayToken, row: _Row, kind: _Kind
) -> None:
    """An attribute of an object can be written exactly where the table says Write."""
    async with _scene(pool, token, row) as scene:
        if row.access[kind] is Access.NONE:
            with pytest.raises(ValueError, match="unpack"):  # it sees none
                await scene.session.run(_change, kind.name)
        elif row.access[kind] is Access.READ:
            with pytest.raises(pkcs11.SessionReadOnly):
                await scene.session.run(_change, kind.name)
            assert len(await scene.find(kind.name)) == 1
        else:
            await scene.session.run(_change, kind.name)
            assert await scene.find(kind.name) == []
            assert len(await scene.find("changed")) == 1


async def test_logged_out_and_ro_a_write_is_refused_for_ro_first(
    pool: TokenPool,
) -> None:
    """Both rules forbid it; SoftHSM2 names the session's type, and not the login."""
    async with pool.session() as session:
        await pool.logout()
        for kind in (_TOKEN_PUBLIC, _TOKEN_PRIVATE):
            with pytest.raises(pkcs11.SessionReadOnly):
                await session.create_object(kind.template("new"))


async def test_private_objects_are_invisible_to_the_officer(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """Of a key pair he finds the public half alone, and cannot sign."""
    await pool.generate_keypair(KeyType.EC, curve="secp256r1", label="pair", store=True)
    as_user = await pool.find()
    assert len(as_user) == 2
    async with pool.security_officer(token.so_pin) as so:
        (seen,) = await so.session.find()
        classes = await seen.on(so.session).attributes([Attribute.CLASS])
        assert classes == {Attribute.CLASS: ObjectClass.PUBLIC_KEY}
        assert await so.session.find({Attribute.PRIVATE: True}) == []
        with pytest.raises(pkcs11.UserNotLoggedIn) as caught:
            await so.session.key(label="pair").sign(
                bytes(32), mechanism=pkcs11.Mechanism.ECDSA
            )
        assert "nobody" not in str(caught.value)
        # Somebody is logged in: to say that nobody is would lead astray.
        with pytest.raises(pkcs11.UserNotLoggedIn) as caught:
            await so.session.create_object(_TOKEN_PRIVATE.template("new"))
        assert "nobody" not in str(caught.value)
    assert len(await pool.find()) == 2


# -- session.info() ---------------------------------------------------------------


async def test_info_asks_the_token_each_time(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """One C_GetSessionInfo with this session's number, each time anew."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        fault.reset_counts()
        fault.clear_log()
        first, second = await session.info(), await session.info()
        assert first == second
        assert fault.counts() == {"C_GetSessionInfo": 2}
        assert [call.session for call in fault.calls()] == [session.handle] * 2


async def test_info_is_never_guessed(make_pool: MakePool, fault: FaultModule) -> None:
    """A login lost behind the pool's back shows, though the pool knows nothing yet."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        fault.lose_login()
        assert pool.login_state is LoginState.USER
        assert (await session.info()).state is SessionState.RO_PUBLIC_SESSION


async def test_an_error_of_info_is_the_tokens(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """What the token answers to C_GetSessionInfo is raised as it is."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        fault.on("C_GetSessionInfo", answer=CKR.DEVICE_MEMORY)
        with pytest.raises(pkcs11.exceptions.DeviceMemory):
            await session.info()
        assert (await session.info()).state is SessionState.RO_USER_FUNCTIONS


@pytest.mark.parametrize("rw", [False, True])
async def test_info_has_state_type_error_and_slot(pool: TokenPool, *, rw: bool) -> None:
    """The four fields of CK_SESSION_INFO, for each type.

    Text: There are two basic session types.
    """
    async with pool.session(rw=rw) as session:
        info = await session.info()
        assert session.rw is rw
    state = SessionState.RW_USER_FUNCTIONS if rw else SessionState.RO_USER_FUNCTIONS
    assert info == SessionInfo(
        state=state, rw=rw, device_error=0, slot_id=pool.token.slot_id
    )
