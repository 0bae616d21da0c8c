"""Everything else that python-pkcs11 can do with objects, through the pool."""

from __future__ import annotations

import datetime as dt
import inspect
import secrets
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pkcs11
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import dsa, ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from cryptography.x509.oid import NameOID
from pkcs11 import KDF, Attribute, KeyType, Mechanism, ObjectClass, types
from pkcs11.util.x509 import decode_x509_certificate

from faultmodule import CKR
from keykit import (
    PIECE,
    SECRET,
    awaited,
    collected,
    data_of,
    is_signature,
    make_secret,
    sha256,
)
from pkcs11_pool import (
    InvalidOption,
    InvalidType,
    KeyNotFound,
    KeyRef,
    LoginRequired,
    ObjectRef,
    PooledSession,
    SecurityOfficer,
    SessionObjectDestroyed,
    SessionObjectNeedsSession,
    TokenPool,
)
from pkcs11_pool.cryptoki import operations
from pkcs11_pool.faces.parameters import LocalParameters, ParametersRef
from poolkit import blocking, digest, make_ec_key, settled

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakePool
    from faultmodule import FaultModule

_BLOCK = b"sixteen bytes..."
_ECB = Mechanism.AES_ECB
_OPEN = {Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False}
_PREHASHED = ec.ECDSA(utils.Prehashed(hashes.SHA256()))

# A group for DSA and one for Diffie-Hellman, made once: to make one takes seconds.
_P = int(
    "aaf454a6a57d72a9594ee1baed77cca2308c235b3f4fbc4d1d74b25919037f8171afdd81cfa3cdcaaa"
    "69af86bda14aa261708be98dc6cddd34174d6683b47c61d1d534f7257dba08fb609d99ba464b9056ee"
    "a12e0a7884ddbdd1e533f7c9d3d7a3bfa24659ff9e1823c43d2249da8d629d4e0bc0f70c9a273aa366"
    "e837e439fd",
    16,
)
_Q = int("d294f988641c12ac4c68e9f1357d748300c70e03", 16)
_G = int(
    "3f56c2e291fc86b74230f048458137341e56440a37451f817ae8546592f18cb0774b7040f87caaa986"
    "ec3bb3acd9f26f2e7f5264cbc88418dc9a3b6995587e6feba0700b9eb5e67ca4fb6e3e2ffb292296e5"
    "47b0280332bc78ec7d47f974e14e960e6efaa0e7f73ebf73a97d960c2b647be8f0f428716130ae03b9"
    "ab7966e628",
    16,
)
_DH_P = int(
    "85b83bb8528c460645863c9c2140a435e4990d64191347bdbd19e00bd4dd67b2956e28e3aeb82b516d"
    "83e00e72b78d4eae95e92ee8f393a2c545499f4f2b752f",
    16,
)


