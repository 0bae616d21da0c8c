"""Commands on whole tokens: labels that stay apart, and what is no token yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pkcs11_pool import list_tokens, softhsm
from test_cli import Run, bare, no_terminal, no_variables, run

if TYPE_CHECKING:
    from pathlib import Path

    from pkcs11_pool.softhsm import SoftHSM, ThrowawayToken, TokenDirectory

__all__ = ["bare", "no_terminal", "no_variables", "run"]


@pytest.fixture(autouse=True)
def officer(monkeypatch: pytest.MonkeyPatch) -> None:
    """PINs of new tokens."""
    monkeypatch.setenv("SO", "87654321")


def test_a_label_that_another_token_has_is_refused(
    run: Run, token: ThrowawayToken
) -> None:
    """Neither could be named any more; unless it is said to be meant."""
    words = ("init-token", token.label, "--so-pin-env", "SO")
    told = run(*words, status=2).err
    assert f"there is a token 'demo' (serial {token.serial.decode()}" in told
    assert "--allow-same-label" in told
    run("random", "8")
    run(*words, "--allow-same-label")
    assert "2 tokens match" in run("random", "8", status=3).err


def test_a_token_keeps_its_own_label(run: Run, token: ThrowawayToken) -> None:
    """It is no other token's."""
    (slot,) = [t["slot"] for t in run("tokens", "--json").json if t["label"]]
    words = ("init-token", token.label, "--slot", str(slot), "--so-pin-env")
    run(*words, "SO", status=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOW", token.so_pin)
        run(*words, "NOW", "--wipe")
    run("random", "8")


def test_a_used_token_is_refused_before_any_pin_is_asked_for(run: Run) -> None:
    """Nobody types in vain."""
    (slot,) = [t["slot"] for t in run("tokens", "--json").json if t["label"]]
    told = run("init-token", "other", "--slot", str(slot), status=2).err
    assert "--wipe initialises it anew and destroys all its objects" in told


def test_the_slot_may_come_from_a_uri(run: Run) -> None:
    """As of every other command."""
    (slot,) = [t["slot"] for t in run("tokens", "--json").json if not t["label"]]
    uri = f"pkcs11:slot-id={slot}"
    made = run("init-token", "other", "--so-pin-env", "SO", "--uri", uri, "--json").json
    assert made["label"] == "other"


async def test_a_token_that_is_not_initialised_has_no_empty_name(
    soft_hsm: SoftHSM, token_directory: TokenDirectory
) -> None:
    """In messages it is what it is."""
    del token_directory
    (info,) = await list_tokens(soft_hsm.module)
    assert str(info) == f"uninitialised token (slot {info.slot_id})"


def test_a_token_that_is_not_initialised_is_not_waited_for(run: Run) -> None:
    """It does not come by itself: the command that initialises it is named."""
    (slot,) = [t["slot"] for t in run("tokens", "--json").json if not t["label"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PKCS11_TOKEN")
        told = run("random", "8", "--slot", str(slot), status=3).err
    assert told == (
        f"uninitialised token (slot {slot}): initialise it by "
        "`pkcs11-pool init-token LABEL`\n"
    )


def test_objects_are_those_that_the_uri_names(run: Run) -> None:
    """Its label, its id, its class; without, all of them."""
    run("keygen", "one", "--id", "01")
    run("keygen", "two", "--id", "02")

    def listed(uri: str) -> list[tuple[str, str]]:
        found = run("objects", "--uri", f"pkcs11:token=demo{uri}", "--json").json
        return [(item["class"], item["label"]) for item in found]

    assert len(listed("")) == 4
    assert listed(";object=one") == [("PRIVATE_KEY", "one"), ("PUBLIC_KEY", "one")]
    assert listed(";type=public;id=%02") == [("PUBLIC_KEY", "two")]
    assert listed(";object=none") == []


def test_softhsm_is_at_hand_without_root(
    bare: Run,
    soft_hsm: SoftHSM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the cache of the user, where `ensure` unpacks it; it works from there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SOFTHSM2_MODULE", raising=False)
    monkeypatch.setattr(softhsm, "ROOT", tmp_path / "nothing")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (tmp_path / "bin").mkdir()
    for program in ("apt-get", "dpkg"):
        (tmp_path / "bin" / program).symlink_to("/bin/false")  # nothing is fetched
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    home = softhsm._cache() / softhsm._system()  # noqa: SLF001
    module = home / "usr/lib/softhsm/libsofthsm2.so"
    util = home / "usr/bin/softhsm2-util"
    for place, real in ((module, soft_hsm.module), (util, soft_hsm.util)):
        place.parent.mkdir(parents=True)
        place.write_bytes(real.read_bytes())
        place.chmod(0o755)
    assert bare("softhsm").out == f"{module}\n"
    assert bare("softhsm", "--json").json == {"module": str(module), "util": str(util)}
    monkeypatch.setenv("PKCS11_MODULE", bare("softhsm").out.strip())
    (tmp_path / "tokens").mkdir()
    (tmp_path / "conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "conf"))
    monkeypatch.setenv("PKCS11_PIN", "1234")
    bare("init-token", "mine", "--so-pin-env", "SO")
    assert len(bare("random", "8", "--token", "mine").out) == 17
