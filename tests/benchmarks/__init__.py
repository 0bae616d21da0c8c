"""The pool next to its peers, in one run: see run.py."""
