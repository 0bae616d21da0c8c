"""Make the screenshots of the status page, on a throwaway token under some load.

    python docs/screenshots.py

Writes ``docs/_static/status/*.png``. Needs SoftHSM2, Chromium and its driver.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from pkcs11 import KeyType, Mechanism

from pkcs11_pool import KeyNotFound, PoolTimeout, TokenPool, softhsm
from pkcs11_pool.asgi import StatusApp

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from browserkit import browser, find_browser, prefer, resize, served  # noqa: E402

SHOTS = {
    "light": ("light", 1280),
    "dark": ("dark", 1280),
    "narrow": ("light", 390),
}


async def load(pool: TokenPool, callers: int) -> None:
    """Sign without end, a little faster and slower; fail now and then."""
    key = pool.key(label="signer")

    async def caller(number: int) -> None:
        turn = 0
        while True:
            turn += 1
            await key.sign(bytes(32), mechanism=Mechanism.ECDSA)
            if turn % 40 == number:
                await asyncio.sleep(0.3)

    async def mistakes() -> None:
        while True:
            try:
                await pool.key(label="nowhere").sign(b"data")
            except KeyNotFound:
                await asyncio.sleep(2)
            try:
                async with pool.session(timeout=0):
                    await asyncio.sleep(0.2)
            except PoolTimeout:
                pass

    await asyncio.gather(mistakes(), *(caller(number) for number in range(callers)))


def shoot(paths: tuple[str, str], url: str) -> None:
    """Take the pictures, each when the charts have something to show."""
    target = HERE / "_static" / "status"
    target.mkdir(parents=True, exist_ok=True)
    with browser(paths) as driver:
        driver.get(f"{url}/?every=0.25")
        driver.implicitly_wait(5)
        driver.find_element("css selector", "section")
        asyncio.run(asyncio.sleep(40))
        for name, (scheme, width) in SHOTS.items():
            prefer(driver, prefers_color_scheme=scheme)
            resize(driver, width, 500)
            height = driver.execute_script("return document.body.scrollHeight")
            resize(driver, width, height + 20)
            asyncio.run(asyncio.sleep(0.5))
            driver.save_screenshot(str(target / f"{name}.png"))


async def main(token: softhsm.ThrowawayToken, paths: tuple[str, str]) -> None:
    """Serve the status app of a pool that is at work."""
    async with TokenPool(
        token.module, token_label=token.label, pin=token.user_pin, name="signing"
    ) as pool:
        await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", label="signer", store=True
        )
        async with served(StatusApp(pool, allow_anonymous=True)) as url:
            work = asyncio.create_task(load(pool, callers=12))
            await asyncio.to_thread(shoot, paths, url)
            work.cancel()
            await asyncio.wait([work])


if __name__ == "__main__":
    found = find_browser()
    if found is None:
        sys.exit("no Chromium: apt-get install chromium chromium-driver")
    with softhsm.throwaway_token() as throwaway:
        asyncio.run(main(throwaway, found))
