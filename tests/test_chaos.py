"""The chaos command: what it reports, and that it would report what must not be."""

from __future__ import annotations

import json
import random
import re
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import Attribute, KeyType

from pkcs11_pool import TokenPool, chaos
from pkcs11_pool.chaos import faults, load, server
from pkcs11_pool.chaos.report import Report
from poolkit import (
    LAST_RESORT,
    digest,
    eventually,
    hangs,
)
from terminalkit import on_a_terminal

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule

_SEED = 45


@pytest.fixture
def needs_server(soft_hsm: object) -> None:
    """Skip where there is no server to be killed."""
    del soft_hsm
    try:
        server.client_module()
    except server.ServerUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("needs_server")
@pytest.mark.timeout(90)
def test_a_short_run_loses_nothing() -> None:
    """Thirteen seconds with real kills: lost, wrong and left over are empty.

    A terminal shows meanwhile how it goes, and each fault.
    """
    command = ["chaos", "--json", "--minutes", "0.22", "--seed", str(_SEED)]
    done = on_a_terminal([*command, "--tasks", "32"], timeout=80)
    report: dict[str, Any] = json.loads(done.out)
    assert (report["lost"], report["wrong"], report["leaked"]) == ([], [], [])
    assert done.status == 0
    lived = re.findall(r"([\d,]+) results, 0 wrong, the pool is (\w+)", done.screen)
    counts = [int(count.replace(",", "")) for count, _ in lived]
    assert counts == sorted(counts)
    assert len(set(counts)) > 10
    assert "ready" in {state for _, state in lived}
    kills = re.findall(r"  kill for [\d.]+ s", done.screen)
    assert len(kills) == report["faults"]["kill"]
    assert report["seed"] == _SEED
    planned = faults.plan(random.Random(_SEED), 0.22 * 60)  # noqa: S311
    assert sum(report["faults"].values()) == len(planned)
    assert report["faults"]["kill"] == [f.kind for f in planned].count("kill") > 0
    assert report["recoveries"] >= report["faults"]["kill"]
    assert report["outages"] > 0
    assert report["longest_return_seconds"] < 3 * 2.0
    assert report["operations"] == sum(report["operations_by_kind"].values()) > 100


def test_without_a_server_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, and a text that helps."""
    monkeypatch.setattr(server, "_PLACES", ())
    status = chaos.run(seconds=1, seed=1, tasks=1, loop="asyncio", as_json=True)
    assert status == 2
    told = capsys.readouterr()
    assert "apt-get install p11-kit" in told.err
    assert told.out == ""


def test_the_same_seed_makes_the_same_faults() -> None:
    """And another one others; they leave the end in peace."""
    one, same, other = (
        faults.plan(random.Random(seed), 60)  # noqa: S311
        for seed in (1, 1, 2)
    )
    assert one == same != other
    assert sum(fault.rest + fault.length for fault in one) <= 57
    assert {fault.kind for fault in one} <= set(faults.KINDS)


async def test_what_is_lost_or_strange_on_the_token_is_seen(pool: TokenPool) -> None:
    """A key that was acknowledged and is gone, and one that nobody was told of."""
    book = load.Book()
    for label in ("kept", "strange", "unsure"):
        await pool.generate_key(KeyType.AES, 128, label=label, store=True)
    book.made |= {"kept", "lost"}
    book.unsure |= {"unsure", "neither"}
    assert await load.compare(pool, book) == (["lost"], ["strange"])
    # Made twice: what must not be repeated was.
    await pool.generate_key(KeyType.AES, 128, label="kept", store=True)
    assert await load.compare(pool, book) == (["lost"], ["strange", "kept"])


async def test_wrong_results_and_callers_without_answer_are_seen(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signature by another key, and a call that does not come back in time."""
    async with make_pool(module=fault.path, timeout=LAST_RESORT) as pool:
        await load.prepare(pool)
        await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", label="another", store=True
        )
        another = await pool.key(label="another").public_key_der()
        rng = random.Random(1)  # noqa: S311
        work = load.Load(pool, another, rng, unruly=False)
        await work._once(work._sign)  # noqa: SLF001
        assert "wrong signature" in work.book.wrong[0]
        fault.on("C_Digest", hang="before")
        # From here on only: a call that answers has all the time.
        monkeypatch.setattr(load, "_GRACE", -29.8)
        await work._once(work._digest)  # noqa: SLF001
        assert "no answer" in work.book.wrong[1]
        assert work.book.total == 0
        fault.release()
        await eventually(lambda: pool.stats().operations_running == 0)
        assert len(await pool.find({Attribute.LABEL: load.SIGNER})) == 2


async def test_what_is_left_over_is_seen(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that nobody gave back, and a call that is still inside."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", hang="before")
        async with anyio.create_task_group() as tasks, pool.session():
            tasks.start_soon(digest, pool)
            await hangs(fault, "C_Digest")
            with monkeypatch.context() as patch:
                patch.setattr(chaos, "_PATIENCE", 0.0)
                left = await chaos._left_over(pool)  # noqa: SLF001
            fault.release()
        assert left == ["2 sessions", "1 leases", "1 running"]
        assert await chaos._left_over(pool) == []  # noqa: SLF001


@pytest.mark.parametrize("what", ["lost", "wrong", "strange", "leaked", "nothing"])
def test_what_must_not_be_is_its_exit_status(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is named; with nothing of the kind the status is 0."""
    found = {name: ["key 7"] * (name == what) for name in ("lost", "strange", "leaked")}
    book = load.Book()
    if what == "wrong":
        book.blame("key 7")
    report = Report(
        seed=1,
        loop="asyncio",
        tasks=1,
        seconds=1.0,
        book=book,
        faults={},
        stats=TokenPool("x.so", slot_id=0).stats(),
        **found,
    )
    monkeypatch.setattr(chaos, "_on_a_server", lambda *_: report)
    status = chaos.run(seconds=1, seed=1, tasks=1, loop="asyncio", as_json=True)
    told = capsys.readouterr()
    assert status == (what != "nothing")
    assert ("not as it should be: key 7" in told.err) == (what != "nothing")
    data = json.loads(told.out)
    assert sum(len(data[name]) for name in ("lost", "wrong", "leaked")) == status


async def test_a_right_load_fills_the_book_and_blames_nobody(pool: TokenPool) -> None:
    """One operation of each kind."""
    work = load.Load(pool, await load.prepare(pool), random.Random(3))  # noqa: S311
    for kind, _ in work._kinds:  # noqa: SLF001
        await kind(b"1", {})
    assert work.book.wrong == []
    assert {"sign", "verify", "digest", "random", "make", "session", "stream"} <= set(
        work.book.acknowledged
    )
