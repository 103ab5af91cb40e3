"""``fastvideo live`` with a real student: random weights, real classes, a recipe that says how it streams."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvideo.cli import live as verb
from fastvideo.cli import main
from fastvideo.errors import UserError
from fastvideo.inference.streaming import Streamer
from fastvideo.live.clock import Clock
from fastvideo.live.server import listen
from fastvideo.live.session import Session
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.tests.launch import Child
from fastvideo.tests.live.test_session import Viewer

PROMPT = "a red seven moving left"
STREAMING = {"chunk": 1, "window": 2, "sink": 1, "positions": "window", "context_time": 0.0}
SIZE = {"height": 16, "width": 32, "num_frames": 25, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy student that streams."""
    root = tmp_path_factory.mktemp("live")
    folder = root / "student"
    shutil.copytree(wan_folder(root), folder)
    recipe = {"ladder": [1.0, 0.6], "sampler": "renoise", "streaming": STREAMING, "model": SIZE}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def pixels(sprite: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Frames ``[n, 16, 32, 3]`` of a sprite."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(sprite.split(",")[1])))).reshape(-1, 16, 32, 3)


def test_pages_see_the_frames_of_the_stream(student: Path) -> None:
    streamer = Streamer.load(str(student), seed=3)
    session = Session(streamer, PROMPT, Clock(1000.0))
    session.start()
    viewer, expected = Viewer(session), streamer.open(PROMPT)
    first = [viewer.wait("chunk") for _ in range(4)]
    for chunk in first:
        assert np.array_equal(pixels(chunk["sprite"]), next(expected))
    meters = first[-1]["meters"]
    assert meters["past_bytes"] == expected.stats.past_bytes > 0
    assert meters["chunk_ms"] == pytest.approx(sum(ms for _, ms in meters["parts"]))
    session.ask(viewer.number, PROMPT, "again")
    viewer.wait("applied")
    assert [viewer.wait("chunk")["sprite"] for _ in range(4)] == [chunk["sprite"] for chunk in first]
    session.close()


def test_a_stream_goes_on_from_an_image(student: Path, tmp_path: Path) -> None:
    """The first time, and when it starts over."""
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "still.png")
    session, _ = verb._prepare(verb.LiveArguments(str(student), PROMPT, image=tmp_path / "still.png"))
    session.start()
    viewer, expected = Viewer(session), Streamer.load(str(student)).open(PROMPT, given=image[None])
    first = [viewer.wait("chunk") for _ in range(3)]
    for chunk in first:
        assert np.array_equal(pixels(chunk["sprite"]), next(expected))
    session.ask(viewer.number, PROMPT, "again")
    viewer.wait("applied")
    assert [viewer.wait("chunk")["sprite"] for _ in range(3)] == [chunk["sprite"] for chunk in first]
    session.close()


def test_an_image_is_read_before_the_weights(student: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(student, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"image no\.png does not exist"):
        verb._prepare(verb.LiveArguments(str(bare), PROMPT, image=Path("no.png")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "generates whole videos at once"),
        (["STUDENT"], "--prompt: the first prompt is needed, as "),
        (["STUDENT", "--prompt", " "], "the prompt is empty"),
        (["tiny_stream", "--prompt", ""], "the prompt is empty"),
        (["STUDENT", "--prompt", PROMPT, "--image", "no.png"], "image no.png does not exist"),
        (["STUDENT", "--port", "70000"], "--port must be from 0 to 65535, got 70000"),
    ],
)
def test_bad_input(arguments: list[str], message: str, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(student) if word == "STUDENT" else word for word in arguments]
    assert main(["live", *words, *([] if "--port" in words else ["--port", "0"])]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "dtype"), [([], torch.float32), (["--precision", "bfloat16"], torch.bfloat16)], ids=str
)
def test_a_precision(flags: list[str], dtype: torch.dtype, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = list[Session]()
    monkeypatch.setattr("fastvideo.live.server.serve", lambda session, page, listening: served.append(session))
    assert main(["live", str(student), "--prompt", PROMPT, "--port", "0", *flags]) == 0
    assert served[0].streamer.model.network.blocks[0].attn1.to_q.weight.dtype == dtype  # type: ignore[union-attr, index]
    served[0].close()


def test_a_port_in_use_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with listen(0) as taken:
        assert main(["live", "no/such/model", "--port", str(taken.getsockname()[1])]) == 2
    assert "is in use; perhaps by another live stream" in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verb, "find_spec", lambda name: None)
    assert main(["live", "tiny_stream"]) == 2
    assert "starlette is not installed: pip install 'fastvideo-distillation[live]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_asked_to_end(student: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "fastvideo.cli", "live", str(student), "--prompt", PROMPT, "--port", "0"]
    run = Child(command, {"OMP_NUM_THREADS": "1"})
    try:
        run.wait_for("(Ctrl-C ends it)\n")
        first, second = run.text.splitlines()[:2]
        assert first == "stream: chunks of 1, window 2 + sink 1, 2 calls + 1 commit per chunk"
        url = second.split()[0]
        with urllib.request.urlopen(url, timeout=60) as page:
            assert "<textarea" in page.read().decode()
        with urllib.request.urlopen(f"{url}/events", timeout=60) as events:
            while b'"frame":5' not in events.readline():
                pass
            run.signal(number)
            while events.readline() != b"event: bye\n":
                pass
        assert run.wait(60) == 0
        assert run.text.splitlines()[-1].startswith("ended after ")
    finally:
        run.process.kill()
