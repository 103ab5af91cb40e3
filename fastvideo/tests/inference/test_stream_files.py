"""``fastvideo generate`` with a streaming student: files that grow, switches, signals, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fastvideo.cli import main
from fastvideo.cli.generate import GenerateArguments, run_generate
from fastvideo.data.video_io import write_video
from fastvideo.errors import UserError
from fastvideo.inference.loading import load_model
from fastvideo.inference.streaming import Streamer
from fastvideo.inference.switch_plan import chunk_starts, parse_switch
from fastvideo.stopping import Stopped
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.tiny.paths import PIPELINE_FOLDER

OLD, NEW = "a green seven moving left", "a red seven moving up"
STREAMING = {"chunk": 1, "window": 2, "sink": 1, "positions": "window", "context_time": 0.0}
SIZE = {"height": 16, "width": 32, "num_frames": 9, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal student of two calls per chunk, as a run saves it."""
    root = tmp_path_factory.mktemp("student")
    folder = root / "student"
    shutil.copytree(wan_folder(root), folder)
    recipe = {"ladder": [1.0, 0.6], "sampler": "renoise", "guidance": 1.0, "model": SIZE, "streaming": STREAMING}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return str(folder)


@pytest.fixture
def generate(student: str, tmp_path: Path) -> Callable[..., str]:
    def run(**options: Any) -> str:
        return run_generate(GenerateArguments(student, OLD, out=tmp_path / "a.apng", scale=1, **options))

    return run


def frames_of(path: Path) -> np.ndarray:
    """uint8 ``[T, H, W, 3]``."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_file_is_the_stream(student: str, generate: Callable[..., str], tmp_path: Path) -> None:
    summary = generate(frames=25, seed=3)
    with Streamer.load(student, seed=3).open(OLD, frames=25) as stream:
        assert np.array_equal(frames_of(tmp_path / "a.apng"), np.concatenate(list(stream)))
    assert "25 frames of 32x16 in 7 chunks" in summary
    assert "stream: chunks of 1, window 2 + sink 1, 2 calls + 1 commit per chunk, past " in summary


def test_switches(student: str, generate: Callable[..., str], tmp_path: Path, capfd: Any) -> None:
    """A switch inside a chunk waits for the next one, and the file is what a stream steered by hand is."""
    generate(frames=25, switch=(f'9:"{NEW}"', f"18:{OLD}"), on_switch="keep")
    stream, chunks = Streamer.load(student).open(OLD, frames=25), []
    while stream.frames < 25:
        if stream.frames in (9, 21):
            stream.prompt({9: NEW, 21: OLD}[stream.frames], "keep")
        chunks.append(next(stream))
    assert np.array_equal(frames_of(tmp_path / "a.apng"), np.concatenate(chunks))
    assert capfd.readouterr().err == "--switch 18: inside a chunk; its prompt holds from frame 21 on\n"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A file of 11 frames of 16x32, and its frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.apng"
    write_video(path, torch.rand(3, 11, 16, 32) * 2 - 1, 8)
    return path, frames_of(path)


def test_a_clip_is_continued(
    clip: tuple[Path, np.ndarray], student: str, generate: Callable[..., str], tmp_path: Path
) -> None:
    """The file is the stream behind the clip's first 4k + 1 frames, and a switch comes behind them."""
    path, seen = clip
    summary = generate(frames=21, image=path, switch=(f"9:{NEW}", f"14:{OLD}"), on_switch="keep")
    stream, chunks = Streamer.load(student).open(OLD, frames=21, given=seen[:9]), []
    while stream.frames < 21:
        if stream.frames in (9, 17):
            stream.prompt({9: NEW, 17: OLD}[stream.frames], "keep")
        chunks.append(next(stream))
    assert np.array_equal(frames_of(tmp_path / "a.apng"), np.concatenate(chunks))
    assert f"21 frames of 32x16 in 6 chunks, the first 9 of {path}, " in summary


