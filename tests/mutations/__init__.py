"""Mistakes that the tests must find: each breaks the source in one place.

``python3 dev.py mutations`` makes them one after the other, in a copy of the tree.
"""
