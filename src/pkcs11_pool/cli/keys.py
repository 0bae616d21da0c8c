"""Commands that use keys: sign, verify; and random."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Final, Literal

import anyio
from cyclopts import Parameter
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import KeyType, Mechanism

from pkcs11_pool.cli import output
from pkcs11_pool.cli.exits import CommandError, Exit
from pkcs11_pool.cli.options import TokenOptions, octets_id
from pkcs11_pool.errors import KeyNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkcs11_pool.faces.keyref import KeyRef
    from pkcs11_pool.faces.pool import TokenPool

Hash = Literal["sha256", "sha384", "sha512"]
Encoding = Literal["base64", "hex", "raw"]

_MAKES: Final = 1 << 16
_MOST_RANDOM: Final = 1 << 30
_RSA: Final = {
    "sha256": Mechanism.SHA256_RSA_PKCS,
    "sha384": Mechanism.SHA384_RSA_PKCS,
    "sha512": Mechanism.SHA512_RSA_PKCS,
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class KeyOptions(TokenOptions):
    """Which key on which token.

    Attributes:
        key: Label of the key.
        id: Id of the key, in hexadecimal digits.
    """

    key: str | None = None
    id: Annotated[bytes | None, Parameter(converter=octets_id)] = None

    def of(self, pool: TokenPool, half: ObjectClass | None = None) -> KeyRef:
        """The key, by the words or else by the URI; either half of a pair."""
        uri = self.parsed()
        label = uri.object if self.key is None else self.key
        id_ = uri.id if self.id is None else self.id
        if label is None and id_ is None:
            raise CommandError(
                "which key? Give --key, --id, or a --uri with object=; `pkcs11-pool "
                f"objects` shows them{self.unquoted()}"
            )
        return pool.key(label=label, id=id_, object_class=half)


File = Annotated[Path, Parameter(allow_leading_hyphen=True)]
"""A file, or "-" for standard input."""


def _named(file: Path) -> None:
    """Take nothing for a file that was meant as an option.

    Raises:
        CommandError: It begins with a hyphen and goes on.
    """
    if str(file).startswith("-") and str(file) != "-":
        raise CommandError(f"Unknown option: {file}. A file of that name: ./{file}")


def sign(
    file: File,
    /,
    *,
    where: KeyOptions = KeyOptions(),
    hash: Hash = "sha256",  # noqa: A002
    mechanism: str | None = None,
    raw_format: bool = False,
    signature: Path | None = None,
    encoding: Encoding = "base64",
    json: bool = False,
) -> None:
    """Sign a file ("-": standard input) with a key of the token.

    RSA keys sign by PKCS#1 v1.5, EC keys by ECDSA and give DER, Edwards keys sign the
    file as it is. The file goes to the token in parts, or its hash does.

    Args:
        file: What to sign.
        where: Which key.
        hash: For RSA and ECDSA.
        mechanism: Another one, such as SHA256_RSA_PKCS_PSS: the file is its input.
        raw_format: ECDSA as r and s one after the other, and not DER.
        signature: Write it there, raw, and not to standard output.
        encoding: On standard output.
        json: Print JSON.
    """
    _named(file)
    made = anyio.run(
        _with_file, file, where, Scheme(hash, mechanism, raw_format=raw_format), None
    )
    assert isinstance(made, bytes)  # noqa: S101  # nothing to compare with
    if signature is not None:
        signature.write_bytes(made)
    if json:
        output.as_json({"signature": made})
    elif signature is None:
        write(made, encoding)


def verify(
    file: File,
    signature: Path,
    /,
    *,
    where: KeyOptions = KeyOptions(),
    hash: Hash = "sha256",  # noqa: A002
    mechanism: str | None = None,
    raw_format: bool = False,
    no_login: bool = False,
    json: bool = False,
) -> int:
    """Verify a signature of a file on the token. Status 1: it is not the key's.

    Args:
        file: What was signed; "-": standard input.
        signature: File with the signature: raw, hexadecimal or base64.
        where: Which key.
        hash: As it was signed.
        mechanism: As it was signed.
        raw_format: As it was signed.
        no_login: Do not log in: a public key needs no login on most tokens.
        json: Print JSON.
    """
    _named(file)
    scheme = Scheme(hash, mechanism, raw_format=raw_format)
    good = False
    for candidate in candidates(signature.read_bytes()):
        good = bool(anyio.run(_with_file, file, where, scheme, candidate, not no_login))
        if good or str(file) == "-":
            break
    if json:
        output.as_json({"valid": good})
    else:
        output.say("valid" if good else "not valid: another key, file or signature")
    return Exit.OK if good else Exit.NO


@dataclass(frozen=True)
class Scheme:
    """How a file is signed."""

    hash: Hash
    mechanism: str | None
    raw_format: bool

    async def of(self, half: KeyRef) -> tuple[dict[str, Any], bool]:
        """The options of an operation, and whether the file is hashed here first.

        Args:
            half: The half of the pair that is used. A secret key has none.

        Raises:
            CommandError: Nothing fits the key.
        """
        kind = None
        try:
            kind = (await half.attributes([Attribute.KEY_TYPE]))[Attribute.KEY_TYPE]
        except KeyNotFound:
            if self.mechanism is None:
                raise
        options: dict[str, Any] = {}
        if kind in (KeyType.EC, KeyType.DSA):
            options["signature_format"] = "raw" if self.raw_format else "der"
        if self.mechanism is not None:
            return {**options, "mechanism": _mechanism(self.mechanism)}, False
        if kind == KeyType.EC:
            # Every token does this one; few do CKM_ECDSA_SHA256.
            return {**options, "mechanism": Mechanism.ECDSA}, True
        if kind == KeyType.RSA:
            return {**options, "mechanism": _RSA[self.hash]}, False
        if kind == KeyType.EC_EDWARDS:
            return {**options, "mechanism": Mechanism.EDDSA}, False
        raise CommandError(
            "how does this key sign? Give --mechanism, such as SHA256_HMAC", Exit.KEY
        )


async def _with_file(
    file: Path,
    where: KeyOptions,
    scheme: Scheme,
    signature: bytes | None,
    login: bool = True,  # noqa: FBT001, FBT002
) -> bytes | bool:
    """Sign a file, or verify its signature."""
    with opened(file) as (data, total):
        async with where.pool(login=login) as pool:
            key = where.of(pool)
            halves = ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY
            half = where.of(pool, halves[signature is not None])
            options, hashed = await scheme.of(half)
            with output.bar(f"reading {file}", total) as done:
                source: Any = Counted(data, done)
                if hashed:
                    source = _hashed(scheme.hash, source)
                if signature is None:
                    return await key.sign(source, **options)
                return await key.verify(source, signature, **options)


class Counted:
    """A file that tells how much of it was read.

    Not a pass-through of more than ``read``: the pool reads nothing else.
    """

    def __init__(self, file: IO[bytes], done: Callable[[int], None]) -> None:
        self._file = file
        self._done = done

    def read(self, size: int = -1) -> bytes:
        """Read, and tell."""
        found = self._file.read(size)
        self._done(len(found))
        return found


def _hashed(name: str, file: Counted) -> bytes:
    digest = hashlib.new(name)
    while part := file.read(_MAKES):
        digest.update(part)
    return digest.digest()


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[IO[bytes], int | None]]:
    """A file to read and its size, or standard input."""
    if str(file) == "-":
        yield sys.stdin.buffer, None
        return
    with file.open("rb") as data:
        yield data, file.stat().st_size


def candidates(given: bytes) -> list[bytes]:
    """What a file with a signature may mean: its octets, or text that encodes them."""
    found = [given]
    text = b"".join(given.split())
    with contextlib.suppress(ValueError):
        found.append(bytes.fromhex(text.decode("ascii")))
    with contextlib.suppress(ValueError):
        found.append(base64.b64decode(text, validate=True))
    # The likeliest first: text that can be read so is hardly ever a raw signature.
    return found[::-1]


def random(
    size: int,
    /,
    *,
    where: TokenOptions = TokenOptions(),
    output_file: Annotated[Path | None, Parameter(name="--output")] = None,
    encoding: Encoding = "hex",
    no_login: bool = False,
    json: bool = False,
) -> None:
    """Random octets from the token.

    Args:
        size: How many octets.
        where: Which token.
        output_file: Write them there, raw, and not to standard output.
        encoding: On standard output.
        no_login: Do not log in: few tokens ask for it here.
        json: Print JSON.
    """
    if not 0 < size <= _MOST_RANDOM:
        raise CommandError(f"a number of octets is 1 to {_MOST_RANDOM}, not {size}")
    with contextlib.ExitStack() as stack:
        sink = None
        if output_file is not None:
            sink = stack.enter_context(output_file.open("wb"))
        found = anyio.run(_random, size, where, not no_login, sink)
    if json:
        output.as_json({"size": size, "random": found or None})
    elif output_file is None:
        write(found, encoding)


async def _random(
    size: int,
    where: TokenOptions,
    login: bool,  # noqa: FBT001
    sink: IO[bytes] | None,
) -> bytes:
    parts: list[bytes] = []
    async with where.pool(login=login) as pool:
        with output.bar("random", size) as done:
            while size:
                part = await pool.generate_random(8 * min(size, _MAKES))
                (parts.append if sink is None else sink.write)(part)
                size -= len(part)
                done(len(part))
    return b"".join(parts)


def write(octets: bytes, encoding: Encoding) -> None:
    """Write octets to standard output."""
    if encoding == "raw":
        sys.stdout.buffer.write(octets)
        sys.stdout.flush()
    else:
        text = octets.hex() if encoding == "hex" else base64.b64encode(octets).decode()
        sys.stdout.write(f"{text}\n")


def _mechanism(name: str) -> Mechanism:
    given = name.upper().removeprefix("CKM_")
    try:
        return Mechanism[given]
    except KeyError:
        raise CommandError(
            f"{name!r} is no mechanism; `pkcs11-pool tokens --json` shows the token's"
        ) from None
