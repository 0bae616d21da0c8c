"""Completion of the command line's words in a shell."""

from __future__ import annotations

import sys
from typing import Literal

from pkcs11_pool.cli import app


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the script that completes the words of this program in a shell.

    bash: `source <(pkcs11-pool completion bash)`; zsh: write it to a file
    `_pkcs11-pool` in a directory of `$fpath`; fish: write it to
    `~/.config/fish/completions/pkcs11-pool.fish`.

    Args:
        shell: Which shell.
    """
    sys.stdout.write(app.app().generate_completion(prog_name=app.NAME, shell=shell))
