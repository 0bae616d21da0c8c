"""A key ceremony: a new token, its users' PINs, a key that no one can copy.

The security officer prepares the token and never sees the key; the user makes the key
and cannot reset a PIN. Here one process plays both.
"""

import asyncio
import secrets

from pkcs11 import Attribute, KeyType, Mechanism

from pkcs11_pool import TokenPool, init_token, list_tokens, softhsm


def new_pin() -> str:
    """Eight digits; a real ceremony prints them into two envelopes."""
    return f"{secrets.randbelow(10**8):08}"


async def main(directory: softhsm.TokenDirectory) -> None:
    """Do it, step by step."""
    module, so_pin = directory.softhsm.module, new_pin()
    empty = (await list_tokens(module))[-1]
    info = await init_token(
        module, slot_id=empty.slot_id, label="root-ca", so_pin=so_pin
    )
    print(f"1. token {info.label!r} is initialised, and has no user's PIN")

    async with TokenPool(module, token_serial=info.serial) as pool:
        async with pool.security_officer(so_pin) as officer:
            state = (await officer.session.info()).state.name
            pin = new_pin()
            await officer.init_pin(pin)
        print(f"2. the officer set it, as {state}; now {pool.login_state.name}")

        await pool.login(pin)
        await pool.set_pin(pin, pin := new_pin())
        print("3. the user has changed it: the officer does not know it any more")

        public, private = await pool.generate_keypair(
            KeyType.RSA, 3072, label="root", id=b"\x01", store=True
        )
        kept = [Attribute.SENSITIVE, Attribute.NEVER_EXTRACTABLE, Attribute.LOCAL]
        for name, value in (await private.attributes(kept)).items():
            print(f"4. CKA_{name.name}: {value}")
        how = Mechanism.SHA256_RSA_PKCS
        signature = await private.sign(b"the minutes", mechanism=how)
        right = await public.verify(b"the minutes", signature, mechanism=how)
        print(f"5. the minutes are signed: {right}")


if __name__ == "__main__":
    with softhsm.token_directory() as empty_directory:  # in its place: your module
        asyncio.run(main(empty_directory))
