"""The doctor finds each thing that can be wrong, and says how to mend it."""

from __future__ import annotations

import grp
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pkcs11
import pytest

from pkcs11_pool.cli import checks
from poolkit import make_ec_key
from test_cli import Run, bare, no_terminal, no_variables, run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from faultmodule import FaultModule
    from pkcs11_pool import TokenPool
    from pkcs11_pool.cli.checks import Finding
    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory

__all__ = ["bare", "no_terminal", "no_variables", "run"]


def found(run: Run, *words: str, status: int) -> list[dict[str, str]]:
    """What the doctor found, worst last."""
    findings: list[dict[str, str]] = run("doctor", "--json", *words, status=status).json
    for finding in findings:
        assert (finding["advice"] == "") is (finding["level"] == "good"), finding
    return findings


def bad(run: Run, *words: str) -> tuple[str, str]:
    """The one thing that the doctor found to be bad, and what to do about it."""
    findings = found(run, *words, status=1)
    (one,) = [finding for finding in findings if finding["level"] == "bad"]
    return one["text"], one["advice"]


def test_a_good_set_up_is_good(run: Run) -> None:
    """Up to the login; the status is 0."""
    findings = found(run, status=0)
    assert {finding["level"] for finding in findings} == {"good"}
    texts = [finding["text"] for finding in findings]
    assert "the PIN is right" in texts
    assert any("SoftHSM2 keeps its tokens in" in text for text in texts)
    told = run("doctor").out
    assert told.splitlines()[0].startswith("ok    CPython 3.")


def test_no_module(bare: Run) -> None:
    """It says where modules are on this machine."""
    text, advice = bad(bare)
    assert text == "no module is named"
    assert "PKCS11_MODULE" in advice


def test_a_module_that_is_not_there(bare: Run, tmp_path: Path) -> None:
    """Or is no file, or no library."""
    assert "there is no /none.so" in bad(bare, "--module", "/none.so")[0]
    assert "is a directory" in bad(bare, "--module", str(tmp_path))[0]
    assert "no shared library" in bad(bare, "--module", __file__)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is of Linux")
def test_modules_of_this_machine_are_named(
    bare: Run, monkeypatch: pytest.MonkeyPatch, soft_hsm: SoftHSM
) -> None:
    """Where the one that was given cannot be it; else how to get one to try."""
    there = (str(soft_hsm.module), "/none.so")
    monkeypatch.setattr(checks, "TYPICAL_MODULES", there)
    advice = bad(bare, "--module", "/none.so")[1]
    assert advice.endswith(f"on this machine: {soft_hsm.module}")
    monkeypatch.setattr(checks, "TYPICAL_MODULES", ())
    assert "pkcs11-pool softhsm" in bad(bare, "--module", "/none.so")[1]


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is of Linux")
def test_a_module_for_another_machine(
    bare: Run, soft_hsm: SoftHSM, tmp_path: Path
) -> None:
    """It is not even loaded."""
    other = tmp_path / "libother.so"
    octets = bytearray(soft_hsm.module.read_bytes())
    ours = int.from_bytes(octets[18:20], "little")
    octets[18:20] = (62 if ours != 62 else 183).to_bytes(2, "little")
    other.write_bytes(octets)
    text, advice = bad(bare, "--module", str(other))
    assert "aarch64" in text or "x86_64" in text
    assert "this architecture" in advice


def test_a_library_that_is_no_module(bare: Run) -> None:
    """It has no C_GetFunctionList."""
    import _ctypes  # noqa: PLC0415

    text, advice = bad(bare, "--module", _ctypes.__file__)
    assert "C_GetFunctionList" in text
    assert "it is some other library" in advice


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (
            "x.so cannot be loaded: libnone.so.3: cannot open shared object file: No",
            "install the package with libnone.so.3",
        ),
        ("x.so cannot be loaded: undefined symbol: X", "for this release"),
        ("/lib/libc.so.6: version `GLIBC_9.9' not found", "for this release"),
        ("x.so cannot be initialised: C_Initialize returned CKR_x", "its daemon"),
    ],
)
def test_what_the_loader_says_has_its_own_advice(said: str, advice: str) -> None:
    """By the words of the system."""
    finding = checks.of_load(said)
    assert finding.level == "bad"
    assert advice in finding.advice


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is of Linux")
def test_a_module_that_brings_the_process_down(
    bare: Run, soft_hsm: SoftHSM, tmp_path: Path
) -> None:
    """Another process has tried it first: this one lives, and says so."""
    half = tmp_path / "libhalf.so"
    half.write_bytes(soft_hsm.module.read_bytes()[:4096])
    text, advice = bad(bare, "--module", str(half))
    assert text.startswith("the module brings the process down (SIG")
    assert "Install its package anew" in advice


