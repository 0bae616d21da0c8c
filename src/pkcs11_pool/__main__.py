"""``python -m pkcs11_pool``: the command line, if it is installed."""

import sys
from collections.abc import Sequence

__all__ = ["main"]

_NEEDS = frozenset({"attrs", "cyclopts", "rich"})


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        from pkcs11_pool.cli.app import main as run  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDS:
            raise
        sys.stderr.write(
            f"The command line needs {error.name}: pip install 'pkcs11-pool[cli]'\n"
        )
        return 2
    return run(words)


if __name__ == "__main__":
    sys.exit(main())
