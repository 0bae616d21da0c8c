"""The command line on a real token: what it prints, where, and how it ends."""

from __future__ import annotations

import base64
import getpass
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from pkcs11_pool import LoginState, cli, pins
from pkcs11_pool.cli import app, exits, options
from pkcs11_pool.cli.app import main

if TYPE_CHECKING:
    from conftest import MakePool
    from faultmodule import FaultModule
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory

COMMAND = (sys.executable, "-W", "error", "-m", "pkcs11_pool")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, as JSON; and it printed nothing else."""
        return json.loads(self.out)


class Run:
    """Runs commands in this process, with variables that name token and PIN."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0) -> Ended:
        """Run one; it ends with this status, and if it fails, with one line."""
        self._capsys.readouterr()
        found = main(words)
        told = self._capsys.readouterr()
        assert found == status, told
        if status > 1:
            assert told.err.count("\n") == 1, told.err
            assert "Traceback" not in told.err
        return Ended(found, told.out, told.err)


@pytest.fixture
def bare(capsys: pytest.CaptureFixture[str]) -> Run:
    """Commands where no variable is set."""
    return Run(capsys)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    token: ThrowawayToken,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Commands on a token with a user."""
    monkeypatch.setenv("PKCS11_MODULE", str(token.module))
    monkeypatch.setenv("PKCS11_TOKEN", token.label)
    monkeypatch.setenv("PKCS11_PIN", token.user_pin)
    return Run(capsys)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine sets is not the tests' business."""
    for name in ("PKCS11_MODULE", "PKCS11_TOKEN", "PKCS11_PIN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked, unless a test types."""
    monkeypatch.setattr("pkcs11_pool.pin_sources.can_prompt", lambda: False)
    monkeypatch.setattr("pkcs11_pool.pins.can_prompt", lambda: False)


class Typed:
    """Somebody who types PINs, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.answers: list[str] = []
        monkeypatch.setattr("pkcs11_pool.pin_sources.can_prompt", lambda: True)
        monkeypatch.setattr("pkcs11_pool.pins.can_prompt", lambda: True)
        monkeypatch.setattr(getpass, "getpass", self)

    def __call__(self, text: str) -> str:
        """Answer."""
        self.asked.append(text)
        return self.answers.pop(0)


@pytest.fixture
def typed(no_terminal: None, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """A terminal."""
    del no_terminal
    return Typed(monkeypatch)


# -- Tokens ---------------------------------------------------------------------------


def test_tokens_are_listed(run: Run, token: ThrowawayToken) -> None:
    """For people as a table, for programs as JSON with the mechanisms."""
    assert token.serial.decode() in run("tokens").out
    listed = run("tokens", "--json").json
    ours = next(item for item in listed if item["label"] == token.label)
    assert ours["serial"] == token.serial.decode()
    assert "TOKEN_INITIALIZED" in ours["flags"]
    assert {"RSA_PKCS", "ECDSA"} <= set(ours["mechanisms"])


def test_a_label_is_no_mark_up(
    run: Run, token_directory: TokenDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token may be called anything."""
    del monkeypatch
    token_directory.add_token("[red]x[/nope]")
    assert "[red]x[/nope]" in run("tokens").out


def test_a_token_is_initialised(
    bare: Run,
    soft_hsm: SoftHSM,
    token_directory: TokenDirectory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only free one, without naming its slot; used ones only with --wipe."""
    del token_directory
    monkeypatch.setenv("PKCS11_MODULE", str(soft_hsm.module))
    monkeypatch.setenv("SO", "87654321")
    monkeypatch.setenv("PKCS11_PIN", "4321")
    made = bare("init-token", "mine", "--so-pin-env", "SO", "--json").json
    assert made["label"] == "mine"
    assert "USER_PIN_INITIALIZED" in made["flags"]
    monkeypatch.setenv("PKCS11_TOKEN", "mine")
    assert len(bytes.fromhex(bare("random", "20").out)) == 20
    words = ("init-token", "other", "--slot", str(made["slot"]), "--so-pin-env", "SO")
    assert "--wipe initialises it anew" in bare(*words, status=2).err
    again = bare(*words, "--wipe", "--no-user-pin", "--json").json
    assert "USER_PIN_INITIALIZED" not in again["flags"]
    assert "no user PIN" in bare("tokens").out


def test_new_pins_are_typed_and_not_shown(
    bare: Run,
    soft_hsm: SoftHSM,
    token_directory: TokenDirectory,
    monkeypatch: pytest.MonkeyPatch,
    typed: Typed,
) -> None:
    """Where no word names a source."""
    del token_directory
    monkeypatch.setenv("PKCS11_MODULE", str(soft_hsm.module))
    typed.answers = ["87654321", "87654321", "4321", "4321"]
    told = bare("init-token", "mine")
    assert typed.asked == [
        "New PIN of the security officer: ",
        "The same again: ",
        "First PIN of the user: ",
        "The same again: ",
    ]
    assert "4321" not in told.err.replace("87654321", "")
    typed.answers = ["4321"]
    bare("random", "8", "--token", "mine")
    typed.answers = ["4321", "9876", "9875"]
    told = bare("set-pin", "--token", "mine", status=4)
    assert "the two PINs differ; nothing was done" in told.err
    typed.answers = ["4321", "9876", "9876"]
    bare("set-pin", "--token", "mine")
    typed.answers = ["9876"]
    bare("random", "8", "--token", "mine")
    # Asked once for each command, however often the pool logs in.
    assert typed.answers == []


# -- Keys -----------------------------------------------------------------------------

_VERIFY = {
    "ec": lambda key, signature, data: key.verify(
        signature, data, ec.ECDSA(hashes.SHA256())
    ),
    "rsa": lambda key, signature, data: key.verify(
        signature, data, padding.PKCS1v15(), hashes.SHA256()
    ),
    "ed25519": lambda key, signature, data: key.verify(signature, data),
}


@pytest.mark.parametrize("kind", _VERIFY)
def test_what_is_signed_another_library_verifies(
    run: Run, tmp_path: Path, kind: str
) -> None:
    """By the public key that keygen printed; and the token by itself."""
    pem = run("keygen", "signer", "--type", kind, "--id", "01ff").out
    public = serialization.load_pem_public_key(pem.encode())
    assert isinstance(
        public, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey, ed25519.Ed25519PublicKey)
    )
    file, signature = tmp_path / "file", tmp_path / "signature"
    # More than one call takes, so that it goes in parts.
    file.write_bytes(os.urandom(200_000))
    run("sign", str(file), "--key", "signer", "--signature", str(signature))
    _VERIFY[kind](public, signature.read_bytes(), file.read_bytes())
    assert run("verify", str(file), str(signature), "--id", "01ff").out == "valid\n"
    told = run("sign", str(file), "--key", "signer", "--json").json
    text = base64.b64decode(run("sign", str(file), "--id", "01FF").out)
    for made in (bytes.fromhex(told["signature"]), text):
        _VERIFY[kind](public, made, file.read_bytes())
    with pytest.raises(InvalidSignature):
        _VERIFY[kind](public, signature.read_bytes(), b"other")


def test_a_wrong_signature_is_status_1(run: Run, tmp_path: Path) -> None:
    """Not an error: it is the answer."""
    run("keygen", "signer")
    file, signature = tmp_path / "file", tmp_path / "signature"
    file.write_bytes(b"data")
    run("sign", str(file), "--key", "signer", "--signature", str(signature))
    for encoding in ("hex", "base64"):
        text = run("sign", str(file), "--key", "signer", "--encoding", encoding).out
        (tmp_path / "text").write_text(text)
        these = (str(file), str(tmp_path / "text"), "--key", "signer")
        assert run("verify", *these, "--no-login", "--json").json == {"valid": True}
    file.write_bytes(b"Data")
    words = ("verify", str(file), str(signature), "--key", "signer")
    assert run(*words, status=1).out.startswith("not valid")
    assert run(*words, "--json", status=1).json == {"valid": False}
    signature.write_bytes(b"\x30\x00")
    run(*words, status=1)


def test_a_uri_names_module_token_key_and_pin(
    bare: Run, token: ThrowawayToken, run: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    """All in one word, the PIN by its source."""
    run("keygen", "signer", "--type", "aes", "--bits", "128")
    for name in ("PKCS11_MODULE", "PKCS11_TOKEN", "PKCS11_PIN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ANOTHER", token.user_pin)
    file = tmp_path / "file"
    file.write_bytes(bytes(16))
    uri = (
        f"pkcs11:token={token.label};object=signer"
        f"?module-path={token.module}&pin-source=env:ANOTHER"
    )
    words = ("--uri", uri, "--mechanism", "AES_CMAC", "--encoding", "hex")
    assert len(bytes.fromhex(bare("sign", str(file), *words).out)) == 16


def test_standard_input_is_signed_and_verified(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As "-"."""
    run("keygen", "signer", "--type", "aes", "--bits", "128")
    words = ("--key", "signer", "--mechanism", "AES_CMAC")
    data, signature = tmp_path / "data", tmp_path / "signature"
    data.write_bytes(bytes(16))
    for command in (
        ("sign", "-", "--signature", str(signature)),
        ("verify", "-", str(signature)),
    ):
        with data.open() as file:
            monkeypatch.setattr("sys.stdin", file)
            run(*command, *words)
    run("verify", str(data), str(signature), *words)


def test_objects_are_listed_with_what_they_may_do(run: Run) -> None:
    """Private ones only after a login."""
    run("keygen", "signer")
    listed = run("objects", "--json").json
    assert [(item["class"], item["label"]) for item in listed] == [
        ("PRIVATE_KEY", "signer"),
        ("PUBLIC_KEY", "signer"),
    ]
    assert listed[0]["sign"] is True
    assert "EC" in run("objects").out
    public = run("objects", "--no-login", "--json").json
    assert [item["class"] for item in public] == ["PUBLIC_KEY"]


def test_random_octets(run: Run, tmp_path: Path) -> None:
    """As many as asked for, in each form."""
    file = tmp_path / "random"
    told = run("random", "100000", "--output", str(file), "--json").json
    assert told == {"size": 100000, "random": None}
    assert len(set(file.read_bytes())) == 256
    assert file.stat().st_size == 100000
    assert len(base64.b64decode(run("random", "7", "--encoding", "base64").out)) == 7


# -- What is wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["random", "8", "--module", "/no.so"], 3, "/no.so does not exist"),
        (["random", "8", "--token", "none"], 3, "no token matches"),
        (["random", "8", "--pin-env", "NONE"], 4, "NONE is not set"),
        (["random", "8", "--pin-file", "/none"], 4, "/none"),
        (["random", "8", "--pin-prompt"], 4, "no terminal"),
        (["random", "8", "--pin-env", "A", "--pin-file", "/b"], 2, "has one source"),
        (["random", "8", "--pin", "1234"], 2, "is no word of a command"),
        (["random", "8", "--pin=1234"], 2, "is no word of a command"),
        (["random", "0"], 2, "1 to 1073741824, not 0"),
        (["random", "many"], 2, "many"),
        (["random", "8", "--encoding", "morse"], 2, 'Choose from: "base64"'),
        (["random", "8", "--uri", "pkcs11:token"], 2, "at character 8"),
        (["random", "8", "--uri", "pkcs11:library-version=1"], 2, "take it out"),
        (["random", "8", "--timeout", "-1"], 2, "timeout must be"),
        (["objects", "--uri", "pkcs11:token=other"], 2, "names the token 'other'"),
        (
            ["tokens", "--uri", "pkcs11:?module-path=/b.so"],
            2,
            "names the module '/b.so'",
        ),
        (["sign", "--frob", "--key", "x"], 2, "Unknown option: --frob"),
        (["random", "8", "--pin-prompt"], 4, "--pin-env"),
        (["sign", __file__, "--key", "none"], 5, "`pkcs11-pool objects`"),
        (["sign", __file__], 2, "which key?"),
        (["sign", "/no/file", "--key", "x"], 8, "/no/file: No such file"),
        (["sign", __file__, "--key", "x", "--mechanism", "y"], 2, "no mechanism"),
        (["sign", __file__, "--id", "xyz"], 2, "'xyz' is not hexadecimal"),
        (["keygen", "x", "--type", "dsa"], 2, '"ec", "ed25519"'),
        (["random", "8", "--pin-env", "1234"], 2, "takes the name of a variable"),
        (["random", "8", "9"], 2, "'9': more words than random takes"),
        (["random", "8", "--pin-file", "/none"], 4, "/none: No such file or"),
        (["tokens", "--module", __file__], 3, "loaded: invalid ELF header"),
        (["sign", __file__, "--uri", "pkcs11:token=demo"], 2, "not quoted"),
        (["init-token", 33 * "x", "--so-pin-env", "PKCS11_PIN"], 2, "33 bytes"),
        (["set-pin", "--new-pin-env", "NONE"], 4, "NONE is not set"),
        (["top", "localhost"], 2, "http://localhost?"),
        (["top", "ftp://localhost"], 2, "http://HOST:PORT/PATH"),
        (["top", "http://127.0.0.1:9/x"], 7, "does not answer"),
        (["completion", "tcsh"], 2, '"bash"'),
    ],
)
def test_bad_input_is_one_line_and_a_status(
    run: Run, words: list[str], status: int, said: str
) -> None:
    """That says what to do."""
    told = run(*words, status=status)
    assert said in told.err
    assert told.out == ""


