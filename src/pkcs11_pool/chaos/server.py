"""A token behind a server that can be killed: ``p11-kit server`` over SoftHSM2.

The nearest thing to a network HSM that any machine can have. Killed with ``SIGKILL``,
its clients get ``CKR_DEVICE_ERROR`` until they initialise their module anew; stopped
with ``SIGSTOP``, their calls hang. It may know processes; it must not know the pool.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from pkcs11_pool.softhsm import ThrowawayToken

ADDRESS: Final = "P11_KIT_SERVER_ADDRESS"
"""The variable by which the client finds the server, at ``C_Initialize``."""
HOW_TO_INSTALL: Final = "apt-get install p11-kit p11-kit-modules"
_PATIENCE: Final = 10.0
_PLACES: Final = (
    "/usr/lib/x86_64-linux-gnu/pkcs11",
    "/usr/lib/aarch64-linux-gnu/pkcs11",
    "/usr/lib64/pkcs11",
    "/usr/lib/pkcs11",
)


class ServerUnavailable(RuntimeError):
    """There is no ``p11-kit server`` on this machine, or it does not start."""


def client_module() -> Path:
    """The module that speaks to the server.

    Raises:
        ServerUnavailable: It is not installed; the text says how.
    """
    found = [Path(place) / "p11-kit-client.so" for place in _PLACES]
    module = next((path for path in found if path.exists()), None)
    if module is None or shutil.which("p11-kit") is None:
        message = f"p11-kit and its modules are not here: {HOW_TO_INSTALL}"
        raise ServerUnavailable(message)
    return module


class TokenServer:
    """One server for one token, with its children: one for each client.

    Attributes:
        came_back: On the monotonic clock, when it last began to serve again.
    """

    def __init__(self, token: ThrowawayToken, directory: Path) -> None:
        self._token = token
        self._socket = directory / "p11-kit"
        self._process: subprocess.Popen[bytes] | None = None
        self.came_back = 0.0

    @property
    def environment(self) -> dict[str, str]:
        """What the client's process needs."""
        return {ADDRESS: f"unix:path={self._socket}"}

    @property
    def pid(self) -> int | None:
        """Its process, which leads its process group."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Begin to serve.

        Raises:
            ServerUnavailable: It did not start.
        """
        self._socket.unlink(missing_ok=True)
        token = f"pkcs11:token={self._token.label}"
        module = str(self._token.module)
        command = ["p11-kit", "server", "-f", "-n", str(self._socket), "-p", module]
        self._process = subprocess.Popen(
            [*command, token],
            # A group of its own: its children are killed and stopped with it.
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _PATIENCE
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                message = "p11-kit server does not start"
                raise ServerUnavailable(message)
            time.sleep(0.002)
        self.came_back = time.monotonic()

    def kill(self) -> None:
        """``SIGKILL``: it and all its children are gone at once."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """``SIGSTOP``: calls go in and do not come back."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """``SIGCONT``."""
        self._signal(signal.SIGCONT)
        self.came_back = time.monotonic()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        """Serve for the length of a block."""
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Whatever state it is in, it is gone."""
        self.kill()
