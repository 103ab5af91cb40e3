"""A real headless Chromium for the tests of pages, and what is asked of a page in it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

REQUIRED = "FASTVIDEO_REQUIRE_BROWSER"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)

OUTSIDE = """
const width = document.documentElement.clientWidth, found = [];
const hidden = element => element && (getComputedStyle(element).clipPath !== 'none' || hidden(element.parentElement));
for (const element of document.querySelectorAll('main, main *')) {
  const box = element.getBoundingClientRect();
  const out = box.width && (box.right > width + 0.5 || box.left < -0.5);
  if (out && !hidden(element)) found.push(element.outerHTML.slice(0, 90));
}
for (const element of document.querySelectorAll('.card, .chart, .notice, td, th, dd')) {
  if (element.scrollWidth > element.clientWidth + 1 && !hidden(element))
    found.push('wider than its box: ' + element.outerHTML.slice(0, 90));
}
if (document.documentElement.scrollWidth > width) found.push('the page');
return found;
"""
"""Elements that stand out of the page or of the box that frames them; text for screen readers alone is left out."""

FAINT = """
const parse = colour => colour.match(/[0-9.]+/g).map(Number);
const light = colour => {
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = parse(colour).slice(0, 3).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = element => {
  for (; element; element = element.parentElement) {
    const colour = parse(getComputedStyle(element).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return light(`rgb(${colour})`);
  }
  return light(getComputedStyle(document.body).backgroundColor);
};
const found = [];
let seen = 0;
for (const element of document.querySelectorAll('main *')) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!own || !element.getClientRects().length || element.closest('title')) continue;
  const style = getComputedStyle(element), ink = light(element.closest('svg') ? style.fill : style.color);
  const behind = ground(element), ratio = (Math.max(ink, behind) + 0.05) / (Math.min(ink, behind) + 0.05);
  seen += 1;
  if (ratio < 4.5) found.push(ratio.toFixed(2) + ' ' + element.outerHTML.slice(0, 90));
}
return [seen, found];
"""
"""How many elements hold text of their own, and those whose contrast is below WCAG's 4.5 (level AA)."""


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile; without one the test is skipped, or fails if one is required."""
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, but {reason}")
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        session = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield session
        finally:
            session.quit()


def look(browser: webdriver.Chrome, width: int = 1280, scheme: str = "light", motion: str = "") -> None:
    """Give the window a width, and its reader preferences."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": motion},
    ]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def show(browser: webdriver.Chrome, page: Path, width: int = 1280, motion: str = "") -> None:
    """Open a page, everything on it unfolded."""
    look(browser, width, motion=motion)
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(block => { block.open = true; })")


def complaints(browser: webdriver.Chrome, home: str = "file:") -> list[str]:
    """What the console says, and every request that goes neither to the page's own ``home`` nor to data inside it."""
    found = [entry["message"] for entry in browser.get_log("browser")]
    requests: dict[str, str] = {}
    for entry in browser.get_log("performance"):
        event: dict[str, Any] = json.loads(entry["message"])["message"]
        about = event["params"]
        # The browser's own start page asks for things too; it is at no home.
        if event["method"] == "Network.requestWillBeSent" and about["documentURL"].startswith(home):
            requests[about["requestId"]] = about["request"]["url"]
        if event["method"] == "Network.loadingFailed" and about["requestId"] in requests:
            found.append(f"{about['errorText']}: {requests[about['requestId']][:90]}")
    return found + [address for address in requests.values() if not address.startswith(("data:", home))]


def wait_for(happens: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether something happens in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happens():
            return True
        time.sleep(0.05)
    return False
