"""What to say when the library that an integration stands on is not installed."""

from __future__ import annotations


def missing(extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise: it says how to install what is missing."""
    return ModuleNotFoundError(
        f"pkcs11_pool.integrations needs {error.name}: "
        f"pip install 'pkcs11-pool[{extra}]'",
        name=error.name,
    )
