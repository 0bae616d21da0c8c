"""``run``: a caller's function, and the real session that it has for one call."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pkcs11
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.util.ec import encode_ec_public_key, encode_named_curve_parameters

from faultmodule import CKR
from pkcs11_pool import LoginState, SessionClosed
from pkcs11_pool.engine import outage
from pkcs11_pool.state import Epoch
from poolkit import (
    LAST_RESORT,
    Hold,
    blocking,
    by_session,
    digest,
    eventually,
    hangs,
    make_ec_key,
    settled,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool

_DIGEST = b"d" * 32
_BLOCK = b"b" * 16
_ECB = Mechanism.AES_ECB


async def _at_rest(pool: TokenPool, sessions: int = 0) -> None:
    """Wait until only so many sessions are open, none of them ahead."""
    await eventually(lambda: pool.stats().sessions_open == sessions)


# -- What the function is given ---------------------------------------------------


async def test_the_function_gets_a_real_session_and_its_arguments(
    pool: TokenPool,
) -> None:
    """It is called once, off the loop's thread, and what it gives is the result."""
    calls: list[tuple[Any, ...]] = []

    def work(*given: Any) -> str:
        calls.append((threading.get_ident(), *given))
        return "result"

    marker = object()
    assert await pool.run(work, marker, 2) == "result"
    ((thread, session, *arguments),) = calls
    assert thread != threading.get_ident()
    assert type(session) is pkcs11._pkcs11.Session  # type: ignore[attr-defined]  # noqa: SLF001
    assert session.token.label == "demo"
    assert arguments == [marker, 2]