def test_an_image_is_continued(
    clip: tuple[Path, np.ndarray], student: str, generate: Callable[..., str], tmp_path: Path
) -> None:
    Image.fromarray(clip[1][0]).save(tmp_path / "still.png")
    generate(frames=9, image=tmp_path / "still.png")
    stream = Streamer.load(student).open(OLD, frames=9, given=clip[1][:1])
    assert np.array_equal(frames_of(tmp_path / "a.apng"), np.concatenate(list(stream)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 9}, "it has as many frames as the video is to have, 9 or more.*raise --frames, or cut the clip"),
        (
            {"frames": 21, "switch": (f"5:{NEW}",)},
            "--switch 5: the first 9 frames are given: frame 9 is the first made",
        ),
    ],
    ids=str,
)
def test_what_is_refused_beside_a_clip(
    clip: tuple[Path, np.ndarray], generate: Callable[..., str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(image=clip[0], **options)


def test_a_cut_moves_the_chunks_behind_it(student: str, generate: Callable[..., str], tmp_path: Path) -> None:
    streamer = Streamer.load(student)
    assert chunk_starts(streamer, 25, [9, 17], restarts=True) == [0, 1, 5, 9, 10, 14, 18, 19, 23]
    assert "25 frames" in generate(frames=25, switch=(f"9:{NEW}", f"17:{OLD}"), on_switch="cut")
    assert len(frames_of(tmp_path / "a.apng")) == 25


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (f'"{NEW}"', NEW),
        (f" '{NEW}' ", NEW),
        ('a sign that says "hello"', 'a sign that says "hello"'),
        ('"hello" on a sign', '"hello" on a sign'),
        ('"hello" and "bye"', '"hello" and "bye"'),
        ("the boys'", "the boys'"),
        ('"the boys\'"', "the boys'"),
    ],
)
def test_quotes_of_a_prompt_stay_and_those_around_it_go(text: str, prompt: str) -> None:
    assert parse_switch(f"65:{text}").prompt == prompt


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_leaves_a_video_that_plays(
    student: str, tmp_path: Path, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvideo.distillation.adapters.wan_family.frames import WanFrameDecoder

    chunks, decode = [], WanFrameDecoder.__call__

    def signalled(self: Any, latents: Any) -> Any:
        chunks.append(1)
        if len(chunks) == 3:
            os.kill(os.getpid(), number)
        return decode(self, latents)

    monkeypatch.setattr(WanFrameDecoder, "__call__", signalled)
    with pytest.raises(Stopped, match=r"stopped by SIG\w+ after \d+ of 4001 frames, which .*a.mp4 holds") as stop:
        run_generate(GenerateArguments(student, OLD, out=tmp_path / "a.mp4", frames=4001, scale=4))
    assert stop.value.exit_code == code
    assert len(frames_of(tmp_path / "a.mp4")) == 1 + 4 * (len(chunks) - 1) < 1000
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 24}, "one more than a multiple of 4, such as 21 or 25, got 24"),
        ({"switch": ("4",)}, r"--switch '4': FRAME:\"PROMPT\""),
        ({"switch": ('4:""',)}, r"--switch '4:\"\"': FRAME"),
        ({"switch": (f"x:{NEW}",)}, r"--switch 'x:a red.*FRAME"),
        ({"switch": (f"0:{NEW}",)}, "--switch 0: the video begins with --prompt"),
        ({"switch": (f"9:{NEW}",)}, "--switch 9: the video has frames 0 to 8, and its last chunk begins at frame 5"),
        ({"switch": (f"2:{NEW}", f"4:{NEW}")}, "--switch 4: the chunk at frame 5 has another switch already"),
        ({"switch": (f"5:{NEW} {NEW}",)}, "prompt has 11 tokens, the text encoder takes 8"),
        ({"negative_prompt": NEW}, "--negative-prompt: guidance leads away from it, and this model runs without"),
        ({"on_switch": "cut"}, "--on-switch cut: no prompt changes: add --switch FRAME"),
        ({"window": 2, "ladder": (0.5,)}, "start from pure noise, time 1"),
        ({"image": Path("no.png")}, "image no.png does not exist"),
        ({"out": Path("/proc/nowhere/a.mp4")}, "--out /proc/nowhere/a.mp4 cannot be written"),
    ],
    ids=str,
)
def test_what_is_refused(student: str, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Before anything is written."""
    with pytest.raises(UserError, match=message):
        run_generate(GenerateArguments(student, OLD, **{"out": tmp_path / "a.mp4", **options}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"negative_prompt": NEW}, {"on_switch": "cut"}, {"image": Path("no.png")}], ids=str
)
def test_flags_are_checked_before_the_weights_are_read(student: str, tmp_path: Path, options: dict[str, Any]) -> None:
    bare = shutil.copytree(student, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=f"(--|^){next(iter(options)).replace('_', '-')}"):
        run_generate(GenerateArguments(str(bare), OLD, **{"out": tmp_path / "a.mp4", **options}))


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a"])
def test_a_folder_in_the_place_of_the_file_is_told_before_the_model_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"cannot write a video to '.*{name}': it is a folder"):
        run_generate(GenerateArguments("no/such/model", OLD, out=tmp_path / name))


def test_an_unknown_policy_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "tiny_stream", "--switch", f"5:{NEW}", "--on-switch", "recash"])
    assert "'recash' for argument '--on-switch'" in (said := capsys.readouterr().err)
    assert "'recache', 'keep', 'flush', 'cut'" in said


@pytest.mark.parametrize("options", [{"switch": ("5:a seven",)}, {"window": 3}, {"on_switch": "cut"}])
def test_a_model_of_whole_videos_has_no_switches(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is for streaming students, and the model in .* makes whole videos at once"):
        run_generate(GenerateArguments("tiny", "a seven", out=tmp_path / "a.mp4", **options))


def test_another_window_warns(student: str, generate: Callable[..., str], capfd: Any) -> None:
    with pytest.warns(UserWarning, match="trained with a window of 2, and window 4"):
        assert Streamer.load(student, window=4).reach.window == 4
    assert "window 4 + sink 1" in generate(window=4)
    assert "warning: the student was trained with a window of 2" in capfd.readouterr().err


@pytest.fixture
def of_the_world(tmp_path: Path) -> str:
    """A model of the tiny world under the sampler of a stream."""
    folder = tmp_path / "tiny"
    shutil.copytree(PIPELINE_FOLDER, folder)
    model = {"path": "tiny", "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
    recipe = {"ladder": [1.0], "sampler": "renoise", "model": model, "streaming": STREAMING}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return str(folder)


def test_a_word_that_the_tiny_world_does_not_know(student: str, of_the_world: str) -> None:
    """The message names its words, and the stream goes on."""
    assert load_model(of_the_world).is_embedded
    assert not load_model(student).is_embedded
    stream = Streamer.load(of_the_world).open(NEW)
    next(stream)
    with pytest.raises(UserError, match=r"unknown word cat\. The tiny world knows: a, an"):
        stream.prompt("a red cat")
    assert next(stream).shape == (4, 32, 32, 3)
    assert stream.prompt_in_force == NEW


def test_without_a_prompt_it_is_a_video_of_anything(of_the_world: str, tmp_path: Path) -> None:
    run_generate(GenerateArguments(of_the_world, out=tmp_path / "a.apng", scale=1, frames=5, switch=(f"1:{NEW}",)))
    assert len(frames_of(tmp_path / "a.apng")) == 5
