"""Data in parts: every kind of input, in bounded memory, and nobody is held up."""

from __future__ import annotations

import asyncio
import gc
import io
import sys
import threading
import tracemalloc
from collections import Counter, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pkcs11
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from pkcs11 import GCMParams, KeyType, Mechanism

from faultmodule import CKR
from keykit import (
    IV,
    NONCE,
    PIECE,
    aes_cbc_pad,
    aes_gcm,
    awaited,
    chunks,
    collected,
    data_of,
    hmac_sha256,
    is_signature,
    make_secret,
    sha256,
)
from pkcs11_pool import (
    InvalidType,
    KeyNotFound,
    LoginRequired,
    LoginState,
    PoolClosed,
    PoolTimeout,
    SessionClosed,
    SessionObjectDestroyed,
    StreamInterrupted,
    WouldBlockLoop,
    WouldDeadlock,
)
from poolkit import (
    LAST_RESORT,
    blocking,
    by_session,
    digest,
    eventually,
    given_up,
    hangs,
    paused,
    settled,
    time_limits,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import KeyRef, TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_HMAC = Mechanism.SHA256_HMAC
_CBC: dict[str, Any] = {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": IV}
_LARGE = 3 * PIECE + 1234


class _Chunky:
    """Not an iterator, and yet its data comes once only."""

    def __init__(self, data: bytes) -> None:
        self._left = chunks(data)

    def __iter__(self) -> Iterator[bytes]:
        """Each chunk leaves with its giving."""
        while self._left:
            yield self._left.pop(0)


class _AsyncFile:
    """As web frameworks hand out an upload: it is read by awaiting."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    async def read(self, size: int) -> bytes:
        """No more than so many bytes."""
        await anyio.lowlevel.checkpoint()
        return self._file.read(size)


class Source:
    """An async iterable that gives a chunk when it is told to, and knows who waits."""

    def __init__(self, *ready: bytes) -> None:
        self._ready: deque[bytes | None] = deque(ready)
        self._news = anyio.Event()
        self._asking = anyio.Event()

    def give(self, *ready: bytes | None) -> None:
        """Have these chunks ready; None is the end."""
        self._ready += ready
        self._news.set()
        self._asking = anyio.Event()

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Itself."""
        return self

    async def __anext__(self) -> bytes:
        """The next chunk, once there is one."""
        while not self._ready:
            self._news = anyio.Event()
            self._asking.set()
            await self._news.wait()
        chunk = self._ready.popleft()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def runs_dry(self) -> None:
        """Wait until somebody waits for a chunk that is not there."""
        with anyio.fail_after(LAST_RESORT):
            await self._asking.wait()


_SOURCES: dict[str, Callable[[bytes], Any]] = {
    "bytes": lambda data: data,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "list": chunks,
    "small chunks": lambda data: [*chunks(data[:500], 1), b"", data[500:]],
    "one large chunk": lambda data: [data],
    "other buffers": lambda data: iter([bytearray(data[:9]), memoryview(data)[9:]]),
    "generator": lambda data: (chunk for chunk in chunks(data, 4096)),
    "read once": _Chunky,
    "file": io.BytesIO,
    "async iterable": lambda data: awaited(chunks(data, 30_000)),
    "async file": _AsyncFile,
}


@pytest.mark.parametrize("source", _SOURCES)
async def test_every_kind_of_data_gives_what_bytes_give(
    pool: TokenPool, source: str
) -> None:
    """Digest, signature, verification, encryption and decryption, of every size."""
    give = _SOURCES[source]
    aes = await make_secret(pool)
    mac = await make_secret(pool, KeyType.GENERIC_SECRET, "mac")
    for size in (0, 1, PIECE, PIECE + 1, _LARGE):
        data = data_of(size)
        found = await pool.digest(give(data), mechanism=Mechanism.SHA256)
        assert found == sha256(data)
        signature = hmac_sha256(data)
        assert await mac.sign(give(data), mechanism=_HMAC) == signature
        assert await mac.verify(give(data), signature, mechanism=_HMAC)
        assert not await mac.verify(give(data + b"x"), signature, mechanism=_HMAC)
        assert not await mac.verify(give(data), signature[:-1], mechanism=_HMAC)
        encrypted = aes_cbc_pad(data)
        assert await aes.encrypt(give(data), **_CBC) == encrypted
        assert await aes.decrypt(give(encrypted), **_CBC) == data
        assert await collected(aes.encrypt_stream(give(data), **_CBC)) == encrypted
        assert await collected(aes.decrypt_stream(give(encrypted), **_CBC)) == data


async def test_a_signature_in_parts_is_one_to_others(pool: TokenPool) -> None:
    """RSA over an iterator, with and without a parameter; ``cryptography`` agrees."""
    data = data_of(_LARGE)
    public, private = await pool.generate_keypair(
        KeyType.RSA, 2048, label="rsa", store=True
    )
    der = await public.public_key_der()
    plain = await private.sign(iter([data]), mechanism=Mechanism.SHA256_RSA_PKCS)
    assert is_signature(der, plain, data, padding.PKCS1v15(), hashes.SHA256())
    pss: dict[str, Any] = {
        "mechanism": Mechanism.SHA256_RSA_PKCS_PSS,
        "mechanism_param": (Mechanism.SHA256, pkcs11.MGF.SHA256, 32),
    }
    salted = await private.sign(awaited(chunks(data)), **pss)
    how = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    assert is_signature(der, salted, data, how, hashes.SHA256())
    assert await public.verify(iter([data]), salted, **pss)
    assert not await public.verify(iter([data]), plain, **pss)


async def test_der_in_parts(pool: TokenPool) -> None:
    """DSA over an iterator as DER, made and verified, and refused where it is none."""
    data = data_of(_LARGE)
    public, private = await pool.generate_keypair(
        KeyType.DSA, 1024, label="dsa", store=True
    )
    how: dict[str, Any] = {
        "mechanism": Mechanism.DSA_SHA256,
        "signature_format": "der",
    }
    signature = await private.sign(iter([data]), **how)
    der = await public.public_key_der()
    assert is_signature(der, signature, data, hashes.SHA256())
    assert await public.verify(iter([data]), signature, **how)
    assert not await public.verify(iter([data[1:]]), signature, **how)
    assert not await public.verify(iter([data]), b"no DER", **how)


@pytest.mark.usefixtures("never_idle")
async def test_what_fits_into_one_piece_is_one_call(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """No parts where the data is small: also mechanisms without parts take it."""
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        await mac.sign(b"", mechanism=_HMAC)
        await settled(pool)
        fault.reset_counts()
        await mac.sign(iter(chunks(data_of(PIECE))), mechanism=_HMAC)
        await settled(pool)
        counts = Counter(fault.counts()) - Counter({"C_OpenSession": 9})
        assert counts == {"C_SignInit": 1, "C_Sign": 1, "C_CloseSession": 1}


@pytest.mark.usefixtures("never_idle")
async def test_parts_are_a_chain_on_one_session(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Init, one Update for each piece, Final, and the session is closed."""
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        await mac.sign(b"", mechanism=_HMAC)
        await settled(pool)
        fault.clear_log()
        await mac.sign(iter([data_of(_LARGE)]), mechanism=_HMAC)
        await eventually(lambda: pool.stats().sessions_leased == 0)
        await settled(pool)
        (calls,) = [c for c in by_session(fault.calls()).values() if "C_SignInit" in c]
        chain = ["C_SignInit", *["C_SignUpdate"] * 4, "C_SignFinal", "C_CloseSession"]
        assert calls[-len(chain) :] == chain
        assert len(fault.sessions()) == 1 + pool.stats().sessions_ahead


async def test_all_parts_are_one_operation_in_the_statistics(pool: TokenPool) -> None:
    """However many calls it takes; and one that fails has failed once."""
    before = pool.stats()
    await pool.digest(iter([data_of(_LARGE)]), mechanism=Mechanism.SHA256)
    after = pool.stats()
    assert after.operations_total == before.operations_total + 1
    assert after.operations_failed == before.operations_failed
    with pytest.raises(ZeroDivisionError):
        await pool.digest(_broken(), mechanism=Mechanism.SHA256)
    assert pool.stats().operations_total == after.operations_total + 1
    assert pool.stats().operations_failed == after.operations_failed + 1


def _broken() -> Iterator[bytes]:
    yield data_of(_LARGE)
    raise ZeroDivisionError


# -- Bounded memory ---------------------------------------------------------------


async def test_memory_does_not_grow_with_the_data(make_pool: MakePool) -> None:
    """16 MiB pass through, in and out, and one more is never in memory."""
    mebibyte = bytes(1024 * 1024)
    whole, seen = 0, 0

    def much() -> Iterator[bytes]:
        for _ in range(16):
            yield mebibyte

    # Few threads: one that is late has a piece in its hands for a moment.
    async with make_pool(max_sessions=1) as pool:
        aes = await make_secret(pool)
        await pool.digest(iter([mebibyte]), mechanism=Mechanism.SHA256)
        gc.collect()
        tracemalloc.start()
        try:
            await pool.digest(much(), mechanism=Mechanism.SHA256)
            async for piece in aes.encrypt_stream(much(), **_CBC):
                whole += len(piece)
                seen = max(seen, len(piece))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert whole == 16 * len(mebibyte) + 16
    assert seen <= PIECE + 16
    assert peak < len(mebibyte)


async def test_a_file_without_lines_is_read_in_pieces(
    pool: TokenPool, tmp_path: Path
) -> None:
    """By its read(), and never as one line."""
    data = bytes(_LARGE)
    path = anyio.Path(tmp_path / "zeros")
    await path.write_bytes(data)
    sizes: list[int] = []

    class Watched(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            got = super().read(size) or b""
            sizes.append(len(got))
            return got

    with Watched(path) as file:
        found = await pool.digest(file, mechanism=Mechanism.SHA256)
    assert found == sha256(data)
    assert max(sizes) == PIECE
    async with await anyio.open_file(path, "rb") as opened:
        assert await pool.digest(opened, mechanism=Mechanism.SHA256) == sha256(data)


# -- The output as it comes -------------------------------------------------------


async def test_output_comes_before_there_is_more_input(pool: TokenPool) -> None:
    """Each chunk of an async iterable goes on at once, however small it is."""
    aes = await make_secret(pool)
    source = Source(b"a" * 32)
    stream = aes.encrypt_stream(source, **_CBC)
    first = await anext(stream)
    assert first == aes_cbc_pad(b"a" * 32)[: len(first)]
    assert len(first) >= 16
    source.give(b"b" * 32)
    second = await anext(stream)
    assert len(second) == 32
    source.give(None)
    rest = await collected(stream)
    assert first + second + rest == aes_cbc_pad(b"a" * 32 + b"b" * 32)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_input_is_read_as_output_is_asked_for(pool: TokenPool) -> None:
    """Backpressure: no more than two pieces ahead of the consumer."""
    aes = await make_secret(pool)
    given = 0

    def watched() -> Iterator[bytes]:
        nonlocal given
        for _ in range(100):
            given += 1
            yield bytes(PIECE)

    stream = aes.encrypt_stream(watched(), **_CBC)
    assert given == 0
    for taken in range(1, 4):
        await anext(stream)
        assert given <= taken + 1
    await stream.aclose()


async def test_a_stream_is_for_one_reader(pool: TokenPool) -> None:
    """A second task that reads, or closes, at the same time is told so."""
    aes = await make_secret(pool)
    source = Source()
    stream = aes.encrypt_stream(source, **_CBC)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anext, stream, b"")
        await source.runs_dry()
        with pytest.raises(RuntimeError, match="another task"):
            await anext(stream)
        with pytest.raises(RuntimeError, match="another task"):
            await stream.aclose()
        source.give(None)


async def test_a_mechanism_that_withholds_its_output(pool: TokenPool) -> None:
    """AES-GCM tells nothing before the tag is checked, and nothing if it is wrong."""
    aes = await make_secret(pool)
    data = data_of(_LARGE)
    how: dict[str, Any] = {
        "mechanism": Mechanism.AES_GCM,
        "mechanism_param": GCMParams(NONCE, None, 128),
    }
    sealed = aes_gcm(data)
    assert await collected(aes.encrypt_stream(chunks(data), **how)) == sealed
    assert await collected(aes.decrypt_stream(chunks(sealed, 9999), **how)) == data
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    with pytest.raises(pkcs11.PKCS11Error):
        await collected(aes.decrypt_stream(chunks(changed, 9999), **how))
    await eventually(lambda: pool.stats().sessions_leased == 0)


async def test_a_mechanism_that_takes_its_data_in_one_part(pool: TokenPool) -> None:
    """EdDSA over an iterator longer than a piece; ``cryptography`` agrees."""
    data = data_of(_LARGE)
    public, private = await pool.generate_keypair(
        KeyType.EC_EDWARDS, curve="ed25519", label="ed", store=True
    )
    signature = await private.sign(iter(chunks(data)))
    assert is_signature(await public.public_key_der(), signature, data)
    assert await public.verify(awaited(chunks(data)), signature)
    async with pool.session() as session:
        again = await private.on(session).sign(iter(chunks(data)))
        assert again == signature
        assert await digest(session)
    assert pool.stats().last_error is None


# -- Whoever is slow holds up nobody ----------------------------------------------


async def test_a_slow_source_holds_a_session_and_no_thread(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Meanwhile operations run, the user logs out and in, and nothing is inside."""
    async with (
        make_pool(module=fault.path, max_sessions=2) as pool,
        anyio.create_task_group() as tasks,
    ):
        source, found = Source(b"start"), []

        async def slow() -> None:
            found.append(await pool.digest(source, mechanism=Mechanism.SHA256))

        tasks.start_soon(slow)
        await source.runs_dry()
        # Not even a session, as long as it may all be one call.
        assert pool.stats().sessions_leased == 0
        source.give(bytes(2 * PIECE))
        await source.runs_dry()
        await settled(pool)
        assert pool.stats().sessions_leased == 1
        assert fault.inside() == 0
        assert await digest(pool, timeout=LAST_RESORT) == sha256(b"data")
        await pool.logout()
        assert await digest(pool, timeout=LAST_RESORT) == sha256(b"data")
        await pool.login()
        source.give(b"end", None)
    assert found == [sha256(b"start" + bytes(2 * PIECE) + b"end")]


class Caught:
    """Awaits something in a task and keeps what came of it."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = anyio.Event()

    async def __call__(self, awaitable: Any) -> None:
        """Await it."""
        try:
            self.result = await awaitable
        except Exception as error:  # noqa: BLE001  # the test looks at it
            self.error = error
        self.done.set()


async def test_a_logout_ends_what_needs_the_login(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Between two chunks the user logs out: no signature, though there could be one."""
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        source, caught = Source(bytes(2 * PIECE)), Caught()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caught, mac.sign(source, mechanism=_HMAC))
            await source.runs_dry()
            await pool.logout()
            await pool.login()
            fault.reset_counts()
            source.give(bytes(2 * PIECE), None)
        assert type(caught.error) is LoginRequired
        assert "in the middle" in str(caught.error)
        assert fault.count("C_SignUpdate") == 0
        await eventually(lambda: pool.stats().sessions_leased == 0)
        # With the data from its start, all is well again.
        data = bytes(2 * PIECE)
        assert await mac.sign(iter([data]), mechanism=_HMAC) == hmac_sha256(data)


async def test_a_public_key_outlasts_a_logout(pool: TokenPool) -> None:
    """A verification does not need the login, and goes on."""
    key = await make_secret(pool, KeyType.GENERIC_SECRET, private=False)
    data = bytes(2 * PIECE)
    source, caught = Source(data), Caught()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caught, key.verify(source, hmac_sha256(data), mechanism=_HMAC))
        await source.runs_dry()
        await pool.logout()
        source.give(None)
    assert caught.result is True


async def test_the_officer_does_not_wait_for_a_slow_source(
    make_pool: MakePool, token: ThrowawayToken, fault: FaultModule
) -> None:
    """Its session is closed for the period, and what was begun must be begun again."""
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        source, caught = Source(bytes(2 * PIECE)), Caught()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caught, mac.sign(source, mechanism=_HMAC))
            await source.runs_dry()
            async with pool.security_officer(token.so_pin, timeout=LAST_RESORT):
                assert pool.login_state is LoginState.SO
                assert [s.rw for s in fault.sessions()] == [True]
                assert pool.stats().sessions_leased == 0
            fault.reset_counts()
            source.give(b"end", None)
        assert isinstance(caught.error, StreamInterrupted)
        assert "begin again" in str(caught.error)
        assert fault.count("C_SignUpdate") == 0
        assert pool.login_state is LoginState.USER


async def test_data_that_is_still_there_is_begun_again(
    make_pool: MakePool, token: ThrowawayToken, fault: FaultModule
) -> None:
    """A list can be read twice: the signature is late, and right."""
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        data = [data_of(_LARGE), b"end"]

        async def period() -> None:
            async with pool.security_officer(token.so_pin, timeout=LAST_RESORT):
                assert pool.login_state is LoginState.SO

        # The officer comes while the second call is inside. When it is back, either he
        # or the next part is first.
        for _ in range(100):
            caught = Caught()
            fault.reset_counts()
            fault.on("C_SignUpdate", nth=2, hang="before")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(caught, mac.sign(data, mechanism=_HMAC))
                await hangs(fault, "C_SignUpdate")
                tasks.start_soon(period)
                await paused(pool)
                fault.release()
            assert caught.result == hmac_sha256(b"".join(data))
            if fault.count("C_SignInit") == 2:
                return
        pytest.fail("the officer was never first")


@pytest.mark.parametrize("repeatable", [True, False])
async def test_a_login_lost_in_the_middle(
    make_pool: MakePool, fault: FaultModule, *, repeatable: bool
) -> None:
    """The pool logs in again; data that cannot be read again must be brought again."""
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        data = [data_of(_LARGE)]

        fault.on("C_SignUpdate", nth=3, hang="before", answer=CKR.USER_NOT_LOGGED_IN)
        caught = Caught()
        async with anyio.create_task_group() as tasks:
            source = data if repeatable else iter(data)
            tasks.start_soon(caught, mac.sign(source, mechanism=_HMAC))
            await hangs(fault, "C_SignUpdate")
            fault.lose_login()
            fault.release()
        if repeatable:
            assert caught.result == hmac_sha256(data[0])
        else:
            assert isinstance(caught.error, StreamInterrupted)
            assert isinstance(caught.error.__cause__, pkcs11.PKCS11Error)
        await eventually(lambda: pool.stats().recoveries_total == 1)
        assert await mac.sign(iter(data), mechanism=_HMAC) == hmac_sha256(data[0])


async def test_a_login_that_is_missing_at_the_start_is_restored(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """An iterator is no hindrance: nothing of it is lost before the first call."""
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        data = data_of(_LARGE)
        await mac.sign(b"", mechanism=_HMAC)
        fault.lose_login()
        assert await mac.sign(iter([data]), mechanism=_HMAC) == hmac_sha256(data)
        assert pool.stats().recoveries_total == 1


# -- Sessions that all others need ------------------------------------------------


async def test_the_only_session_is_waited_for(make_pool: MakePool) -> None:
    """With one session others wait inside their deadlines; the same task is told."""
    async with make_pool(max_sessions=1) as pool:
        aes = await make_secret(pool)
        source = Source(b"a" * 32)
        stream = aes.encrypt_stream(source, **_CBC)
        await anext(stream)
        with pytest.raises(WouldDeadlock):
            await digest(pool)
        waiting = Caught()
        async with anyio.create_task_group() as tasks:
            with pytest.raises(PoolTimeout) as caught:
                await blocking(pool.run_sync, int, timeout=0.01)
            assert caught.value.phase == "waiting"
            tasks.start_soon(waiting, digest(pool))
            await eventually(lambda: pool.stats().operations_waiting == 1)
            source.give(None)
            await collected(stream)
        assert waiting.result == sha256(b"data")


async def test_streams_of_one_task_never_wait_for_each_other(
    make_pool: MakePool,
) -> None:
    """One into the other takes two sessions besides the one that is never lent."""
    data = data_of(_LARGE)
    async with make_pool(max_sessions=2) as pool:
        aes = await make_secret(pool)
        encrypted = aes.encrypt_stream(iter([data]), **_CBC)
        with pytest.raises(WouldDeadlock):
            await collected(aes.decrypt_stream(encrypted, **_CBC))
        await encrypted.aclose()
        await eventually(lambda: pool.stats().sessions_leased == 0)
    async with make_pool(max_sessions=3) as pool:
        encrypted = aes_of(pool).encrypt_stream(iter([data]), **_CBC)
        decrypted = aes_of(pool).decrypt_stream(encrypted, **_CBC)
        assert await collected(decrypted) == data


def aes_of(pool: TokenPool) -> KeyRef:
    """The key that ``make_secret`` made, by its name."""
    return pool.key(label="secret")


async def test_a_session_waits_for_the_end_of_its_stream(pool: TokenPool) -> None:
    """In an open session everything is in order; who would wait for himself is told."""
    aes = await make_secret(pool)
    async with pool.session() as session, anyio.create_task_group() as tasks:
        source, other = Source(b"a" * 32), Caught()
        stream = aes.on(session).encrypt_stream(source, **_CBC)
        first = await anext(stream)
        with pytest.raises(WouldDeadlock, match="aclose"):
            await digest(session)
        tasks.start_soon(other, digest(session))
        await anyio.wait_all_tasks_blocked()
        assert pool.stats().operations_waiting == 1
        assert not other.done.is_set()
        source.give(b"b" * 32, None)
        assert first + await collected(stream) == aes_cbc_pad(b"a" * 32 + b"b" * 32)
        await other.done.wait()
        assert other.result == sha256(b"data")
        assert not session.closed


@pytest.mark.parametrize("how", ["break", "aclose", "with", "error"])
async def test_a_session_is_free_after_a_stream_that_was_broken_off(
    pool: TokenPool, how: str
) -> None:
    """What was active in it is ended: the next operation of any kind runs."""
    aes = await make_secret(pool)
    data = data_of(_LARGE)
    async with pool.session() as session:
        key = aes.on(session)
        if how == "break":
            async for _ in key.encrypt_stream(data, **_CBC):
                break
        elif how == "aclose":
            stream = key.encrypt_stream(data, **_CBC)
            await anext(stream)
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        elif how == "with":
            async with key.encrypt_stream(data, **_CBC) as stream:
                await anext(stream)
        else:
            with pytest.raises(ZeroDivisionError):
                await collected(key.encrypt_stream(_broken(), **_CBC))
        assert await digest(session) == sha256(b"data")
        assert await key.encrypt(data, **_CBC) == aes_cbc_pad(data)
        assert await collected(key.encrypt_stream(data, **_CBC)) == aes_cbc_pad(data)


async def test_a_session_that_ends_ends_its_stream(pool: TokenPool) -> None:
    """The block does not wait for a source that gives no more."""
    aes = await make_secret(pool)
    source = Source(b"a" * 32)
    async with pool.session() as session:
        stream = aes.on(session).encrypt_stream(source, **_CBC)
        await anext(stream)
    source.give(b"b" * 32, None)
    with pytest.raises(SessionClosed):
        await anext(stream)
    assert pool.stats().sessions_leased == 0


# -- Time -------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True])
async def test_the_time_limit_covers_the_source(
    pool: TokenPool, *, begun: bool
) -> None:
    """A source that gives nothing more: the caller is told in time, nothing is kept."""
    for limit in time_limits(0.1):
        before = pool.stats().operations_timed_out
        source = Source(bytes(2 * PIECE if begun else 1))
        with pytest.raises(PoolTimeout) as caught:
            await pool.digest(source, mechanism=Mechanism.SHA256, timeout=limit)
        if caught.value.phase == ("running" if begun else "waiting"):
            break
    await eventually(lambda: pool.stats().sessions_leased == 0)
    assert pool.stats().operations_timed_out == before + begun
    aes = await make_secret(pool)
    for limit in time_limits(0.1):
        before = pool.stats().operations_timed_out
        stream = aes.encrypt_stream(Source(b"a" * 32), **_CBC, timeout=limit)
        with suppress(PoolTimeout):
            await anext(stream)
            break
    with pytest.raises(PoolTimeout):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert pool.stats().operations_timed_out == before + 1


async def test_the_time_limit_covers_a_source_that_never_waits(
    pool: TokenPool,
) -> None:
    """A generator that goes on for ever is stopped between two chunks."""

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x"

    with pytest.raises(PoolTimeout):
        await pool.digest(endless(), mechanism=Mechanism.SHA256, timeout=0.1)
    key = pool.key(label="any")
    with pytest.raises(PoolTimeout):
        await blocking(lambda: list(key.sync.encrypt_stream(endless(), timeout=0.01)))


async def test_a_callers_own_time_limit_stays_his(pool: TokenPool) -> None:
    """``fail_after`` around a stream raises what it always raises."""
    source = Source(bytes(2 * PIECE))
    with pytest.raises(TimeoutError) as caught, anyio.fail_after(0.1):
        await pool.digest(source, mechanism=Mechanism.SHA256, timeout=30)
    assert not isinstance(caught.value, PoolTimeout)
    await eventually(lambda: pool.stats().sessions_leased == 0)


async def test_a_stream_that_nobody_reads_loses_its_session_in_time(
    make_pool: MakePool,
) -> None:
    """Kept and not read, it does not keep the session beyond its time limit."""
    async with make_pool(max_sessions=1) as pool:
        aes = await make_secret(pool)
        for limit in time_limits(0.1):
            stream = aes.encrypt_stream(data_of(_LARGE), **_CBC, timeout=limit)
            with suppress(PoolTimeout):
                await anext(stream)
                if pool.stats().sessions_leased == 1:
                    break
        await eventually(lambda: pool.stats().sessions_leased == 0)
        assert await digest(pool) == sha256(b"data")
        with pytest.raises(PoolTimeout) as caught:
            await anext(stream)
        assert caught.value.phase == "running"
        for limit in time_limits(0.1):
            async with pool.session() as session:
                data = data_of(_LARGE)
                kept = aes.on(session).encrypt_stream(data, **_CBC, timeout=limit)
                try:
                    await anext(kept)
                except PoolTimeout:
                    continue
                other = Caught()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(other, digest(session))
                assert other.result == sha256(b"data")
                assert not session.closed
                break


async def test_no_waiting_for_a_session(make_pool: MakePool) -> None:
    """``timeout=0``: at once or not at all; once begun it goes on."""
    async with make_pool(max_sessions=1) as pool:
        data = iter([data_of(_LARGE)])
        how: dict[str, Any] = {"mechanism": Mechanism.SHA256, "timeout": 0}
        assert await pool.digest(data, **how) == sha256(data_of(_LARGE))
        await eventually(lambda: pool.stats().sessions_leased == 0)
        taken = Source(bytes(2 * PIECE))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Caught(), pool.digest(taken, mechanism=Mechanism.SHA256))
            await taken.runs_dry()
            with pytest.raises(PoolTimeout) as caught:
                await pool.digest(iter([data_of(_LARGE)]), **how)
            assert caught.value.phase == "waiting"
            taken.give(None)


# -- Breaking off -----------------------------------------------------------------


async def test_break_lets_the_session_go(make_pool: MakePool) -> None:
    """Whoever leaves a loop, and the pool, need do nothing about it."""
    async with make_pool(max_sessions=1) as pool:
        aes = await make_secret(pool)
        for _ in range(3):
            async for piece in aes.encrypt_stream(data_of(_LARGE), **_CBC):
                assert piece
                break
            assert await digest(pool) == sha256(b"data")
        stream = aes.encrypt_stream(data_of(_LARGE), **_CBC)
        await anext(stream)
        await stream.aclose()
        assert pool.stats().sessions_leased == 0
        await stream.aclose()
        unread = aes.encrypt_stream(data_of(_LARGE), **_CBC)
        await unread.aclose()
        assert await collected(unread) == b""


async def test_a_stream_that_was_left_has_no_session(make_pool: MakePool) -> None:
    """Also while the worker that brought its session has that in its hands yet."""
    async with make_pool(max_sessions=1) as pool:
        aes = await make_secret(pool)
        stream = aes.encrypt_stream(data_of(_LARGE), **_CBC)
        assert await anext(stream)
        by_the_worker = stream._feed._hold  # noqa: SLF001
        assert by_the_worker is not None
        del stream
        assert await digest(pool) == sha256(b"data")
        assert pool.stats().sessions_leased == 0


async def test_a_forgotten_stream_is_looked_for(make_pool: MakePool) -> None:
    """Also where nobody asks for a session: an idle thread finds it."""
    async with make_pool(max_sessions=2) as pool:
        aes = await make_secret(pool)
        stream = aes.encrypt_stream(data_of(_LARGE), **_CBC)
        await anext(stream)
        del stream
        gc.collect()
        await eventually(lambda: pool.stats().sessions_leased == 0)


async def test_cancelled_while_the_source_is_awaited(pool: TokenPool) -> None:
    """The caller goes at once, and the session after him."""
    source = Source(bytes(2 * PIECE))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Caught(), pool.digest(source, mechanism=Mechanism.SHA256))
        await source.runs_dry()
        before = pool.stats().operations_cancelled
        tasks.cancel_scope.cancel()
    await eventually(lambda: pool.stats().sessions_leased == 0)
    assert pool.stats().operations_cancelled == before + 1
    assert await digest(pool)


