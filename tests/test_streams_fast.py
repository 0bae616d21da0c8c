"""A source that is fed as fast as it can be: who else still gets his turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import KeyType, Mechanism

from keykit import PIECE, hmac_sha256, make_secret, sha256
from pkcs11_pool import LoginRequired, LoginState, PoolTimeout, StreamInterrupted
from poolkit import LAST_RESORT, blocking, digest, eventually, hangs, settled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import ThrowawayToken

_HMAC = Mechanism.SHA256_HMAC


class Endless:
    """Data that is there at once, without an end until it is told.

    Attributes:
        taken: How many pieces were taken.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.over = False

    def __iter__(self) -> Iterator[bytes]:
        """Piece after piece."""
        while not self.over:
            self.taken += 1
            yield bytes(PIECE)


class Upload:
    """A task with an operation on endless data, and how it ended."""

    def __init__(self, pool: TokenPool, **options: Any) -> None:
        self.data = Endless()
        self.error: Exception | None = None
        self.result: bytes | None = None
        self._pool = pool
        self._options = options

    async def __call__(self) -> None:
        """Make it."""
        try:
            self.result = await self._operation()
        except Exception as error:  # noqa: BLE001  # the test looks at it
            self.error = error

    async def _operation(self) -> bytes:
        result: bytes = await self._pool.digest(
            self.data, mechanism=Mechanism.SHA256, **self._options
        )
        return result

    async def goes_on(self, pieces: int = 3) -> None:
        """Wait until more of the data was taken."""
        enough = self.data.taken + pieces
        await eventually(lambda: self.data.taken >= enough or self.error)


class SignedUpload(Upload):
    """The same for a signature, which needs the login."""

    async def _operation(self) -> bytes:
        return await self._pool.key("secret").sign(
            self.data, mechanism=_HMAC, **self._options
        )


class Relay:
    """Two operations, of which one always has a part inside the module.

    A part of one is let go when the next of the other is there. Should it not come,
    because nothing may start any more, all go.

    Attributes:
        rounds: How often each was let go.
    """

    def __init__(self, fault: FaultModule, *functions: str) -> None:
        self.rounds = 0
        self._fault = fault
        self._functions = functions
        for function in functions:
            fault.on(function, every=True, hang="before")

    async def __call__(self) -> None:
        """Go on until nothing more comes."""
        await blocking(self._run)

    def _run(self) -> None:
        fault = self._fault
        for function in self._functions:
            fault.wait_until_hanging(function)
        for turn in range(10_000):
            self.rounds = turn
            for function in self._functions:
                before = fault.count(function)
                fault.release(function)
                try:
                    fault.wait_until_count(function, before + 1, timeout=3)
                    fault.wait_until_hanging(function)
                except TimeoutError:
                    fault.clear()
                    return

    async def goes_on(self) -> None:
        """Wait for some more rounds."""
        enough = self.rounds + 3
        await eventually(lambda: self.rounds >= enough)


async def test_the_officer_comes_in_between_two_parts(
    make_pool: MakePool, token: ThrowawayToken, fault: FaultModule
) -> None:
    """However fast they are fed, operations are cut off, and his own session works."""
    async with make_pool(module=fault.path, timeout=3 * LAST_RESORT) as pool:
        await make_secret(pool, KeyType.GENERIC_SECRET)
        uploads = [Upload(pool), SignedUpload(pool)]
        relay = Relay(fault, "C_DigestUpdate", "C_SignUpdate")
        async with anyio.create_task_group() as tasks:
            for upload in uploads:
                tasks.start_soon(upload)
            tasks.start_soon(relay)
            await relay.goes_on()
            async with pool.security_officer(token.so_pin, timeout=LAST_RESORT) as so:
                assert pool.login_state is LoginState.SO
                assert [s.rw for s in fault.sessions()] == [True]
                # What was stopped must not stand in the way of his own.
                assert await digest(so.session, timeout=LAST_RESORT) == sha256(b"data")
        assert [type(upload.error) for upload in uploads] == [StreamInterrupted] * 2
        assert all("begin again" in str(upload.error) for upload in uploads)
        assert pool.login_state is LoginState.USER
        await settled(pool)
        assert pool.stats().sessions_leased == 0
        assert pool.stats().operations_waiting == 0


