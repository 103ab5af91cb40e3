"""Figures of videos that show a failing distillation earlier than its loss.

Motion and diversity are relative to contrast, so that a pale student does not also count as still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.evaluation.alarms import FAINT

LUMINANCE = (0.299, 0.587, 0.114)
LONG = 17
"""Frames of a video that has a course: its last quarter is compared with its first."""


def measure(videos: Tensor, latents: Tensor | None = None, block: int = 8) -> dict[str, float]:
    """Measure videos.

    Args:
        videos: ``[P, S, 3, T, H, W]`` in ``[-1, 1]``: ``S`` seeds of each of ``P`` prompts.
        latents: ``[P, S, C, F, H, W]``, normalised.
        block: pixels between the borders at which a codec or a patch shows.

    Returns:
        ``brightness`` and ``saturation`` (chroma without a common tint) in [0, 1]; ``contrast``: spread of luminance
        within a frame; ``red``, ``green``, ``blue``: mean deviation from grey; ``motion`` and ``diversity``: difference
        between neighbouring frames, and between seeds of a prompt, over contrast; ``late_motion`` and
        ``late_brightness``: ratios of a long video's last quarter to its first; ``grid``: steepness of block borders
        over the rest; ``latent_mean``, ``latent_std``. Undefined figures are absent.
    """
    x = (videos.float().clamp(-1, 1) + 1) / 2
    light = torch.einsum("pscthw,c->psthw", x, x.new_tensor(LUMINANCE))
    contrast = light.std(dim=(-2, -1)).mean()
    scale = contrast.clamp_min(FAINT)
    tint = (x - light.unsqueeze(2)).mean(dim=(0, 1, 3, 4, 5))
    plain = x - tint.view(3, 1, 1, 1)
    found = {
        "brightness": light.mean(),
        "contrast": contrast,
        "saturation": (plain.amax(2) - plain.amin(2)).mean(),
        **dict(zip(("red", "green", "blue"), tint, strict=True)),
    }
    if light.shape[2] > 1:
        found["motion"] = light.diff(dim=2).abs().mean() / scale
    if light.shape[2] >= LONG:
        found |= _late(light)
    if x.shape[1] > 1:
        found["diversity"] = _between_seeds(x) / scale
    if 1 < block < min(light.shape[-2:]):
        found["grid"] = (_borders(light, block) + _borders(light.transpose(-1, -2), block)) / 2
    if latents is not None:
        found |= {"latent_mean": latents.float().mean(), "latent_std": latents.float().std()}
    return {name: float(value) for name, value in found.items()}


def _late(light: Tensor) -> dict[str, Tensor]:
    """Motion and brightness of the last quarter over those of the first; without what is not there at first."""
    quarter = light.shape[2] // 4
    ends = light[:, :, :quarter], light[:, :, -quarter:]
    motion = [end.diff(dim=2).abs().mean() / end.std(dim=(-2, -1)).mean().clamp_min(FAINT) for end in ends]
    brightness = [end.mean() for end in ends]
    pairs = {"late_motion": motion, "late_brightness": brightness}
    return {name: late / first for name, (first, late) in pairs.items() if first > FAINT}


def _between_seeds(x: Tensor) -> Tensor:
    """Mean absolute difference between two seeds of a prompt."""
    seeds = x.shape[1]
    pairs = [(x[:, i] - x[:, j]).abs().mean() for i in range(seeds) for j in range(i)]
    return torch.stack(pairs).mean()


def _borders(light: Tensor, block: int) -> Tensor:
    """Mean step across block borders over the mean step elsewhere, along the last dimension."""
    steps = light.diff(dim=-1).abs().mean(dim=tuple(range(light.ndim - 1)))
    border = torch.arange(1, light.shape[-1]) % block == 0
    return steps[border].mean() / steps[~border].mean().clamp_min(FAINT / 10)
