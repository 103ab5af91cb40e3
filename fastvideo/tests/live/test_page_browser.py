"""The page in a real browser: it plays, it is steered by keys, chips and text, and says what happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from fastvideo.tests.evaluation.browser import FAINT, OUTSIDE, chromium, complaints, look
from fastvideo.tests.evaluation.browser import wait_for as wait_briefly
from fastvideo.tests.live.serving import Live, live
from fastvideo.tests.live.world_stream import BROKEN

pytestmark = pytest.mark.slow
VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]
NAMELESS = """
return [...document.querySelectorAll('button, input, textarea, canvas, [role=meter]')].filter(element =>
  !(element.ariaLabel || element.textContent.trim() || element.labels?.length)).map(element => element.outerHTML);
"""
INK = """
const canvas = document.getElementById('video'), data = canvas.getContext('2d').getImageData(0, 0, 32, 32).data;
const brightest = [0, 0, 0];
data.forEach((value, at) => { if (at % 4 < 3) brightest[at % 4] = Math.max(brightest[at % 4], value); });
return brightest;
"""
"""The highest red, green and blue on the canvas."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as session:
        yield session


@pytest.fixture
def page(browser: Chrome) -> Iterator[tuple[Live, Chrome]]:
    """A server of the true world, and its page at desktop width."""
    with live(seconds=0.02, fps=12.0) as running:
        look(browser)
        browser.get(running.url)
        assert wait_for(lambda: frame(browser) > 10)
        yield running, browser
        browser.get("about:blank")


def wait_for(happens: Callable[[], bool]) -> bool:
    """Patience with a machine that does other things: one question to the browser may take a second."""
    return wait_briefly(happens, 20.0)


def element(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def empty(box: WebElement) -> None:
    """By keys, as people do: WebDriver's own ``clear`` is no input, so an answer of the server could refill the box."""
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)


def text(browser: Chrome, name: str) -> str:
    return element(browser, f"#{name}").text


def frame(browser: Chrome) -> int:
    return int(text(browser, "frame"))


def reading(browser: Chrome) -> dict[str, tuple[str, str]]:
    """Word and verdict of the judge, for each attribute."""
    cells = browser.find_elements(By.CSS_SELECTOR, "[data-read]")
    return {cell.get_attribute("data-read"): (cell.text.split("\n")[1], cell.get_attribute("class")) for cell in cells}


def pressed(browser: Chrome) -> list[str]:
    buttons = browser.find_elements(By.CSS_SELECTOR, "[data-word] [aria-pressed=true]")
    return [button.get_attribute("value") for button in buttons]


def plays(browser: Chrome) -> bool:
    before = frame(browser)
    return wait_for(lambda: frame(browser) > before)


def prompt_is(browser: Chrome, wanted: str) -> Callable[[], bool]:
    return lambda: element(browser, "#prompt").get_attribute("value") == wanted


def test_page_is_readable_everywhere_and_quiet(page: tuple[Live, Chrome]) -> None:
    running, browser = page
    assert wait_for(lambda: "Read as asked after 9 frames" in text(browser, "latency"))
    grounds = set()
    for width, scheme in VIEWS:
        look(browser, width, scheme)
        assert plays(browser)
        assert browser.execute_script(OUTSIDE) == [], (width, scheme)
        seen, faint = browser.execute_script(FAINT)
        assert seen > 50
        assert faint == [], (width, scheme)
        grounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2, "light and dark"
    assert browser.execute_script(NAMELESS) == []
    assert complaints(browser, running.url) == []


def test_the_video_plays_and_is_judged(page: tuple[Live, Chrome]) -> None:
    _, browser = page
    red, green, blue = browser.execute_script(INK)
    assert red > 200 > 100 > max(green, blue), "a red digit"
    assert wait_for(lambda: reading(browser)["direction"] == ("left", "as-asked"))
    assert reading(browser) == {name: (word, "as-asked") for name, word in
                                (("digit", "seven"), ("colour", "red"), ("direction", "left"))}  # fmt: skip
    assert text(browser, "status") == "Live. You drive."
    assert text(browser, "m-past") == "200"
    assert pressed(browser) == ["left", "red", "seven"]
    assert wait_for(lambda: 1 < float(text(browser, "m-shown")) < 16), "12 frames per second; fewer on a busy machine"
    assert "ahead" in text(browser, "ready")


def test_arrow_keys_steer(page: tuple[Live, Chrome]) -> None:
    _, browser = page
    element(browser, "body").send_keys(Keys.ARROW_UP)
    assert wait_for(prompt_is(browser, "a red seven moving up"))
    assert wait_for(lambda: reading(browser)["direction"][0] == "up")
    assert wait_for(lambda: "applied at frame" in text(browser, "log") and "after that" in text(browser, "log"))
    both = ActionChains(browser).key_down(Keys.ARROW_DOWN).key_down(Keys.ARROW_RIGHT)
    both.key_up(Keys.ARROW_DOWN).key_up(Keys.ARROW_RIGHT).perform()
    assert wait_for(prompt_is(browser, "a red seven moving down and right"))
    assert pressed(browser)[0] == "down and right"


