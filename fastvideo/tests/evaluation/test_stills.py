"""Stills, and the trial of a frame teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvideo.evaluation.stills import FrameTrial, read_stills, sharpness, shown
from fastvideo.tiny.world import TinyWorld, soften, stills

GOOD = FrameTrial(
    own=0.95,
    before=0.8,
    right=0.94,
    shuffled=0.3,
    sharpness_before=0.2,
    sharpness_right=0.8,
    sharpness_shuffled=0.8,
    frames=100,
)


def test_the_judge_reads_stills_and_half_the_resolution_hides_digits() -> None:
    sample = stills("heldout").sample(100, seed=0)
    right = (read_stills(sample.videos) == torch.stack([sample.digit, sample.colour], 1)).double().mean(dim=0)
    assert right.min() >= 0.97
    sharp, soft = (shown(videos, sample.captions) for videos in (sample.videos, soften(sample.videos)))
    assert sharp["digit"] >= 0.97
    assert soft["digit"] < 0.9
    assert soft["colour"] >= 0.97


def test_soft_videos_keep_a_fifth_of_the_sharpness() -> None:
    videos = TinyWorld("heldout").sample(64, seed=0).videos
    assert sharpness(soften(videos)) / sharpness(videos) == pytest.approx(0.21, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"own": 0.8}, "its own stills show"),
        ({"right": 0.9}, "soft frames that it denoised show it in 0.900"),
        ({"before": 0.95}, "soft frames that it denoised"),
        ({"shuffled": 0.81}, "does not go by them"),
    ],
)
def test_a_frame_teacher_is_admitted_by_what_it_shows_and_never_by_sharpness(
    change: dict[str, float], message: str | None
) -> None:
    refusal = replace(GOOD, **change).refusal
    assert refusal is None if message is None else message in str(refusal)
