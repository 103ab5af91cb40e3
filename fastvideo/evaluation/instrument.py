"""The frozen teacher as an instrument: its features of a video, and its denoising error of a video under a prompt.

Both need no other network, so they work for every family, resolution and prompt that the teacher knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.features import features, widths_of
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.rng import mixed
from fastvideo.distillation.sample import SampleNoise
from fastvideo.errors import UserError
from fastvideo.inference.loading import LoadedModel

FEATURE_TIMES = (0.1, 0.3)
"""Noise levels of the features: detail and layout."""
MATCH_TIMES = (0.5, 0.7)
"""Noise levels at which prompts are told apart: content is decided there."""
DISTRACTORS = 4
"""Other prompts that a video's own prompt competes with."""
_STREAM = 7_919
"""Keeps the instrument's noise apart from that of sampling."""


class Instrument:
    """A teacher that looks at videos in its own latent space; the same noise for the same ``seed``, whoever made them.

    Args:
        model: the teacher.

    Raises:
        UserError: for a family without features.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.adapter, self.denoiser = model.adapter, model.denoiser
        self.taps = taps_of(model.adapter)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Noise ``[B, C, F, H, W]`` of each sample."""
        streams = [mixed(seed, _STREAM) for seed in seeds]
        return SampleNoise(streams, self.adapter.device).draw(self.adapter.codec.latent_shape)

    @torch.no_grad()
    def features(self, latents: Tensor, seeds: Sequence[int]) -> Tensor:
        """Mean over the tokens of each tap at each time, without a prompt: float32 ``[B, S, D]``.

        ``S`` spaces: one per time and tap.
        """
        latents = latents.to(self.adapter.device)
        noise, empty = self.noise(seeds), self.adapter.conditioner.encode_prompts([""] * len(latents))
        found = []
        for time in FEATURE_TIMES:
            t = torch.full((len(latents),), time, device=latents.device)
            tokens = features(self.denoiser, add_noise(latents, noise, t), t, empty, self.taps)
            found += [one.float().mean(1) for one in tokens]
        return torch.stack(found, 1).cpu()

    @torch.no_grad()
    def errors(self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Mean squared error of the velocity under each prompt, over :data:`MATCH_TIMES`: float32 ``[B]``."""
        latents = latents.to(self.adapter.device)
        noise, condition = self.noise(seeds), self.adapter.conditioner.encode_prompts(prompts)
        errors = []
        for time in MATCH_TIMES:
            t = torch.full((len(latents),), time, device=latents.device)
            missed = self.denoiser.velocity(add_noise(latents, noise, t), t, condition) - (noise - latents)
            errors.append(missed.square().flatten(1).mean(1))
        return torch.stack(errors, 1).mean(1).cpu()


def taps_of(adapter: DistillAdapter[Any]) -> list[int]:
    """The middle and the last block of a family's network.

    Raises:
        UserError: for a family without features.
    """
    blocks = len(widths_of(adapter))
    if not blocks:
        raise UserError(f"{type(adapter).__name__} has no features of its blocks: it cannot judge videos")
    return sorted({blocks // 2, blocks - 1})


def distractors(prompts: Sequence[str], most: int = DISTRACTORS) -> list[list[str]]:
    """Other prompts to tell each prompt from, drawn by its text: fewer than ``most`` where there are fewer.

    Raises:
        UserError: if all prompts are the same.
    """
    distinct = sorted(set(prompts))
    if len(distinct) < 2:
        raise UserError("prompt_match tells different prompts apart: give two or more, or leave it out of --metrics")
    return [_others(distinct, prompt, min(most, len(distinct) - 1)) for prompt in prompts]


def _others(distinct: Sequence[str], prompt: str, count: int) -> list[str]:
    rest = [one for one in distinct if one != prompt]
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
    return [rest[i] for i in np.random.default_rng(seed).choice(len(rest), count, replace=False)]
