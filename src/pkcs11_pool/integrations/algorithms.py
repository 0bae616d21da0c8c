"""How a signature algorithm is asked of a token: the mechanism, and what is sent.

Each integration says what it wants in its own words (``PS256``, ``padding.PSS``, an
``AlgorithmIdentifier``); this says it in Cryptoki's. What is signed is hashed here
and only the digest goes to the token: large messages cross no network, and the
mechanisms are those that every module has (``CKM_RSA_PKCS``, ``CKM_RSA_PKCS_PSS``,
``CKM_ECDSA``; SoftHSM2 has no ``CKM_ECDSA_SHA256``). EdDSA and HMAC take the message.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from asn1crypto import algos, core
from pkcs11 import MGF, Attribute, KeyType, Mechanism, ObjectClass

from pkcs11_pool.cryptoki.keys import KeySpec, narrowed
from pkcs11_pool.errors import InvalidOption, InvalidType
from pkcs11_pool.faces.arguments import DEFAULT, Timeout
from pkcs11_pool.faces.keyref import KeyRef

if TYPE_CHECKING:
    from pkcs11_pool.pins import Pin

Asn1T = TypeVar("Asn1T", bound=Any)

HASHES: Final = {
    "sha1": (Mechanism.SHA_1, MGF.SHA1),
    "sha224": (Mechanism.SHA224, MGF.SHA224),
    "sha256": (Mechanism.SHA256, MGF.SHA256),
    "sha384": (Mechanism.SHA384, MGF.SHA384),
    "sha512": (Mechanism.SHA512, MGF.SHA512),
    "sha3_224": (Mechanism.SHA3_224, MGF.SHA3_224),
    "sha3_256": (Mechanism.SHA3_256, MGF.SHA3_256),
    "sha3_384": (Mechanism.SHA3_384, MGF.SHA3_384),
    "sha3_512": (Mechanism.SHA3_512, MGF.SHA3_512),
}
"""By their names in ``hashlib``."""
_HMAC: Final = {
    "sha256": Mechanism.SHA256_HMAC,
    "sha384": Mechanism.SHA384_HMAC,
    "sha512": Mechanism.SHA512_HMAC,
}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to sign.

    Attributes:
        mechanism: The mechanism that the token is given.
        param: Its parameters, as python-pkcs11 takes them.
        hash: What the message is hashed with before; None: it is sent as it is.
        prefix: What stands before the digest: that of a ``DigestInfo`` (RFC 8017).
        most: The most bytes of the digest that count; None: all.
        der: Whether the signature shall be DER and not r‖s.
    """

    mechanism: Mechanism
    param: tuple[Any, ...] | None = None
    hash: str | None = None
    prefix: bytes = b""
    most: int | None = None
    der: bool = False

    def message(self, data: bytes) -> tuple[bytes, dict[str, Any]]:
        """What ``KeyRef.sign`` takes to sign a message: the data and the options."""
        if self.hash is None:
            return data, self._options()
        return self.digest(hashlib.new(self.hash, data).digest())

    def digest(self, digest: bytes) -> tuple[bytes, dict[str, Any]]:
        """The same for the digest of a message that somebody else has hashed."""
        if self.hash is None:
            raise InvalidOption("this algorithm signs the message, not a digest of it")
        size = hashlib.new(self.hash).digest_size
        if len(digest) != size:
            message = f"a {self.hash} digest has {size} bytes, not {len(digest)}"
            raise InvalidOption(message)
        return self.prefix + digest[: self.most], self._options()

    async def sign(
        self,
        key: KeyRef,
        data: bytes,
        *,
        pin: Pin | None = None,
        timeout: Timeout = DEFAULT,
    ) -> bytes:
        """Sign a message with a key of the pool.

        Cancellation:
            The caller goes at once; the signature is dropped.

        Cryptoki:
            As :meth:`KeyRef.sign`.
        """
        octets, options = self.message(data)
        return await key.sign(octets, pin=pin, timeout=timeout, **options)  # type: ignore[arg-type]  # hidden already

    def _options(self) -> dict[str, Any]:
        return {
            "mechanism": self.mechanism,
            "mechanism_param": self.param,
            "signature_format": "der" if self.der else "raw",
        }


@cache
def rsa_pkcs1(hash_name: str) -> Algorithm:
    """RSASSA-PKCS1-v1_5 (RFC 8017)."""
    _known(hash_name)
    size = hashlib.new(hash_name).digest_size
    kind = {"algorithm": hash_name, "parameters": core.Null()}
    info = algos.DigestInfo({"digest_algorithm": kind, "digest": bytes(size)})
    prefix = info.dump()[:-size]
    return Algorithm(Mechanism.RSA_PKCS, hash=hash_name, prefix=prefix)


@cache
def rsa_pss(
    hash_name: str, salt_length: int | None = None, mgf_hash: str | None = None
) -> Algorithm:
    """RSASSA-PSS (RFC 8017); without ``salt_length`` as long as the digest."""
    mechanism, mgf = _known(hash_name)
    if mgf_hash is not None:
        mgf = _known(mgf_hash)[1]
    if salt_length is None:
        salt_length = hashlib.new(hash_name).digest_size
    param = (mechanism, mgf, salt_length)
    return Algorithm(Mechanism.RSA_PKCS_PSS, param, hash=hash_name)


