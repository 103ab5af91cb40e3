"""The page in a real browser: videos move, nothing sticks out, text can be read, nothing is loaded, nothing fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from fastvideo.evaluation.report import write_report
from fastvideo.tests.evaluation.browser import FAINT, OUTSIDE, chromium, complaints, look, show, wait_for
from fastvideo.tests.evaluation.runs import add_validation, make_run, measured
from fastvideo.tests.evaluation.streams.rows import measured_streams

PAGES = ("run", "large", "compare", "unlike", "trained", "trainings", "streams", "streams_compared")
VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as session:
        yield session


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run: measured, with large videos, trained alone. Several: like ones, unlike ones, trained alone."""
    root = tmp_path_factory.mktemp("runs")
    first, second = make_run(root / "first"), make_run(root / "a-long-name-second", measured(24.0), guidance=3.0)
    large = make_run(root / "large", measured(side=160))
    few = make_run(root / "few", measured(prompts=48))
    bare = make_run(root / "bare", None)
    trained = [add_validation(make_run(root / name, None)) for name in ("early", "late")]
    streams, drifting = (
        make_run(root / name, measured_streams(drift, students))
        for name, drift, students in (("streams", 0.1, 2), ("drifting", 0.5, 1))
    )
    return {
        "streams": write_report([streams], root / "streams.html"),
        "streams_compared": write_report([streams, drifting], root / "streams_compared.html"),
        "run": write_report([first], root / "run.html"),
        "large": write_report([large], root / "large.html"),
        "compare": write_report([first, second], root / "compare.html"),
        "unlike": write_report([first, second, few, bare], root / "unlike.html"),
        "trained": write_report(trained[:1], root / "trained.html"),
        "trainings": write_report(trained, root / "trainings.html"),
    }


@pytest.mark.parametrize("name", PAGES)
def test_page_is_readable_everywhere_and_quiet(name: str, pages: dict[str, Path], browser: Chrome) -> None:
    assert pages[name].stat().st_size < 5e6
    show(browser, pages[name])
    grounds = set()
    for width, scheme in VIEWS:
        look(browser, width, scheme)
        assert browser.execute_script("return document.documentElement.clientWidth") == width
        assert browser.execute_script(OUTSIDE) == [], (width, scheme)
        seen, faint = browser.execute_script(FAINT)
        assert seen > 50
        assert faint == [], (width, scheme)
        grounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2, "light and dark"
    levels = [int(h.tag_name[1]) for h in browser.find_elements(By.CSS_SELECTOR, "h1, h2, h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels)), "no level is left out"
    assert complaints(browser) == []


def test_what_the_checks_look_for_is_found(tmp_path: Path, browser: Chrome) -> None:
    """The page checks fail on a page that deserves it."""
    page = tmp_path / "bad.html"
    wide = '<div class="card" style="width:300px"><p style="width:2000px;color:#999">faint and far too wide</p></div>'
    head = '<meta name="viewport" content="width=device-width"><style>body { background: #fff; }</style>'
    page.write_text(f'{head}<main>{wide}<img src="http://127.0.0.1:9/x.png">')
    show(browser, page, 390)
    outside = browser.execute_script(OUTSIDE)
    assert any("wider than its box" in text for text in outside)
    assert any(text.startswith("<p") for text in outside)
    assert browser.execute_script(FAINT)[1]
    assert wait_for(lambda: any("127.0.0.1" in text for text in complaints(browser)))


@pytest.mark.parametrize("width", [390, 1280])
def test_small_videos_move_until_they_are_paused_by_keyboard(
    width: int, pages: dict[str, Path], browser: Chrome
) -> None:
    show(browser, pages["run"], width)
    images = browser.find_elements(By.CSS_SELECTOR, "img.moving")
    assert len(images) == 15
    assert all(image.get_property("naturalWidth") == 32 for image in images)
    for image in (images[0], images[-1]):
        assert wait_for(lambda image=image, first=image.screenshot_as_png: image.screenshot_as_png != first)  # type: ignore[misc]
    _press_on(browser, "pause")
    clip = browser.find_element(By.CSS_SELECTOR, ".clip")
    before = clip.screenshot_as_png
    time.sleep(0.5)
    assert clip.screenshot_as_png == before
    assert not images[0].is_displayed()
    assert all(still.is_displayed() for still in browser.find_elements(By.CSS_SELECTOR, "img.still"))


def _press_on(browser: Chrome, name: str) -> None:
    """Walk to a control with the tabulator and press it."""
    for _ in range(20):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if browser.switch_to.active_element.get_attribute("id") == name:
            browser.switch_to.active_element.send_keys(Keys.SPACE)
            return
    raise AssertionError(f"{name} cannot be reached by keyboard")


def test_large_videos_play(pages: dict[str, Path], browser: Chrome) -> None:
    show(browser, pages["large"])
    videos = browser.find_elements(By.CSS_SELECTOR, "video.moving")
    assert len(videos) == 15
    clock = "return arguments[0].currentTime > 0.1 && arguments[0].videoWidth === 160"
    for video in (videos[0], videos[-1]):
        browser.execute_script("arguments[0].scrollIntoView()", video)
        assert wait_for(lambda video=video: bool(browser.execute_script(clock, video)))  # type: ignore[misc]


def test_videos_stand_still_for_who_asked_for_less_motion(pages: dict[str, Path], browser: Chrome) -> None:
    show(browser, pages["run"], motion="reduce")
    moving = browser.find_element(By.CSS_SELECTOR, "img.moving")
    assert not moving.is_displayed()
    _press_on(browser, "play")
    assert moving.is_displayed()
