"""Make the screenshots of the status page, on a throwaway token under some load.

    python docs/screenshots.py          all of it
    python docs/screenshots.py --top    what ``pkcs11-pool top`` shows of it, alone

Writes ``docs/_static/status/*.png``, which needs Chromium and its driver, and a block
of ``docs/how-to/watch-a-service.md``.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
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


def watch(url: str) -> None:
    """Write what ``top`` shows at its second reading into its page."""
    command = [sys.executable, "-m", "pkcs11_pool", "top", url]
    command += ["--count", "2", "--interval", "2"]
    done = subprocess.run(  # noqa: S603  # our own program
        command, capture_output=True, text=True, check=True
    )
    title = "pkcs11-pool at "
    lines = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    last = max(n for n, line in enumerate(lines) if title in line)
    shown = "\n".join(lines[last:])
    block = f"```text\n$ pkcs11-pool top http://localhost:8000/pools\n{shown}\n```\n"
    page = HERE / "how-to" / "watch-a-service.md"
    marked = re.compile(r"(?s)(<!-- top: .*? -->\n).*(<!-- end of top -->)")
    text = page.read_text()
    page.write_text(marked.sub(lambda found: found[1] + block + found[2], text))


async def main(token: softhsm.ThrowawayToken, paths: tuple[str, str] | None) -> None:
    """Serve the status app of a pool that is at work."""
    async with TokenPool(
        token.module, token_label=token.label, pin=token.user_pin, name="signing"
    ) as pool:
        await pool.generate_keypair(
            KeyType.EC, curve="secp256r1", label="signer", store=True
        )
        async with served(StatusApp(pool, allow_anonymous=True)) as url:
            work = asyncio.create_task(load(pool, callers=12))
            await asyncio.to_thread(watch, url)
            if paths is not None:
                await asyncio.to_thread(shoot, paths, url)
            work.cancel()
            await asyncio.wait([work])


if __name__ == "__main__":
    found = None if "--top" in sys.argv else find_browser()
    if found is None and "--top" not in sys.argv:
        sys.exit("no Chromium: apt-get install chromium chromium-driver")
    with softhsm.throwaway_token() as throwaway:
        asyncio.run(main(throwaway, found))