@cache
def ecdsa(hash_name: str, order_bits: int, *, der: bool = True) -> Algorithm:
    """ECDSA (FIPS 186-5), on a curve whose order has so many bits.

    Of a digest that is longer than the order the first bits count. The token should
    cut it (PKCS#11 v3.1, "ECDSA without hashing"), and not every module does.
    """
    _known(hash_name)
    most = order_bits // 8 if order_bits % 8 == 0 else None
    return Algorithm(Mechanism.ECDSA, hash=hash_name, most=most, der=der)


@cache
def eddsa() -> Algorithm:
    """Ed25519 or Ed448, pure (RFC 8032)."""
    return Algorithm(Mechanism.EDDSA)


@cache
def hmac(hash_name: str) -> Algorithm:
    """HMAC (RFC 2104), all of it on the token."""
    return Algorithm(_HMAC[hash_name])


def of_identifier(
    identifier: Any, public: Any, digest_algorithm: str | None = None
) -> Algorithm:
    """The algorithm that an ``AlgorithmIdentifier`` of X.509 or CMS stands for.

    Args:
        identifier: An ``asn1crypto.algos.SignedDigestAlgorithm``.
        public: The ``asn1crypto.keys.PublicKeyInfo`` of the key.
        digest_algorithm: The hash, where the identifier does not say it.

    Raises:
        InvalidOption: No token signs so, or the hash is not that of the identifier.
    """
    name = identifier["algorithm"].native
    if name in {"ed25519", "ed448"}:
        return eddsa()
    try:
        kind = identifier.signature_algo
    except ValueError:
        raise InvalidOption(f"no token signs with {name!r}") from None
    if kind == "rsassa_pss":
        params = identifier["parameters"]
        mgf_hash = params["mask_gen_algorithm"]["parameters"]["algorithm"].native
        hash_name = params["hash_algorithm"]["algorithm"].native
        way = rsa_pss(hash_name, params["salt_length"].native, mgf_hash)
    else:
        hash_name = _hash_of(identifier) or digest_algorithm
        if hash_name is None:
            raise InvalidOption(f"with which hash does {name!r} sign?")
        if kind == "ecdsa":
            way = ecdsa(hash_name, public.bit_size)
        elif kind == "rsassa_pkcs1v15":
            way = rsa_pkcs1(hash_name)
        else:
            raise InvalidOption(f"no token signs with {name!r}")
    if digest_algorithm not in {None, hash_name}:
        message = f"{name!r} signs with {hash_name}, not with {digest_algorithm}"
        raise InvalidOption(message)
    return way


def settled(structure: Asn1T) -> Asn1T:
    """A copy of an asn1crypto object that many threads may read.

    asn1crypto encodes and parses when it is asked for something: a thread that asks
    meanwhile sees half of it. So all of it is done here.
    """
    copy: Asn1T = type(structure).load(structure.dump())
    _ = copy.native
    return copy


def _hash_of(identifier: Any) -> str | None:
    try:
        found: str = identifier.hash_algo
    except ValueError:
        return None
    return found


def oaep(
    hash_name: str, mgf_hash: str, label: bytes | None
) -> tuple[Mechanism, tuple[Any, ...]]:
    """RSAES-OAEP (RFC 8017): the mechanism and its parameters."""
    mechanism, mgf = _known(hash_name)[0], _known(mgf_hash)[1]
    return Mechanism.RSA_PKCS_OAEP, (mechanism, mgf, label or None)


def _known(hash_name: str) -> tuple[Mechanism, MGF]:
    try:
        return HASHES[hash_name]
    except KeyError:
        message = f"no token signs with {hash_name!r}; one of {', '.join(HASHES)}"
        raise InvalidOption(message) from None


def digest_size(hash_name: str) -> int:
    """Bytes of a digest."""
    return hashlib.new(hash_name).digest_size


def check_key(key: object) -> KeyRef:
    """Take a reference to a key, and nothing else.

    Raises:
        InvalidType: It is none.
    """
    if isinstance(key, KeyRef):
        return key
    message = f"key must be a KeyRef (pool.key(...)), not {type(key).__name__}"
    raise InvalidType(message)


def secret_key(key: KeyRef) -> KeyRef:
    """The same key as a secret key, where its name alone may stand for others too."""
    target = key._target  # noqa: SLF001  # one package
    if isinstance(target, KeySpec):
        target = narrowed(target, (int(ObjectClass.SECRET_KEY),))
    return KeyRef(key._calls, target, home=key._home)  # noqa: SLF001


def name_of(key: KeyRef) -> tuple[str | None, bytes | None]:
    """Label and id that a reference names its key by."""
    target = key._target  # noqa: SLF001  # one package
    given = dict(target.attributes) if isinstance(target, KeySpec) else {}
    label = given.get(int(Attribute.LABEL))
    return None if label is None else label.decode(), given.get(int(Attribute.ID))


SECRET_KEY_TYPES: Final = frozenset(
    {KeyType.GENERIC_SECRET, KeyType.SHA256_HMAC, KeyType.SHA384_HMAC}
    | {KeyType.SHA512_HMAC}
)
"""What signs HMACs."""
