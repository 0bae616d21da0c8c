"""The pool on opencryptoki: PINs that really lock, numbers that are reused at once.

It has fixed paths and a daemon, so all of it runs in namespaces of its own, which
takes root. The tests are in ``tests/opencryptoki``; one run of them is a test here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).parent / "opencryptoki"
_MODULES = list(Path("/usr/lib").glob("*/opencryptoki/libopencryptoki.so.0"))
_NAMESPACES = ["--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.mark.skipif(
    not _MODULES or not shutil.which("pkcsslotd", path="/usr/sbin:/usr/bin"),
    reason="opencryptoki is not here: apt-get install opencryptoki",
)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, so only root can run it")
@pytest.mark.timeout(300)
def test_the_pool_on_opencryptoki() -> None:
    """Every test in the folder passes there, and there are some."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    tests = ["-o", "python_files=check_*.py", str(_HERE)]
    inner = [sys.executable, "-m", "pytest", *options, *tests]
    found = subprocess.run(
        ["/usr/bin/unshare", *_NAMESPACES, "sh", str(_HERE / "namespace.sh"), *inner],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    passed = re.search(r"(\d+) passed", found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
    assert passed is not None
    assert int(passed[1]) > 0
