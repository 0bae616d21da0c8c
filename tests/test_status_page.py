"""The status page in a real browser: live, readable, narrow, and of no harm."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pkcs11 import DataInvalid
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from browserkit import browser, needed_browser, prefer, resize, served
from pkcs11_pool.asgi import BasicAuth, StatusApp
from pkcs11_pool.asgi.page import PAGE
from pkcs11_pool.stats import BOUNDS, Histogram
from poolkit import Hold, blocking, digest, settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from selenium.webdriver import Chrome

    from conftest import MakePool
    from pkcs11_pool import TokenPool

NAME = "<img src=x onerror=alert(1)>"
TIMES = ["Run time p50", "Run time p99", "Wait time p99"]
CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((one) => {
    const part = one / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const back = (node) => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3 || colour[3]) return colour;
  }
  return [255, 255, 255];
};
const found = {};
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
  if (!own || node.closest("script, style, template, noscript")) continue;
  const style = getComputedStyle(node);
  const colour = node.ownerSVGElement ? style.fill : style.color;
  const [high, low] = [light(parse(colour)), light(back(node))].sort((a, b) => b - a);
  found[`${node.tagName}.${node.getAttribute("class")}`] = (high + 0.05) / (low + 0.05);
}
return found;
"""


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    """One browser for all tests here."""
    with browser(needed_browser()) as driver:
        yield driver


