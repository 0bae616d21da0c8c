"""How fast the pool is on this machine and this token, next to the bare module.

``python -m pkcs11_pool bench``. Nothing is imported here: a client of the benchmark
is a program of its own that needs the pool and no more.
"""