def _octets(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


_DSA_GROUP = {
    Attribute.PRIME: _octets(_P),
    Attribute.SUBPRIME: _octets(_Q),
    Attribute.BASE: _octets(_G),
}
_DH_GROUP = {Attribute.PRIME: _octets(_DH_P), Attribute.BASE: b"\x02"}


def _aes(key: bytes, data: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    return encryptor.update(data) + encryptor.finalize()


# -- Derive -----------------------------------------------------------------------


async def test_a_shared_secret_is_the_one_of_the_other_side(pool: TokenPool) -> None:
    """ECDH: ``cryptography`` comes to the same secret with its own half."""
    mine = ec.generate_private_key(ec.SECP256R1())
    point = mine.public_key().public_bytes(
        Encoding.X962, PublicFormat.UncompressedPoint
    )
    public, private = await pool.generate_keypair(
        KeyType.EC, curve="secp256r1", label="ec", store=True
    )
    theirs: Any = load_der_public_key(await public.public_key_der())
    shared = mine.exchange(ec.ECDH(), theirs)
    how: dict[str, Any] = {"mechanism_param": (KDF.NULL, None, point)}
    async with pool.session() as session:
        derived = await private.on(session).derive_key(
            KeyType.AES, 256, template=_OPEN, **how
        )
        assert await derived.attributes([Attribute.VALUE]) == {Attribute.VALUE: shared}
        assert await derived.encrypt(_BLOCK, mechanism=_ECB) == _aes(shared, _BLOCK)
    with pytest.raises(SessionObjectNeedsSession):
        await private.derive_key(KeyType.AES, 256, **how)
    kept = await private.derive_key(
        KeyType.AES, 256, store=True, label="derived", id=b"1", **how
    )
    assert await kept.encrypt(_BLOCK, mechanism=_ECB) == _aes(shared, _BLOCK)
    again = pool.key(label="derived", id=b"1", key_type=KeyType.AES)
    assert await again.encrypt(_BLOCK, mechanism=_ECB) == _aes(shared, _BLOCK)

    def derive() -> bytes:
        with_sync = private.sync.derive_key(
            KeyType.AES, 256, store=True, label="blocking", **how
        )
        return with_sync.sync.encrypt(_BLOCK, mechanism=_ECB)

    assert await blocking(derive) == _aes(shared, _BLOCK)


async def test_a_key_is_derived_by_encryption(pool: TokenPool) -> None:
    """``CKM_AES_ECB_ENCRYPT_DATA``: the new key is what the old one makes of data."""
    base = await make_secret(pool, derive=True)
    async with pool.session() as session:
        derived = await base.on(session).derive_key(
            KeyType.AES,
            128,
            mechanism=Mechanism.AES_ECB_ENCRYPT_DATA,
            mechanism_param=_BLOCK,
        )
        expected = _aes(_aes(SECRET, _BLOCK), _BLOCK)
        assert await derived.encrypt(_BLOCK, mechanism=_ECB) == expected


async def test_keys_are_wrapped_and_unwrapped_as_others_do(pool: TokenPool) -> None:
    """AES key wrap and RSA-OAEP, into the token and into a session."""
    wrapping = await make_secret(pool, label="kek", wrap=True, unwrap=True)
    value = secrets.token_bytes(32)
    plain = await make_secret(pool, label="dek", value=value, extractable=True)
    how: dict[str, Any] = {"mechanism": Mechanism.AES_KEY_WRAP}
    wrapped = await wrapping.wrap_key(plain, **how)
    assert wrapped == keywrap.aes_key_wrap(SECRET, value)
    kept = await wrapping.unwrap_key(
        ObjectClass.SECRET_KEY, KeyType.AES, wrapped, store=True, label="back", **how
    )
    assert await kept.encrypt(_BLOCK, mechanism=_ECB) == _aes(value, _BLOCK)
    public, private = await pool.generate_keypair(
        KeyType.RSA, 2048, label="rsa", store=True
    )
    theirs: Any = load_der_public_key(await public.public_key_der())
    oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)  # noqa: S303
    sealed = theirs.encrypt(value, oaep)
    assert isinstance(theirs, rsa.RSAPublicKey)
    async with pool.session() as session:
        opened = await private.on(session).unwrap_key(
            ObjectClass.SECRET_KEY,
            KeyType.AES,
            sealed,
            mechanism=Mechanism.RSA_PKCS_OAEP,
        )
        assert await opened.encrypt(_BLOCK, mechanism=_ECB) == _aes(value, _BLOCK)


async def test_encapsulation_is_passed_through(pool: TokenPool) -> None:
    """No module here has ML-KEM (not run here): python-pkcs11 refuses it."""
    public, private = await pool.generate_keypair(
        KeyType.EC, curve="secp256r1", label="no kem", store=True
    )
    how: dict[str, Any] = {"mechanism": Mechanism.ML_KEM, "label": "secret"}
    secret = KeyType.GENERIC_SECRET
    async with pool.session() as session:
        with pytest.raises(pkcs11.FunctionNotSupported, match="EncapsulateKey"):
            await public.on(session).encapsulate_key(secret, 256, **how)
        with pytest.raises(pkcs11.FunctionNotSupported, match="DecapsulateKey"):
            await private.on(session).decapsulate_key(b"c", secret, 256, **how)
        assert await digest(session)
    for store in (False, True):
        refused = pkcs11.FunctionNotSupported if store else SessionObjectNeedsSession
        with pytest.raises(refused):
            await public.encapsulate_key(secret, 256, store=store, **how)
        with pytest.raises(refused):
            await private.decapsulate_key(b"c", secret, store=store, **how)
    with pytest.raises(InvalidType, match="ciphertext"):
        await private.decapsulate_key("c", secret)  # type: ignore[arg-type]
    with pytest.raises(InvalidType, match="label"):
        await public.encapsulate_key(secret, label=7)  # type: ignore[arg-type]

    def work() -> None:
        with pytest.raises(pkcs11.FunctionNotSupported):
            public.sync.encapsulate_key(secret, 256, store=True, **how)
        with pytest.raises(pkcs11.FunctionNotSupported):
            private.sync.decapsulate_key(b"c", secret, 256, store=True, **how)

    await blocking(work)


# -- Signatures -------------------------------------------------------------------


async def test_der_signatures_go_both_ways(pool: TokenPool) -> None:
    """Ours is one to ``cryptography``, and its own is one to the token."""
    key = await make_ec_key(pool)
    der, hashed = await key.public_key_der(), sha256(b"message")
    how: dict[str, Any] = {"mechanism": Mechanism.ECDSA, "signature_format": "der"}
    signature = await key.sign(hashed, **how)
    assert is_signature(der, signature, hashed, _PREHASHED)
    raw = await key.sign(hashed, mechanism=Mechanism.ECDSA)
    assert len(raw) == 64
    r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    as_der = utils.encode_dss_signature(r, s)
    assert is_signature(der, as_der, hashed, _PREHASHED)
    assert await key.verify(hashed, as_der, **how)
    assert await key.verify(hashed, raw, mechanism=Mechanism.ECDSA)
    assert not await key.verify(hashed, raw, **how)
    assert not await key.verify(sha256(b"another"), as_der, **how)
    mine = ec.generate_private_key(ec.SECP256R1())
    imported = await pool.create_object(
        {
            Attribute.CLASS: ObjectClass.PUBLIC_KEY,
            Attribute.KEY_TYPE: KeyType.EC,
            Attribute.TOKEN: True,
            Attribute.VERIFY: True,
            Attribute.EC_PARAMS: pkcs11.util.ec.encode_named_curve_parameters(
                "secp256r1"
            ),
            Attribute.EC_POINT: pkcs11.util.ec.decode_ec_public_key(
                mine.public_key().public_bytes(
                    Encoding.DER, PublicFormat.SubjectPublicKeyInfo
                )
            )[Attribute.EC_POINT],
        }
    )
    assert isinstance(imported, KeyRef)
    assert await imported.verify(hashed, mine.sign(hashed, _PREHASHED), **how)
    with pytest.raises(InvalidOption, match="der"):
        await (await make_secret(pool)).sign(
            b"x", mechanism=Mechanism.AES_CMAC, signature_format="der"
        )


@pytest.mark.parametrize("curve", ["ed25519", "ED25519", "1.3.101.112"])
async def test_edwards_curves_by_name(pool: TokenPool, curve: str) -> None:
    """The signature is one to ``cryptography``, also with the private half alone."""
    _, private = await pool.generate_keypair(
        KeyType.EC_EDWARDS, curve=curve, label="ed", store=True
    )
    signature = await private.sign(b"message")
    assert is_signature(await private.public_key_der(), signature, b"message")


# -- Domain parameters ------------------------------------------------------------


@pytest.mark.parametrize("how", ["stored", "session", "local"])
async def test_dsa_keys_from_parameters(pool: TokenPool, how: str) -> None:
    """Stored, in a session or nowhere: the keys have the group, and sign."""
    async with pool.session() as session:
        if how == "stored":
            made: Any = await pool.create_domain_parameters(
                KeyType.DSA, _DSA_GROUP, store=True
            )
            (found,) = await pool.find({Attribute.CLASS: ObjectClass.DOMAIN_PARAMETERS})
            assert found == made or repr(found) == repr(made)
            told = await made.attributes([Attribute.PRIME, Attribute.KEY_TYPE])
            assert told == {
                Attribute.PRIME: _octets(_P),
                Attribute.KEY_TYPE: KeyType.DSA,
            }
        elif how == "session":
            made = await session.create_domain_parameters(KeyType.DSA, _DSA_GROUP)
        else:
            made = await pool.create_domain_parameters(
                KeyType.DSA, _DSA_GROUP, local=True
            )
        public, private = await made.generate_keypair(label="dsa", store=True)
        signature = await private.sign(
            b"message", mechanism=Mechanism.DSA_SHA256, signature_format="der"
        )
        der = await public.public_key_der()
        assert is_signature(der, signature, b"message", hashes.SHA256())
        key = load_der_public_key(der)
        assert isinstance(key, dsa.DSAPublicKey)
        assert key.public_numbers().parameter_numbers == dsa.DSAParameterNumbers(
            _P, _Q, _G
        )
        with pytest.raises(SessionObjectNeedsSession):
            await made.generate_keypair()
        short, _ = await made.on(session).generate_keypair(
            public_template={Attribute.VERIFY: True}
        )
        assert await short.attributes([Attribute.TOKEN]) == {Attribute.TOKEN: False}


async def test_diffie_hellman_from_parameters(pool: TokenPool) -> None:
    """The secret is the one that arithmetic gives for the other side."""
    group = await pool.create_domain_parameters(KeyType.DH, _DH_GROUP, local=True)
    public, private = await group.generate_keypair(label="dh", store=True)
    theirs = (await public.attributes([Attribute.VALUE]))[Attribute.VALUE]
    mine = secrets.randbelow(_DH_P)
    shared = pow(int.from_bytes(theirs, "big"), mine, _DH_P).to_bytes(64, "big")
    async with pool.session() as session:
        derived = await private.on(session).derive_key(
            KeyType.GENERIC_SECRET,
            512,
            mechanism_param=_octets(pow(2, mine, _DH_P)),
            capabilities=0,  # type: ignore[arg-type]
            template=_OPEN,
        )
        told = await derived.attributes([Attribute.VALUE])
        assert told[Attribute.VALUE] == shared


async def test_parameters_are_generated(pool: TokenPool) -> None:
    """``C_GenerateKey`` of a group: in the token, or in a session."""
    with pytest.raises(SessionObjectNeedsSession):
        await pool.generate_domain_parameters(KeyType.DSA, 512)
    group = await pool.generate_domain_parameters(
        KeyType.DSA, 512, store=True, template={Attribute.LABEL: "group"}
    )
    told = await group.attributes(
        [Attribute.PRIME, Attribute.LABEL, Attribute.CLASS, Attribute.TOKEN]
    )
    assert int.from_bytes(told[Attribute.PRIME], "big").bit_length() == 512
    assert told[Attribute.LABEL] == "group"
    assert told[Attribute.CLASS] == ObjectClass.DOMAIN_PARAMETERS
    await group.destroy()
    assert await pool.find() == []
    with pytest.raises(InvalidOption, match="both"):
        await pool.create_domain_parameters(  # type: ignore[call-overload]
            KeyType.DSA, _DSA_GROUP, local=True, store=True
        )
    with pytest.raises(InvalidType, match="attrs"):
        await pool.create_domain_parameters(KeyType.DSA, {"p": b"x"}, local=True)  # type: ignore[call-overload]
    with pytest.raises(InvalidOption, match="param_length"):
        await pool.generate_domain_parameters(KeyType.DSA, 0, store=True)


# -- Attributes, copies, certificates, data ---------------------------------------


async def test_attributes_are_read_and_written(pool: TokenPool) -> None:
    """A new name is found, the old one is not, and each reference knows its object."""
    named = pool.key(label="secret")
    made = await make_secret(pool, extractable=True, sensitive=False)
    assert await named.encrypt(_BLOCK, mechanism=_ECB) == _aes(SECRET, _BLOCK)
    changed = await named.set_attributes({Attribute.LABEL: "new", Attribute.ID: b"7"})
    wanted = [Attribute.LABEL, Attribute.ID, Attribute.VALUE]
    told = {
        Attribute.LABEL: "new",
        Attribute.ID: b"7",
        Attribute.VALUE: SECRET,
    }
    assert await changed.attributes(wanted) == told
    assert await pool.key(label="new", id=b"7").attributes(wanted) == told
    assert await changed.encrypt(_BLOCK, mechanism=_ECB) == _aes(SECRET, _BLOCK)
    with pytest.raises(KeyNotFound):
        await named.attributes(wanted)
    # One that was made from the object itself goes with it.
    again = await changed.set_attributes({Attribute.LABEL: "third"})
    assert (await changed.attributes(wanted))[Attribute.LABEL] == "third"
    assert await again.encrypt(_BLOCK, mechanism=_ECB) == _aes(SECRET, _BLOCK)
    # What was made under the first name was not asked in between: it is not sure.
    with pytest.raises(KeyNotFound):
        await made.encrypt(_BLOCK, mechanism=_ECB)
    await pool.logout()
    await pool.login()
    assert (await again.attributes(wanted))[Attribute.LABEL] == "third"
    assert set(await again.attributes()) >= {Attribute.CLASS, Attribute.LABEL}
    with pytest.raises(pkcs11.AttributeReadOnly):
        await again.set_attributes({Attribute.KEY_TYPE: KeyType.DES3})
    with pytest.raises(InvalidOption, match="at least one"):
        await again.set_attributes({})
    with pytest.raises(InvalidType, match="values"):
        await again.set_attributes({Attribute.LABEL: 7})

    def rename() -> None:
        named_again = again.sync.set_attributes({Attribute.LABEL: "fourth"})
        assert named_again.sync.attributes([Attribute.LABEL]) == {
            Attribute.LABEL: "fourth"
        }

    await blocking(rename)


async def test_attributes_of_a_session_object(pool: TokenPool) -> None:
    """In the session that owns it or in any other; its reference stays the same."""
    async with pool.session() as session:
        key = await make_secret(session, token=False)
        assert await key.set_attributes({Attribute.LABEL: "new"}) is key
        assert await key.attributes([Attribute.LABEL]) == {Attribute.LABEL: "new"}
        assert await key.on(session).encrypt(_BLOCK, mechanism=_ECB) == _aes(
            SECRET, _BLOCK
        )
    with pytest.raises(SessionObjectDestroyed):
        await key.set_attributes({Attribute.LABEL: "late"})


async def test_an_object_that_was_logged_out_is_not_changed(pool: TokenPool) -> None:
    """Without the login a private key is not even seen."""
    key = await make_secret(pool)
    await pool.logout()
    with pytest.raises(LoginRequired):
        await pool.key(label="secret").set_attributes({Attribute.LABEL: "new"})
    await pool.login()
    assert await key.attributes([Attribute.LABEL]) == {Attribute.LABEL: "secret"}


async def test_objects_are_copied(pool: TokenPool) -> None:
    """Into the token or into a session, with what is to be different."""
    key = await make_secret(pool)
    twin = await key.copy({Attribute.LABEL: "twin", Attribute.DECRYPT: False})
    assert await twin.encrypt(_BLOCK, mechanism=_ECB) == _aes(SECRET, _BLOCK)
    assert (await twin.attributes())[Attribute.DECRYPT] is False
    await key.destroy()
    assert await twin.encrypt(_BLOCK, mechanism=_ECB) == _aes(SECRET, _BLOCK)
    short = {Attribute.TOKEN: False}
    with pytest.raises(SessionObjectNeedsSession):
        await twin.copy(short)
    async with pool.session() as session:
        lent = await twin.on(session).copy(short)
        assert await lent.encrypt(_BLOCK, mechanism=_ECB) == _aes(SECRET, _BLOCK)
        with pytest.raises(SessionObjectNeedsSession):
            await lent.copy()
        second = await lent.on(session).copy()
        kept = await second.copy({Attribute.TOKEN: True, Attribute.LABEL: "kept"})
    with pytest.raises(SessionObjectDestroyed):
        await lent.encrypt(_BLOCK, mechanism=_ECB)
    assert await kept.encrypt(_BLOCK, mechanism=_ECB) == _aes(SECRET, _BLOCK)
    found = await pool.find({Attribute.CLASS: ObjectClass.SECRET_KEY})
    assert {str(ref) for ref in found} == {str(twin), str(kept)}

    def work() -> None:
        ref = twin.sync.copy({Attribute.LABEL: "blocking"})
        assert ref.sync.encrypt(_BLOCK, mechanism=_ECB) == _aes(SECRET, _BLOCK)

    await blocking(work)


def _certificate() -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
    begins = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7)
    builder = builder.not_valid_before(begins)
    builder = builder.not_valid_after(begins + dt.timedelta(days=9))
    return builder.sign(key, hashes.SHA256())