def test_arrow_keys_move_the_caret_in_the_prompt(page: tuple[Live, Chrome]) -> None:
    _, browser = page
    element(browser, "#prompt").send_keys(Keys.ARROW_UP, Keys.END, Keys.ARROW_LEFT, "!")
    assert element(browser, "#prompt").get_attribute("value") == "a red seven moving lef!t"


def test_chips_and_words(page: tuple[Live, Chrome]) -> None:
    _, browser = page
    element(browser, "[data-word=colour] [value=green]").click()
    assert wait_for(prompt_is(browser, "a green seven moving left"))
    assert wait_for(lambda: browser.execute_script(INK)[1] > 200 > 100 > browser.execute_script(INK)[0])
    element(browser, "[data-word=direction] [value='']").click()
    assert wait_for(prompt_is(browser, "a green seven"))
    box = element(browser, "#prompt")
    empty(box)
    box.send_keys("a rod ")
    assert wait_for(lambda: text(browser, "log").count("applied") == 2), "both, and neither disturbs the typing"
    box.send_keys("seven", Keys.ENTER)
    assert wait_for(lambda: "unknown word rod. The tiny world knows: a, an" in text(browser, "problem"))
    assert plays(browser)
    empty(box)
    box.send_keys("a blue two moving up")
    element(browser, "[value=cut]").click()
    assert wait_for(lambda: reading(browser)["digit"] == ("two", "as-asked"))
    assert not element(browser, "#problem").is_displayed()
    before = frame(browser)
    element(browser, "[value=again]").click()
    assert wait_for(lambda: text(browser, "log").count("applied") == 4)
    assert frame(browser) > before


def test_one_drives_and_the_other_watches(page: tuple[Live, Chrome]) -> None:
    running, browser = page
    first = browser.current_window_handle
    browser.switch_to.new_window("window")
    look(browser)
    browser.get(running.url)
    assert wait_for(lambda: text(browser, "status") == "Live. Another page drives, you watch.")
    assert plays(browser)
    assert not element(browser, "#prompt").is_enabled()
    assert not element(browser, "[value=up]").is_enabled()
    assert text(browser, "m-viewers") == "2"
    second = browser.current_window_handle
    browser.switch_to.window(first)
    browser.get("about:blank")
    browser.switch_to.window(second)
    assert wait_for(lambda: text(browser, "status") == "Live. You drive.")
    assert element(browser, "#prompt").is_enabled()
    browser.close()
    browser.switch_to.window(first)


def test_pause_lets_the_model_sleep(page: tuple[Live, Chrome]) -> None:
    running, browser = page
    element(browser, "#play").click()
    assert "Paused" in text(browser, "status")
    made = [-1]

    def asleep() -> bool:
        made.append(running.session.frames)
        return made[-1] == made[-8] if len(made) > 8 else False

    assert wait_for(asleep)
    stopped = frame(browser)
    element(browser, "#play").click()
    assert wait_for(lambda: frame(browser) > stopped)
    assert text(browser, "status") == "Live. You drive."


def test_who_wants_less_motion_starts_it(page: tuple[Live, Chrome]) -> None:
    running, browser = page
    look(browser, motion="reduce")
    browser.get(running.url)
    assert text(browser, "status") == "Paused, as your system asks for less motion."
    assert frame(browser) == 0
    element(browser, "#play").click()
    assert plays(browser)


def test_the_ends_are_told(page: tuple[Live, Chrome]) -> None:
    running, browser = page
    running.session.close()
    assert wait_for(lambda: text(browser, "status") == "The server was stopped.")
    assert not element(browser, "#prompt").is_enabled()
    with live(seconds=0.02) as other:
        browser.get(other.url)
        assert wait_for(lambda: frame(browser) > 10)
        box = element(browser, "#prompt")
        empty(box)
        box.send_keys(BROKEN, Keys.ENTER)
        assert wait_for(lambda: text(browser, "status") == "The model stopped: the network is broken")


def test_other_models_have_neither_chips_nor_judge(browser: Chrome) -> None:
    name = "/data/outputs/self_forcing_with_a_long_name/checkpoints/student-ema-0.999-final"
    with live(seconds=0.02, fps=24.0, judged=False, name=name) as running:
        look(browser, 390)
        browser.get(running.url)
        assert wait_for(lambda: frame(browser) > 10)
        assert browser.execute_script(OUTSIDE) == []
        assert not browser.find_elements(By.CSS_SELECTOR, ".judge, .words")
        box = element(browser, "textarea")
        empty(box)
        box.send_keys("a blue two moving up", Keys.ENTER)
        assert wait_for(lambda: browser.execute_script(INK)[2] > 200)
        assert "applied at frame" in text(browser, "log")
        browser.get("about:blank")
