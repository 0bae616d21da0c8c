"""The tokens that are measured: near, behind a network, and full of keys."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import pkcs11
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from pkcs11 import Attribute, CertificateType, KeyType, ObjectClass

from pkcs11_pool import softhsm
from pkcs11_pool.bench import programs, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkcs11_pool.bench.measure import Scenario
    from pkcs11_pool.bench.tokens import Token

HERE: Final = Path(__file__).resolve().parent
LOCAL: Final = "local"
NETWORK: Final = "network"
KEYS: Final = "keys"
NAMES: Final = (LOCAL, NETWORK, KEYS)

#: Keys on the token, in the scenarios of their growth.
GROWTH: Final = (10, 1000, 5000)
DELAY_US: Final = 500

_GROWTH_CLIENTS: Final = ("bare", "pool-asyncio", "pool-trio", "hand-lock-asyncio")


def growing(keys: int) -> str:
    """The name of the scenario with so many keys."""
    return f"keys-{keys}"


@contextlib.contextmanager
def local(tell: Callable[[str], None], name: str = LOCAL) -> Iterator[Scenario]:
    """A token of SoftHSM2, with certificates: Java sees no key without one."""
    hsm = softhsm.ensure(tell)
    with softhsm.throwaway_token("bench", softhsm=hsm) as made:
        token = tokens.Token(
            str(made.module), {"token_label": made.label}, made.user_pin, throwaway=True
        )
        with tokens.with_keys(token, name, "local token") as scenario:
            anyio.run(_certify, token, scenario)
            configuration = str(made.directory / "softhsm2.conf")
            yield dataclasses.replace(
                scenario, environment={"SOFTHSM2_CONF": configuration}
            )


def network(near: Scenario, directory: Path) -> Scenario:
    """The same token behind a module that sleeps before each call."""
    headers = HERE.parent / "faultmodule"
    shim = programs.compile_c(
        HERE / "delay.c", directory, "-shared", "-fPIC", f"-I{headers}"
    )
    return dataclasses.replace(
        near,
        name=NETWORK,
        title=f"behind {DELAY_US} µs per call",
        module=str(shim),
        environment={
            **near.environment,
            "PKCS11_DELAY_TARGET": near.module,
            "PKCS11_DELAY_US": str(DELAY_US),
        },
    )


@contextlib.contextmanager
def growth(tell: Callable[[str], None]) -> Iterator[list[Scenario]]:
    """Tokens with ever more keys, each in a directory of its own."""
    with contextlib.ExitStack() as stack:
        found = []
        for keys in GROWTH:
            scenario = stack.enter_context(local(tell, growing(keys)))
            tell(f"Filling a token with {keys:,} keys")
            _fill(scenario, keys)
            found.append(
                dataclasses.replace(
                    scenario,
                    title=f"{keys:,} keys on the token",
                    operations=("p256",),
                    callers=(1,),
                    clients=_GROWTH_CLIENTS,
                )
            )
        yield found


def _fill(scenario: Scenario, keys: int) -> None:
    """Bring the token to so many keys, the halves of pairs counted each.

    One is made, and its file copied: by calls it would take minutes.
    """
    token = tokens.Token(
        scenario.module,
        {"token_label": scenario.label},
        scenario.pin or "",
        throwaway=True,
    )
    directory = Path(scenario.environment["SOFTHSM2_CONF"]).parent
    before = set(directory.rglob("*.object"))
    there = anyio.run(_make_one, token)
    (made,) = set(directory.rglob("*.object")) - before
    content = made.read_bytes()
    for _ in range(keys - there):
        copy = made.with_name(f"{uuid.uuid4()}.object")
        copy.write_bytes(content)
        copy.with_suffix(".lock").touch()


async def _make_one(token: Token) -> int:
    """Make a key like those that fill the token; how many keys there are then."""

    def count(session: pkcs11.Session) -> int:
        return sum(1 for one in session.get_objects() if isinstance(one, pkcs11.Key))

    async with token.pool() as pool:
        await pool.generate_key(KeyType.AES, 128, label="other", store=True)
        return await pool.run(count)


async def _certify(token: Token, scenario: Scenario) -> None:
    issuer = ec.generate_private_key(ec.SECP256R1())
    keys = {"p256": scenario.material.p256, "rsa2048": scenario.material.rsa2048}
    async with token.pool() as pool:
        for name, key in keys.items():
            label = f"{scenario.material.prefix}-{name}"
            await pool.create_object(_certificate(key, issuer, label, name.encode()))


def _certificate(
    key: Any, issuer: ec.EllipticCurvePrivateKey, label: str, number: bytes
) -> dict[Attribute, Any]:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, label)])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key)
        .serial_number(1)
        .not_valid_before(dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
        .not_valid_after(dt.datetime(2040, 1, 1, tzinfo=dt.UTC))
        .sign(issuer, hashes.SHA256())
    )
    return {
        Attribute.CLASS: ObjectClass.CERTIFICATE,
        Attribute.CERTIFICATE_TYPE: CertificateType.X_509,
        Attribute.TOKEN: True,
        Attribute.LABEL: label,
        Attribute.ID: number,
        Attribute.SUBJECT: name.public_bytes(),
        Attribute.VALUE: signed.public_bytes(Encoding.DER),
    }