@pytest.fixture(
    params=[pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """What a browser shows does not depend on the loop."""
    return request.param


def text(driver: Chrome, selector: str) -> str:
    """The words of the first that matches."""
    return driver.find_element(By.CSS_SELECTOR, selector).text


def until(driver: Chrome, true: Callable[[], object]) -> None:
    """Wait for what the page will show."""
    # The tables are made anew with each report.
    wait = WebDriverWait(driver, 15, 0.1, [StaleElementReferenceException])
    wait.until(lambda _: true())


def visit(driver: Chrome, url: str) -> None:
    """Load the page and wait for the first pool."""
    driver.get(url)
    until(driver, lambda: driver.find_elements(By.CSS_SELECTOR, "section dd"))


def total(driver: Chrome) -> str:
    """How many operations the page says there were."""
    return text(driver, ".totals td")


async def test_the_page_is_live_and_of_no_harm(
    chrome: Chrome, make_pool: MakePool
) -> None:
    """It follows the pool, and shows names as the text that they are."""
    async with make_pool(name=NAME) as pool:
        app = StatusApp(pool, allow_anonymous=True)
        async with served(app) as url:
            await blocking(visit, chrome, f"{url}/?every=0.25")
            assert await blocking(text, chrome, "h2") == NAME
            assert await blocking(text, chrome, ".state") == "● ready"
            assert await blocking(text, chrome, ".login") == "● logged in"
            assert await blocking(text, chrome, ".errors tbody") == "none"
            for _ in range(3):
                await digest(pool)
            with pytest.raises(DataInvalid):
                await pool.run(_fails)
            await settled(pool)
            await blocking(until, chrome, lambda: total(chrome) == "4")
            told_last = "DataInvalid CKR_DATA_INVALID"
            await blocking(
                until,
                chrome,
                lambda: text(chrome, ".errors tbody").endswith(told_last),
            )
            await pool.logout()
            out = "◐ not logged in"
            await blocking(until, chrome, lambda: text(chrome, ".login") == out)
        lost = "No answer"
        await blocking(
            until, chrome, lambda: text(chrome, "#connection").startswith(lost)
        )
    told = [entry["message"] for entry in _log(chrome)]
    # The policy was kept, nothing raised: only the lost server is told of.
    assert [line for line in told if "ERR_" not in line] == []


async def test_the_page_tells_sessions_queue_and_times(
    chrome: Chrome, make_pool: MakePool
) -> None:
    """One session is lent, one is at work, and one caller waits for it."""
    async with make_pool(max_sessions=2) as pool:
        app = StatusApp(pool, allow_anonymous=True)
        async with served(app) as url, pool.session():
            await blocking(visit, chrome, f"{url}/?every=0.25")
            shown = await blocking(tiles, chrome)
            nothing = {shown[name] for name in TIMES}
            assert nothing == {"\N{EN DASH}"}
            async with anyio.create_task_group() as tasks:
                with Hold() as hold:
                    tasks.start_soon(pool.run, hold)
                    await hold.entered()
                    tasks.start_soon(pool.run, hold)
                    expected = {
                        "Waiting": "1",
                        "Running": "1",
                        "Sessions open": "2 of 2, 1 leased",
                    }
                    await blocking(
                        until, chrome, lambda: expected.items() <= tiles(chrome).items()
                    )
                    label = (await blocking(_labels, chrome))[2]
                    assert label == "Queue: now waiting 1, running 1; most 1"
            await blocking(
                until, chrome, lambda: tiles(chrome)[TIMES[0]] not in nothing
            )
            shown = await blocking(tiles, chrome)
            for name in TIMES:
                assert re.fullmatch(r"[\d.,]+ (µs|ms|s)", shown[name])
            assert re.fullmatch(r"(?!0 )[\d.,]+ a second", shown["Operations"])


def tiles(driver: Chrome) -> dict[str, str]:
    """What stands in the row of figures, by name."""
    script = """
    const words = (one) => [...one.children].map((part) => part.textContent);
    return [...document.querySelectorAll(".tiles > div")].map(words);
    """
    return dict(driver.execute_script(script))


def _log(driver: Any) -> list[dict[str, Any]]:
    """What the browser wrote to its console."""
    told: list[dict[str, Any]] = driver.get_log("browser")
    return told


def _fails(_session: object) -> None:
    raise DataInvalid


async def test_the_page_can_be_read(chrome: Chrome, pool: TokenPool) -> None:
    """Light and dark, wide and narrow, with eyes, by ear, and without motion."""
    app = StatusApp(pool, allow_anonymous=True)
    async with served(app) as url:
        await digest(pool)
        await blocking(visit, chrome, f"{url}/?every=0.25")
        await digest(pool)
        await blocking(_looks_right, chrome)


def _looks_right(driver: Chrome) -> None:
    until(driver, lambda: "now p50" in _labels(driver)[1])
    backs = set()
    for scheme in ("light", "dark"):
        prefer(driver, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        contrasts = driver.execute_script(CONTRAST)
        assert len(contrasts) > 10
        # WCAG 2.2, "Contrast (Minimum)".
        assert {k: v for k, v in contrasts.items() if v < 4.5} == {}
        script = "return getComputedStyle(document.body).backgroundColor"
        backs.add(driver.execute_script(script))
    assert len(backs) == 2
    assert driver.execute_script("return document.getAnimations().length") == 0
    for width in (320, 768, 1280):
        resize(driver, width, 900)
        script = "return document.documentElement.scrollWidth"
        assert driver.execute_script(script) <= width
    resize(driver, 1280, 1000)
    assert len(_labels(driver)) == 3
    assert all(re.search(r": now .*; most ", label) for label in _labels(driver))
    root = driver.find_element(By.TAG_NAME, "html")
    assert root.get_attribute("lang") == "en"
    assert [h.text for h in driver.find_elements(By.TAG_NAME, "h1")] == [
        "PKCS#11 pools"
    ]
    # What can be scrolled can be reached by the keyboard, and has a name.
    scrolled = driver.find_element(By.CSS_SELECTOR, ".scroll")
    assert scrolled.get_attribute("tabindex") == "0"
    assert scrolled.get_attribute("aria-label") == "Last errors"
    status = driver.find_element(By.ID, "connection")
    assert status.get_attribute("role") == "status"


def _labels(driver: Chrome) -> list[str]:
    charts = driver.find_elements(By.CSS_SELECTOR, 'svg[role="img"]')
    return [chart.get_attribute("aria-label") or "" for chart in charts]


async def test_the_page_works_behind_a_password(
    chrome: Chrome, pool: TokenPool
) -> None:
    """The browser sends it with the figures, too."""
    app = StatusApp(pool, guard=BasicAuth("ops", "right"))
    async with served(app) as url:
        address = url.replace("//", "//ops:right@")
        await blocking(visit, chrome, f"{address}/?every=0.25")
        await digest(pool)
        await settled(pool)
        await blocking(until, chrome, lambda: total(chrome) == "1")


def test_the_page_and_the_pool_agree_on_percentiles(chrome: Chrome) -> None:
    """The same function twice: in Python for ``top``, in the page for its charts."""
    page = PAGE.decode()
    found = re.search(r"(?ms)^  function percentile\(.*?^  }", page)
    assert found is not None
    script = f"{found[0]} return percentile(...arguments);"
    dice = random.Random(7)  # noqa: S311  # no secret
    for _ in range(20):
        counts = [dice.choice((0, 0, 1, 5, 900)) for _ in range(len(BOUNDS) + 1)]
        for percent in (50, 99):
            shown = chrome.execute_script(script, list(BOUNDS), counts, percent)
            expected = Histogram(tuple(counts), 0.0).percentile(percent)
            assert shown == pytest.approx(expected)