async def test_each_call_has_a_session_of_its_own(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No two have the same number, and each is opened for its call and closed."""
    numbers: list[int] = []

    def work(session: Any) -> None:
        numbers.append(session.handle)
        session.generate_random(64)

    async with make_pool(module=fault.path) as pool:
        fault.clear_log()
        for _ in range(5):
            await pool.run(work)
        async with anyio.create_task_group() as tasks:
            for _ in range(15):
                tasks.start_soon(pool.run, work)
        await _at_rest(pool)
        assert len(set(numbers)) == 20
        calls = by_session(fault.calls())
        assert [calls[number] for number in numbers] == [
            ["C_OpenSession", "C_GenerateRandom", "C_CloseSession"]
        ] * 20


async def test_nothing_of_an_earlier_call_is_in_a_session(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Not under the same number either: no object, and no search under way."""
    fault.reuse_numbers()

    def leave(session: Any) -> int:
        for _ in range(3):
            session.generate_key(KeyType.AES, 128, label="mine")
        assert next(session.get_objects({Attribute.LABEL: "mine"}, batch_size=1))
        return int(session.handle)

    def look(session: Any) -> tuple[int, list[object]]:
        return session.handle, list(session.get_objects({Attribute.LABEL: "mine"}))

    async with make_pool(module=fault.path) as pool:
        number = await pool.run(leave)
        await _at_rest(pool)
        assert await pool.run(look) == (number, [])


async def test_what_python_pkcs11_can_do_it_can_do_here(pool: TokenPool) -> None:
    """Generate, find, sign, verify, encrypt, wrap, write attributes and destroy."""

    def work(session: Any) -> tuple[bytes, bytes]:
        curve = encode_named_curve_parameters("secp256r1")
        public, private = session.generate_keypair(
            KeyType.EC,
            public_template={Attribute.EC_PARAMS: curve},
            store=True,
            label="made here",
        )
        signature = private.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        assert public.verify(_DIGEST, signature, mechanism=Mechanism.ECDSA)
        found = session.get_key(label="made here", object_class=ObjectClass.PRIVATE_KEY)
        assert found == private
        private[Attribute.LABEL] = "renamed"
        with pytest.raises(pkcs11.NoSuchKey):
            session.get_key(label="made here", object_class=ObjectClass.PRIVATE_KEY)
        return encode_ec_public_key(public), signature

    def secret(session: Any) -> None:
        key, other = (
            session.generate_key(KeyType.AES, 128, template={Attribute.EXTRACTABLE: 1})
            for _ in range(2)
        )
        parts = [_BLOCK] * 3
        sealed = b"".join(key.encrypt(iter(parts), mechanism=_ECB))
        assert key.decrypt(sealed, mechanism=_ECB) == b"".join(parts)
        wrapped = key.wrap_key(other, mechanism=Mechanism.AES_KEY_WRAP)
        copy = key.unwrap_key(
            ObjectClass.SECRET_KEY,
            KeyType.AES,
            wrapped,
            mechanism=Mechanism.AES_KEY_WRAP,
        )
        assert copy.encrypt(_BLOCK, mechanism=_ECB) == other.encrypt(
            _BLOCK, mechanism=_ECB
        )
        found = session.digest(iter(parts), mechanism=Mechanism.SHA256)
        assert found == hashlib.sha256(b"".join(parts)).digest()

    der, raw = await pool.run(work, rw=True)
    public = load_der_public_key(der)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    r, s = (int.from_bytes(half, "big") for half in (raw[:32], raw[32:]))
    scheme = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
    public.verify(utils.encode_dss_signature(r, s), _DIGEST, scheme)
    await pool.run(secret)
    assert await pool.key(label="renamed").sign(_DIGEST, mechanism=Mechanism.ECDSA)


async def test_the_session_is_ro_unless_rw_is_asked_for(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A token object can be made with ``rw=True``, and not without."""

    def make(session: Any) -> tuple[bool, bool]:
        (open_here,) = (s.rw for s in fault.sessions() if s.number == session.handle)
        session.generate_key(KeyType.AES, 128, label="stays", store=True)
        return session.rw, open_here

    async with make_pool(module=fault.path) as pool:
        with pytest.raises(pkcs11.SessionReadOnly):
            await pool.run(make)
        assert await pool.find({Attribute.LABEL: "stays"}) == []
        assert await pool.run(make, rw=True) == (True, True)
        assert len(await pool.find({Attribute.LABEL: "stays"})) == 1


# -- Its errors -------------------------------------------------------------------


class _NoException(BaseException):
    """What no ``except Exception`` stops."""


def _raise(error: BaseException, _session: object) -> None:
    raise error


_ERRORS = [
    KeyError("mine"),
    pkcs11.DataInvalid("the token's"),
    ExceptionGroup("mine", [ValueError("inner")]),
    _NoException("mine"),
]


@pytest.mark.parametrize("error", _ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_of_the_function_leaves_as_itself(
    make_pool: MakePool, error: BaseException
) -> None:
    """The same object, neither wrapped nor changed; the pool goes on."""
    func = partial(_raise, error)
    async with make_pool(max_sessions=2) as pool:
        ways: list[Callable[[], Awaitable[object]]] = [
            lambda: pool.run(func),
            lambda: pool.run(func, rw=True),
            lambda: pool.run(func, repeat=True),
            lambda: blocking(pool.run_sync, func),
        ]
        async with pool.session() as session:
            ways.append(lambda: session.run(func))
            for way in ways:
                with pytest.raises(type(error)) as caught:
                    await way()
                assert caught.value is error
            assert await digest(session)
        assert await digest(pool)
        assert pool.stats().operations_failed == 5


async def test_a_stop_iteration_is_told_and_not_lost(pool: TokenPool) -> None:
    """No coroutine can raise it (PEP 479): it is the cause of what is raised."""

    def first(session: Any) -> object:
        return next(session.get_objects({Attribute.LABEL: "nobody"}))

    for call in (pool.run(first), blocking(pool.run_sync, first)):
        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            await call
        assert isinstance(caught.value.__cause__, StopIteration)


# -- What it leaves unfinished ----------------------------------------------------


async def test_a_search_that_an_error_keeps_holds_up_nobody(pool: TokenPool) -> None:
    """``get_key`` that finds two raises with its search under way.

    python-pkcs11 locks the session for the thread that searches, and the error's
    traceback keeps the search. The session's next call runs on another thread.
    """
    await make_ec_key(pool)
    threads: list[int] = []
    held: list[int] = []
    hold = Hold()

    def get(session: Any) -> None:
        threads.append(threading.get_ident())
        session.get_key(label="signer")

    def stay(session: Any) -> None:
        held.append(threading.get_ident())
        hold(session)

    async with pool.session() as session:
        with pytest.raises(pkcs11.MultipleObjectsReturned) as first:
            await session.run(get)
        with hold:
            async with anyio.create_task_group() as tasks:
                # Whichever thread it was, it is not free for the next call.
                while threads[0] not in held:
                    tasks.start_soon(pool.run, stay)
                    await hold.entered(len(held) + 1)
                with pytest.raises(pkcs11.MultipleObjectsReturned) as second:
                    await session.run(get, timeout=LAST_RESORT / 2)
                hold.let_go()
        assert threads[0] != threads[1]
        assert first.value is not second.value


def _search(session: Any) -> Iterator[object]:
    found: Iterator[object] = session.get_objects({}, batch_size=1)
    assert next(found)
    return found


def _encrypt(session: Any) -> Iterator[bytes]:
    key = session.generate_key(KeyType.AES, 128)
    sealed: Iterator[bytes] = key.encrypt(iter([_BLOCK] * 3), mechanism=_ECB)
    assert next(sealed)
    return sealed


@pytest.mark.parametrize("begin", [_search, _encrypt])
async def test_what_it_began_ends_with_its_call(
    pool: TokenPool, begin: Callable[[Any], Iterator[object]]
) -> None:
    """Kept, it is used up; and the session's next calls find nothing under way."""
    await make_ec_key(pool)
    async with pool.session() as session:
        kept = await session.run(begin)
        # A second one of the same kind is refused while one is active.
        await session.run(begin)
        assert await session.find()
        assert await session.run(_use_up, kept) in ("PKCS11Error", "RuntimeError")


def _use_up(_session: object, kept: Iterator[object]) -> str:
    try:
        list(kept)
    except pkcs11.PKCS11Error:
        return "PKCS11Error"
    except RuntimeError:
        return "RuntimeError"
    return "went on"


# -- What it keeps ----------------------------------------------------------------


class _Kept:
    """What a function has kept: its session, objects, and what it has begun."""

    def __init__(self, begin: Callable[[Any], Iterator[object]]) -> None:
        self.number = 0
        self.session: Any = None
        self.key: Any = None
        self.secret: Any = None
        self._begin = begin
        self._begun: Any = None

    def keep(self, session: Any) -> None:
        """Be the function."""
        self.session = session
        self.number = session.handle
        self.secret = session.generate_key(KeyType.AES, 128, label="kept")
        self.key = session.get_key(label="signer", object_class=ObjectClass.PRIVATE_KEY)
        self._begun = self._begin(session)

    def uses(self) -> dict[str, Callable[[], object]]:
        """Each way to use it, by what it does."""
        session, key, secret = self.session, self.key, self.secret
        sha = Mechanism.SHA256
        return {
            "close": session.close,
            "random": lambda: session.generate_random(64),
            "digest": lambda: session.digest(_BLOCK, mechanism=sha),
            "digest parts": lambda: session.digest(iter([_BLOCK] * 2), mechanism=sha),
            "find": lambda: list(session.get_objects()),
            "get key": lambda: session.get_key(label="signer"),
            "generate": lambda: session.generate_key(KeyType.AES, 128, label="late"),
            "set PIN": lambda: session.set_pin("1234", "12345"),
            "sign": lambda: key.sign(_DIGEST, mechanism=Mechanism.ECDSA),
            "read": lambda: key[Attribute.LABEL],
            "write": lambda: key.__setitem__(Attribute.LABEL, "changed"),
            "copy": lambda: key.copy({Attribute.LABEL: "copied"}),
            "destroy": key.destroy,
            "close by key": key.session.close,
            "encrypt": lambda: secret.encrypt(_BLOCK, mechanism=_ECB),
            "decrypt": lambda: secret.decrypt(_BLOCK, mechanism=_ECB),
            "destroy secret": secret.destroy,
            "go on": lambda: next(self._begun),
        }

    def use_all(self) -> dict[str, str]:
        """Use it in each way; what came of those that did not raise."""
        went_on = {}
        for name, use in self.uses().items():
            try:
                went_on[name] = repr(use())
            except (pkcs11.PKCS11Error, RuntimeError):
                continue
        return went_on


# A search that cannot begin says so once more when it is forgotten: __del__ of
# python-pkcs11's OperationContext, that no except clause sees.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("begin", [_search, _encrypt])
@pytest.mark.parametrize("where", ["on the loop", "on another thread"])
async def test_what_it_kept_does_not_reach_a_stranger(
    make_pool: MakePool,
    fault: FaultModule,
    begin: Callable[[Any], Iterator[object]],
    where: str,
) -> None:
    """Its use raises before the module, where others have its numbers now."""
    fault.reuse_numbers()
    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        kept = _Kept(begin)
        await _at_rest(pool)
        await pool.run(kept.keep)
        await _at_rest(pool)
        async with pool.session(rw=True) as stranger:
            secret = await stranger.generate_key(KeyType.AES, 128, label="stranger's")
            sealed = await secret.on(stranger).encrypt(_BLOCK, mechanism=_ECB)
            assert stranger.handle == kept.number
            assert await stranger.run(_numbers, "stranger's") == [kept.secret.handle]
            await settled(pool)
            fault.clear_log()
            if where == "on the loop":
                assert kept.use_all() == {}
            else:
                assert await blocking(kept.use_all) == {}
            # What python-pkcs11 had begun keeps a function of the module by itself.
            reached = {(call.function, call.session) for call in fault.calls()}
            assert reached <= {("C_EncryptUpdate", None)}
            assert [s.number for s in fault.sessions() if s.rw] == [stranger.handle]
            assert await secret.on(stranger).encrypt(_BLOCK, mechanism=_ECB) == sealed
        found = await pool.find({Attribute.CLASS: ObjectClass.PRIVATE_KEY})
        labels = [(await ref.attributes())[Attribute.LABEL] for ref in found]
        assert labels == ["signer"]


async def test_what_was_kept_of_an_open_session_is_refused_after_its_end(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its use raises before the module, as after a call on the pool."""
    async with make_pool(module=fault.path) as pool:
        kept: list[Any] = []
        async with pool.session() as session:
            await session.run(kept.append)
            assert await blocking(kept[0].generate_random, 64)
        await settled(pool)
        fault.clear_log()
        with pytest.raises(pkcs11.SessionHandleInvalid):
            kept[0].generate_random(64)
        assert fault.calls() == []


class _Eager(asyncio.SelectorEventLoop):
    """A loop that uses a key on the very way of the result that it came with."""

    def __init__(self) -> None:
        super().__init__()
        self.key: Any = None
        self.answers: list[object] = []

    def is_closed(self) -> bool:
        # The worker asks just before it wakes the loop.
        if threading.current_thread().name == "pkcs11-pool worker" and self.key:
            try:
                self.answers.append(
                    self.key.sign(_BLOCK * 2, mechanism=Mechanism.ECDSA)
                )
            except pkcs11.PKCS11Error as error:
                self.answers.append(type(error))
        return super().is_closed()


def test_what_it_returned_is_harmless_at_once(make_pool: MakePool) -> None:
    """Its session is still open when the caller is told."""
    loop = _Eager()
    pool = make_pool()

    def key_of(session: Any) -> None:
        loop.key = session.get_key(label="signer", object_class=ObjectClass.PRIVATE_KEY)

    async def main() -> None:
        async with pool:
            await make_ec_key(pool)
            await pool.run(key_of)
            key, loop.key = loop.key, None
            with pytest.raises(pkcs11.SessionHandleInvalid):
                key.sign(_BLOCK * 2, mechanism=Mechanism.ECDSA)

    loop.run_until_complete(main())
    loop.close()
    assert set(loop.answers) == {pkcs11.SessionHandleInvalid}


def _numbers(session: Any, label: str) -> list[int]:
    return [item.handle for item in session.get_objects({Attribute.LABEL: label})]


class _Digesting:
    """A function whose thread is in the middle of a digest when it returns."""

    def __init__(self) -> None:
        self.number = 0
        self.result: bytes | Exception | None = None
        self._begun, self._go_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._digest)
        self._session: Any = None

    def __call__(self, session: Any) -> None:
        """Begin."""
        self._session, self.number = session, session.handle
        self._thread.start()
        assert self._begun.wait(LAST_RESORT)

    def finish(self) -> None:
        """Let the thread go on to its end."""
        self._go_on.set()
        self._thread.join(LAST_RESORT)
        assert not self._thread.is_alive()

    def _digest(self) -> None:
        try:
            self.result = self._session.digest(
                self._parts(), mechanism=Mechanism.SHA256
            )
        except (pkcs11.PKCS11Error, RuntimeError) as error:
            self.result = error

    def _parts(self) -> Iterator[bytes]:
        yield b"mine"
        self._begun.set()
        assert self._go_on.wait(LAST_RESORT)
        yield b"mine, too"


async def test_a_digest_that_goes_on_elsewhere_does_not_reach_a_stranger(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its thread gets an error, and a stranger's digest has none of its parts."""
    fault.reuse_numbers()
    digesting = _Digesting()

    def parts() -> Iterator[bytes]:
        yield b"stranger's"
        digesting.finish()
        yield b"end"

    def work(session: Any) -> bytes:
        found: bytes = session.digest(parts(), mechanism=Mechanism.SHA256)
        return found

    async with make_pool(module=fault.path) as pool:
        await pool.run(digesting)
        await _at_rest(pool)
        async with pool.session() as stranger:
            assert stranger.handle == digesting.number
            assert await stranger.run(work) == hashlib.sha256(b"stranger'send").digest()
        assert isinstance(digesting.result, (pkcs11.PKCS11Error, RuntimeError))


# -- What it closes ---------------------------------------------------------------


def _close(session: Any) -> int:
    with session:
        session.generate_random(64)
    number: int = session.handle
    return number


async def test_it_may_close_its_session(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """As python-pkcs11's own examples do. Nobody is logged out, and nothing leaks."""
    async with make_pool(module=fault.path) as pool:
        fault.reset_counts()
        for _ in range(3):
            await pool.run(_close)
        await _at_rest(pool)
        assert len(fault.sessions()) == 1
        assert fault.count("C_Logout") == 0
        assert pool.login_state is LoginState.USER
        assert await digest(pool)


async def test_it_may_close_a_session_that_is_lent(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """What the block does then raises, whoever has the number now; it ends well."""
    fault.reuse_numbers()
    async with make_pool(module=fault.path) as pool:
        async with pool.session(rw=True) as session:
            assert await session.run(_close) == 0
            async with pool.session(rw=True) as stranger:
                assert stranger.handle == session.handle
                fault.clear_log()
                for call in (session.info, partial(digest, session)):
                    with pytest.raises(SessionClosed):
                        await call()
                assert [c for c in fault.calls() if c.session is not None] == []
                assert await digest(stranger)
        await _at_rest(pool)
        assert len(fault.sessions()) == 1


async def test_a_session_that_it_closed_is_not_closed_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Its number is a stranger's by then, whose opening has just returned or not."""
    fault.reuse_numbers()
    closed, go_on = threading.Event(), threading.Event()

    def close(session: Any) -> None:
        session.close()
        closed.set()
        assert go_on.wait(LAST_RESORT)

    results: list[bytes] = []

    async def stranger() -> None:
        results.append(await digest(pool))

    async with make_pool(module=fault.path) as pool:
        fault.clear_log()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(pool.run, close, rw=True))
            assert await blocking(closed.wait, LAST_RESORT)
            # It is open in the module, and the pool does not know yet.
            fault.on("C_OpenSession", hang="after")
            tasks.start_soon(stranger)
            await hangs(fault, "C_OpenSession")
            go_on.set()
            await eventually(lambda: pool.stats().operations_running == 1)
            await eventually(lambda: pool.stats().sessions_open == 1)
            fault.release()
        (first, second, *_) = fault.calls("C_OpenSession")
        assert first.session == second.session
        assert results == [hashlib.sha256(b"data").digest()]


# -- In an open session -----------------------------------------------------------


async def test_in_an_open_session_its_objects_live_on(pool: TokenPool) -> None:
    """All calls have the one session; what one makes the next one uses."""

    def make(session: Any) -> tuple[Any, int]:
        return session.generate_key(KeyType.AES, 128), session.handle

    def use(session: Any, key: Any) -> tuple[bytes, int]:
        return key.encrypt(_BLOCK, mechanism=_ECB), session.handle

    async with pool.session() as session:
        key, number = await session.run(make)
        sealed, again = await session.run(use, key)
        assert number == again == session.handle
        # Seen by everybody, as the standard has it, and by the pool's own names.
        assert len(await session.find({Attribute.CLASS: ObjectClass.SECRET_KEY})) == 1
        assert await blocking(use, key.session, key) == (sealed, number)
    with pytest.raises(pkcs11.SessionHandleInvalid):
        key.encrypt(_BLOCK, mechanism=_ECB)
    with pytest.raises(pkcs11.SessionHandleInvalid):
        key.session.close()


# -- Calling it again -------------------------------------------------------------


async def test_an_error_of_its_own_is_not_repeated(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """``repeat=True`` is for a lost login; what else goes wrong is the caller's."""
    calls: list[object] = []

    def work(session: Any) -> None:
        calls.append(session.handle)
        session.get_key(label="nobody")

    async with make_pool(module=fault.path) as pool:
        with pytest.raises(pkcs11.NoSuchKey):
            await pool.run(work, repeat=True)
        fault.on("C_GenerateRandom", times=9, answer=CKR.FUNCTION_FAILED)
        with pytest.raises(pkcs11.FunctionFailed):
            await pool.run(lambda s: calls.append(s.generate_random(8)), repeat=True)
        assert len(calls) == 1
        assert fault.count("C_GenerateRandom") == 1


@pytest.mark.parametrize("lent", [False, True])
async def test_a_repeated_call_has_the_same_arguments(
    make_pool: MakePool, fault: FaultModule, *, lent: bool
) -> None:
    """In a fresh session, or in the one that is open, when the login is back."""
    calls: list[tuple[int, object]] = []
    marker = object()

    def work(session: Any, *given: object) -> str:
        calls.append((session.handle, *given))
        key: Any = session.get_key(label="signer", object_class=ObjectClass.PRIVATE_KEY)
        assert key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        return "done"

    async with make_pool(module=fault.path) as pool:
        await make_ec_key(pool)
        if lent:
            async with pool.session() as session:
                fault.lose_login()
                assert await session.run(work, marker, repeat=True) == "done"
        else:
            fault.lose_login()
            assert await pool.run(work, marker, repeat=True) == "done"
        (first, *one), (second, *other) = calls
        assert one == other == [marker]
        assert (first == second) is lent


async def test_it_is_not_called_again_for_ever(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """A function that finds the login lost each time gets its error at last."""
    calls: list[int] = []

    def work(session: Any) -> object:
        calls.append(session.handle)
        fault.lose_login()
        return session.get_key(label="signer", object_class=ObjectClass.PRIVATE_KEY)

    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        with pytest.raises(pkcs11.NoSuchKey):
            await pool.run(work, repeat=True, timeout=LAST_RESORT / 2)
        assert 1 < len(calls) < 10
        assert len(set(calls)) == len(calls)
        assert await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)


async def test_a_login_that_is_restored_while_the_token_is_asked_is_seen(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not found, then restored by others: it is found, and not told as missing."""
    asked = outage._is_logged_out  # noqa: SLF001  # no other moment would do

    async with make_pool(module=fault.path) as pool:
        key = await make_ec_key(pool)
        assert await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        before = pool.login_epoch

        def restored_first(session: Any) -> bool:
            if pool.login_epoch == before:
                pool._engine.actor.need_login(Epoch(before))  # noqa: SLF001
            wait_for(lambda: pool.login_epoch > before + 1)
            return asked(session)

        monkeypatch.setattr(outage, "_is_logged_out", restored_first)
        fault.lose_login()
        assert await key.sign(_DIGEST, mechanism=Mechanism.ECDSA)
        assert pool.stats().logins_total == 2
