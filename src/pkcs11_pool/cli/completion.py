"""Completion of the command line's words in a shell."""

from __future__ import annotations

import sys
from typing import Final, Literal

from pkcs11_pool.cli import app

# The script of cyclopts defines a function and calls it nowhere. As a file of $fpath it
# is the function's body, run at the first TAB; sourced, it has to be made known.
_ZSH_END: Final = """\
if [[ ${funcstack[1]} == _pkcs11-pool ]]; then
  _cyclopts_pkcs11-pool "$@"
else
  compdef _cyclopts_pkcs11-pool pkcs11-pool
fi
"""


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the script that completes the words of this program in a shell.

    bash: `source <(pkcs11-pool completion bash)`; zsh: write it to a file
    `_pkcs11-pool` in a directory of `$fpath`; fish: write it to
    `~/.config/fish/completions/pkcs11-pool.fish`.

    Args:
        shell: Which shell.
    """
    script = app.app().generate_completion(prog_name=app.NAME, shell=shell)
    end = _ZSH_END if shell == "zsh" else ""
    sys.stdout.write(f"{script}{end}")
