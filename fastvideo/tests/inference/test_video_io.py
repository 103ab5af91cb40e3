"""Videos survive the round trip through every format that can be written."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from fastvideo.data.video_io import FORMATS, video_bytes, video_format, write_video
from fastvideo.distillation.types import UserError


def moving_square(height: int = 32, width: int = 32, frames: int = 5) -> torch.Tensor:
    """A coloured square that moves to the right over black: ``[3, T, H, W]`` in ``[-1, 1]``."""
    video = -torch.ones(3, frames, height, width)
    for t in range(frames):
        video[0, t, 8:16, 4 + 2 * t : 12 + 2 * t] = 1.0
        video[1, t, 8:16, 4 + 2 * t : 12 + 2 * t] = 0.2
    return video


def decode(data: bytes) -> np.ndarray:
    """uint8 ``[T, H, W, 3]``."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def expected(video: torch.Tensor, scale: int = 1) -> np.ndarray:
    frames = ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    return frames.repeat(scale, 1).repeat(scale, 2)


@pytest.mark.parametrize(("suffix", "mean_error"), [(".apng", 0.0), (".gif", 0.0), (".mp4", 3.0)])
def test_round_trip(suffix: str, mean_error: float) -> None:
    video = moving_square()
    decoded = decode(video_bytes(video, suffix, scale=4)).astype(int)
    assert decoded.shape == (5, 128, 128, 3)
    assert np.abs(decoded - expected(video, 4)).mean() <= mean_error


def test_webp_is_an_animation_that_loops() -> None:
    data = video_bytes(moving_square(), ".webp")
    assert data[:4] == b"RIFF"
    assert data[8:12] == b"WEBP"
    assert data.count(b"ANMF") == 5
    assert data[data.index(b"ANIM") + 12 :][:2] == b"\0\0"  # loop count 0 is for ever


def test_frame_rate_is_kept() -> None:
    with av.open(io.BytesIO(video_bytes(moving_square(), ".mp4", fps=5))) as container:
        assert container.streams.video[0].average_rate == 5


def test_odd_sizes_are_padded_for_mp4_only() -> None:
    video = moving_square(height=31, width=33)
    assert decode(video_bytes(video, ".mp4")).shape[1:3] == (32, 34)
    assert decode(video_bytes(video, ".apng")).shape[1:3] == (31, 33)


def test_values_outside_the_range_are_clamped() -> None:
    video = torch.full((3, 1, 16, 16), 7.0)
    assert decode(video_bytes(video, ".apng")).min() == 255


def test_write_is_atomic_and_makes_the_folder(tmp_path: Path) -> None:
    path = write_video(tmp_path / "new" / "seven.mp4", moving_square())
    assert [p.name for p in path.parent.iterdir()] == ["seven.mp4"]


def test_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"seven\.avi.*\.mp4, \.gif, \.webp, \.apng"):
        write_video(tmp_path / "seven.avi", moving_square())
    assert not list(tmp_path.iterdir())


def test_not_a_video() -> None:
    with pytest.raises(ValueError, match=r"\[3, T, H, W\]"):
        video_bytes(torch.zeros(4, 3, 2, 2))


@pytest.mark.parametrize("suffix", FORMATS)
def test_suffixes_ignore_case(suffix: str) -> None:
    assert video_format(f"A{suffix.upper()}") is FORMATS[suffix]
