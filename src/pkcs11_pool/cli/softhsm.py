"""The command that has SoftHSM2 at hand for those who have no token, without root."""

from __future__ import annotations

from pkcs11_pool import softhsm
from pkcs11_pool.cli import output


def command(*, json: bool = False) -> None:
    """Print the path of SoftHSM2's module; fetch it where there is none.

    Debian and its relatives: as root its package is installed, else it is unpacked
    into the cache of the user. `export PKCS11_MODULE=$(pkcs11-pool softhsm)`

    Args:
        json: Print JSON, with the path of softhsm2-util.
    """
    found = softhsm.ensure(output.note)
    if json:
        output.as_json({"module": str(found.module), "util": str(found.util)})
    else:
        output.say(str(found.module))