async def test_certificates_are_objects(pool: TokenPool) -> None:
    """Created, found, read, renamed, copied and destroyed; it is no key."""
    certificate = _certificate()
    der = certificate.public_bytes(Encoding.DER)
    made = await pool.create_object(
        {
            **decode_x509_certificate(der, extended_set=False),
            Attribute.TOKEN: True,
            Attribute.LABEL: "cert",
            Attribute.ID: b"c",
        }
    )
    assert type(made) is ObjectRef
    (found,) = await pool.find({Attribute.CLASS: ObjectClass.CERTIFICATE})
    assert type(found) is ObjectRef
    told = await found.attributes([Attribute.VALUE, Attribute.CERTIFICATE_TYPE])
    assert x509.load_der_x509_certificate(told[Attribute.VALUE]) == certificate
    assert told[Attribute.CERTIFICATE_TYPE] == pkcs11.CertificateType.X_509
    renamed = await found.set_attributes({Attribute.LABEL: "renamed"})
    assert type(renamed) is ObjectRef
    twin = await renamed.copy({Attribute.LABEL: "twin"})
    assert (await twin.attributes([Attribute.VALUE]))[Attribute.VALUE] == der
    await renamed.destroy()
    assert [str(ref) for ref in await pool.find()] == [str(twin)]