def test_a_module_that_never_comes_back(
    bare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: ThrowawayToken
) -> None:
    """As with an HSM whose server hangs."""
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nexec sleep 600\n")
    hangs.chmod(0o755)
    monkeypatch.setattr("pkcs11_pool.cli.doctor._ANOTHER", (str(hangs),))
    text, advice = bad(bare, "--module", str(token.module), "--timeout", "0.1")
    assert text == "the module does not come back within 0.1 s"
    assert "daemon" in advice


def as_nobody(code: str) -> str:
    """What a check finds where this user is nobody."""
    prelude = (
        "import os, sys; from pathlib import Path; from pkcs11_pool.cli import checks\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def open_to_all(directory: Path) -> None:
    """Let everybody go through it, and those above it."""
    for parent in [directory, *directory.parents]:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o111)


needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user"
)


@needs_root
def test_a_module_that_this_user_cannot_read(soft_hsm: SoftHSM, tmp_path: Path) -> None:
    """With the mode to give it."""
    module = tmp_path / "libsofthsm2.so"
    module.write_bytes(soft_hsm.module.read_bytes())
    module.chmod(0o600)
    open_to_all(tmp_path)
    told = as_nobody(f"print(*checks.of_file(Path({str(module)!r})))")
    assert "cannot be read by nobody" in told
    assert "chmod a+r" in told


def softhsm_findings(configuration: Path | str) -> list[Finding]:
    """What is found of SoftHSM2's configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(configuration))
        return list(checks.of_softhsm(Path("/libsofthsm2.so")))


def test_softhsm_without_its_configuration(tmp_path: Path) -> None:
    """Missing; without a directory; with one that is not there."""
    path = tmp_path / "conf"
    (one,) = softhsm_findings(path)
    assert "which is not there" in one.text
    path.write_text("log.level = ERROR\n")
    (one,) = softhsm_findings(path)
    assert "has no directories.tokendir" in one.text
    path.write_text(f"directories.tokendir = {tmp_path / 'none'}\n")
    (one,) = softhsm_findings(path)
    assert "mkdir -m 700" in one.advice
    path.write_bytes(b"\xff\n" + f"directories.tokendir = {tmp_path}\n".encode())
    (one,) = softhsm_findings(path)
    assert one.level == "good"
    (one,) = softhsm_findings(tmp_path)
    assert one.text == f"{tmp_path} is no file"
    assert one.advice.startswith("set SOFTHSM2_CONF to a file")


@needs_root
def test_a_configuration_that_this_user_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mode to give it."""
    conf = tmp_path / "conf"
    conf.write_text("directories.tokendir = /tmp\n")
    conf.chmod(0o600)
    open_to_all(tmp_path)
    monkeypatch.setenv("SOFTHSM2_CONF", str(conf))
    told = as_nobody("print(*checks.of_softhsm(Path('/libsofthsm2.so')))")
    assert f"{conf} cannot be read by nobody" in told
    assert "chmod a+r" in told


@needs_root
def test_softhsm_of_a_group_that_this_user_is_not_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Debian sets it up: the group softhsm, and nobody in it."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    os.chown(tokens, 0, 4321)
    tokens.chmod(0o770)
    group = grp.struct_group(("softhsm", "x", 4321, []))
    monkeypatch.setattr(grp, "getgrnam", lambda _name: group)
    monkeypatch.setattr(os, "access", lambda *_words: False)
    (tmp_path / "conf").write_text(f"directories.tokendir = {tokens}\n")
    (one,) = softhsm_findings(tmp_path / "conf")
    assert "usermod -aG softhsm" in one.advice
    monkeypatch.setattr(os, "getgroups", lambda: [4321])
    (one,) = softhsm_findings(tmp_path / "conf")
    assert "usermod" not in one.advice


