"""A test that fails leaves the module free, so that it fails alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import leftovers
from pkcs11_pool import TokenPool, softhsm
from poolkit import (
    blocking,
    digest,
    lost,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from conftest import MakePool
    from faultmodule import FaultModule


def _is_free(path: Path) -> bool:
    """As the next test finds it."""
    try:
        with softhsm.token_directory(path):
            return True
    except RuntimeError:
        return False


async def test_a_pool_that_nobody_closed_is_closed(
    make_pool: MakePool, tmp_path: Path
) -> None:
    """Its session, its threads and the module go with it."""
    pool = make_pool()
    await pool.open()
    assert not _is_free(tmp_path)
    assert len(await blocking(leftovers.free_modules)) == 1
    assert pool.state.value == "closed"
    assert _is_free(tmp_path)


async def test_a_module_is_finalised_when_its_lost_call_is_back(
    make_pool: MakePool, fault: FaultModule, tmp_path: Path
) -> None:
    """The pool that it was lost in was closed around it, and left the module so."""
    async with make_pool(module=fault.path) as pool:
        fault.on("C_Digest", hang="before")
        await lost(pool, fault)
    assert not _is_free(tmp_path)
    fault.clear()
    assert len(await blocking(leftovers.free_modules)) == 1
    assert _is_free(tmp_path)
    async with make_pool(module=fault.path) as pool:
        assert await digest(pool)


async def test_a_module_is_free_also_when_its_pool_does_not_close(
    make_pool: MakePool,
    fault: FaultModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is finalised under it."""
    stuck = make_pool(module=fault.path)
    await stuck.open()

    async def never(_pool: TokenPool) -> None:
        raise OSError("it cannot be closed")

    with monkeypatch.context() as patched:
        patched.setattr(TokenPool, "close", never)
        left = await blocking(leftovers.free_modules)
    assert left == [f"{fault.path} was left initialised"]
    assert _is_free(tmp_path)
    await stuck.close()


async def test_nothing_is_told_where_nothing_was_left(make_pool: MakePool) -> None:
    """A test that ends well costs nothing."""
    async with make_pool():
        pass
    assert leftovers.free_modules() == []
