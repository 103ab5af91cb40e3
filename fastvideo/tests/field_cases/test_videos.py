"""Files that people brought: each once came out wrong without a word; what is right stands here."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastvideo.cli import main
from fastvideo.data.clips import Policy, Size, read_clips

INPUTS = Path(__file__).parent / "inputs"
BARS = np.array([(191, 191, 191), (191, 191, 0), (0, 191, 191), (0, 191, 0), (191, 0, 191), (191, 0, 0), (0, 0, 191)])
"""Colour bars at 75 %: grey, yellow, cyan, green, magenta, red, blue."""
MIDDLES = [6, 20, 34, 48, 61, 75, 89]


def first(name: str, height: int = 64, width: int = 96, frames: int = 9, fps: float | None = None) -> np.ndarray:
    policy = Policy((Size(height, width, frames),), fit="stretch", fps=fps)
    return next(read_clips(INPUTS / name, policy)).frames.astype(int)


@pytest.mark.parametrize(("name", "fps"), [("own16.mkv", 16.0), ("own24.webm", 24.0)])
def test_a_clock_of_milliseconds_gives_every_frame_once(name: str, fps: float) -> None:
    """Frame i is a flat grey of 7 i."""
    frames = first(f"fps-millisecond-clock/{name}", 32, 32, 17, fps)
    assert [round(float(frame.mean()) / 7) for frame in frames] == list(range(17))


def test_one_late_frame_makes_no_clips() -> None:
    """32 frames of 16 per second, the last two hours late: 16 at 8 per second, so one clip of 9."""
    policy = Policy((Size(32, 32, 9),), fps=8.0, every_clip=True)
    assert len(list(read_clips(INPUTS / "gap-every-clip/gap.mkv", policy))) == 1


def test_mirrored_videos_are_shown_mirrored() -> None:
    folder = "mirrored-display-matrix"
    base = first(f"{folder}/base.mp4")
    np.testing.assert_array_equal(first(f"{folder}/hflip.mp4"), base[:, :, ::-1])
    np.testing.assert_array_equal(first(f"{folder}/vflip.mp4"), base[:, ::-1])


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("hdr-video/hdr_pq.mp4", 24),
        ("hdr-video/hdr_hlg.mp4", 10),
        ("bt709-with-allowed-pyav/bt709.mp4", 8),
        ("bt709-with-allowed-pyav/bt709_full_range.mp4", 8),
    ],
)
def test_colour_bars_have_their_colours(name: str, most: int) -> None:
    assert np.abs(first(name)[0, 10, MIDDLES] - BARS).max() <= most


def test_combs_are_gone() -> None:
    def comb(frames: np.ndarray) -> float:
        lines = frames.astype(float)
        return float(np.abs(lines[:, 1:-1] - (lines[:, :-2] + lines[:, 2:]) / 2).mean())

    name = "interlaced-and-alpha/interlaced.mp4"
    with av.open(str(INPUTS / name)) as container:
        raw = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert comb(first(name, frames=49)) < 0.85 * comb(raw)


def test_what_is_transparent_is_black_and_hides_its_colour() -> None:
    frames = first("interlaced-and-alpha/alpha.webm")
    assert frames[:, :, :40].max() <= 8
    assert frames[:, :, 56:].max() > 200


def test_images_are_data_among_videos(tmp_path: Path) -> None:
    """In one folder, named in its caption file: F = 1 for the image, and a bucket of its own."""
    shutil.copy(INPUTS / "mirrored-display-matrix/base.mp4", tmp_path / "v.mp4")
    Image.new("RGB", (96, 64), "red").save(tmp_path / "i.png")
    (tmp_path / "captions.csv").write_text("file_name,caption\ni.png,a red one\nv.mp4,a red one\n")
    assert main(["preprocess", str(tmp_path), "--model", "tiny", "--out", str(tmp_path / "out")]) == 0
    rows = pq.read_table(tmp_path / "out/videos-00000.parquet").to_pylist()
    assert {(row["media_type"], row["vae_latent_shape"][1]) for row in rows} == {("image", 1), ("video", 3)}
