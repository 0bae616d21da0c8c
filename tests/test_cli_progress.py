"""Long work shows on a real terminal how far it is, and nowhere else."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from terminalkit import on_a_terminal

if TYPE_CHECKING:
    from pathlib import Path

    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory


@pytest.fixture
def variables(token: ThrowawayToken) -> dict[str, str]:
    """What names the token, and its PIN."""
    return {
        "PKCS11_MODULE": str(token.module),
        "PKCS11_TOKEN": token.label,
        "PKCS11_PIN": token.user_pin,
    }


def test_random_octets_move_a_bar(variables: dict[str, str], tmp_path: Path) -> None:
    """With how many are there of how many; the result is as without it."""
    file = tmp_path / "random"
    words = ("random", "2000000", "--output", str(file), "--json")
    done = on_a_terminal(words, variables=variables)
    assert (done.status, file.stat().st_size) == (0, 2_000_000)
    assert json.loads(done.out) == {"size": 2_000_000, "random": None}
    assert re.search(r"random .*2\.0/2\.0 MB", done.screen), done.screen


def test_reading_a_large_file_moves_a_bar(
    variables: dict[str, str], tmp_path: Path
) -> None:
    """When it is signed, and when its signature is verified."""
    file, signature = tmp_path / "file", tmp_path / "signature"
    file.write_bytes(bytes(3_000_000))
    made = on_a_terminal(("keygen", "signer", "--json"), variables=variables)
    assert made.status == 0, made.screen
    for words in (
        ("sign", str(file), "--signature", str(signature)),
        ("verify", str(file), str(signature)),
    ):
        done = on_a_terminal((*words, "--key", "signer"), variables=variables)
        assert done.status == 0, done.screen
        bar = rf"reading {re.escape(str(file))} .*3\.0/3\.0 MB"
        assert re.search(bar, done.screen), done.screen


def test_making_a_key_is_told_while_it_lasts(variables: dict[str, str]) -> None:
    """And is gone afterwards: standard output has the key alone."""
    done = on_a_terminal(("keygen", "signer", "--type", "rsa"), variables=variables)
    assert done.status == 0, done.screen
    assert "making a key of type rsa" in done.screen
    assert done.out.startswith("-----BEGIN PUBLIC KEY-----")


def test_initialising_is_told_while_it_lasts(
    soft_hsm: SoftHSM, token_directory: TokenDirectory
) -> None:
    """It may be a minute on a card."""
    del token_directory
    words = ("init-token", "mine", "--so-pin-env", "SO", "--no-user-pin")
    pins = {"PKCS11_MODULE": str(soft_hsm.module), "SO": "87654321"}
    done = on_a_terminal(words, variables=pins)
    assert done.status == 0, done.screen
    assert "initialising 'mine'" in done.screen
    assert done.out.startswith("initialised 'mine'")


def test_a_benchmark_moves_a_bar(variables: dict[str, str]) -> None:
    """With the turns that are done of all."""
    words = ("bench", "--quick", "--rounds", "1", "--seconds", "0.05", "--json")
    cell = ("--operations", "random", "--callers", "1", "--backends", "asyncio")
    token = ("--module", variables["PKCS11_MODULE"])
    label = ("--token", variables["PKCS11_TOKEN"])
    done = on_a_terminal((*words, *cell, *token, *label), variables=variables)
    assert done.status == 0, done.screen
    turns = len(json.loads(done.out)["cells"])
    assert re.search(rf"turns .*{turns}/{turns}", done.screen), done.screen


def test_the_demo_moves_two_bars(soft_hsm: SoftHSM) -> None:
    """What is done and what is verified, of all."""
    del soft_hsm
    words = ("demo", "--operations", "64", "--tasks", "4", "--json")
    done = on_a_terminal(words)
    assert done.status == 0, done.screen
    for title in ("operations", "verified"):
        assert re.search(rf"{title} .*64/64", done.screen), done.screen
