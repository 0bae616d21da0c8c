"""A Cryptoki module, its sessions, and what one call after the other does on them.

No threads of its own, no event loop, no queue: whoever calls, waits.
"""
