"""The benchmark measures what it says, checks it, and refuses what cannot work."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pkcs11 import Attribute, KeyType

from pkcs11_pool import pins
from pkcs11_pool.__main__ import main
from pkcs11_pool.bench import (
    client,
    command,
    contenders,
    growth,
    imports,
    measure,
    options,
    programs,
    record,
    soak,
    soaking,
    tokens,
    turns,
    work,
)
from pkcs11_pool.bench.growth import Verdict, judge
from pkcs11_pool.bench.measure import Cell, Contender, Plan, Scenario
from pkcs11_pool.bench.programs import Client, ClientError
from pkcs11_pool.bench.soak import Orders, Sample
from pkcs11_pool.bench.turns import Request
from poolkit import time_limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory

COMMAND = (sys.executable, "-m", "pkcs11_pool", "bench")
SHORT = ("--quick", "--rounds", "1", "--seconds", "0.05")


def bench(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as users do."""
    return subprocess.run(
        [*COMMAND, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env={**os.environ, **environment},
    )


@pytest.mark.timeout(120)  # it measures: most of it is waiting for windows to end
def test_all_that_was_asked_for_is_measured(tmp_path: Path, soft_hsm: SoftHSM) -> None:
    """Every cell is there, has counted something, and its samples were right."""
    del soft_hsm
    file, plots = tmp_path / "figures.json", tmp_path / "plots"
    done = bench(
        *SHORT,
        *("--callers", "1,3", "--backends", "trio"),
        *("--output", str(file), "--plots", str(plots)),
    )
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    cells = json.loads(file.read_text())["cells"]
    found = {(one["operation"], one["callers"], one["client"]) for one in cells}
    assert found == {
        (operation, callers, name)
        for operation in turns.OPERATIONS
        for callers in (1, 3)
        for name in ("bare", "kept", "pool-trio")
    }
    for one in cells:
        assert one["scenario"] == "local"
        assert len(one["turns"]) == 1
        # On a busy machine a window this short may have missed all of them.
        assert one["turns"][0]["total"] >= one["turns"][0]["operations"] >= 0
        assert one["turns"][0]["total"] > 0
        assert one["operations"] == one["turns"][0]["operations"]
        assert (one["checked"] > 0, one["wrong"]) == (True, 0)
        assert one["p50_us"]["median"] <= one["p99_us"]["median"]
    assert sum(one["operations"] for one in cells) > 0
    assert {path.name for path in plots.iterdir()} == {
        f"local-{operation}.svg" for operation in turns.OPERATIONS
    }
    for title in turns.OPERATIONS.values():
        assert title in done.stdout


async def test_the_pool_counts_as_the_module_counts(
    make_pool: MakePool,
    token: ThrowawayToken,
    fault: FaultModule,
) -> None:
    """What a turn claims in all, the module has done: no more, no less."""
    async with make_pool() as pool:
        await work.make_keys(pool, "key")
    given = {
        "module": fault.path,
        "token_label": token.label,
        "pin": token.user_pin,
        "max_sessions": 6,
    }
    # On a busy machine a window this short may have missed all of them.
    for seconds in time_limits(0.05):
        before = fault.counts().get("C_SignInit", 0)
        request = Request("p256", 3, 0, seconds)
        answer = json.loads(await client.turn(request, given, "key"))
        # One more, before the clock starts, finds the key.
        assert fault.counts()["C_SignInit"] - before == answer["total"] + 1
        assert 0 <= answer["operations"] <= answer["total"]
        if answer["operations"]:
            break


BARE_IN_A_SHIM = """\
import ctypes, json, sys
from pathlib import Path
from faultmodule import FaultModule
library, module, copy, bare, *words = sys.argv[1:]
fault = FaultModule(Path(library), Path(module), copy_to=Path(copy))
words = [b"bare", str(fault.path).encode(), *(word.encode() for word in words)]
array = (ctypes.c_char_p * len(words))(*words)
status = ctypes.CDLL(bare).main(len(words), array)
print(json.dumps({"status": status, "counts": fault.counts()}))
"""


@pytest.mark.parametrize("mode", ["fresh", "kept", "handed"])
def test_the_bare_program_counts_as_the_module_counts(
    mode: str, prepared: Scenario, fault_library: Path, tmp_path: Path
) -> None:
    """It runs inside a process that asks the fault module afterwards."""
    material = prepared.material
    bare = programs.compile_c(programs.BARE, tmp_path, "-shared", "-fPIC")
    words = [str(fault_library), prepared.module, str(tmp_path / "fault.so")]
    words += [str(bare), prepared.label, material.prefix, mode]
    # On a busy machine one of the callers may have had no turn of a processor before a
    # window this short closed.
    for seconds in time_limits(0.05):
        done = subprocess.run(
            [sys.executable, "-c", BARE_IN_A_SHIM, *words],
            input=f"{prepared.pin}\np256 3 0.01 {seconds}\np256 2 0 {seconds}\n",
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        ready, first, second, last = map(json.loads, done.stdout.splitlines())
        total = first["total"] + second["total"]
        counts = last["counts"]
        assert (ready, last["status"]) == ({"ready": True}, 0)
        assert counts.get("C_SignInit", 0) == counts.get("C_Sign", 0) == total
        # The program's own session, and one for each operation or for each caller.
        opened = 1 + (3 + 2 if mode == "kept" else total)
        closed = counts["C_CloseSession"]
        assert (counts["C_OpenSession"], closed) == (opened, opened - 1)
        assert counts["C_FindObjects"] == 1
        samples = first["samples"] + second["samples"]
        if len(samples) == 5:
            break
    signatures = [bytes.fromhex(one) for one in samples]
    assert len(signatures) == len(set(signatures)) == 5
    assert material.wrong("p256", signatures) == 0


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_who_hands_over_has_a_second_thread_for_each_caller(
    prepared: Scenario, tmp_path: Path
) -> None:
    """They are counted during a turn."""
    program = programs.compile_c(programs.BARE, tmp_path)
    fresh, handed = contenders.bare(program)[0], contenders.handed(program)
    for one, threads in ((fresh, 1 + 3), (handed, 1 + 3 + 3)):
        assert _most_threads(one, prepared, 3, threads) == threads


def _most_threads(
    contender: Contender, scenario: Scenario, callers: int, least: int
) -> int:
    """How many a client was seen to have; on a busy machine it takes longer to see."""
    command = contender.command(scenario)
    with Client(command, scenario.pin, scenario.environment) as client:
        tasks = Path(f"/proc/{client._process.pid}/task")  # noqa: SLF001
        for seconds in time_limits(0.2):
            most = 0
            turn = threading.Thread(
                target=client.turn, args=[Request("p256", callers, 0, seconds)]
            )
            turn.start()
            while turn.is_alive():
                most = max(most, len(list(tasks.iterdir())))
            if most >= least:
                break
    return most


async def test_one_wrong_bit_is_noticed(pool: TokenPool) -> None:
    """Each operation's result is right, and wrong with a bit turned over."""
    material = await work.make_keys(pool, "key")
    for operation in turns.OPERATIONS:
        result = await (await client.operation_of(pool, "key", operation))()
        spoilt = bytes([result[0] ^ 1]) + result[1:]
        if operation == "random":
            spoilt = result[1:]  # nobody can tell wrong random bytes from right ones
        assert material.wrong(operation, [result]) == 0, operation
        assert material.wrong(operation, [result, spoilt]) == 1, operation


def test_wrong_results_reach_the_shell(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    soft_hsm: SoftHSM,
) -> None:
    """The status is 1, and the clients are named."""
    del soft_hsm
    monkeypatch.setattr(work.Material, "_right_p256", lambda *_: False)
    words = ["--operations", "p256", "--callers", "1", "--backends", "trio"]
    assert main(["bench", *SHORT, *words]) == 1
    said = capsys.readouterr().out
    for name in ("bare", "kept", "pool-trio"):
        assert f"local, {name}, p256, 1: " in said
    assert "results are wrong" in said


def test_an_interrupted_benchmark_leaves_nothing_behind(
    tmp_path: Path, soft_hsm: SoftHSM
) -> None:
    """Ctrl-C ends it at once: the clients end, and token and programs are gone."""
    del soft_hsm
    words = [*ONE_CELL, "--rounds", "50", "--seconds", "0.01"]
    with subprocess.Popen(
        [*COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("turns "):  # a tenth is done
                break
        assert list(tmp_path.iterdir())
        process.send_signal(signal.SIGINT)
        shown, said = process.communicate(timeout=30)
    assert (process.returncode, shown) == (130, "")
    # The line before may come again, if the signal met it while it was written.
    assert said.splitlines()[-1] == "stopped"
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


# -- The token of the user ------------------------------------------------------------


@pytest.fixture
def theirs(token: ThrowawayToken) -> list[str]:
    """The words that name the test's token."""
    return ["--module", str(token.module), "--token-label", token.label]


ONE_CELL = ("--operations", "p256", "--callers", "1", "--backends", "asyncio")


async def test_a_given_token_is_left_as_it_was(
    theirs: list[str], token: ThrowawayToken, make_pool: MakePool, tmp_path: Path
) -> None:
    """The keys are made there, measured, and destroyed."""
    async with make_pool() as pool:
        await pool.generate_key(KeyType.AES, 128, label="theirs", store=True)
    file = tmp_path / "pin"
    file.write_text(f"{token.user_pin}\n")
    file.chmod(0o600)
    done = bench(*SHORT, *ONE_CELL, *theirs, "--pin-file", str(file))
    assert done.returncode == 0, done.stderr
    assert "pkcs11_pool, asyncio" in done.stdout
    async with make_pool() as pool:
        (left,) = await pool.find()
        found = await left.attributes([Attribute.LABEL])
        assert found == {Attribute.LABEL: "theirs"}


def test_json_is_all_that_is_printed(
    theirs: list[str], token: ThrowawayToken, tmp_path: Path
) -> None:
    """The same figures as in the file; tables and notes are on standard error."""
    file = tmp_path / "figures.json"
    words = ("--json", "--output", str(file))
    done = bench(*SHORT, *ONE_CELL, *theirs, *words, PKCS11_PIN=token.user_pin)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads(file.read_text())
    assert {one["operation"] for one in told["cells"]} == {"p256"}
    assert "P-256 signature" in done.stderr


def test_json_tells_a_wrong_result_too(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    soft_hsm: SoftHSM,
) -> None:
    """The status is 1, and the figures are there."""
    del soft_hsm
    monkeypatch.setattr(work.Material, "_right_p256", lambda *_: False)
    assert main(["bench", *SHORT, *ONE_CELL, "--json"]) == 1
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert all(one["wrong"] == one["checked"] > 0 for one in cells)


@pytest.mark.parametrize("source", ["env", "file", "credential", "keyring", "prompt"])
def test_the_pin_comes_from_each_of_the_sources(
    source: str,
    theirs: list[str],
    token: ThrowawayToken,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the words of every other command; it is not asked for before it is needed."""
    (tmp_path / "pin").write_text(f"{token.user_pin}\n")
    (tmp_path / "pin").chmod(0o600)
    monkeypatch.setenv("THE_PIN", token.user_pin)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(pins, "keyring", lambda *_words: lambda: token.user_pin)
    asked: list[str] = []

    def typed() -> str:
        asked.append(source)
        return token.user_pin

    monkeypatch.setattr(pins, "prompt", lambda _text: typed)
    value = {
        "env": ["THE_PIN"],
        "file": [str(tmp_path / "pin")],
        "credential": ["pin"],
        "keyring": ["hsm", "signer"],
        "prompt": [],
    }
    given = parsed(*theirs, f"--pin-{source}", *value[source]).token
    assert given is not None
    assert asked == []
    assert tokens.given(given).pin == token.user_pin
    assert len(asked) == (source == "prompt")


def test_without_a_word_it_is_the_pin_of_every_other_command(
    theirs: list[str], token: ThrowawayToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable's; and else it is asked for."""
    monkeypatch.setenv("PKCS11_PIN", token.user_pin)
    given = parsed(*theirs).token
    assert given is not None
    assert tokens.given(given).pin == token.user_pin
    monkeypatch.delenv("PKCS11_PIN")
    monkeypatch.setattr(pins, "can_prompt", lambda: True)
    monkeypatch.setattr(pins, "prompt", lambda text: lambda: f"typed at {text}")
    assert tokens.given(given).pin == "typed at PIN of the user: "


def test_a_uri_names_module_token_and_pin(
    token: ThrowawayToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for every other command; the words beside it may say the same again."""
    monkeypatch.setenv("PKCS11_PIN", "of somebody else")
    monkeypatch.setenv("THE_PIN", token.user_pin)
    whole = f"pkcs11:token={token.label}?module-path={token.module}"
    given = parsed("--uri", f"{whole}&pin-source=env:THE_PIN").token
    assert given is not None
    taken = tokens.given(given)
    with tokens.with_keys(taken) as scenario:
        assert (scenario.module, scenario.label) == (str(token.module), token.label)
    assert taken.pin == token.user_pin
    again = ("--module", str(token.module), "--token", token.label)
    given = parsed("--uri", whole, *again, "--pin-env", "THE_PIN").token
    assert given is not None
    assert tokens.given(given).pin == token.user_pin


def test_a_word_for_the_pin_comes_before_that_of_the_uri(
    token: ThrowawayToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a program of the URI is run only where it is allowed."""
    monkeypatch.setenv("THE_PIN", token.user_pin)
    uri = f"pkcs11:token=x?module-path={token.module}&pin-source=%7Cecho%204711"
    allowed = ("--uri", uri, "--allow-pin-command")
    for words, pin in (
        (allowed, "4711"),
        ((*allowed, "--pin-env", "THE_PIN"), token.user_pin),
    ):
        given = parsed(*words).token
        assert given is not None
        assert tokens.given(given).pin == pin


def test_of_two_tokens_of_a_label_none_is_measured(
    token_directory: TokenDirectory,
) -> None:
    """The serial tells them apart, but not to the programs, that go by the label."""
    one, _ = (token_directory.add_token("twin") for _ in range(2))
    serial = one.serial.decode()
    uri = f"pkcs11:serial={serial}?module-path={one.module}"
    done = bench(*SHORT, *ONE_CELL, "--uri", uri, PKCS11_PIN=one.user_pin)
    assert (done.returncode, done.stdout) == (3, "")
    assert "more than one token has the label 'twin'" in done.stderr


def test_a_serial_alone_chooses_the_token(token: ThrowawayToken) -> None:
    """Its label is asked of the token."""
    uri = f"pkcs11:serial={token.serial.decode()}?module-path={token.module}"
    done = bench(*SHORT, *ONE_CELL, "--uri", uri, PKCS11_PIN=token.user_pin)
    assert done.returncode == 0, done.stderr
    assert "pkcs11_pool, asyncio" in done.stdout


def test_no_variable_names_the_token_that_is_measured(
    token: ThrowawayToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and load come to a token of the user only where words say so."""
    monkeypatch.setenv("PKCS11_MODULE", str(token.module))
    monkeypatch.setenv("PKCS11_TOKEN", token.label)
    monkeypatch.setenv("PKCS11_PIN", token.user_pin)
    assert parsed().token is None


def test_a_wrong_pin_is_sent_once(theirs: list[str]) -> None:
    """The benchmark cannot begin, and says why."""
    done = bench(*SHORT, *ONE_CELL, *theirs, "--pin-env", "THE_PIN", THE_PIN="0000")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("the token refused the PIN of the user")
    assert "0000" not in done.stderr


def test_a_pin_that_cannot_be_had_is_told(theirs: list[str]) -> None:
    """By the name of its source."""
    done = bench(*ONE_CELL, *theirs, "--pin-env", "NO_SUCH_PIN")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "the environment variable NO_SUCH_PIN is not set\n"


def test_a_token_that_is_not_there_has_the_status_of_other_commands(
    token: ThrowawayToken,
) -> None:
    """And one line that says so."""
    theirs = ("--module", str(token.module), "--token", "none")
    done = bench(*SHORT, *ONE_CELL, *theirs, PKCS11_PIN=token.user_pin)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert "no token matches" in done.stderr


# -- Options --------------------------------------------------------------------------


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if anything begins."""

    def run(_options: object) -> int:
        raise AssertionError

    monkeypatch.setattr(command, "run", run)


MODULE = ("--module", __file__)
LABEL = ("--token-label", "x")


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--operations", "p256,dance"], "'dance' is none of p256, rsa2048"),
        (["--operations", ""], "'' is none of"),
        (["--callers", "0"], "'0' is not a number of callers, 1 to 4096"),
        (["--callers", "1,,2"], "'' is not a number of callers"),
        (["--callers", "5000"], "'5000' is not a number of callers"),
        (["--callers", "\u00b2"], "is not a number of callers"),
        (["--backends", "twisted"], "'twisted' is none of asyncio, uvloop, trio"),
        (["--rounds", "0"], "'0' is not a whole number from 1 up"),
        (["--seconds", "0"], "'0' is not a number of seconds above 0"),
        (["--seconds", "nan"], "'nan' is not a number of seconds"),
        (["--seconds", "inf"], "'inf' is not a number of seconds"),
        (["--seconds", "soon"], "'soon' is not a number of seconds"),
        (["--max-sessions", "-1"], "'-1' is not a whole number from 1 up"),
        (["--soak", "0"], "'0' is not a whole number from 1 up"),
        (["--soak", "9", "--import-time"], "two things: choose one"),
        ([*LABEL], "--token-label and a PIN go with --module or --uri"),
        (["--pin-env", "X"], "--token-label and a PIN go with --module or --uri"),
        (["--uri", "pkcs11:token"], "at character 8"),
        (["--uri", "pkcs11:token=x?pin-value=4711"], "a PIN is no word of a command"),
        (["--uri", "pkcs11:library-version=1", *MODULE], "take it out"),
        (["--uri", "pkcs11:token=x"], "which module? Give module-path or --module; if"),
        (["--uri", "pkcs11:", *MODULE], "which token? Give --token-label"),
        (["--uri", "pkcs11:token=x?module-path=/no.so"], "module-path: /no.so is no"),
        (["--uri", "pkcs11:?module-path=/b.so", *MODULE], "the module '/b.so', and"),
        (["--uri", "pkcs11:token=y", *MODULE, *LABEL], "names the token 'y', and"),
        (["--uri", "pkcs11:token=x?pin-source=|cat%20x", *MODULE], "unless it is"),
        ([*MODULE, "--pin-env", "X"], "which token? Give --token-label"),
        ([*MODULE, *LABEL, "--pin-env", "X", "--pin-prompt"], "has one source"),
        ([*MODULE, *LABEL, "--pin-env", "1234"], "takes the name of a variable"),
        ([*LABEL, "--module", "/no.so", "--pin-env", "X"], "/no.so is no file"),
        (["--output", "/no/such/place.json"], "there is no directory for"),
        (["--plots", __file__], "is no directory"),
        (["--pin", "1234"], "a PIN is no word of a command"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_begins(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the option's name and what to write instead."""
    assert main(["bench", *words]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""


def parsed(*words: str) -> options.Options:
    """The options that words stand for."""
    seen = []

    def keep(wanted: options.Options) -> int:
        seen.append(wanted)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run", keep)
        assert main(["bench", *words]) == 0
    return seen[0]


def test_without_options_everything_is_measured() -> None:
    """As the issue of it says: seven operations, 1, 8 and 64 callers, every loop."""
    asked = parsed()
    assert asked.operations == list(turns.OPERATIONS)
    assert list(asked.callers) == [1, 8, 64]
    assert asked.backends == ["asyncio", "uvloop", "trio"]
    assert (asked.soak, asked.import_time, asked.token) == (None, False, None)


def test_a_soak_is_a_million_operations_long() -> None:
    """Unless told otherwise."""
    assert parsed("--soak").soak == 1_000_000
    assert parsed("--soak", "7").soak == 7


def test_names_given_twice_are_measured_once() -> None:
    """In the order in which they were first given."""
    asked = parsed("--operations", "aes,p256,aes", "--callers", "8,1,8")
    assert (asked.operations, asked.callers) == (["aes", "p256"], [8, 1])


def test_a_loop_that_is_not_installed_is_refused_by_name_and_else_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left out with its name kept for a note."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "uvloop" else find(name),
    )
    assert parsed().backends == ["asyncio", "trio"]
    assert parsed().missing == ["uvloop"]
    assert main(["bench", "--backends", "asyncio,uvloop"]) == 2
    assert "pip install uvloop" in capsys.readouterr().err


def test_plots_need_matplotlib(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Told before the measuring, not after it."""
    monkeypatch.setattr(options, "can_plot", lambda: False)
    assert main(["bench", "--plots", str(tmp_path)]) == 2
    assert "pkcs11-pool[bench]" in capsys.readouterr().err


WITHOUT = """\
import sys
class Finder:
    def find_spec(name, *rest):
        if name == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder)
from pkcs11_pool.__main__ import main
sys.exit(main(["bench", "--operations", "random"]))
"""


@pytest.mark.parametrize("name", ["cryptography", "rich"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(name: str) -> None:
    """The package runs without these; its benchmark does not."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"The bench needs {name}: pip install 'pkcs11-pool[bench]'\n"


# -- Clients and turns ----------------------------------------------------------------


def test_a_machine_without_a_compiler_measures_without_ratios(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    soft_hsm: SoftHSM,
) -> None:
    """A line says so, and that only ratios mean anything elsewhere."""
    del soft_hsm

    def none() -> list[str]:
        raise programs.NoCompilerError("no C compiler")

    monkeypatch.setattr(programs, "compiler", none)
    assert main(["bench", *SHORT, *ONE_CELL]) == 0
    said = capsys.readouterr().out
    assert "the bare module is left out: no C compiler" in said
    assert "Only ratios mean anything on another machine" in said


FAKE = """\
import json, sys
name, log, *rates = sys.argv[1:]
sys.stdin.readline()
print('{"ready": true}', flush=True)
for line, rate in zip(sys.stdin, rates):
    with open(log, "a") as file:
        file.write(name + "\\n")
    if rate == "dies":
        sys.exit("it died here")
    if rate == "fails":
        print('{"error": "C_Sign answered 0x5"}', flush=True)
    print(json.dumps({"operations": int(rate), "seconds": 1.0, "total": int(rate),
        "p50_us": 1.0, "p99_us": 2.0, "samples": []}), flush=True)
"""


class Rotation:
    """Clients that answer what they are told to, and one scenario for them."""

    def __init__(self, log: Path, scripts: Mapping[str, Sequence[str]]) -> None:
        self._log = log
        self._scripts = scripts
        self.results = measure.run(self.plan(), lambda _: None)

    @property
    def order(self) -> list[str]:
        """Who took a turn, in order."""
        return self._log.read_text().split()

    def plan(self) -> Plan:
        """Three rounds of one operation."""
        material: Any = NoMaterial()
        scenario = Scenario("near", "near", "module", "token", 1, None, material)
        return Plan(
            blocks=[[scenario]],
            contenders=[
                Contender(name, name, self._command(name)) for name in self._scripts
            ],
            operations=["p256"],
            callers=[1],
            rounds=3,
            warm=0.1,
            seconds=1.0,
        )

    def _command(self, name: str) -> Any:
        words = [sys.executable, "-c", FAKE, name, str(self._log), *self._scripts[name]]
        return lambda _scenario: words


class NoMaterial:
    """Nothing to check."""

    def wrong(self, _operation: str, samples: Sequence[bytes]) -> int:
        """No sample, none wrong."""
        return len(samples)


def cell(name: str) -> Cell:
    """A client of the rotation."""
    return Cell("near", "p256", 1, name)


def test_clients_take_turns_and_each_begins_once(tmp_path: Path) -> None:
    """Whoever comes first finds another machine than who comes last."""
    scripts = {name: ["1", "1", "1"] for name in ("bare", "b", "c")}
    assert Rotation(tmp_path / "log", scripts).order == [
        *("bare", "b", "c"),
        *("b", "c", "bare"),
        *("c", "bare", "b"),
    ]


def test_a_ratio_is_formed_within_a_round(tmp_path: Path) -> None:
    """The median of ratios, not the ratio of medians."""
    scripts = {"bare": ["100", "10", "50"], "b": ["50", "9", "10"]}
    results = Rotation(tmp_path / "log", scripts).results
    assert results.ratio(cell("b")) == measure.Spread(0.5, 0.2, 0.9)
    assert results.rate(cell("b")) == measure.Spread(10, 9, 50)
    assert results.operations(cell("b")) == 69


@pytest.mark.parametrize(
    ("how", "said"), [("dies", "it died here"), ("fails", "C_Sign answered 0x5")]
)
def test_a_client_that_fails_is_out_and_the_others_go_on(
    how: str, said: str, tmp_path: Path
) -> None:
    """What it had measured before stays, and what it said is kept."""
    scripts = {"bare": ["100"] * 3, "b": ["50", how, "50"], "c": ["25"] * 3}
    results = Rotation(tmp_path / "log", scripts).results
    assert list(results.failures) == [("near", "b")]
    assert said in results.failures["near", "b"]
    assert results.turns[cell("b")][1:] == [None, None]
    assert results.ratio(cell("b")) == measure.Spread(0.5, 0.5, 0.5)
    assert results.ratio(cell("c")) == measure.Spread(0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("", "ended"),
        ("import time; time.sleep(60)", "gave no answer within 0 s"),
        ("print('ready')", "gave no JSON: b'ready'"),
        ('print(\'{"error": "no"}\')', "says: no"),
    ],
)
def test_a_program_that_is_no_client_is_found_out(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it did instead."""
    # Long enough for an interpreter to start, but not for the one that sleeps.
    monkeypatch.setattr(programs, "_PATIENCE", 0.4 if "sleep" in program else 30)
    monkeypatch.setattr(programs, "_FAREWELL", 0.1)
    with pytest.raises(ClientError) as raised:
        Client([sys.executable, "-c", program], None, {})
    assert said in str(raised.value)


def test_a_client_that_hangs_does_not_stay_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended, whatever it does with the end of its input."""
    file = tmp_path / "process"
    program = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()));"
    program += "print('{\"ready\": true}', flush=True); time.sleep(60)"
    client = Client([sys.executable, "-c", program, str(file)], None, {})
    monkeypatch.setattr(programs, "_PATIENCE", 0.1)
    monkeypatch.setattr(programs, "_FAREWELL", 0.1)
    with client, pytest.raises(ClientError, match="gave no answer"):
        client.turn(Request("p256", 1, 0, 0.01))
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_only_what_ends_inside_the_window_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the warm-up nor what comes late."""
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 0)
    watch = turns.Stopwatch(Request("p256", 1, warm=1, seconds=2))
    for seconds in (0.5, 0.999, 1, 2, 3, 3.001):
        watch.lap(0, int(seconds * 1e9), b"\x07")
    answer = json.loads(watch.answer())
    assert (answer["operations"], answer["total"]) == (3, 6)
    assert (answer["p50_us"], answer["p99_us"]) == (2e6, 3e6)
    assert answer["samples"] == ["07"]


def test_who_is_interrupted_has_what_was_measured(tmp_path: Path) -> None:
    """Each turn is in the record at once, and from time to time in a file."""
    scripts = {"bare": ["100"] * 3, "b": ["50"] * 3}
    rotation = Rotation(tmp_path / "log", scripts)
    results = measure.Results()
    left = 3

    def advance(_what: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.run(rotation.plan(), advance, results)
    assert [len(results.turns[cell(name)]) for name in ("bare", "b")] == [1, 2]
    assert results.ratio(cell("b")) == measure.Spread(0.5, 0.5, 0.5)


def test_figures_survive_a_file(tmp_path: Path) -> None:
    """What was written is what is read."""
    scripts = {"bare": ["100"] * 3, "b": ["50", "dies", "50"]}
    rotation = Rotation(tmp_path / "log", scripts)
    rotation.results.checked[cell("b")] = 7
    rotation.results.wrong[cell("b")] = 3
    whole = record.Record(
        machine=record.machine("SoftHSM"),
        scenarios={"near": "near"},
        contenders={"bare": "bare", "b": "b"},
        results=rotation.results,
        notes=["x is left out"],
        soaks=[outcome(Verdict("memory", 1, 2, 3, 4, 5, 6, None))],
        imports=imports.ImportTimes(*(measure.Spread(1, 1, 2),) * 3),
    )
    whole.write(tmp_path / "file.json")
    assert record.read(tmp_path / "file.json").as_data() == whole.as_data()


# -- The soak -------------------------------------------------------------------------


def series(*values: float) -> Verdict:
    """A verdict about values at even distances."""
    progress = [float(number) for number in range(len(values))]
    return judge("memory", progress, values, allowance=10, bound=1000)


def test_noise_is_no_growth() -> None:
    """It goes up and down and stays where it is."""
    assert not series(*[100, 130] * 50).grew


def test_what_rises_all_the_time_grew() -> None:
    """However slowly, if it comes to more than is allowed."""
    assert series(*[100 + n * 0.2 for n in range(100)]).grew
    assert not series(*[100 + n * 0.1 for n in range(100)]).grew


def test_what_rises_at_the_beginning_only_is_warm_up() -> None:
    """The first fifth."""
    assert not series(*[n * 40 for n in range(20)], *[800] * 80).grew
    assert series(*[n * 20 for n in range(40)], *[800] * 60).grew


def test_what_may_be_chance_neither_grew_nor_is_flat() -> None:
    """The interval says how far a line can be trusted; slow noise makes it wide."""
    walk = [100 + 12 * (n // 15 % 2) + n * 0.05 for n in range(100)]
    verdict = series(*walk)
    assert verdict.error > 10 > verdict.rise
    assert (verdict.grew, verdict.flat, verdict.told) == (False, False, "unclear")
    still = series(*[100, 130] * 50)
    assert (still.grew, still.flat, still.told) == (False, True, "flat")


def test_the_interval_of_a_line_is_the_one_of_the_textbook() -> None:
    """Means 1 to 10 with alternating errors of one: worked out by hand."""
    progress = [float(n) for n in range(20)]
    values = [n // 2 + (2.0 if n // 2 % 2 == 0 else 0.0) for n in progress]
    # The warm-up before, which does not count.
    progress = [float(n) for n in range(5)] + [5 + n for n in progress]
    verdict = judge("x", progress, [9.0] * 5 + values, allowance=99)
    # A block: slope 1 - 5 / 82.5, and standard error sqrt((10 - 25 / 82.5) / 8 / 82.5).
    assert verdict.rise == pytest.approx(0.93939 * 9.5, abs=0.001)
    assert verdict.error == pytest.approx(2.306 * 0.12121 * 9.5, abs=0.001)


def test_one_moment_past_the_bound_is_growth() -> None:
    """Also when it comes back."""
    assert series(*[100] * 50, 1001, *[100] * 49).grew
    assert not series(*[100] * 50, 1000, *[100] * 49).grew


def test_too_few_samples_are_no_verdict() -> None:
    """Nothing is claimed about them."""
    with pytest.raises(growth.TooFewSamplesError, match="2 samples of memory"):
        series(100, 100, 100)


def sample(number: int, **values: Any) -> Sample:
    """A sample of a soak in which nothing happens."""
    plain = {
        "operations": number,
        "seconds": float(number),
        "memory": 1 << 25,
        "blocks": 100_000,
        "threads": 10,
        "descriptors": 5,
        "sessions": 4,
        "module_sessions": 5,
    }
    return Sample(**(plain | values))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("memory", [(1 << 25) + n * 60_000 for n in range(100)]),
        ("blocks", [100_000 + n * 30 for n in range(100)]),
        ("threads", [10 + n // 10 for n in range(100)]),
        ("descriptors", [5 + n // 40 for n in range(100)]),
        ("sessions", [4 if n != 50 else 9 for n in range(100)]),
        ("module_sessions", [5 if n != 50 else 10 for n in range(100)]),
    ],
)
def test_each_series_is_watched(name: str, values: list[int]) -> None:
    """One that grows is found among the others."""
    flat = [sample(n) for n in range(100)]
    assert not [one for one in soaking.judge(flat, 8) if one.grew]
    grown = [sample(n, **{name: value}) for n, value in enumerate(values)]
    assert [one.name for one in soaking.judge(grown, 8) if one.grew] == [name]


def test_a_token_that_does_not_tell_its_sessions_is_not_judged_by_them() -> None:
    """There is no series then."""
    samples = [sample(n, module_sessions=None) for n in range(100)]
    assert "module_sessions" not in [one.name for one in soaking.judge(samples, 8)]


@pytest.fixture
def prepared(token: ThrowawayToken) -> Iterator[Scenario]:
    """The test's token with the keys of the benchmark."""
    chosen = {"token_label": token.label}
    given = tokens.Token(str(token.module), chosen, token.user_pin, throwaway=True)
    with tokens.with_keys(given) as scenario:
        yield scenario


@pytest.mark.parametrize("backend", list(turns.BACKENDS))
def test_a_soak_does_all_its_operations_and_samples_itself(
    backend: str, prepared: Scenario
) -> None:
    """Those that are cancelled or late included; nothing is left when it ends."""
    seen: list[Sample] = []
    done = soaking.run(prepared, backend, Orders(600, 4), 8, seen.append)
    assert seen == done.samples
    assert [one.operations for one in done.samples] == sorted(
        one.operations for one in done.samples
    )
    assert done.samples[-1].operations == 600
    assert len(done.samples) > 100
    assert 0 < max(one.sessions for one in done.samples) <= 8
    assert min(one.memory for one in done.samples) > 1 << 20
    assert min(one.descriptors for one in done.samples) > 2
    assert min(one.threads for one in done.samples) > 1
    assert done.left == []


def test_a_thread_that_stays_is_told_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that ends in a moment is not."""
    monkeypatch.setattr(soak, "_GRACE", 0.05)
    let_go = threading.Event()
    thread = threading.Thread(target=let_go.wait, name="pkcs11-pool worker")
    thread.start()
    try:
        assert soak.left_over() == ["pkcs11-pool worker"]
    finally:
        let_go.set()
    thread.join()
    assert soak.left_over() == []


def outcome(*verdicts: Verdict, left: Sequence[str] = ()) -> soaking.Outcome:
    """What a soak may come to."""
    return soaking.Outcome("trio", 16, 32, [sample(9)], list(verdicts), list(left))


FLAT = Verdict("memory", 1, 1, 1, 0, 0, 1, None)
UNCLEAR = Verdict("blocks", 1, 1, 1, 0, 2, 1, None)
GREW = Verdict("threads", 1, 9, 9, 8, 2, 1, None)


@pytest.mark.parametrize(
    ("came", "status", "said"),
    [
        (outcome(FLAT), 0, "flat"),
        (outcome(FLAT, UNCLEAR), 0, "unclear"),
        (outcome(FLAT, GREW), 1, "GREW"),
        (outcome(FLAT, left=["pkcs11-pool worker"]), 1, "left over"),
    ],
)
def test_growth_reaches_the_shell(
    came: soaking.Outcome,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The status is 1 if anything grew or was left over."""
    monkeypatch.setattr(soaking, "run", lambda *_: came)
    assert main(["bench", "--soak", "9", "--backends", "trio"]) == status
    assert said in capsys.readouterr().out


# -- Importing ------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "status"), [(1.5, 0), (1.6, 1)])
def test_importing_is_measured_in_turns(
    cost: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each ratio is of two that came one after the other; the first pair is dropped."""
    order: list[str] = []

    def seconds(names: str, environment: Mapping[str, str]) -> float:
        assert "PYTHONDONTWRITEBYTECODE" not in environment
        pair = len(order) // 2
        order.append(names)
        # The machine is ten times slower in every other pair.
        base = 10.0 if pair % 2 else 1.0
        if names == imports._DEPENDENCIES:  # noqa: SLF001
            return base
        return base * (cost if pair else 100 * cost)

    monkeypatch.setattr(imports, "_seconds", seconds)
    assert main(["bench", "--import-time"]) == status
    assert order == [imports._DEPENDENCIES, imports._PACKAGE] * 16  # noqa: SLF001
    said = f"{cost:.2f} ({cost:.2f}-{cost:.2f}) times; at most 1.5 are allowed"
    assert said in capsys.readouterr().out


def test_importing_really_happens() -> None:
    """In interpreters of their own."""
    times = imports.run(1, lambda: None)
    assert 0 < times.dependencies.median < times.package.median * 10
    assert times.ratio.median == times.package.median / times.dependencies.median
