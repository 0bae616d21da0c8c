"""An opencryptoki software token, as the tests in this folder find it.

They run in namespaces of their own, where its daemon is: `tests/test_opencryptoki.py`
starts them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from opencryptoki.ocktoken import MODULE, SO_PIN, USER_PIN, software_slot
from pkcs11_pool import TokenPool, init_token
from pkcs11_pool.cryptoki import module as modules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakePool


@pytest.fixture(scope="session", autouse=True)
def kept_module() -> None:
    """Keep the module initialised from the first test to the last.

    opencryptoki 3.8.1 closes a descriptor again at its second ``C_Initialize``, and the
    number may be an event loop's by then.
    """
    modules.acquire(str(MODULE), None, serialize=None)


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """No thread outlives a test. Of its own descriptors the module keeps some."""
    yield
    ours = [t for t in threading.enumerate() if t.name.startswith("pkcs11-pool")]
    for thread in ours:
        thread.join(5)
    assert [thread for thread in ours if thread.is_alive()] == []


@pytest.fixture
async def make_pool() -> MakePool:
    """Make pools on a token that was just initialised; the test opens them."""
    await init_token(
        MODULE,
        slot_id=await software_slot(),
        label="ock",
        so_pin=SO_PIN,
        user_pin=USER_PIN,
        wipe=True,
    )

    def make(**options: Any) -> TokenPool:
        return TokenPool(MODULE, **({"token_label": "ock", "pin": USER_PIN} | options))

    return make
