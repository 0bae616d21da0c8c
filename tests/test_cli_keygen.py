"""The command that makes keys: what does not go together, and what a token can make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from faultmodule import CKR
from pkcs11_pool.cryptoki import rv
from test_cli import Run, bare, no_terminal, no_variables, run

if TYPE_CHECKING:
    from faultmodule import FaultModule

__all__ = ["bare", "no_terminal", "no_variables", "run"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--type rsa --bits 100",
            "--bits 100: the token makes RSA keys of 512 to ",
        ),
        ("--type rsa --bits 65536", "the token makes RSA keys of 512 to 16384 bits"),
        ("--type aes --bits 100", "the token makes AES keys of 128, 192, 256 bits"),
        ("--type aes --bits 512", "the token makes AES keys of 128, 192, 256 bits"),
        ("--type rsa --bits 0", "--bits is a size, such as 2048, not 0"),
        ("--type aes --bits -1", "--bits is a size, such as 2048, not -1"),
        ("--type rsa --curve secp256r1", "--curve is of --type ec, not of --type rsa"),
        ("--type aes --curve secp256r1", "--curve is of --type ec, not of --type aes"),
        ("--type ed25519 --curve ed25519", "--curve is of --type ec, not of --type ed"),
        ("--bits 256", "not of --type ec: --curve is its size"),
        ("--type ed25519 --bits 256", "--bits is of --type rsa and aes, not of --type"),
        ("--type aes --public-key x.pem", "an AES key has no public half"),
    ],
)
def test_what_does_not_go_together_is_refused(run: Run, words: str, said: str) -> None:
    """Nothing that was said is ignored, and nothing was made."""
    assert said in run("keygen", "signer", *words.split(), status=2).err
    assert run("objects", "--json").json == []


@pytest.mark.parametrize(
    "words",
    ["", "--curve secp384r1", "--type rsa --bits 1024", "--type aes --bits 192"],
)
def test_what_the_token_takes_is_made(run: Run, words: str) -> None:
    """As it was asked for."""
    run("keygen", "signer", *words.split())
    assert run("objects", "--json").json


@pytest.fixture
def fault_run(run: Run, fault: FaultModule, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Commands on a token whose module can be told what to answer."""
    monkeypatch.setenv("PKCS11_MODULE", str(fault.path))
    return run


def test_a_kind_that_the_token_does_not_make_is_named(
    fault_run: Run, fault: FaultModule
) -> None:
    """With the mechanism that it lacks."""
    fault.on("C_GetMechanismInfo", answer=CKR.MECHANISM_INVALID)
    told = fault_run("keygen", "x", "--type", "ed25519", status=6).err
    assert "makes no Ed25519 keys: it has no CKM_EC_EDWARDS_KEY_PAIR_GEN" in told


def test_what_a_token_answers_has_its_sizes_beside_it(
    fault_run: Run, fault: FaultModule
) -> None:
    """Many say no more than that it failed; and some do not even say the sizes."""
    fault.on("C_GenerateKeyPair", answer=CKR.GENERAL_ERROR, every=True)
    told = fault_run("keygen", "x", "--type", "rsa", status=6).err
    assert told.startswith("CKR_GENERAL_ERROR; the token makes RSA keys of 512 to ")
    fault.on("C_GetMechanismInfo", answer=rv.CODES["CKR_FUNCTION_FAILED"])
    told = fault_run("keygen", "x", "--type", "rsa", "--bits", "1024", status=6).err
    assert "does not say which sizes of RSA keys" in told


def test_a_curve_that_is_larger_than_the_token_takes(
    fault_run: Run, fault: FaultModule
) -> None:
    """The token refuses it, and says which sizes it has."""
    fault.on("C_GenerateKeyPair", answer=rv.CODES["CKR_CURVE_NOT_SUPPORTED"])
    told = fault_run("keygen", "x", "--curve", "secp521r1", status=6).err
    assert "CKR_CURVE_NOT_SUPPORTED" in told
    assert "the token makes EC keys of 112 to 521 bits" in told


def test_the_pin_is_known_before_anything_moves(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question under a moving bar would not be seen."""
    moving: list[str] = []
    monkeypatch.setattr("pkcs11_pool.cli.output.working", moving.append)
    monkeypatch.delenv("PKCS11_PIN")
    run("keygen", "x", "--pin-prompt", status=4)
    assert moving == []