def test_a_module_in_use_by_other_code(
    bare: Run, token: ThrowawayToken, fault: FaultModule
) -> None:
    """In this process: as where a web server's other part uses it."""
    lib = pkcs11.lib(str(fault.path))
    try:
        text, advice = bad(bare, "--module", str(fault.path), "--token", token.label)
    finally:
        lib.finalize()
    assert "initialised already" in text
    assert "pool.lib" in advice


def test_no_token_that_is_initialised(
    bare: Run, soft_hsm: SoftHSM, token_directory: TokenDirectory
) -> None:
    """The command that makes one."""
    del token_directory
    text, advice = bad(bare, "--module", str(soft_hsm.module))
    assert text == "no token is initialised"
    assert "init-token" in advice


def test_another_token_than_the_one_named(run: Run) -> None:
    """What is there is told."""
    assert "'demo'" in bad(run, "--token", "none")[0]


def test_a_token_that_is_not_named_is_only_noted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is no login."""
    monkeypatch.delenv("PKCS11_TOKEN")
    findings = found(run, status=0)
    assert findings[-1]["level"] == "warning"
    assert "which token" in findings[-1]["text"]
    assert "--token-label" in findings[-1]["advice"]


def test_a_user_without_a_pin(
    bare: Run,
    run: Run,
    soft_hsm: SoftHSM,
    token_directory: TokenDirectory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The officer sets the first."""
    del token_directory, soft_hsm
    monkeypatch.setenv("SO", "12345678")
    run("init-token", "fresh", "--so-pin-env", "SO", "--no-user-pin")
    findings = found(bare, "--no-login", "--token", "fresh", status=1)
    (one,) = [finding for finding in findings if finding["level"] == "bad"]
    assert "its user has no PIN" in one["text"]
    assert "--by-officer" in one["advice"]


def test_a_wrong_pin_is_sent_once_and_seen_the_next_time(
    run: Run, monkeypatch: pytest.MonkeyPatch, fault: FaultModule
) -> None:
    """The count on the token is low after it, and good again after a login."""
    good_pin = os.environ["PKCS11_PIN"]
    monkeypatch.setenv("PKCS11_MODULE", str(fault.path))
    monkeypatch.setenv("PKCS11_PIN", "999999")
    text, advice = bad(run)
    assert text.startswith("the PIN is wrong")
    assert "--by-officer" in advice
    assert fault.count("C_Login") == 1
    monkeypatch.setenv("PKCS11_PIN", good_pin)
    levels = [finding["level"] for finding in found(run, status=0)]
    assert levels.count("warning") == 1
    assert "warning" not in [finding["level"] for finding in found(run, status=0)]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (pkcs11.TokenFlag.USER_PIN_LOCKED, "is locked"),
        (pkcs11.TokenFlag.USER_PIN_FINAL_TRY, "one more wrong PIN locks it"),
    ],
)
def test_a_pin_that_is_locked_or_nearly_so_is_not_sent(
    run: Run,
    fault: FaultModule,
    monkeypatch: pytest.MonkeyPatch,
    flag: pkcs11.TokenFlag,
    said: str,
) -> None:
    """Whatever it is."""
    monkeypatch.setenv("PKCS11_MODULE", str(fault.path))
    fault.token_info(flags_set=int(flag))
    findings = found(run, status=1)
    (one,) = [finding for finding in findings if finding["level"] == "bad"]
    assert said in one["text"]
    assert "--by-officer" in one["advice"]
    (kept,) = [finding for finding in findings if finding["level"] == "warning"]
    assert kept["text"] == "the PIN was not sent"
    assert fault.count("C_Login") == 0


