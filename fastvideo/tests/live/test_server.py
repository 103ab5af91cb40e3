"""The server over real connections: the page, its events, prompts, pages that come and go, ends of all kinds."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import socket
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from fastvideo.errors import UserError
from fastvideo.live.clock import Clock
from fastvideo.live.page import render
from fastvideo.live.server import MOST_WAITING, feed, listen
from fastvideo.live.session import Session
from fastvideo.live.sprites import sprite
from fastvideo.tests.launch import wait_until
from fastvideo.tests.live.serving import PROMPT, SMALL, Page, deaf, live
from fastvideo.tests.live.world_stream import BROKEN, WorldStreamer


def test_the_page_is_one_file_that_may_load_nothing() -> None:
    with live() as running, urllib.request.urlopen(running.url) as answer:
        text = answer.read().decode()
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    assert "@import" not in text
    assert "url(" not in text
    page = render("a <model>", "", 32, 32, 12, world=True)
    assert all(word in page for word in ("seven", "magenta", "up and left", "a &lt;model&gt;"))


def test_frames_arrive_as_they_are() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 24, 3), dtype=np.uint8)
    head, data = sprite(frames).split(",")
    assert head == "data:image/png;base64"
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(found.reshape(4, 32, 24, 3), frames)
    large = np.zeros((2, 160, 240, 3), dtype=np.uint8)
    head, data = sprite(large).split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (240, 320)


def test_a_prompt_answers_twice() -> None:
    with live() as running, Page(running) as page:
        status, answer = running.post({"viewer": page.number, "prompt": PROMPT, "change": {"direction": "up"}})
        assert status == 202
        assert answer["prompt"] == "a red seven moving up"
        applied = page.wait("applied")
        assert applied["id"] == answer["received"]
        assert page.wait("chunk")["frame"] == applied["frame"]


def test_bad_words_are_answered_and_the_stream_goes_on() -> None:
    with live() as running, Page(running) as page:
        status, answer = running.post({"viewer": page.number, "prompt": "a rod seven"})
        assert status == 422
        assert "unknown word rod. The tiny world knows: a, an, digit" in answer["error"]
        frame = page.wait("chunk")["frame"]
        assert page.wait("chunk")["frame"] > frame


@pytest.mark.parametrize(
    ("body", "kind", "host", "status", "message"),
    [
        ("{", "application/json", "127.0.0.1", 400, "Invalid JSON"),
        ({"prompt": PROMPT}, "application/json", "127.0.0.1", 400, "viewer: Field required"),
        ({"viewer": 1, "prompt": 3}, "application/json", "127.0.0.1", 400, "prompt: Input should be a valid string"),
        ({"viewer": 1, "prompt": "a" * 20_000}, "application/json", "127.0.0.1", 413, "at most 16000 bytes"),
        ({"viewer": 1, "prompt": PROMPT}, "text/plain", "127.0.0.1", 415, "application/json is expected"),
        ({"viewer": 1, "prompt": PROMPT}, "application/json", "evil.example", 400, "Invalid host header"),
        ({"viewer": 77, "prompt": PROMPT}, "application/json", "localhost", 403, "another page drives"),
    ],
)
def test_requests_that_are_refused(body: object, kind: str, host: str, status: int, message: str) -> None:
    with live() as running:
        found, answer = running.post(body, kind, host)
        assert found == status
        assert message in str(answer)


def test_pages_come_and_go() -> None:
    with live() as running:
        with Page(running) as driver, Page(running) as watcher:
            assert driver.wait("role")["drives"]
            assert not watcher.wait("role")["drives"]
            assert running.post({"viewer": watcher.number, "prompt": PROMPT})[0] == 403
        with Page(running) as alone:
            while alone.wait("role") != {"drives": True, "viewers": 1}:
                pass
            assert running.post({"viewer": alone.number, "prompt": PROMPT})[0] == 202
        assert falls_asleep(running.session), "nobody watches"


def falls_asleep(session: Session) -> bool:
    """True once no more frames are made."""
    made, deadline = -1, time.monotonic() + 30
    while made != session.frames and time.monotonic() < deadline:
        made = session.frames
        time.sleep(0.3)
    return made == session.frames


def is_gone(page: socket.socket) -> bool:
    """True if nobody takes what the page sends."""
    try:
        page.send(b" ")
    except ConnectionError:
        return True
    return False


def test_a_page_that_stops_reading_neither_drives_nor_keeps_the_model_awake() -> None:
    with live(seconds=0.002, fps=3000, judged=False, buffer=SMALL) as running, deaf(running) as page:
        assert falls_asleep(running.session)
        with Page(running) as other:
            assert other.wait("role") == {"drives": True, "viewers": 1}
        wait_until(lambda: is_gone(page), 30)


def test_the_end_does_not_wait_for_a_page_that_stops_reading(capfd: pytest.CaptureFixture[str]) -> None:
    with live(seconds=0.002, fps=3000, judged=False, buffer=SMALL) as running, deaf(running):
        assert falls_asleep(running.session)
        running.session.close()
        running.thread.join(60)
        assert not running.thread.is_alive()
    assert capfd.readouterr().err == "", "no task was cancelled"


def test_a_page_that_is_too_slow_is_cut_off_and_nothing_waits_for_it() -> None:
    async def read_late() -> list[bytes]:
        session = Session(WorldStreamer(), PROMPT, Clock(1e6))  # type: ignore[arg-type]
        session.start()
        events = feed(session)
        first = [await anext(events)]
        assert await asyncio.to_thread(falls_asleep, session), "nobody else watches"
        got = first + [event async for event in events]
        session.close()
        return got

    assert 10 < len(asyncio.run(read_late())) <= MOST_WAITING + 1


def test_the_end_of_the_session_ends_the_server_and_the_pages() -> None:
    with live() as running, Page(running) as page:
        running.session.close()
        page.wait("bye")
        assert page.next() == ("end", None)
        running.thread.join(5)
        assert not running.thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            running.post({})


def test_a_failure_of_the_model_ends_the_server_with_it() -> None:
    with live() as running, Page(running) as page:
        running.post({"viewer": page.number, "prompt": BROKEN})
        assert page.wait("failed")["message"] == "the network is broken"
        running.thread.join(5)
        assert [str(error) for error in running.raised] == ["the network is broken"]


def test_a_port_in_use() -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port} is in use; perhaps by another live .* --port 0"):
            listen(port)
