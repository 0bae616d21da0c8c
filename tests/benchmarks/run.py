#!/usr/bin/env python3
"""Measure the pool next to its peers: bare C, Java, Go, and Python by hand.

    python tests/benchmarks/run.py --help
    python tests/benchmarks/run.py --quick --only p256 --callers 1,8 --peers bare,pool
    python tests/benchmarks/run.py --docs

The last one writes docs/benchmarks.md anew, pictures included; it takes half an hour.
Interrupted, it loses nothing: build/benchmarks.json has what was measured until then.
"""

import importlib
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own directory is where Python looks; the package is one above.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    # To be ended is to be interrupted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(importlib.import_module("benchmarks.main").main())