def test_a_wrong_pin_of_before_is_noted(
    run: Run, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works; but somebody has a wrong PIN."""
    monkeypatch.setenv("PKCS11_MODULE", str(fault.path))
    fault.token_info(flags_set=int(pkcs11.TokenFlag.USER_PIN_COUNT_LOW))
    (one,) = [f for f in found(run, status=0) if f["level"] != "good"]
    assert "a wrong PIN was sent" in one["text"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (pkcs11.TokenFlag.SO_PIN_LOCKED, "the security officer's PIN is locked"),
        (pkcs11.TokenFlag.SO_PIN_FINAL_TRY, "is locked by one more wrong one"),
        (pkcs11.TokenFlag.SO_PIN_COUNT_LOW, "was wrong since the last login"),
    ],
)
def test_the_officers_pin_is_looked_at_too(
    run: Run,
    fault: FaultModule,
    monkeypatch: pytest.MonkeyPatch,
    flag: pkcs11.TokenFlag,
    said: str,
) -> None:
    """The user can go on, so it is noted."""
    monkeypatch.setenv("PKCS11_MODULE", str(fault.path))
    fault.token_info(flags_set=int(flag))
    (one,) = [f for f in found(run, status=0) if f["level"] != "good"]
    assert said in one["text"]


def test_what_is_wrong_with_another_token_is_only_noted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is meant is good."""
    monkeypatch.setenv("SO", "12345678")
    run("init-token", "other", "--so-pin-env", "SO", "--no-user-pin")
    (one,) = [f for f in found(run, status=0) if f["level"] != "good"]
    assert "'other'" in one["text"]
    assert "no PIN" in one["text"]


def test_the_one_token_that_is_there_is_one_token(run: Run) -> None:
    """And one object is one object."""
    texts = [finding["text"] for finding in found(run, status=0)]
    assert "the module answers, and shows 2 tokens" in texts
    assert "0 objects to be seen" in texts
    run("keygen", "x", "--type", "aes")
    assert "1 object to be seen" in [f["text"] for f in found(run, status=0)]


def test_a_pin_source_that_has_none(run: Run, tmp_path: Path) -> None:
    """It says why: here, who can read it."""
    (tmp_path / "pin").write_text("1234")
    (tmp_path / "pin").chmod(0o644)
    text, _ = bad(run, "--pin-file", str(tmp_path / "pin"))
    assert "chmod 600" in text


def test_no_pin_is_only_noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token can be used without a login."""
    monkeypatch.delenv("PKCS11_PIN")
    findings = found(run, status=0)
    assert [f["text"] for f in findings if f["level"] == "warning"] == [
        "there is no PIN, so no login was tried"
    ]


@pytest.mark.parametrize(
    ("given", "level"), [("0.10.1", "good"), ("0.10.9", "good"), ("0.11", "bad")]
)
def test_the_version_of_python_pkcs11(
    monkeypatch: pytest.MonkeyPatch, given: str, level: str
) -> None:
    """The module is initialised through a private layout of 0.10."""
    monkeypatch.setattr(checks, "version", lambda _name: given)
    assert list(checks.of_python())[-1].level == level


@pytest.mark.parametrize(
    ("given", "level"),
    [((3, 10, 0), "bad"), ((3, 12, 1), "good"), ((3, 99), "warning")],
)
def test_the_version_of_python(
    monkeypatch: pytest.MonkeyPatch, given: tuple[int, ...], level: str
) -> None:
    """Too old; tested; newer than what is tested."""
    monkeypatch.setattr(sys, "version_info", given)
    assert next(iter(checks.of_python())).level == level


def test_a_token_with_few_sessions(
    run: Run, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number to give the pool is told."""
    monkeypatch.setenv("PKCS11_MODULE", str(fault.path))
    fault.token_info(max_sessions=4, max_rw=4)
    notes = [f for f in found(run, status=0) if f["level"] == "warning"]
    assert "max_sessions=3" in notes[0]["advice"]


async def test_what_it_advises_works(pool: TokenPool) -> None:
    """A pool on the token that it called good."""
    await make_ec_key(pool)


def levels_of(findings: Iterable[Finding]) -> list[str]:
    """The levels alone."""
    return [finding.level for finding in findings]


def test_another_module_has_no_business_with_softhsm() -> None:
    """Its configuration is not looked for."""
    assert levels_of(checks.of_softhsm(Path("/usr/lib/opensc-pkcs11.so"))) == []
