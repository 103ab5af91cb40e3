"""From video files to clips: containers, sizes, frame rates, rotation, and what cannot be decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastvideo.data.clips import Clip, Policy, Size, nearest_sizes, read_clips
from fastvideo.data.faults import VideoError
from fastvideo.errors import UserError
from fastvideo.tests.data.conftest import CODECS, write_clip

SIZE = Size(16, 32, 5)


def clips(path: Path, **options: object) -> list[Clip]:
    return list(read_clips(path, Policy((SIZE,), **options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", CODECS)
def test_every_container_gives_its_frames_in_order(suffix: str, tmp_path: Path) -> None:
    (clip,) = clips(write_clip(tmp_path / f"a{suffix}"))
    assert clip.frames.shape == (5, 16, 32, 3)
    brightness = clip.frames[:, :, 20:].mean(axis=(1, 2, 3))
    assert (np.diff(brightness) > 20).all()
    left, right = clip.frames[-1, :, :12].mean(axis=(0, 1)), clip.frames[-1, :, 20:].mean(axis=(0, 1))
    assert left[0] > 150 > 60 > left[2]
    assert right.min() > 150


def test_a_tensor_is_channels_first_between_minus_one_and_one(tmp_path: Path) -> None:
    (clip,) = clips(write_clip(tmp_path / "a.mp4"))
    assert clip.tensor.shape == (3, 5, 16, 32)
    np.testing.assert_allclose(clip.tensor[0, 4, 3].numpy(), clip.frames[4, 3, :, 0] / 127.5 - 1, atol=1e-6)


def test_crop_cuts_both_sides_pad_keeps_all_stretch_distorts(tmp_path: Path) -> None:
    """A square video, red on the left, at 16 x 32."""
    path = write_clip(tmp_path / "a.mp4", size=(32, 32))
    crop, pad, stretch = (clips(path, fit=fit)[0].frames[-1] for fit in ("crop", "pad", "stretch"))
    assert pad[:, :7].max() < 8 > pad[:, -7:].max()
    assert pad[8, 10, 0] > 150
    for full in (crop, stretch):
        assert full[8, 2, 0] > 150 > 60 > full[8, 2, 2]
        assert full[8, -3].min() > 150


def test_crop_of_a_wide_video_is_its_middle(tmp_path: Path) -> None:
    """The boundary between red and white stays in the middle, and nothing is distorted."""
    frame = clips(write_clip(tmp_path / "a.mp4", size=(16, 96)))[0].frames[-1]
    assert frame[8, 12, 2] < 90
    assert frame[8, 20, 2] > 150


def test_a_rotated_phone_video_stands_upright(tmp_path: Path) -> None:
    """The rotation is patched into the track header, as phones write it: what was left is shown at the top."""
    path = write_clip(tmp_path / "a.mp4", size=(32, 16))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    clockwise = (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in clockwise)
    path.write_bytes(data)
    frame = clips(path)[0].frames[-1]
    assert frame.shape == (16, 32, 3)
    assert frame[2, 16, 2] < 90
    assert frame[13, 16].min() > 150


def test_a_lower_frame_rate_drops_frames_and_a_higher_one_repeats_them(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", frames=10, fps=8)
    native = clips(path)[0].frames
    half, double = clips(path, fps=4.0)[0], clips(path, fps=16.0)[0]
    assert (half.fps, double.fps) == (4.0, 16.0)
    np.testing.assert_array_equal(half.frames[:2], native[[0, 2]])
    np.testing.assert_array_equal(double.frames, native[[0, 0, 1, 1, 2]])


def test_every_clip_cuts_the_whole_video_into_whole_clips(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", frames=13)
    found = clips(path, every_clip=True)
    assert [clip.number for clip in found] == [0, 1]
    np.testing.assert_array_equal(found[0].frames, clips(path)[0].frames)
    assert found[1].frames.mean() > found[0].frames.mean()


def test_the_nearest_aspect_ratio_and_the_longest_that_fits(tmp_path: Path) -> None:
    sizes = (Size(16, 32, 5), Size(32, 16, 5), Size(16, 32, 9), Size(16, 32, 13))
    policy = Policy(sizes)
    assert [str(size) for size in nearest_sizes(sizes, 0.4)] == ["32x16x5"]
    (wide,) = read_clips(write_clip(tmp_path / "wide.mp4", frames=12), policy)
    (tall,) = read_clips(write_clip(tmp_path / "tall.mp4", frames=12, size=(48, 24)), policy)
    assert (wide.frames.shape, tall.frames.shape) == ((9, 16, 32, 3), (5, 32, 16, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (lambda path: path.write_bytes(b"this is no video" * 50), "cannot be decoded"),
        (lambda path: path.write_bytes(write_clip(path).read_bytes()[:300]), "cannot be decoded"),
        (lambda path: write_clip(path, frames=3), "too short: 3 frames, 5 are needed"),
    ],
    ids=["empty", "garbage", "truncated", "short"],
)
def test_a_bad_file_says_why(make: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.mp4"
    make(path)  # type: ignore[operator]
    with pytest.raises(VideoError, match=message):
        clips(path)


def test_a_file_with_sound_alone_has_no_video_stream(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        clips(path)


@pytest.mark.parametrize("text", ["480x832", "axbxc", "0x16x5", "480,832,81"])
def test_a_bucket_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="HEIGHTxWIDTHxFRAMES"):
        Size.parse(text)