async def test_data_objects(pool: TokenPool) -> None:
    """Of any length, private and public; one of them in a session."""
    value = data_of(100_000)
    template = {
        Attribute.CLASS: ObjectClass.DATA,
        Attribute.LABEL: "data",
        Attribute.APPLICATION: "tests",
        Attribute.VALUE: value,
    }
    kept = await pool.create_object({**template, Attribute.TOKEN: True})
    assert type(kept) is ObjectRef
    read = [Attribute.VALUE, Attribute.APPLICATION]
    expected = {Attribute.VALUE: value, Attribute.APPLICATION: "tests"}
    assert await kept.attributes(read) == expected
    renamed = await kept.set_attributes({Attribute.LABEL: "renamed"})
    assert await renamed.attributes(read) == expected
    async with pool.session() as session:
        lent = await session.create_object(template)
        assert await lent.attributes(read) == expected
    with pytest.raises(SessionObjectDestroyed):
        await lent.attributes(read)


async def test_hundreds_are_found_with_one_call_for_each_at_most(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """One call for each object at most, and what is in use stays known."""
    many = 300
    async with make_pool(module=fault.path) as pool:
        hot = await make_secret(pool, label="hot")
        named = pool.key(label="hot")

        def fill(session: Any) -> None:
            for number in range(many):
                session.create_object(
                    {
                        Attribute.CLASS: ObjectClass.DATA,
                        Attribute.TOKEN: True,
                        Attribute.LABEL: f"data {number}",
                        Attribute.PRIVATE: False,
                    }
                )

        await pool.run(fill, rw=True)
        expected = _aes(SECRET, _BLOCK)
        assert await named.encrypt(_BLOCK, mechanism=_ECB) == expected
        await settled(pool)
        fault.reset_counts()
        found = await pool.find()
        assert fault.count("C_GetAttributeValue") <= many + 1
        assert fault.count("C_FindObjectsInit") == 1
        assert len(found) == many + 1
        assert sum(isinstance(ref, KeyRef) for ref in found) == 1
        for key in (named, hot):
            assert await key.encrypt(_BLOCK, mechanism=_ECB) == expected
        assert fault.count("C_FindObjectsInit") == 1
        some = await pool.find({Attribute.LABEL: "data 77"})
        assert [await ref.attributes([Attribute.LABEL]) for ref in some] == [
            {Attribute.LABEL: "data 77"}
        ]


async def test_a_search_does_not_push_out_what_is_in_use(
    make_pool: MakePool, fault: FaultModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many it finds: the next use of a key looks nothing up."""
    monkeypatch.setattr("pkcs11_pool.cryptoki.keys._MOST_ENTRIES", 4)
    async with make_pool(module=fault.path) as pool:
        for number in range(8):
            await make_secret(pool, label=f"key {number}")
        named = pool.key(label="key 3")
        await named.encrypt(_BLOCK, mechanism=_ECB)
        found = await pool.find()
        fault.reset_counts()
        await named.encrypt(_BLOCK, mechanism=_ECB)
        for ref in found:
            assert isinstance(ref, KeyRef)
            assert await ref.encrypt(_BLOCK, mechanism=_ECB) == _aes(SECRET, _BLOCK)
        assert fault.count("C_FindObjectsInit") == 0


# -- Numbers of vendors -----------------------------------------------------------

_VENDOR = 0x80000123


async def test_mechanisms_by_number(pool: TokenPool) -> None:
    """A known number is that mechanism; a vendor's reaches the token as it is."""
    assert await pool.digest(b"x", mechanism=0x250) == sha256(b"x")  # type: ignore[arg-type]
    key = await make_secret(pool, wrap=True, unwrap=True, derive=True)
    wrong: Any = _VENDOR
    calls: list[Callable[[], Any]] = [
        lambda: pool.digest(b"x", mechanism=wrong),
        lambda: key.sign(b"x", mechanism=wrong),
        lambda: key.sign(b"x", mechanism=wrong, mechanism_param=b"raw bytes"),
        lambda: key.verify(b"x", b"s", mechanism=wrong),
        lambda: key.encrypt(b"x", mechanism=wrong),
        lambda: key.decrypt(iter([data_of(2 * PIECE)]), mechanism=wrong),
        lambda: collected(key.encrypt_stream(b"x", mechanism=wrong)),
        lambda: key.wrap_key(key, mechanism=wrong),
        lambda: key.unwrap_key(
            ObjectClass.SECRET_KEY, KeyType.AES, b"x", mechanism=wrong, store=True
        ),
        lambda: key.derive_key(KeyType.AES, 128, mechanism=wrong, store=True),
        lambda: pool.generate_key(KeyType.AES, 128, mechanism=wrong, store=True),
        lambda: pool.generate_key(
            wrong,
            128,
            mechanism=wrong,
            store=True,
            capabilities=0,  # type: ignore[arg-type]
        ),
    ]
    for call in calls:
        with pytest.raises(pkcs11.MechanismInvalid):
            await call()
    for number in (0x7FFF, -1, 1 << 64, True):
        with pytest.raises(InvalidType, match="mechanism"):
            await key.sign(b"x", mechanism=number)  # type: ignore[arg-type]
    assert await pool.find() == [key] or len(await pool.find()) == 1


async def test_attributes_by_number(pool: TokenPool) -> None:
    """A known number is that attribute; a vendor's reaches the token as it is."""
    key = await make_secret(pool, label="name")
    label: Any = int(Attribute.LABEL)
    vendor: Any = _VENDOR
    (found,) = await pool.find({label: "name"})
    assert await found.attributes([label, vendor]) == {Attribute.LABEL: "name"}
    for value in (b"bytes", "text", 7, True, dt.date(2026, 1, 2)):
        with pytest.raises(pkcs11.AttributeTypeInvalid):
            await key.set_attributes({vendor: value})
        assert await pool.find({vendor: value}) == []
    for number in (0x7FFFFFFF, -1, True, "label"):
        with pytest.raises(InvalidType):
            await pool.find({number: b"x"})  # type: ignore[dict-item]
        with pytest.raises(InvalidType):
            await key.attributes([number])  # type: ignore[list-item]
    with pytest.raises(InvalidType, match="template"):
        await pool.find({vendor: object()})


# -- Digests of keys --------------------------------------------------------------


async def test_keys_are_digested_by_the_token(pool: TokenPool) -> None:
    """Alone and among bytes; the digest is that of their values."""
    key = await make_secret(pool)
    how: dict[str, Any] = {"mechanism": Mechanism.SHA256}
    assert await pool.digest(key, **how) == sha256(SECRET)
    assert await pool.digest([key, key], **how) == sha256(SECRET * 2)
    parts: list[Any] = [b"before", key, b"between", key, data_of(3 * PIECE)]
    expected = sha256(b"before" + SECRET + b"between" + SECRET + data_of(3 * PIECE))
    for source in (parts, iter(parts), awaited(parts)):
        assert await pool.digest(source, **how) == expected
    async with pool.session() as session:
        lent = await make_secret(session, token=False)
        mixed: Any = iter([b"x", lent])
        assert await session.digest(mixed, **how) == sha256(b"x" + SECRET)
        assert await pool.digest([lent, b"x"], **how) == sha256(SECRET + b"x")
        assert await digest(session)
    with pytest.raises(SessionObjectDestroyed):
        await pool.digest(lent, **how)
    await key.destroy()
    with pytest.raises(KeyNotFound):
        await pool.digest(key, **how)
    with pytest.raises(KeyNotFound):
        await pool.digest([data_of(3 * PIECE), key], **how)
    with pytest.raises(InvalidType, match="KeyRef"):
        await key.sign([b"x", key], mechanism=Mechanism.AES_CMAC)  # type: ignore[list-item]


# -- Random numbers ---------------------------------------------------------------


async def test_the_random_numbers_of_the_token_are_seeded(
    make_pool: MakePool, fault: FaultModule
) -> None:
    """By a pool or in a session; a token that takes no seed says so itself."""
    async with make_pool(module=fault.path) as pool, pool.session() as session:
        for calls in (pool, session):
            await calls.seed_random(b"seed")
            await calls.seed_random(bytes(1000))
        assert fault.count("C_SeedRandom") == 4
        assert all(call.rv == CKR.OK for call in fault.calls("C_SeedRandom"))
        fault.on("C_SeedRandom", answer=CKR.RANDOM_SEED_NOT_SUPPORTED)
        with pytest.raises(pkcs11.RandomSeedNotSupported):
            await pool.seed_random(b"seed")
        await pool.run(lambda opened: opened.seed_random(b"seed"))
        assert fault.count("C_SeedRandom") == 6


def test_the_whole_seed_is_sent() -> None:
    """To see which bytes come, a function stands in the module's place: none tells."""
    seen: list[tuple[int, bytes, int]] = []

    def take(*given: Any) -> int:
        seen.append(given)
        return int(CKR.OK)

    session: Any = SimpleNamespace(
        handle=7, functions=SimpleNamespace(C_SeedRandom=take)
    )
    operations.seed_random(session, b"\0seed")
    assert seen == [(7, b"\0seed", 5)]


# -- All of python-pkcs11 ---------------------------------------------------------

_NAMES: dict[type, str] = {
    types.Session: "create_domain_parameters create_object digest generate_key "
    "generate_keypair generate_domain_parameters generate_random seed_random",
    types.Object: "copy destroy",
    types.DomainParameters: "generate_keypair",
    types.EncryptMixin: "encrypt",
    types.DecryptMixin: "decrypt",
    types.SignMixin: "sign",
    types.VerifyMixin: "verify",
    types.WrapMixin: "wrap_key",
    types.UnwrapMixin: "unwrap_key",
    types.DeriveMixin: "derive_key",
    types.EncapsulateMixin: "encapsulate_key",
    types.DecapsulateMixin: "decapsulate_key",
}
_OTHER_NAMES: dict[tuple[type, str], object] = {
    (types.Session, "close"): PooledSession.closed,  # at the end of its block
    (types.Session, "get_key"): TokenPool.key,
    (types.Session, "get_objects"): TokenPool.find,
    (types.Session, "init_pin"): SecurityOfficer.init_pin,
    (types.Session, "reaffirm_credentials"): KeyRef.sign,  # pin=
    (types.Session, "set_pin"): TokenPool.set_pin,
    (types.Object, "get_attributes"): ObjectRef.attributes,
    (types.LocalDomainParameters, "get_attributes"): LocalParameters,  # values
}


def test_each_method_of_python_pkcs11_has_its_awaited_one() -> None:
    """By its own name, or by one that says more here: none was forgotten."""
    homes: dict[type, type] = {types.Session: TokenPool, types.Object: ObjectRef}
    homes[types.DomainParameters] = ParametersRef
    for theirs, name in _methods():
        if (theirs, name) not in _OTHER_NAMES:
            assert name in _NAMES.get(theirs, "").split(), (theirs, name)
            ours = getattr(homes.get(theirs, KeyRef), name)
            assert inspect.iscoroutinefunction(inspect.unwrap(ours)), name
    assert set(_OTHER_NAMES) <= set(_methods())


def _methods() -> list[tuple[type, str]]:
    return [
        (kind, name)
        for kind in vars(types).values()
        if inspect.isclass(kind) and kind.__module__ == types.__name__
        # What is looked at is in ``list_tokens``, ``pool.token`` and ``pool.lib``.
        if kind not in {types.Slot, types.Token}
        for name, member in vars(kind).items()
        if inspect.isfunction(member) and not name.startswith("_")
    ]


async def test_a_session_has_all_of_it(pool: TokenPool) -> None:
    """What makes objects on a pool makes session objects in an open session."""

    async def work(session: PooledSession) -> None:
        group = await session.create_domain_parameters(KeyType.DSA, _DSA_GROUP)
        public, private = await group.on(session).generate_keypair()
        copied = await public.on(session).copy()
        signature = await private.sign(b"m", mechanism=Mechanism.DSA_SHA1)
        assert await copied.verify(b"m", signature, mechanism=Mechanism.DSA_SHA1)

    async with pool.session() as session:
        await work(session)
    assert await pool.find() == []
