"""The session without a network: who drives, when the worker sleeps, what a prompt leads to."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fastvideo.errors import UserError
from fastvideo.live.clock import Clock
from fastvideo.live.reading import Reader
from fastvideo.live.session import LONGEST, Session, Watching
from fastvideo.tests.live.world_stream import BROKEN, REFUSED, WorldStreamer

PROMPT = "a red seven moving left"


class Viewer:
    """A page that keeps what it is sent."""

    def __init__(self, session: Session) -> None:
        self._events: queue.Queue[bytes | None] = queue.Queue()
        self.number = session.join(self._events.put)

    def next(self, seconds: float = 5.0) -> tuple[str, Any]:
        """The next event; ``("end", None)`` after the last."""
        found = self._events.get(timeout=seconds)
        if found is None:
            return "end", None
        name, data = found.decode().splitlines()[:2]
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def wait(self, name: str) -> Any:
        """The next event of a name; those before it are dropped."""
        while True:
            found, data = self.next()
            if found == name:
                return data


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session(WorldStreamer(), PROMPT, Clock(200.0), Reader())  # type: ignore[arg-type]
    made.start()
    yield made
    made.close()


def test_frames_are_made_while_somebody_watches(session: Session) -> None:
    time.sleep(0.1)
    assert session.frames == 0, "nobody has come yet"
    viewer = Viewer(session)
    assert viewer.next() == ("hello", {
        "viewer": viewer.number, "prompt": PROMPT, "asked_at": 0,
        "asked": {"digit": "seven", "colour": "red", "direction": "left"},
    })  # fmt: skip
    assert viewer.next() == ("role", {"drives": True, "viewers": 1})
    chunks = [viewer.wait("chunk") for _ in range(5)]
    assert [(chunk["frame"], chunk["count"]) for chunk in chunks] == [(0, 1), (1, 4), (5, 4), (9, 4), (13, 4)]
    assert chunks[-1]["read"] == [["seven", "red", "left"]] * 4
    session.leave(viewer.number)
    time.sleep(0.1)
    asleep = session.frames
    time.sleep(0.2)
    assert session.frames == asleep
    again = Viewer(session)
    assert again.wait("chunk")["frame"] < asleep, "the latest picture, at once"
    assert again.wait("chunk")["frame"] == asleep


def test_a_model_that_is_faster_than_the_pages_waits_for_them() -> None:
    session = Session(WorldStreamer(), PROMPT, Clock(0.5))  # type: ignore[arg-type]
    session.start()
    viewer = Viewer(session)
    for _ in range(2):
        viewer.wait("chunk")
    time.sleep(0.3)
    assert session.frames <= 9, "the first frame and two chunks"
    session.close()


def test_a_prompt_is_received_and_applied(session: Session) -> None:
    viewer = Viewer(session)
    for _ in range(8):
        viewer.wait("chunk")
    wish = session.ask(viewer.number, "a red seven moving right")
    applied = viewer.wait("applied")
    assert applied["id"] == wish.number
    assert applied["asked"] == {"digit": "seven", "colour": "red", "direction": "right"}
    assert 0 <= applied["waited"] <= 8.01, "two chunks"
    chunk = viewer.wait("chunk")
    assert chunk["frame"] == applied["frame"]
    while chunk["latency"] is None:
        chunk = viewer.wait("chunk")
    assert 5 <= chunk["latency"] <= 9
    assert Viewer(session).wait("hello")["prompt"] == "a red seven moving right"


def test_of_several_prompts_the_last_one_counts() -> None:
    session = Session(WorldStreamer(), PROMPT, Clock(200.0), Reader())  # type: ignore[arg-type]
    viewer = Viewer(session)
    first, second = (session.ask(viewer.number, PROMPT, change={"direction": word}) for word in ("up", "down"))
    session.start()
    assert viewer.wait("replaced") == {"id": first.number, "by": second.number}
    assert viewer.wait("applied")["prompt"] == "a red seven moving down"
    assert viewer.wait("chunk")["frame"] == 0
    session.close()


def test_the_same_noise_again(session: Session) -> None:
    viewer = Viewer(session)
    first = [viewer.wait("chunk")["sprite"] for _ in range(4)]
    session.ask(viewer.number, PROMPT, "again")
    frame = viewer.wait("applied")["frame"]
    chunks = [viewer.wait("chunk") for _ in range(4)]
    assert [chunk["sprite"] for chunk in chunks] == first
    assert [chunk["frame"] for chunk in chunks] == [frame, frame + 1, frame + 5, frame + 9]


def test_a_cut_begins_a_new_scene(session: Session) -> None:
    viewer = Viewer(session)
    for _ in range(6):
        viewer.wait("chunk")
    session.ask(viewer.number, "a blue two moving up", "cut")
    viewer.wait("applied")
    assert viewer.wait("chunk")["read"] == [None], "no window over the cut"


def test_one_drives_the_others_watch(session: Session) -> None:
    first, second, third = Viewer(session), Viewer(session), Viewer(session)
    assert second.wait("role") == {"drives": False, "viewers": 2}
    with pytest.raises(Watching):
        session.ask(second.number, PROMPT)
    session.leave(first.number)
    session.leave(first.number)
    while not (role := second.wait("role"))["drives"]:
        pass
    assert role["viewers"] == 2
    assert third.wait("role") == {"drives": False, "viewers": 3}
    session.ask(second.number, PROMPT)
    with pytest.raises(Watching):
        session.ask(first.number, PROMPT)


@pytest.mark.parametrize(
    ("prompt", "kind", "change", "message"),
    [
        ("a rod seven", "switch", None, "unknown word rod. The tiny world knows: a, an"),
        ("seven red", "switch", None, "is not a caption of the tiny world"),
        ("  ", "switch", None, "the prompt is empty"),
        ("a " * LONGEST, "switch", None, f"at most {LONGEST} characters, got {2 * LONGEST}"),
        (PROMPT, "swich", None, "kind: one of switch, cut, again is expected, got 'swich'; did you mean 'switch'?"),
        (PROMPT, "switch", {"hue": "red"}, "change: one of digit, colour, direction is expected, got 'hue'"),
        (PROMPT, "switch", {"colour": "rod"}, "change.colour: one of red, .* got 'rod'; did you mean 'red'"),
        ("a rod seven", "switch", {"colour": "red"}, "unknown word rod"),
    ],
)
def test_what_cannot_be_asked(session: Session, prompt: str, kind: str, change: Any, message: str) -> None:
    viewer = Viewer(session)
    with pytest.raises(UserError, match=message):
        session.ask(viewer.number, prompt, kind, change)
    frame = viewer.wait("chunk")["frame"]
    assert viewer.wait("chunk")["frame"] > frame, "the stream goes on"


def test_a_prompt_that_the_model_refuses_changes_nothing(session: Session) -> None:
    viewer = Viewer(session)
    wish = session.ask(viewer.number, REFUSED)
    assert viewer.wait("refused") == {"id": wish.number, "message": "the model itself refuses this"}
    viewer.wait("chunk")
    assert Viewer(session).wait("hello")["prompt"] == PROMPT


def test_a_first_prompt_outside_of_the_world_is_refused() -> None:
    with pytest.raises(UserError, match="unknown word rod"):
        Session(WorldStreamer(), "a rod seven", Clock(12.0), Reader())  # type: ignore[arg-type]


def test_without_a_judge_any_prompt_is_the_models_own_affair() -> None:
    session = Session(WorldStreamer(), PROMPT, Clock(200.0))  # type: ignore[arg-type]
    session.start()
    viewer = Viewer(session)
    assert viewer.wait("hello")["asked"] is None
    chunk = viewer.wait("chunk")
    assert (chunk["read"], chunk["latency"]) == (None, None)
    with pytest.raises(UserError, match="only prompts of the tiny world"):
        session.ask(viewer.number, PROMPT, change={"direction": "up"})
    session.close()


def test_a_failure_of_the_model_is_told_and_kept(session: Session) -> None:
    viewer = Viewer(session)
    session.ask(viewer.number, BROKEN)
    assert viewer.wait("failed") == {"message": "the network is broken"}
    assert str(session.failure) == "the network is broken"
    assert session.over


def test_the_end_is_told(session: Session) -> None:
    viewer = Viewer(session)
    session.close()
    viewer.wait("bye")
    assert viewer.next() == ("end", None)
    Viewer(session).wait("bye")
