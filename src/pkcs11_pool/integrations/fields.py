"""The fields of certificates, requests and CRLs, out of what a caller gives.

Names, keys, times, extensions and algorithms, as asn1crypto takes them, checked at the
door. Nothing is signed here, and no token is known.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from asn1crypto import algos, keys, x509

from pkcs11_pool.errors import InvalidOption, InvalidType
from pkcs11_pool.integrations import algorithms

if TYPE_CHECKING:
    from collections.abc import Sequence

NameLike: TypeAlias = Mapping[str, Any] | x509.Name
PublicKeyLike: TypeAlias = bytes | keys.PublicKeyInfo

_LAST_UTC_YEAR: Final = 2049
_HASHES: Final = ((256, "sha256"), (384, "sha384"))


@dataclass(frozen=True, slots=True)
class Revoked:
    """A certificate that a CRL lists.

    Attributes:
        serial_number: Its serial number.
        date: When it was revoked; aware.
        reason: As asn1crypto names it: ``"key_compromise"``, ``"superseded"``, …
    """

    serial_number: int
    date: dt.datetime
    reason: str | None = None


def algorithm_of(
    public: keys.PublicKeyInfo, hash_name: str | None, *, pss: bool
) -> algos.SignedDigestAlgorithm:
    """What stands in a structure as its signature algorithm."""
    kind = public.algorithm
    if kind in {"ed25519", "ed448"}:
        if hash_name is not None or pss:
            raise InvalidOption(f"{kind} has its own hash: leave out hash_name and pss")
        return algos.SignedDigestAlgorithm({"algorithm": kind})
    if kind not in {"rsa", "ec"}:
        raise InvalidOption(f"certificates are not signed here with a {kind} key")
    if hash_name is None:
        bits = public.bit_size if kind == "ec" else 0
        hash_name = next((h for most, h in _HASHES if bits <= most), "sha512")
    if hash_name not in algorithms.HASHES:
        known = ", ".join(algorithms.HASHES)
        raise InvalidOption(f"hash_name must be one of {known}, not {hash_name!r}")
    if kind == "ec":
        if pss:
            raise InvalidOption("pss is for RSA keys")
        return algos.SignedDigestAlgorithm({"algorithm": f"{hash_name}_ecdsa"})
    if not pss:
        return algos.SignedDigestAlgorithm({"algorithm": f"{hash_name}_rsa"})
    digest = {"algorithm": hash_name}
    return algos.SignedDigestAlgorithm(
        {
            "algorithm": "rsassa_pss",
            "parameters": {
                "hash_algorithm": digest,
                "mask_gen_algorithm": {"algorithm": "mgf1", "parameters": digest},
                "salt_length": algorithms.digest_size(hash_name),
            },
        }
    )


def name_of(value: object) -> x509.Name:
    """A name, or one of its parts."""
    if isinstance(value, x509.Name):
        return value
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        message = f"a name is an asn1crypto Name or a mapping of its parts, not {kind}"
        raise InvalidType(message)
    try:
        return x509.Name.build(dict(value))
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"the name cannot be used: {error}") from error


def public_key_of(value: object) -> keys.PublicKeyInfo:
    """A public key, of DER."""
    if isinstance(value, keys.PublicKeyInfo):
        return value
    if not isinstance(value, bytes):
        message = (
            f"public_key must be DER or a PublicKeyInfo, not {type(value).__name__}"
        )
        raise InvalidType(message)
    try:
        found = keys.PublicKeyInfo.load(value, strict=True)
        _ = found.algorithm  # read, so that what it is no key of is seen here
    except ValueError as error:
        raise InvalidOption("public_key is no DER of a public key") from error
    return found


def extensions_of(
    own: Mapping[str, tuple[bool, Any]], given: Sequence[Mapping[str, Any]]
) -> x509.Extensions:
    """The extensions given, and of our own those that they do not replace."""
    replaced = {item.get("extn_id") for item in given}
    made = [
        {"extn_id": name, "critical": critical, "extn_value": value}
        for name, (critical, value) in own.items()
        if name not in replaced
    ]
    return [*made, *map(dict, given)]


def entry_of(item: object) -> dict[str, Any]:
    """The line of a CRL for a certificate."""
    if not isinstance(item, Revoked):
        raise InvalidType(f"revoked must hold Revoked(...), not {type(item).__name__}")
    entry: dict[str, Any] = {
        "user_certificate": item.serial_number,
        "revocation_date": time_of(moment(item.date, "date")),
    }
    if item.reason is not None:
        reason = {"extn_id": "crl_reason", "extn_value": item.reason}
        entry["crl_entry_extensions"] = [reason]
    return entry


def moment(value: dt.datetime | None, name: str) -> dt.datetime:
    """A time in UTC, to the second; None: now."""
    if value is None:
        value = dt.datetime.now(dt.UTC)
    if not isinstance(value, dt.datetime) or value.tzinfo is None:
        raise InvalidOption(f"{name} must be a datetime with a time zone")
    return value.astimezone(dt.UTC).replace(microsecond=0)


def days_of(days: object) -> dt.timedelta:
    """How long something is valid."""
    if not isinstance(days, (int, float)) or not days > 0:
        raise InvalidOption("days must be a number above 0")
    return dt.timedelta(days=days)


def time_of(moment: dt.datetime) -> x509.Time:
    """The form that RFC 5280 wants for the year."""
    form = "utc_time" if moment.year <= _LAST_UTC_YEAR else "general_time"
    return x509.Time({form: moment})
