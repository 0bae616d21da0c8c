"""The command line, ``pkcs11-pool``: a module for each family of commands."""
