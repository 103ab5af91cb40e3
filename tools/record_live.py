"""Record the page of ``fastvideo live`` as an animated picture, steered by keys, words and text: for the README.

    python -m tools.record_live outputs/demo_stream/student --out docs/images/live.webp

It needs Chromium and chromedriver, and a quiet machine: pictures are taken as fast as the browser gives them, and shown
at the times at which they were taken.
"""

from __future__ import annotations

import argparse
import base64
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from fastvideo.entry import report_user_errors
from fastvideo.errors import UserError
from fastvideo.files import readable_size, replacing
from fastvideo.tests.evaluation.browser import chromium, look, wait_for

LARGEST = 1_000_000
"""Bytes of the picture."""
QUALITIES = (80, 65, 50, 35)
"""Qualities of WebP, the first that is small enough is taken."""
WIDTH, HEIGHT = 1080, 900
Act = Callable[[Chrome], None]


@dataclass(frozen=True)
class Shot:
    """One picture of the page, and the second at which it was taken."""

    picture: Image.Image
    at: float


def key(name: str) -> Act:
    """Press an arrow key."""
    return lambda browser: browser.find_element(By.TAG_NAME, "body").send_keys(name)


def word(attribute: str, value: str) -> Act:
    """Press the button of a word."""
    return lambda browser: browser.find_element(By.CSS_SELECTOR, f"[data-word={attribute}] [value={value}]").click()


def cut_to(prompt: str) -> Act:
    """Write a prompt and cut to it."""

    def act(browser: Chrome) -> None:
        box = browser.find_element(By.ID, "prompt")
        box.clear()
        box.send_keys(prompt)
        browser.find_element(By.CSS_SELECTOR, "[value=cut]").click()

    return act


SCRIPT: tuple[tuple[float, Act], ...] = (
    (2.5, key(Keys.ARROW_UP)),
    (5.0, word("colour", "green")),
    (7.5, key(Keys.ARROW_RIGHT)),
    (10.0, cut_to("a yellow three moving down and left")),
)
"""Seconds after the first picture, and deeds."""


def record(browser: Chrome, url: str, script: Sequence[tuple[float, Act]], seconds: float) -> list[Shot]:
    """Pictures of the page while a script is played on it.

    Raises:
        UserError: if no video begins.
    """
    look(browser, WIDTH)
    browser.get(url)
    if not wait_for(lambda: int(browser.find_element(By.ID, "frame").text) > 8, 60):
        raise UserError(f"{url}: no video begins")
    begin, deeds, shots = time.monotonic(), list(script), []
    while (now := time.monotonic() - begin) < seconds:
        if deeds and now >= deeds[0][0]:
            deeds.pop(0)[1](browser)
        answer = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": True})
        shots.append(Shot(Image.open(io.BytesIO(base64.b64decode(answer["data"]))).convert("RGB"), now))
    return shots


def write(shots: Sequence[Shot], output: Path) -> int:
    """Write an animated WebP of at most a megabyte; returns its bytes.

    Raises:
        UserError: if it cannot be that small.
    """
    ends = [*(shot.at for shot in shots[1:]), shots[-1].at + 1.0]
    durations = [max(10, round(1000 * (end - shot.at))) for shot, end in zip(shots, ends, strict=True)]
    first, *rest = (shot.picture for shot in shots)
    for quality in QUALITIES:
        buffer = io.BytesIO()
        options: dict[str, Any] = {"quality": quality, "method": 4, "minimize_size": True, "loop": 0}
        first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=durations, **options)
        if (size := buffer.tell()) <= LARGEST:
            output.parent.mkdir(parents=True, exist_ok=True)
            with replacing(output) as partial:
                partial.write_bytes(buffer.getvalue())
            return size
    raise UserError(f"{len(shots)} pictures take {readable_size(size)}: record fewer --seconds")


@contextmanager
def serving(model: str, fps: float) -> Iterator[str]:
    """The address of ``fastvideo live MODEL`` in a process of its own.

    Raises:
        UserError: if it ends before it serves; it has said why.
    """
    command = [sys.executable, "-m", "fastvideo.cli", "live", model, "--port", "0", "--fps", f"{fps:g}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            url = next((line.split()[0] for line in lines if line.startswith("http")), None)
            if url is None:
                raise UserError(f"{' '.join(command[1:])} does not serve")
            yield url
        finally:
            process.kill()  # it has nothing to save, and may not have come so far as to listen


def main(arguments: Sequence[str]) -> int:
    """Record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a student of the tiny world that streams")
    parser.add_argument("--out", type=Path, default=Path("docs/images/live.webp"))
    parser.add_argument("--seconds", type=float, default=13.0)
    parser.add_argument("--fps", type=float, default=12.0)
    given = parser.parse_args(arguments)
    if given.out.suffix != ".webp":
        raise UserError(f"--out {given.out}: a name that ends in .webp is expected")
    with serving(given.model, given.fps) as url, chromium() as browser:
        shots = record(browser, url, SCRIPT, given.seconds)
    size = write(shots, given.out)
    print(f"{given.out}: {len(shots)} pictures in {shots[-1].at:.0f} s, {readable_size(size)}")
    return 0


if __name__ == "__main__":
    sys.exit(report_user_errors(lambda: main(sys.argv[1:])))
