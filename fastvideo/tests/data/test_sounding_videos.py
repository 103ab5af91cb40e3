"""Videos with sound as data: the part of the sound that belongs to a clip, and what is left out with its reason."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from fastvideo.data.captions import Video
from fastvideo.data.clips import Clip, Policy, Size, read_clips
from fastvideo.data.faults import VideoError
from fastvideo.data.shards import sound_of
from fastvideo.data.sound_clock import checked
from fastvideo.data.sound_io import read_sound
from fastvideo.data.video_io import write_video
from fastvideo.distillation.sound import Sound

RATE, FPS = 16_000, 24
SIZE = Size(32, 32, 9)


def tone(begin: float, end: float, seconds: float) -> Sound:
    """1 kHz from ``begin`` to ``end``, on the left alone."""
    t = torch.arange(round(seconds * RATE)) / RATE
    left = torch.where((t >= begin) & (t < end), 0.5 * torch.sin(2 * math.pi * 1000 * t), 0.0)
    return Sound(torch.stack([left, 0 * left])[None], RATE)


def video(frames: int) -> Tensor:
    """Grey."""
    return torch.zeros(3, frames, 32, 32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 frames; sound from 0.5 to 1.0 s."""
    return write_video(tmp_path_factory.mktemp("sound") / "a.mp4", video(36), FPS, sound=tone(0.5, 1.0, 1.5))


def loud(sound: Sound) -> tuple[float, float]:
    """First and last second of what is loud on the left."""
    place = (sound.waveform[0, 0].abs() > 0.25).nonzero()
    return place[0].item() / RATE, place[-1].item() / RATE


def test_a_part_of_the_sound_is_the_one_that_is_heard_at_that_time(file: Path) -> None:
    for start in (0.0, 0.25, 0.4):
        found = read_sound(file, start, 1.0, RATE, 2)
        assert found.waveform.shape == (1, 2, RATE)
        assert loud(found) == pytest.approx((0.5 - start, 1.0 - start), abs=2e-3)
        assert found.waveform[0, 1].abs().max() < 0.05
    assert read_sound(file, 0.0, 1.0, 8000, 1).waveform.shape == (1, 1, 8000)


def test_every_clip_has_its_own_sound(file: Path) -> None:
    clips = list(read_clips(file, Policy((SIZE,), every_clip=True)))
    assert [clip.start for clip in clips] == pytest.approx([0.0, 0.375, 0.75, 1.125])
    sounds = [sound_of(clip, Video(file, "a", ""), FPS, (RATE, 2)) for clip in clips]
    assert {sound.waveform.shape for sound in sounds} == {(1, 2, 6000)}
    assert [loud(sounds[i]) for i in (1, 2)] == [pytest.approx(at, abs=2e-3) for at in ((0.125, 0.375), (0.0, 0.25))]
    assert all(sounds[i].waveform.abs().max() < 0.05 for i in (0, 3))


def test_clips_at_another_frame_rate_begin_where_they_are_shown(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", video(60), 30, sound=tone(0.0, 1.0, 2.0))
    clips = list(read_clips(path, Policy((SIZE,), fps=FPS, every_clip=True)))
    assert [clip.start for clip in clips] == pytest.approx([0.375 * i for i in range(5)])


def reason(clip: Clip, path: Path) -> str:
    with pytest.raises(VideoError) as found:
        sound_of(clip, Video(path, "a", ""), FPS, (RATE, 2))
    return str(found.value)


def test_what_has_no_sound_that_fits_is_left_out_with_its_reason(file: Path, tmp_path: Path) -> None:
    (clip,) = read_clips(file, Policy((SIZE,)))
    silent = write_video(tmp_path / "silent.mp4", video(12), FPS)
    assert reason(next(read_clips(silent, Policy((SIZE,)))), silent) == "no sound"
    short = write_video(tmp_path / "short.mp4", video(36), FPS, sound=tone(0.0, 0.1, 0.2))
    assert reason(next(read_clips(short, Policy((SIZE,)))), short).endswith("s of a clip of 0.38 s")
    slow = Clip(clip.frames, 12.0, 0, start=0.0)
    assert reason(slow, file) == "12 frames per second, and the model's videos have 24: --fps 24"
    assert reason(replace(slow, fps=25.0), file).startswith("25 frames per second")
    assert reason(replace(clip, start=None), file).startswith("its clock jumps before this clip")
    assert reason(Clip(clip.frames[:1], FPS, 0, still=True), file).startswith("an image has no sound")


def test_a_rate_of_23_976_is_taken_for_24_and_its_sound_is_as_long_as_the_models(file: Path) -> None:
    clip = Clip(np.zeros((9, 32, 32, 3), np.uint8), 24_000 / 1001, 0, start=0.0)
    assert sound_of(clip, Video(file, "a", ""), FPS, (RATE, 2)).waveform.shape == (1, 2, 6000)  # not 6006


def stored(path: Path, layout: str, rate: int) -> bytes:
    """A second of sound as AAC packets that can be put one behind another."""
    with av.open(str(path), "w", format="adts") as container:
        stream = container.add_stream("aac", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.full((stream.layout.nb_channels, rate), 0.1, np.float32), format="fltp", layout=layout
        )
        frame.sample_rate, frame.pts = rate, 0
        for one in (frame, None):
            container.mux(stream.encode(one))
    return path.read_bytes()


@pytest.mark.parametrize(("layout", "rate"), [("mono", RATE), ("stereo", 24_000)])
def test_a_sound_that_changes_its_channels_or_rate_is_left_out(layout: str, rate: int, tmp_path: Path) -> None:
    path = tmp_path / "a.aac"
    path.write_bytes(stored(path, "stereo", RATE) + stored(tmp_path / "b.aac", layout, rate))
    with pytest.raises(VideoError, match=rf"its sound changes from stereo, 16000 Hz, fltp to {layout}, {rate} Hz"):
        read_sound(path, 0.0, 1.5, RATE, 2)
    assert read_sound(path, 0.0, 0.8, RATE, 2).waveform.shape == (1, 2, 12_800)


def test_a_sound_without_times_is_left_out() -> None:
    frame = av.AudioFrame.from_ndarray(np.zeros((2, 8), np.float32), format="fltp", layout="stereo")
    with pytest.raises(VideoError, match="its sound has no clock"):
        next(checked([frame]))


def seconds_of_sound(path: Path, *parts: tuple[float, float]) -> Path:
    """A second of 1 kHz for each beginning and loudness, on one clock."""
    t = torch.arange(RATE) / RATE
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for begin, size in parts:
            samples = (size * torch.sin(2 * math.pi * 1000 * t) * 32767).short().numpy()[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, round(begin * RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_what_comes_behind_a_gap_of_the_clock_is_heard_at_its_time(tmp_path: Path) -> None:
    """A second of silence, none of a tone that begins at 1.5 s, and the tone."""
    path = seconds_of_sound(tmp_path / "a.mkv", (0.0, 0.0), (1.5, 0.5))
    with pytest.raises(VideoError, match=r"its sound covers 2\.00 s of a clip of 2\.50 s"):
        read_sound(path, 0.0, 2.5, RATE, 2)
    assert loud(read_sound(path, 1.45, 1.0, RATE, 2)) == pytest.approx((0.05, 1.0), abs=2e-3)


def test_times_count_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    """As those of its pictures do; its clock begins at five seconds."""
    path = seconds_of_sound(tmp_path / "a.mkv", (5.0, 0.0), (6.0, 0.5))
    assert loud(read_sound(path, 0.5, 1.0, RATE, 2)) == pytest.approx((0.5, 1.0), abs=2e-3)
