"""The comparison with peers: who takes part, what must be reached, what is written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from matplotlib.figure import Figure

from benchmarks import main as comparison
from benchmarks import page, peers, scenarios, targets
from pkcs11_pool.bench import command, growth, imports, measure, options
from pkcs11_pool.bench.measure import Cell, Results, Spread
from pkcs11_pool.bench.plots import draw
from pkcs11_pool.bench.programs import ClientError, Turn
from pkcs11_pool.bench.record import Record, read
from pkcs11_pool.bench.report import Terminal
from pkcs11_pool.bench.soak import Sample
from pkcs11_pool.bench.soaking import Outcome
from pkcs11_pool.bench.turns import OPERATIONS

if TYPE_CHECKING:
    from pkcs11_pool.bench.measure import Plan, Scenario
    from pkcs11_pool.softhsm import SoftHSM

RUN = Path(__file__).parent / "benchmarks" / "run.py"
SHORT = ("--quick", "--rounds", "1", "--seconds", "0.1")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the comparison as developers do."""
    return subprocess.run(
        [sys.executable, str(RUN), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_pool_on_one_core_has_one_for_all_its_threads() -> None:
    """It is bound before there is a thread, so each of them is."""
    script = Path(peers.__file__).with_name("one_core.py")
    done = subprocess.run(
        [sys.executable, "-c", BOUND, str(script), "the", "words"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", "the", "words"]


BOUND = """\
import os, runpy, sys, threading
from pkcs11_pool.bench import client

def main(words):
    def look():
        print(len(os.sched_getaffinity(threading.get_native_id())), *words)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()

client.main = main
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.timeout(120)  # it builds and starts a dozen programs
def test_every_peer_takes_part_or_a_line_says_why_not(
    tmp_path: Path, soft_hsm: SoftHSM
) -> None:
    """Near and behind a network; each one's signatures are right."""
    del soft_hsm
    file = tmp_path / "figures.json"
    done = run(*SHORT, "--only", "p256", "--callers", "2", "--output", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text())
    seen = {(one["scenario"], one["client"]): one for one in data["cells"]}
    clients = {client for _, client in seen}
    assert set(seen) == {
        (scenario, client)
        for scenario in (scenarios.LOCAL, scenarios.NETWORK)
        for client in clients
    }
    for one in seen.values():
        assert one["turns"][0]["total"] > 0, one
        assert (one["checked"] > 0, one["wrong"]) == (True, 0), one
    assert {*peers.BARE, *peers.POOLS, *peers.ONE_CORE, *peers.HANDS} <= clients
    left_out = {peers.JAVA: "Java", peers.GO: "Go ", peers.PYKCS11: "PyKCS11"}
    for name, title in left_out.items():
        notes = [note for note in data["notes"] if note.startswith(title)]
        assert (name in clients) != bool(notes)
    # The shim sleeps before each of the calls, and nobody sleeps too short.
    for name, calls in {"bare": 4, "kept": 2, "handed": 4}.items():
        told = seen[scenarios.NETWORK, name]["p50_us"]["least"]
        assert told >= calls * scenarios.DELAY_US
    assert "Targets" not in done.stdout  # there are none for two callers


def test_more_keys_on_the_token_are_more_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, soft_hsm: SoftHSM
) -> None:
    """Those of the benchmark included; each token has a directory of its own."""
    del soft_hsm
    monkeypatch.setattr(scenarios, "GROWTH", (8, 20))
    counted = []
    with scenarios.growth(lambda _: None) as found:
        for scenario in found:
            done = subprocess.run(
                [sys.executable, "-c", COUNT, scenario.module, scenario.label],
                input=scenario.pin,
                env=dict(scenario.environment),
                capture_output=True,
                text=True,
                check=True,
                cwd=tmp_path,
            )
            counted.append(int(done.stdout))
    assert counted == [8, 20]


def test_the_growth_of_keys_is_measured_unasked_and_told_in_tables(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    soft_hsm: SoftHSM,
) -> None:
    """With 10, 1,000 and 5,000, taking turns with each other. Nothing is measured."""
    del soft_hsm
    monkeypatch.setattr(page, "DOCS", tmp_path)
    filled: dict[str, int] = {}
    together: list[list[str]] = []

    def fill(scenario: Scenario, keys: int) -> None:
        filled[scenario.name] = keys

    def measured(plan: Plan, _advance: object, results: Results) -> None:
        for block in plan.blocks:
            together.append([scenario.name for scenario in block])
            for cell in (cell for group in plan.groups(block) for cell in group):
                rate = 100.0 + filled.get(cell.scenario, 0) // 100
                results.turns[cell] = [turn(rate)] * plan.rounds

    monkeypatch.setattr(scenarios, "_fill", fill)
    monkeypatch.setattr(measure, "run", measured)
    file = tmp_path / "figures.json"
    words = ["--quick", "--peers", "bare,pool-trio,hand-os-locks"]
    assert comparison.main([*words, "--output", str(file)]) == 0
    assert filled == {"keys-10": 10, "keys-1000": 1000, "keys-5000": 5000}
    assert together == [[scenarios.LOCAL], [scenarios.NETWORK], list(filled)]
    said = capsys.readouterr().out
    for keys in ("10", "1,000", "5,000"):
        assert f"P-256 signature, {keys} keys on the token" in said
    seen = read(file)
    grown = {cell for cell in seen.results.turns if cell.scenario in filled}
    # Of those by hand only one is in this comparison, and it was not asked for.
    assert grown == {
        Cell(name, "p256", 1, client)
        for name in filled
        for client in ("bare", "pool-trio")
    }
    page.write(seen)
    text = (tmp_path / "benchmarks.md").read_text()
    table = text[text.index("| client | 10 keys | 1,000 keys | ratio | 5,000 keys |") :]
    assert "| 100/s | 110/s | 1.10 (1.10-1.10) | 150/s | 1.50 (1.50-1.50) |" in table


COUNT = """\
import pkcs11, sys
module, label = sys.argv[1:]
token = pkcs11.lib(module).get_token(token_label=label)
with token.open(user_pin=sys.stdin.read()) as session:
    print(sum(isinstance(one, pkcs11.Key) for one in session.get_objects()))
"""


@pytest.mark.parametrize(
    ("hidden", "wanted", "said"),
    [
        ("java", peers.JAVA, "Java SunPKCS11 is left out: there is no java"),
        ("go", peers.GO, "Go crypto11 is left out: there is no go"),
    ],
)
def test_a_missing_tool_chain_is_named(
    hidden: str,
    wanted: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With the package that brings it; the others take part."""
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name: None if name == hidden else which(name)
    )
    found = peers.Peers(tmp_path, [wanted, "hand-os-locks"])
    assert [one.name for one in found.found] == ["hand-os-locks"]
    assert [note.startswith(said) for note in found.notes] == [True]


def test_a_word_stands_for_all_names_that_begin_so() -> None:
    """In the order in which they are given."""
    assert peers.chosen(["pool", "bare"]) == [*peers.POOLS, "bare"]
    assert peers.chosen(["pool-trio", "pool"])[0] == "pool-trio"
    with pytest.raises(KeyError):
        peers.chosen(["poo"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peers", "rust"], "'rust' is none of bare, kept"),
        (["--scenarios", "far"], "'far' is none of local, network, keys"),
        (["--only", "dance"], "'dance' is none of p256"),
        (["--output", "/no/such/place.json"], "there is no directory for"),
        (["--from", "/no/such/file.json"], "No such file"),
    ],
)
def test_bad_words_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is built."""
    try:
        status: object = comparison.main(words)
    except SystemExit as ended:
        status = ended.code
    assert (status, said in capsys.readouterr().err) == (2, True)


# -- Targets --------------------------------------------------------------------------


def turn(rate: float, p50_us: float = 50.0, p99_us: float = 99.0) -> Turn:
    """A turn at so many operations in a second."""
    return Turn(round(rate * 10), 10.0, round(rate * 10), p50_us, p99_us, ())


def record_of(rates: dict[Cell, list[float]]) -> Record:
    """A record of such rates, round by round."""
    results = Results()
    for cell, found in rates.items():
        results.turns[cell] = [turn(rate) for rate in found]
    names = {cell.scenario: cell.scenario for cell in rates}
    clients = {cell.client: f"the {cell.client}" for cell in rates}
    return Record(
        machine={
            "cores": "2",
            "processor": "x",
            "system": "y",
            "python": "3",
            "date": "today",
        },
        settings={"rounds": 3, "seconds": 1.0, "max_sessions": "twice the callers"},
        scenarios=names,
        contenders=clients,
        results=results,
    )


NEAR = Cell(scenarios.LOCAL, "p256", 8, "bare")


@pytest.mark.parametrize(
    ("rates", "met"),
    [([50.0, 50, 50], True), ([49.9, 49.9, 90], False), ([1, 50, 50], True)],
)
def test_a_target_is_met_by_the_median(rates: list[float], met: bool) -> None:  # noqa: FBT001
    """Exactly the number is enough."""
    mine = NEAR.of("pool-asyncio")
    record = record_of({NEAR: [100.0] * 3, mine: rates})
    (one,) = targets.measured(record)
    assert (one.cell, one.to, one.least) == (mine, NEAR, 0.50)
    assert one.met(record) is met
    assert targets.missed(record) == ([] if met else [one])


def test_each_number_of_callers_has_its_own_target() -> None:
    """As in the issue."""
    asked = {(one.cell, one.to.client): one.least for one in targets.targets()}
    far = Cell(scenarios.NETWORK, "p256", 1, "pool-trio")
    for cell, to, needed in (
        (NEAR.of("pool-uvloop"), "bare", (0.40, 0.50, 0.60)),
        (far, "bare", (1.4, 0.75, 0.50)),
        (far, "hand-lock-trio", (5.0, None, 40.0)),
    ):
        for callers, least in zip((1, 8, 64), needed, strict=True):
            one = Cell(cell.scenario, cell.operation, callers, cell.client)
            assert asked.get((one, to)) == least


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    """There are 39 of them."""
    empty = record_of({})
    assert {one.met(empty) for one in targets.targets()} == {None}
    assert len(list(targets.targets())) == 39
    assert targets.measured(empty) == targets.missed(empty) == []


def test_by_hand_is_compared_on_the_same_loop_and_growth_with_oneself() -> None:
    """Trio with trio; 5,000 keys with 10."""
    hand = [t for t in targets.targets() if t.to.client.startswith("hand")]
    for one in hand:
        loop = one.cell.client.removeprefix("pool-")
        assert one.to == one.cell.of(f"hand-lock-{loop}")
    grown = [t for t in targets.targets() if t.to.client == t.cell.client]
    assert {(t.cell.scenario, t.to.scenario, t.least) for t in grown} == {
        ("keys-5000", "keys-10", 0.9)
    }


@pytest.mark.parametrize(("words", "status"), [([], 0), (["--check"], 1)])
def test_a_missed_target_is_a_status_if_asked_for(
    words: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed in any case."""
    mine = NEAR.of("pool-trio")
    record_of({NEAR: [100.0] * 3, mine: [41.0] * 3}).write(tmp_path / "f.json")
    assert comparison.main(["--from", str(tmp_path / "f.json"), *words]) == status
    said = capsys.readouterr().out
    assert re.search(r"MISSED 0\.41 \(0\.41-0\.41\) +of +0\.42  the pool-trio", said)


# -- The page -------------------------------------------------------------------------


def whole_record() -> Record:
    """A record with something in every place."""
    rates: dict[Cell, list[float]] = {}
    for callers in (1, 8):
        cell = Cell(scenarios.LOCAL, "p256", callers, "bare")
        rates[cell] = [10_000.0, 12_000, 11_000]
        rates[cell.of("pool-trio")] = [5_000.0, 6_000, 6_600]
    for keys, rate in zip(scenarios.GROWTH, (100, 99, 98), strict=True):
        rates[Cell(scenarios.growing(keys), "p256", 1, "pool-trio")] = [rate] * 3
    record = record_of(rates)
    samples = [Sample(n, n + 1.0, 1 << 25, 99, 9, 5, 4, None) for n in range(100)]
    verdict = growth.Verdict("memory", 1 << 25, 1 << 25, 1 << 25, 0, 0, 1 << 22, None)
    record.soaks = [Outcome("trio", 16, 32, samples, [verdict], [])]
    record.imports = imports.ImportTimes(
        Spread(0.2, 0.1, 0.3), Spread(0.3, 0.2, 0.4), Spread(1.5, 1.2, 1.8)
    )
    record.notes = ["Go crypto11 is left out: there is no go: install golang-go"]
    return record


@pytest.fixture(scope="module", autouse=True)
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What matplotlib opens once per process is nobody's left-over."""
    draw(whole_record(), tmp_path_factory.mktemp("plots"))


def test_the_page_shows_all_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables have the figures, its pictures are there, old ones are gone."""
    monkeypatch.setattr(page, "DOCS", tmp_path)
    old = tmp_path / page.PICTURES / "old.svg"
    old.parent.mkdir(parents=True)
    old.touch()
    record = whole_record()
    written = page.write(record)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "python tests/benchmarks/run.py --docs" in text
    assert (
        "| the pool-trio | 0.50 (0.50-0.60) | 6,000 | 0.05 / 0.099 "
        "| 0.50 (0.50-0.60) | 6,000 | 0.05 / 0.099 |"
    ) in text
    assert "| the pool-trio | 100/s | 99/s | 0.99 (0.99-0.99) | 98/s |" in text
    assert "| 0.42 | 0.50 (0.50-0.60) | met |" in text
    assert "nothing grew" in text
    assert "takes 1.50 (1.20-1.80) times" in text
    assert "- Go crypto11 is left out" in text
    pictures = re.findall(r"\]\((.*\.svg)\)", text)
    assert pictures == [
        f"{page.PICTURES}/{name}.svg" for name in ("local-p256", "soak-trio")
    ]
    assert all((tmp_path / picture).is_file() for picture in pictures)
    assert not old.exists()
    assert {path.name for path in written} == {
        *("benchmarks.md", "figures.json", "soak.json"),
        *("local-p256.svg", "soak-trio.svg"),
    }


CALLERS = (1, 8, 64)
#: Rate, p50 and p99 of three turns of one caller; the last one is the median.
TURNS = ((100.0, 100.0, 700.0), (300.0, 300.0, 900.0), (200.0, 200.0, 800.0))


def _drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """The figure of two clients, the second of half the speed, and its file."""
    drawn: list[Any] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    record = record_of({})
    for callers in CALLERS:
        cell = Cell(scenarios.LOCAL, "p256", callers, "bare")
        for client, speed in (("bare", 2), ("pool-trio", 1)):
            record.results.turns[cell.of(client)] = [
                turn(callers * rate * speed, callers * p50 / speed, callers * p99)
                for rate, p50, p99 in TURNS
            ]
    record.scenarios[scenarios.LOCAL] = "local token"
    record.contenders |= {"bare": "the module", "pool-trio": "the pool"}
    (path,) = draw(record, tmp_path)
    assert path.name == "local-p256.svg"
    (figure,) = drawn
    return figure, path.read_text()


def test_the_axes_of_a_picture_say_what_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Throughput, p50 and p99 against callers; as text, for who cannot see it, too."""
    figure, picture = _drawn(tmp_path, monkeypatch)
    panels = ("operations per second", "p50, ms", "p99, ms")
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    assert [axes.get_xlabel() for axes in figure.axes] == ["callers"] * 3
    for axes in figure.axes:
        assert list(axes.get_xticks()) == list(CALLERS)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "8", "64"]
    title = f"{OPERATIONS['p256']}, local token"
    for text in (title, *panels, "callers", "the module", "the pool"):
        assert f">{text}</text>" in picture


def test_a_picture_has_the_medians_and_how_far_the_turns_lay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line through the one, and for each of them a bar; milliseconds are such."""
    figure, _ = _drawn(tmp_path, monkeypatch)
    rate, p50, p99 = figure.axes
    for axes, least, units in (
        (rate, 100, {"the module": 2.0, "the pool": 1.0}),
        (p50, 100, {"the module": 0.5e-3, "the pool": 1e-3}),
        (p99, 700, {"the module": 1e-3, "the pool": 1e-3}),
    ):
        lines: list[Any] = axes.get_lines()
        assert [one.get_label() for one in lines[::2]] == list(units)
        # After each line its bars, in one broken line without a name.
        for line, bars, unit in zip(
            lines[::2], lines[1::2], units.values(), strict=True
        ):
            assert list(line.get_xdata()) == list(CALLERS)
            medians = [n * (least + 100) * unit for n in CALLERS]
            assert list(line.get_ydata()) == pytest.approx(medians)
            thrice = [n for n in CALLERS for _ in range(3)]
            assert list(bars.get_xdata()) == thrice
            ends = [
                n * end * unit
                for n in CALLERS
                for end in (least, least + 200, math.nan)
            ]
            assert list(bars.get_ydata()) == pytest.approx(ends, nan_ok=True)


def test_the_page_can_be_made_again_from_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, to the byte: pictures too."""
    monkeypatch.setattr(page, "DOCS", tmp_path)
    written = page.write(whole_record())
    before = {path: path.read_bytes() for path in written}
    figures = tmp_path / "copy.json"
    figures.write_bytes((tmp_path / page.PICTURES / "figures.json").read_bytes())
    # The soak is beside it, and is taken from there.
    assert comparison.main(["--docs", "--from", str(figures)]) == 0
    assert {path: path.read_bytes() for path in written} == before


def test_the_longest_soak_stays_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took its time; one that is as long takes its place."""
    monkeypatch.setattr(page, "DOCS", tmp_path)
    first, second = whole_record(), whole_record()
    first.settings["command"] = "a long one"
    page.write(first)
    second.soaks = [
        dataclasses.replace(second.soaks[0], samples=first.soaks[0].samples[:50])
    ]
    page.write(second)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "    a long one\n" in text
    assert "trio: 99 operations in 100 s, nothing grew." in text
    assert "- trio: 49 operations in 50 s, nothing grew." in text
    second.soaks = first.soaks
    second.settings["command"] = "as long"
    page.write(second)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "a long one" not in text
    assert text.count("trio: 99 operations") == 1


def test_an_interrupted_comparison_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured is in a file, from which the page can be made."""
    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(comparison, "KEPT", tmp_path / "build" / "kept.json")

    def broken_off(run: comparison.Run) -> None:
        whole = whole_record()
        run.record.results.turns.update(whole.results.turns)
        run.record.scenarios, run.record.contenders = whole.scenarios, whole.contenders
        run.record.settings |= whole.settings
        cell = next(reversed(run.record.results.turns))
        del run.record.results.turns[cell]
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.Run, "all", broken_off)
    assert comparison.main(["--docs"]) == command.INTERRUPTED
    assert f"what was measured is in {comparison.KEPT}" in capsys.readouterr().err
    assert comparison.main(["--docs", "--from", str(comparison.KEPT)]) == 0
    assert "| 0.50 (0.50-0.60) |" in (tmp_path / "benchmarks.md").read_text()


def test_a_soak_that_fails_takes_nothing_else_along(
    monkeypatch: pytest.MonkeyPatch, soft_hsm: SoftHSM
) -> None:
    """A line says so."""
    del soft_hsm

    def fails(*_: object) -> None:
        raise ClientError("it crashed")

    monkeypatch.setattr(command, "soak", fails)
    given = comparison.parser().parse_args(["--soak", "9"])
    record = Record()
    monkeypatch.setattr(comparison.Run, "_compare", lambda *_: None)
    comparison.Run(given, Terminal(), record).all()
    assert record.notes == [
        "the soak on asyncio failed: it crashed",
        "the soak on trio failed: it crashed",
    ]


def test_the_command_is_told_without_places() -> None:
    """They are this machine's."""
    words = ["--docs", "--output", "/home/x", "--only", "p256", "--from", "y"]
    assert comparison.told(words) == "python tests/benchmarks/run.py --docs --only p256"


def test_the_page_needs_matplotlib_and_says_so_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not after half an hour."""
    monkeypatch.setattr(options, "can_plot", lambda: False)
    monkeypatch.setattr(comparison, "Run", None)
    assert comparison.main(["--docs"]) == command.CANNOT_RUN
    assert "--docs needs matplotlib" in capsys.readouterr().err


def test_what_failed_is_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that failed has no figures, and a line."""
    monkeypatch.setattr(page, "DOCS", tmp_path)
    record = whole_record()
    cell: Any = next(c for c in record.results.turns if c.client == "pool-trio")
    record.results.turns[cell] = [None, None, None]
    record.results.failures[cell.scenario, cell.client] = "it died\nof this"
    page.write(record)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| the pool-trio | failed |" in text
    assert "- local, pool-trio: it died\n" in text