@pytest.mark.usefixtures("never_idle")
@pytest.mark.parametrize("call", ["Init", "Update", "Final"])
async def test_cancelled_inside_the_module(
    make_pool: MakePool, fault: FaultModule, call: str
) -> None:
    """The caller goes at once; the session is closed when the call returns."""
    function = f"C_Digest{call}"
    async with make_pool(module=fault.path) as pool:
        fault.on(function, hang="before")
        async with anyio.create_task_group() as tasks:
            data = iter([data_of(_LARGE)])
            tasks.start_soon(Caught(), pool.digest(data, mechanism=Mechanism.SHA256))
            await hangs(fault, function)
            tasks.cancel_scope.cancel()
        assert fault.inside(function) == 1
        fault.release()
        await eventually(lambda: pool.stats().sessions_leased == 0)
        await settled(pool)
        assert len(fault.sessions()) == 1 + pool.stats().sessions_ahead


async def test_a_call_that_hangs_in_the_middle_is_lost_in_time(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """As any call: the caller is told, and the pool goes on."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_DigestUpdate", nth=2, hang="before")
        data = iter([data_of(_LARGE)])
        await given_up(
            pool,
            lambda: pool.digest(data, mechanism=Mechanism.SHA256),
            hangs(fault, "C_DigestUpdate"),
        )
        assert pool.stats().calls_lost == 1
        assert pool.stats().sessions_leased == 0
        assert await digest(pool)
        fault.release()
        await eventually(lambda: pool.stats().calls_stuck == 0)


async def test_a_pool_that_closes_ends_streams(make_pool: MakePool) -> None:
    """Nobody waits for a source; who reads on is told."""
    pool = make_pool()
    await pool.open()
    aes = await make_secret(pool)
    stream = aes.encrypt_stream(data_of(_LARGE), **_CBC)
    await anext(stream)
    source, caught = Source(bytes(2 * PIECE)), Caught()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caught, pool.digest(source, mechanism=Mechanism.SHA256))
        await source.runs_dry()
        await pool.close()
        source.give(b"x", None)
    assert isinstance(caught.error, PoolClosed)
    with pytest.raises(PoolClosed):
        await anext(stream)
    await stream.aclose()


# -- What goes wrong --------------------------------------------------------------


class _OwnError(BaseException):
    """Something that only the caller knows."""


@pytest.mark.parametrize("error", [ZeroDivisionError, StopAsyncIteration, _OwnError])
@pytest.mark.parametrize("size", [10, _LARGE])
async def test_an_error_of_the_source_leaves_as_itself(
    pool: TokenPool, error: type[BaseException], size: int
) -> None:
    """Of an iterable, an async iterable or a file; before and after the first call."""
    raised = error("mine")

    class Plain:
        def __init__(self) -> None:
            self.given = False

        def __iter__(self) -> Plain:
            return self

        def __next__(self) -> bytes:
            if self.given:
                raise raised
            self.given = True
            return data_of(size)

    class Readable(Plain):
        def read(self, _size: int) -> bytes:
            return next(self)

    for source in (Plain(), Readable()):
        with pytest.raises(error) as caught:
            await pool.digest(source, mechanism=Mechanism.SHA256)
        assert caught.value is raised
    if error is not StopAsyncIteration:

        async def giving() -> AsyncIterator[bytes]:
            yield data_of(size)
            raise raised

        with pytest.raises(error) as caught:
            await pool.digest(giving(), mechanism=Mechanism.SHA256)
        assert caught.value is raised
    await eventually(lambda: pool.stats().sessions_leased == 0)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (5, "int"),
        ({b"a": b"b"}, "dict"),
        (None, "NoneType"),
        (["text"], "str"),
        ([None], "NoneType"),
        ([data_of(_LARGE), 5], "int"),
        ("a text file", "str"),
    ],
)
async def test_what_gives_no_bytes_is_refused(
    pool: TokenPool, data: Any, kind: str
) -> None:
    """With the type that it gave instead, and nothing is left over."""
    if data == "a text file":
        data = io.StringIO(data)
    with pytest.raises(InvalidType, match=kind):
        await pool.digest(data, mechanism=Mechanism.SHA256)
    await eventually(lambda: pool.stats().sessions_leased == 0)


async def test_what_is_no_data_is_refused_before_the_loop(pool: TokenPool) -> None:
    """A stream of the wrong thing is not even made."""
    key = pool.key(label="any")
    with pytest.raises(InvalidType, match="int"):
        key.encrypt_stream(5)  # type: ignore[arg-type]
    with pytest.raises(InvalidType, match="mechanism"):
        key.decrypt_stream(b"", mechanism="AES")  # type: ignore[arg-type]


async def test_a_session_object_may_end_in_the_middle(pool: TokenPool) -> None:
    """With its owner: the next piece is not sent."""
    source, caught = Source(bytes(2 * PIECE)), Caught()
    async with anyio.create_task_group() as tasks:
        async with pool.session() as owner:
            mac = await make_secret(owner, KeyType.GENERIC_SECRET, token=False)
            data = [data_of(_LARGE)]
            expected = hmac_sha256(data[0])
            assert await mac.sign(iter(data), mechanism=_HMAC) == expected
            tasks.start_soon(caught, mac.sign(source, mechanism=_HMAC))
            await source.runs_dry()
        source.give(b"end", None)
    assert isinstance(caught.error, SessionObjectDestroyed)


async def test_the_only_session_is_its_owners(make_pool: MakePool) -> None:
    """A session object is used in parts in its own session where there is no other."""
    async with make_pool(max_sessions=1) as pool, pool.session() as owner:
        mac = await make_secret(owner, KeyType.GENERIC_SECRET, token=False)
        data = data_of(_LARGE)
        assert await mac.sign(iter([data]), mechanism=_HMAC) == hmac_sha256(data)
        assert await digest(owner)


async def test_a_number_that_is_another_keys_signs_nothing(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """The key goes in the middle and its number to another: no result leaves."""
    fault.reuse_numbers()
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        source, caught = Source(bytes(2 * PIECE)), Caught()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caught, mac.sign(source, mechanism=_HMAC))
            await source.runs_dry()
            await mac.destroy()
            await make_secret(pool, KeyType.GENERIC_SECRET, "another")
            source.give(b"end", None)
        assert isinstance(caught.error, StreamInterrupted | KeyNotFound)
        assert "went from the token" in str(caught.error)


async def test_an_operation_that_is_gone_is_begun_again(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Some modules drop what is active: with the data still there nobody notices."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_DigestUpdate", nth=3, answer=CKR.OPERATION_NOT_INITIALIZED)
        data = data_of(_LARGE)
        assert await pool.digest([data], mechanism=Mechanism.SHA256) == sha256(data)
        fault.on("C_DigestFinal", answer=CKR.OPERATION_NOT_INITIALIZED)
        with pytest.raises(StreamInterrupted):
            await pool.digest(iter([data]), mechanism=Mechanism.SHA256)
        fault.on("C_DigestUpdate", nth=2, answer=CKR.DEVICE_MEMORY)
        with pytest.raises(pkcs11.DeviceMemory):
            await pool.digest([data], mechanism=Mechanism.SHA256)


# -- For code that is not async ---------------------------------------------------


async def test_the_blocking_twins_take_data_in_parts(pool: TokenPool) -> None:
    """On a plain thread: iterables and files in, an iterable out."""
    aes = await make_secret(pool)
    mac = await make_secret(pool, KeyType.GENERIC_SECRET, "mac")
    data = data_of(_LARGE)

    def work() -> None:
        how: dict[str, Any] = {"mechanism": _HMAC}
        assert mac.sync.sign(iter(chunks(data)), **how) == hmac_sha256(data)
        assert mac.sync.verify(io.BytesIO(data), hmac_sha256(data), **how)
        stream = aes.sync.encrypt_stream(chunks(data), **_CBC)
        pieces = list(stream)
        assert len(pieces) > 1
        assert b"".join(pieces) == aes_cbc_pad(data)
        with aes.sync.decrypt_stream(iter(pieces), **_CBC) as plain:
            assert data.startswith(next(plain))
        with pytest.raises(InvalidType, match="blocking call"):
            mac.sync.sign(awaited([data]), **how)
        with pytest.raises(InvalidType, match="blocking call"):
            mac.sync.sign(_AsyncFile(data), **how)  # type: ignore[arg-type]
        for _ in aes.sync.encrypt_stream(data, **_CBC):
            break

    await blocking(work)
    await eventually(lambda: pool.stats().sessions_leased == 0)
    with pytest.raises(WouldBlockLoop):
        next(aes.sync.encrypt_stream(data, **_CBC))


async def test_threads_and_the_loop_stream_at_once(make_pool: MakePool) -> None:
    """Many chains on few sessions, from tasks and threads, and each is right."""
    async with make_pool(max_sessions=3) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        data = data_of(_LARGE)
        found: list[bytes] = []

        async def one(number: int) -> None:
            parts = [bytes([number]), data]
            if number % 2:
                signature = await mac.sign(awaited(parts), mechanism=_HMAC)
            else:
                signature = await blocking(
                    lambda: mac.sync.sign(iter(parts), mechanism=_HMAC)
                )
            found.append(signature)

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(one, number)
        assert set(found) == {hmac_sha256(bytes([n]) + data) for n in range(20)}
        await eventually(lambda: pool.stats().sessions_leased == 0)
        assert threading.active_count() < 60


# -- Loops that end ---------------------------------------------------------------


def _abandon(make: Callable[[], list[Any]], under_way: Callable[[], Any]) -> None:
    """Run a loop of its own, and close it under its tasks."""
    loop = asyncio.new_event_loop()

    async def main() -> list[asyncio.Task[Any]]:
        tasks = [asyncio.ensure_future(each) for each in make()]
        await under_way()
        return tasks

    tasks = loop.run_until_complete(main())
    for task in tasks:
        # asyncio's own complaint, that nobody can catch, is not of interest here.
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
    loop.close()


@pytest.mark.parametrize("limit", [None, 0.5])
async def test_a_loop_is_abandoned_with_its_streams(
    pool: TokenPool, limit: float | None
) -> None:
    """Nobody closes them: their sessions come back all the same.

    With the tasks, when they are collected; and at the time limit, because AnyIO never
    lets a task be collected that is inside one of its scopes.
    """
    aes = await make_secret(pool)

    async def reads(source: Source) -> None:
        await collected(aes.encrypt_stream(source, **_CBC, timeout=limit))

    def work() -> None:
        sources = [Source(bytes(2 * PIECE)) for _ in range(2)]

        async def under_way() -> None:
            for source in sources:
                await source.runs_dry()
            assert pool.stats().sessions_leased == 2

        _abandon(
            lambda: [
                pool.digest(sources[0], mechanism=Mechanism.SHA256, timeout=limit),
                reads(sources[1]),
            ],
            under_way,
        )

    await blocking(work)
    # Until then the workers that brought them may have them in their hands.
    await settled(pool)
    gc.collect()
    await eventually(lambda: pool.stats().sessions_leased == 0)
    assert await digest(pool)


_FORK = """
import os, sys
import anyio
from pkcs11 import Mechanism
from pkcs11_pool import ForkedProcess, TokenPool

MODULE, LABEL, PIN = sys.argv[1:]


async def main():
    async with TokenPool(MODULE, token_label=LABEL, pin=PIN) as pool:
        key = pool.key(label="secret")
        how = {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": bytes(16)}
        stream = key.encrypt_stream(bytes(10**6), **how)
        results = pool.map(lambda session, item: item, range(100))
        size = len(await anext(stream)) + await anext(results)
        # Whatever takes the lock in the child waits for ever.
        with pool._engine._lock:
            child = os.fork()
        if not child:
            pool._engine._lock.acquire()
            refused = 0
            for each in (stream, results):
                try:
                    await anext(each)
                except ForkedProcess:
                    refused += 1
                await each.aclose()
            del stream, results
            os._exit(refused)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        async for piece in stream:
            size += len(piece)
        print(status, size, sum([result async for result in results]))


anyio.run(main)
"""


async def test_a_forked_child_leaves_streams_alone(
    pool: TokenPool, token: ThrowawayToken
) -> None:
    """It is refused, and the parent's go on."""
    await make_secret(pool)
    await pool.close()
    arguments = [str(token.module), token.label, token.user_pin]
    done = await anyio.run_process(
        [sys.executable, "-W", "ignore", "-c", _FORK, *arguments], check=False
    )
    expected = f"2 {10**6 + 16 - 10**6 % 16} {sum(range(100))}"
    assert done.stdout.decode().split() == expected.split(), done.stderr.decode()