async def test_an_officer_who_gives_up_cuts_nothing_off(
    make_pool: MakePool, token: ThrowawayToken, fault: FaultModule
) -> None:
    """A call of somebody else does not end in time: the parts go on, and come right."""
    async with make_pool(module=fault.path, timeout=2 * LAST_RESORT) as pool:
        upload = Upload(pool)
        async with anyio.create_task_group() as tasks:
            fault.on("C_GenerateRandom", hang="before")
            tasks.start_soon(pool.generate_random, 8)
            await hangs(fault, "C_GenerateRandom")
            tasks.start_soon(upload)
            await upload.goes_on()
            with pytest.raises(PoolTimeout) as caught:
                async with pool.security_officer(token.so_pin, timeout=0.3):
                    pass
            assert caught.value.phase == "waiting"
            await upload.goes_on()
            fault.release()
            upload.data.over = True
        assert upload.error is None
        pieces = [bytes(PIECE)] * upload.data.taken
        assert upload.result == await pool.digest(pieces, mechanism=Mechanism.SHA256)


async def test_who_holds_a_session_brings_his_data_to_its_end(
    make_pool: MakePool, token: ThrowawayToken, fault: FaultModule
) -> None:
    """The officer waits for a session whose holder needs the parts first."""
    async with make_pool(module=fault.path) as pool:
        mac = await make_secret(pool, KeyType.GENERIC_SECRET)
        inside = anyio.Event()
        waits = anyio.Event()

        async def officer() -> None:
            async with pool.security_officer(token.so_pin, timeout=LAST_RESORT):
                inside.set()

        async def until_he_waits() -> None:
            # In a task of its own: what the holder asks for is let pass.
            while not waits.is_set():
                try:
                    await pool.generate_random(8, timeout=0)
                except PoolTimeout:
                    waits.set()

        async def data() -> AsyncIterator[bytes]:
            yield bytes(2 * PIECE)
            tasks.start_soon(officer)
            tasks.start_soon(until_he_waits)
            await waits.wait()
            for _ in range(3):
                yield bytes(2 * PIECE)

        async with anyio.create_task_group() as tasks:
            async with pool.session():
                with anyio.fail_after(LAST_RESORT / 2):
                    signature = await mac.sign(data(), mechanism=_HMAC)
                assert not inside.is_set()
            await inside.wait()
        assert signature == hmac_sha256(bytes(8 * PIECE))


async def test_a_logout_comes_in_between_two_parts(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """It ends what needs the login; what does not goes on as if nothing had been."""
    async with make_pool(module=fault.path, timeout=3 * LAST_RESORT) as pool:
        await make_secret(pool, KeyType.GENERIC_SECRET)
        public, private = Upload(pool), SignedUpload(pool)
        relay = Relay(fault, "C_DigestUpdate", "C_SignUpdate")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(public)
            tasks.start_soon(private)
            tasks.start_soon(relay)
            await relay.goes_on()
            with anyio.fail_after(LAST_RESORT):
                await pool.logout()
            assert pool.login_state is LoginState.PUBLIC
            await public.goes_on()
            public.data.over = True
        assert type(private.error) is LoginRequired
        assert public.error is None
        pieces = [bytes(PIECE)] * public.data.taken
        assert public.result == await pool.digest(pieces, mechanism=Mechanism.SHA256)


async def test_a_login_does_not_wait_for_a_part(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """Nobody need be out of the module for a login: a part that hangs holds up none."""
    async with make_pool(module=fault.path, pin=None, timeout=LAST_RESORT) as pool:
        upload = Upload(pool)
        fault.on("C_DigestUpdate", nth=2, hang="before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upload)
            await hangs(fault, "C_DigestUpdate")
            with anyio.fail_after(LAST_RESORT / 2):
                await pool.login("1234")
            assert pool.login_state is LoginState.USER
            fault.release()
            await upload.goes_on()
            upload.data.over = True
        assert upload.error is None
