"""A web server and a browser for tests, both real: uvicorn, and headless Chromium."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from selenium.webdriver import Chrome

BROWSERS = ("chromium", "google-chrome", "chromium-browser")


@asynccontextmanager
async def served(app: Any, **options: Any) -> AsyncIterator[str]:
    """The address of an application that is served on a port of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            app, **({"log_level": "warning", "ws": "none", "http": "h11"} | options)
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([listener]))
        while not server.started and not task.done():  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            await task


def find_browser() -> tuple[str, str] | None:
    """The paths of a browser and its driver; None where one of them is missing."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return None if browser is None or driver is None else (browser, driver)


def needed_browser() -> tuple[str, str]:
    """The paths of a browser and its driver; skips the test where one is missing."""
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    return found


@contextmanager
def browser(
    paths: tuple[str, str], *, width: int = 1280, height: int = 1000
) -> Iterator[Chrome]:
    """A headless browser."""
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--force-device-scale-factor=1")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(paths[1]))
    try:
        # Not the window's size: a headless window is not as narrow as a telephone.
        resize(driver, width, height)
        yield driver
    finally:
        driver.quit()


def resize(driver: Chrome, width: int, height: int) -> None:
    """Give the page a size."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", metrics | {"mobile": False}
    )


def prefer(driver: Chrome, **features: str) -> None:
    """Tell the page what its reader prefers, as ``prefers_color_scheme="dark"``."""
    told = [{"name": n.replace("_", "-"), "value": v} for n, v in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": told})
