"""The shipped streaming VAE holds for videos of four times the length that it was first trained on."""

from __future__ import annotations

import pytest

from fastvideo.evaluation.streams.reconstruction import codec_goals
from fastvideo.inference.loading import open_model


@pytest.mark.slow
def test_the_vae_is_as_good_at_the_end_of_a_long_video_as_at_its_start() -> None:
    """At least 34 dB in every block, flat within 0.5 dB, and the digit of 0.95 readable in every window."""
    goals = list(codec_goals(open_model("tiny_stream", {"num_frames": 129}).adapter.codec, 129, videos=128))
    assert [goal.name for goal in goals] == ["vae_psnr", "vae_psnr_spread", "vae_digit"]
    assert all(goal.met for goal in goals), goals