def test_a_wrong_pin_is_sent_once(
    run: Run, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its status is 4."""
    monkeypatch.setenv("PKCS11_MODULE", str(fault.path))
    monkeypatch.setenv("PKCS11_PIN", "9999")
    told = run("random", "8", status=4)
    assert "9999" not in told.err
    assert fault.count("C_Login") == 1


def test_a_key_that_is_there_is_not_made_again(run: Run) -> None:
    """Two of one name are one that nobody can name."""
    run("keygen", "signer", "--type", "aes")
    assert "already" in run("keygen", "signer", "--type", "aes", status=5).err


def test_without_a_module_those_of_this_machine_are_named(
    bare: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In advice: none is loaded by itself. And where there is none, how to get one."""
    monkeypatch.setattr(options, "TYPICAL_MODULES", ("/no.so", __file__))
    told = bare("tokens", status=2).err
    assert "set PKCS11_MODULE" in told
    assert told.endswith(f"; on this machine: {__file__}\n")
    monkeypatch.setattr(options, "TYPICAL_MODULES", ("/no.so",))
    assert "`pkcs11-pool softhsm` gets one" in bare("tokens", status=2).err


def test_without_a_pin_its_sources_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a session without a login is offered where it can do."""
    monkeypatch.delenv("PKCS11_PIN")
    assert "--pin-credential" in run("random", "8", status=4).err
    run("random", "8", "--no-login")


def test_each_source_of_a_pin(
    run: Run,
    token: ThrowawayToken,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: Typed,
) -> None:
    """By its word."""
    monkeypatch.delenv("PKCS11_PIN")
    (tmp_path / "pin").write_text(token.user_pin)
    (tmp_path / "pin").chmod(0o600)
    monkeypatch.setenv("ANOTHER", token.user_pin)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(pins, "keyring", lambda _service, _user: lambda: token.user_pin)
    typed.answers = [token.user_pin]
    for words in (
        ("--pin-env", "ANOTHER"),
        ("--pin-file", str(tmp_path / "pin")),
        ("--pin-credential", "pin"),
        ("--pin-keyring", "hsm", "signer"),
        ("--pin-prompt",),
    ):
        run("random", "8", *words)
    assert typed.answers == []


@pytest.mark.usefixtures("run")
def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no error of a user has its traceback."""

    def spoil(*_words: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pkcs11_pool.cli.tokens.list_tokens", spoil)
    with pytest.raises(ZeroDivisionError):
        main(["tokens"])


def test_ctrl_c_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a program that the signal ends."""

    def stop(*_words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pkcs11_pool.cli.tokens.list_tokens", stop)
    assert run("tokens", status=130).err == "stopped\n"


# -- The program ----------------------------------------------------------------------


def program(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run it as users do."""
    return subprocess.run(
        [*COMMAND, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **more,
    )


def test_the_program_runs_on_a_real_token(token: ThrowawayToken) -> None:
    """As a process of its own, without a warning."""
    words = ("random", "8", "--module", str(token.module), "--token", token.label)
    pin = {**os.environ, "PKCS11_PIN": token.user_pin}
    done = program(*words, env=pin)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(bytes.fromhex(done.stdout)) == 8
    done = program(*words, "--pin-file", "/dev/stdin", input=f"{token.user_pin}\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_who_reads_the_output_may_go(token: ThrowawayToken, unbuffered: str) -> None:
    """As `| head` does: no traceback, whenever Python writes it."""
    with subprocess.Popen(
        [*COMMAND, "tokens", "--json", "--module", str(token.module)],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


IMPORTED = """\
import sys
from pkcs11_pool.__main__ import main
main(["--help"])
print([n for n in ("pkcs11", "anyio", "cryptography", "httpx") if n in sys.modules])
"""


def test_help_imports_no_command() -> None:
    """So that it is quick: neither python-pkcs11 nor AnyIO is there afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", app.COMMANDS)
def test_each_command_has_help(command: str, bare: Run) -> None:
    """With a text for each of its words."""
    told = bare(command, "--help").out
    assert told.startswith(f"Usage: pkcs11-pool {command}")
    rows = [line.strip("│ ") for line in told.splitlines() if line.startswith("│")]
    assert [row for row in rows if row.startswith("--") and "  " not in row] == []


def test_help_of_a_command_is_more_than_its_line_in_the_list(bare: Run) -> None:
    """The whole of its docstring: here, where a shell wants the script."""
    assert ".config/fish/completions" in bare("completion", "--help").out
    assert "ratios to it" in bare("bench", "--help").out


def test_the_page_has_the_table_of_statuses() -> None:
    """All of them, and no others."""
    page = Path(__file__).parents[1] / "docs/reference/command-line.md"
    table = [
        line.split("|")[1:3]
        for line in page.read_text().splitlines()
        if line.startswith("| `") and line.split("|")[1].strip(" `").isdecimal()
    ]
    assert [int(number.strip(" `")) for number, _ in table] == list(exits.Exit)
    for command in app.COMMANDS:
        assert f"`{command}`" in page.read_text()


STATUSES = {
    exits.Exit.USAGE: {
        "InvalidOption",
        "InvalidType",
        "InvalidURI",
        "KeyNotExportable",
        "SessionObjectNeedsSession",
    },
    exits.Exit.TOKEN: {
        "ModuleError",
        "ModuleInUse",
        "TokenAmbiguous",
        "TokenInUse",
        "TokenNotFound",
    },
    exits.Exit.PIN: {
        "LoginRequired",
        "PinLengthInvalid",
        "PinRefused",
        "PinSourceError",
    },
    exits.Exit.KEY: {"KeyAmbiguous", "KeyFunctionNotPermitted", "KeyNotFound"},
    exits.Exit.UNAVAILABLE: {"OutcomeUnknown", "PoolTimeout", "TokenUnavailable"},
}


def test_every_error_of_the_pool_has_a_status() -> None:
    """None of them reaches a user as a traceback; the rest is as the token refused."""
    import pkcs11  # noqa: PLC0415

    from pkcs11_pool import errors  # noqa: PLC0415

    assert set().union(*STATUSES.values()) <= set(errors.__all__)
    for name in errors.__all__:
        kind = getattr(errors, name)
        error = kind("text", "waiting") if name == "PoolTimeout" else kind("text")
        wanted = [status for status, names in STATUSES.items() if name in names]
        told = exits.explained(error)
        assert told is not None
        assert [told[1]] == (wanted or [exits.Exit.REFUSED]), name
    assert exits.explained(pkcs11.exceptions.DeviceError()) == ("DeviceError", 6)
    assert exits.explained(OSError("no file")) == ("no file", 8)
    assert exits.explained(ZeroDivisionError()) is None
    assert cli.__doc__


def test_help_has_the_statuses_of_the_page(bare: Run) -> None:
    """In a line at its end."""
    told = " ".join(bare("--help").out.split())
    line = told.partition("Exit status: ")[2]
    assert [int(n) for n in re.findall(r"\b\d+\b", line)] == list(exits.Exit)


@pytest.mark.parametrize("command", sorted(set(app.COMMANDS) - {"completion"}))
def test_each_command_has_json(command: str, bare: Run) -> None:
    """But the one whose result is a script for a shell."""
    assert re.search(r"^│ --json +Print", bare(command, "--help").out, re.MULTILINE)


async def test_the_library_reads_none_of_these_variables(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, token: ThrowawayToken
) -> None:
    """They are of the command line: a pool is what its code says."""
    monkeypatch.setenv("PKCS11_MODULE", "/none.so")
    monkeypatch.setenv("PKCS11_TOKEN", "none")
    monkeypatch.setenv("PKCS11_PIN", token.user_pin)
    async with make_pool(pin=None) as pool:
        assert pool.token.label == token.label
        assert pool.login_state is LoginState.PUBLIC
    for path in (Path(cli.__file__).parents[1]).rglob("*.py"):
        if "cli" not in path.parts:
            assert not re.search(r"\bPKCS11_(MODULE|TOKEN|PIN)\b", path.read_text())


async def test_a_library_call_is_spoken_of_as_a_command(make_pool: MakePool) -> None:
    """What an error says to do is what can be done here."""
    async with make_pool() as pool:
        with pytest.raises(Exception, match=r"pool\.find") as caught:
            await pool.key("none").sign(b"data")
    told = exits.explained(caught.value)
    assert told is not None
    assert "pool.find" not in told[0]
