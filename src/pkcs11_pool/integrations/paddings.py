"""What the hashes and paddings of ``cryptography`` are called on a token.

Objects in, mechanisms out: no key and no session. It reads the objects as
``cryptography``'s own backend does, where they have no public way to be read.
"""

from __future__ import annotations

from typing import Any, Final

from pkcs11 import Mechanism

from pkcs11_pool.errors import InvalidOption, InvalidType
from pkcs11_pool.integrations import algorithms, extras
from pkcs11_pool.integrations.algorithms import Algorithm

try:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, utils
except ModuleNotFoundError as error:
    raise extras.missing("cryptography", error) from error

_PAD_OVERHEAD: Final = 2


def signature(how: object, algorithm: object, key_size: int) -> tuple[Algorithm, bool]:
    """How an RSA key of so many bits signs, and whether it is given a digest."""
    if _is_no_digest_info(algorithm):
        if not isinstance(how, padding.PKCS1v15):
            raise InvalidOption("NoDigestInfo goes with PKCS1v15 only")
        return Algorithm(Mechanism.RSA_PKCS), False
    name, prehashed = hash_of(algorithm)
    if isinstance(how, padding.PKCS1v15):
        return algorithms.rsa_pkcs1(name), prehashed
    if not isinstance(how, padding.PSS):
        message = f"padding must be PKCS1v15 or PSS, not {type(how).__name__}"
        raise InvalidType(message)
    return _pss(name, how, key_size), prehashed


def _pss(name: str, how: padding.PSS, key_size: int) -> Algorithm:
    mgf_hash = _mgf1(how.mgf)
    most = (key_size + 6) // 8 - algorithms.digest_size(name) - _PAD_OVERHEAD
    salt: Any = how._salt_length  # noqa: SLF001  # as its own backend reads it
    if isinstance(salt, type(padding.PSS.MAX_LENGTH)):
        salt = most
    elif isinstance(salt, type(padding.PSS.DIGEST_LENGTH)):
        salt = algorithms.digest_size(name)
    if not isinstance(salt, int):
        raise InvalidOption("PSS.AUTO is for verification: give a salt length")
    if not 0 <= salt <= most:
        message = f"this key and hash have room for {most} bytes of salt at most"
        raise InvalidOption(message)
    return algorithms.rsa_pss(name, salt, mgf_hash)


def hash_of(algorithm: object) -> tuple[str, bool]:
    """The name of a hash in ``hashlib``, and whether it was made already."""
    prehashed = isinstance(algorithm, utils.Prehashed)
    if isinstance(algorithm, utils.Prehashed):
        algorithm = algorithm._algorithm  # noqa: SLF001  # as its own backend reads it
    if not isinstance(algorithm, hashes.HashAlgorithm):
        kind = type(algorithm).__name__
        message = f"algorithm must be a hash or Prehashed(hash), not {kind}"
        raise InvalidType(message)
    return _named(algorithm), prehashed


def _named(algorithm: hashes.HashAlgorithm) -> str:
    name = algorithm.name.replace("-", "_")
    if name not in algorithms.HASHES:
        message = f"no token signs with {algorithm.name}; use SHA-2, SHA-3 or SHA-1"
        raise InvalidOption(message)
    return name


def _mgf1(mgf: object) -> str:
    if not isinstance(mgf, padding.MGF1):
        raise InvalidOption("the mask generation function must be MGF1")
    return _named(mgf._algorithm)  # noqa: SLF001  # as its own backend reads it


def decryption(how: object) -> tuple[Mechanism, tuple[Any, ...] | None]:
    """The mechanism that an RSA key decrypts with, and its parameters."""
    if isinstance(how, padding.PKCS1v15):
        return Mechanism.RSA_PKCS, None
    if isinstance(how, padding.OAEP):
        label = how._label  # noqa: SLF001  # as its own backend reads it
        return algorithms.oaep(_named(how._algorithm), _mgf1(how._mgf), label)  # noqa: SLF001
    message = f"padding must be OAEP or PKCS1v15, not {type(how).__name__}"
    raise InvalidType(message)


def _is_no_digest_info(algorithm: object) -> bool:
    kind = getattr(utils, "NoDigestInfo", None)  # not in older versions
    return kind is not None and isinstance(algorithm, kind)
