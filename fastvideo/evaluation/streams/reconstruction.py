"""Reconstruction of long videos by a codec: its quality along the stream, and the content that is still read."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvideo.distillation.adapters.base import Codec
from fastvideo.evaluation.streams.goals import Goal
from fastvideo.evaluation.streams.motion import window_starts
from fastvideo.evaluation.streams.observer import observe_streams
from fastvideo.evaluation.streams.world import STRIDE
from fastvideo.tiny.world import torus

BLOCK = 16
"""Frames between two readings of the reconstruction's quality."""
BATCH, SEED = 8, 0


def psnr(reconstruction: Tensor, videos: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of the mean squared error over all pixels; both in [-1, 1] (peak to peak 2)."""
    error = (reconstruction - videos).square().mean().item()
    return 10.0 * math.log10(4.0 / error)


def psnr_by_block(reconstruction: Tensor, videos: Tensor) -> list[float]:
    """:func:`psnr` of each block of :data:`BLOCK` frames of ``[N, 3, T, H, W]``; the last one may be shorter."""
    pairs = zip(reconstruction.split(BLOCK, dim=2), videos.split(BLOCK, dim=2), strict=True)
    return [psnr(*pair) for pair in pairs]


@torch.no_grad()
def codec_goals(codec: Codec, frames: int, videos: int) -> Iterator[Goal]:
    """Goals of a codec on held-out videos: its worst block, how far the best is above it, the worst window's digits."""
    sample = torus("heldout", frames).sample(videos, seed=SEED)
    decoded = torch.cat([codec.decode(codec.encode(part)).clamp(-1, 1) for part in sample.videos.split(BATCH)])
    whole = frames - frames % BLOCK
    blocks = psnr_by_block(decoded[:, :, :whole], sample.videos[:, :, :whole])
    yield Goal("vae_psnr", min(blocks), 34.0)
    yield Goal("vae_psnr_spread", max(blocks) - min(blocks), highest=0.5)
    seen = observe_streams(decoded, window_starts(frames, stride=STRIDE))
    right = (seen.read[:, :, 0] == sample.digit[:, None]).double().mean(0)
    yield Goal("vae_digit", float(right.min()), 0.95)
