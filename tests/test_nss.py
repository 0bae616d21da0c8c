"""NSS softokn, where it is installed: a module that reads attributes its own way."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pkcs11 import KeyType, MechanismFlag

from pkcs11_pool import TokenPool
from pkcs11_pool.integrations.envelope import Envelope
from poolkit import blocking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PLACES = [
    *Path("/usr/lib").glob("*-linux-gnu/libsoftokn3.so"),
    *Path("/usr/lib").glob("*-linux-gnu/nss/libsoftokn3.so"),
]
CERTUTIL = shutil.which("certutil")
pytestmark = pytest.mark.skipif(
    not PLACES or CERTUTIL is None, reason="libnss3 or libnss3-tools is not installed"
)


@pytest.fixture
async def nss(tmp_path: Path) -> AsyncIterator[TokenPool]:
    """An open pool on a fresh database of NSS."""
    database, secret = f"sql:{tmp_path}", tmp_path / "password"
    secret.write_text("secret12\n")
    command = ["certutil", "-N", "-d", database, "-f", str(secret)]
    await blocking(lambda: subprocess.run(command, check=True))
    given = (
        f"configdir='{database}' certPrefix='' keyPrefix='' secmod='secmod.db' flags="
    )
    async with TokenPool(
        PLACES[0],
        token_label="NSS Certificate DB",  # noqa: S106
        pin="secret12",
        init_reserved=given,
    ) as pool:
        yield pool


async def test_a_key_is_known_though_some_attributes_hide_others(
    nss: TokenPool,
) -> None:
    """Asked for one attribute that it lacks, NSS keeps back every number.

    And all four ways to wrap a data key work there.
    """
    may: dict[str, Any] = {"store": True}
    may["capabilities"] = MechanismFlag.WRAP | MechanismFlag.UNWRAP
    await nss.generate_key(KeyType.AES, 256, label="aes", **may)
    await nss.generate_keypair(KeyType.RSA, 2048, label="rsa", **may)
    for label, wrap in (
        ("aes", "aes-kw"),
        ("aes", "aes-kwp"),
        ("rsa", "rsa-oaep-sha1"),
        ("rsa", "rsa-oaep-sha256"),
    ):
        envelope = Envelope({label: nss.key(label=label)}, wrap=wrap)  # type: ignore[arg-type]
        assert await envelope.decrypt(await envelope.encrypt(b"data")) == b"data"
