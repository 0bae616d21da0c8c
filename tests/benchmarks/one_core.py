"""The pool in a process that is bound to one core.

    python one_core.py MODULE TOKEN-LABEL KEY-PREFIX BACKEND

Loop and workers wake each other all the time. On one core that is cheap, and what one
of them has just written is in the cache of the other.
"""

from __future__ import annotations

import os
import sys

from pkcs11_pool.bench import client

if __name__ == "__main__":
    # All threads that are started later have it from this one.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.exit(client.main(sys.argv[1:]))
