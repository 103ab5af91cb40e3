"""Stills of the tiny world: read by its judge, and the trial of a frame teacher before it trains anything.

A frame teacher that is not good enough makes frames sharper and destroys what they show, so sharpness says nothing. The
trial takes frames that are worse than the teacher's own, noises them and lets it denoise them: what they show must then
be read better, and only with the right captions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.frame_bridge import figures_of
from fastvideo.distillation.noise import add_noise, full_time
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.evaluation.judge import frozen_classifier
from fastvideo.evaluation.metrics import ATTRIBUTES, correctness, named_attributes
from fastvideo.inference.loading import LoadedModel
from fastvideo.inference.sampler import Sampling, sample_latents
from fastvideo.tiny.world import FRAMES, Split, TinyWorld, WorldSample, soften

BATCH = 64
TRIAL_TIME, TRIAL_STEPS, TRIAL_GUIDANCE = 0.35, 7, 4.0
"""Noise level of the trial, the steps of the way back, and their guidance: the best of 2, 3, 4 on train."""
OWN_DIGIT, RESTORED_DIGIT = 0.90, 0.92
"""Shares of digits read right that admit a frame teacher: of its own samples, and of the frames that it denoised."""


def read_stills(stills: Tensor) -> Tensor:
    """The judge's digit and colour of each still ``[N, 3, 1, 32, 32]``: int64 ``[N, 2]``, of a video that stands."""
    videos = stills.expand(-1, -1, FRAMES, -1, -1)
    return torch.cat([frozen_classifier().read(part)[:, :2] for part in videos.split(BATCH)])


def sharpness(videos: Tensor) -> float:
    """Mean squared Laplacian of videos ``[N, 3, T, H, W]``."""
    return float(figures_of(videos)["sharpness"])


def shown(stills: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Shares of the named digits and colours that the judge reads in the stills."""
    named = named_attributes(captions)[:, :2]
    right = correctness(read_stills(stills), named).nanmean(dim=0).tolist()
    return dict(zip(ATTRIBUTES[:2], right, strict=True))


@torch.no_grad()
def sampled_stills(model: LoadedModel, prompts: Sequence[str], sampler: SamplerSpec, seed: int = 0) -> Tensor:
    """A model's stills ``[N, 3, 1, 32, 32]`` in ``[-1, 1]``, one per prompt."""
    latents = sample_latents(model.adapter, model.denoiser, Sampling(prompts, sampler, seed))
    return torch.cat([model.adapter.codec.decode(part) for part in latents.split(BATCH)]).clamp(-1, 1)


class Noised(SampleNoise):
    """Starting points of a sampler that are given samples ``[B, C, F, H, W]``, noised to ``time``."""

    def __init__(self, x0: Tensor, time: float, seeds: Sequence[int]) -> None:
        super().__init__(seeds, x0.device)
        self.x0, self.time = x0, time

    def draw(self, shape: Sequence[int]) -> Tensor:
        x_t = add_noise(self.x0, super().draw(shape), full_time(self.x0, self.time))
        return x_t / math.hypot(1 - self.time, self.time)  # a sampler that starts below t = 1 scales it back


@torch.no_grad()
def denoised(model: LoadedModel, stills: Tensor, captions: Sequence[str], time: float, guidance: float) -> Tensor:
    """Stills ``[N, 3, 1, 32, 32]`` noised to ``time`` and denoised under the captions by the model's guided flow."""
    codec, texts, parts = model.adapter.codec, model.adapter.conditioner, []
    sampler = SamplerSpec.teacher(tuple(time * (1 - step / TRIAL_STEPS) for step in range(TRIAL_STEPS)), guidance)
    for start in range(0, len(stills), BATCH):
        x0, names = codec.encode(stills[start : start + BATCH]), captions[start : start + BATCH]
        condition, negative = (texts.encode_prompts(each) for each in (names, [texts.negative_prompt] * len(names)))
        noise = Noised(x0, time, range(start, start + len(names)))
        parts.append(codec.decode(sample(model.denoiser, noise, codec.latent_shape, sampler, condition, negative)))
    return torch.cat(parts).clamp(-1, 1)


@dataclass(frozen=True)
class FrameTrial:
    """Shares of digits that the judge reads right, and sharpness beside that of sharp stills.

    Attributes:
        own: in the teacher's own samples.
        before: in the soft frames.
        right, shuffled: in the soft frames after noise and denoising under their own captions, and under others'.
    """

    own: float
    before: float
    right: float
    shuffled: float
    sharpness_before: float
    sharpness_right: float
    sharpness_shuffled: float
    frames: int
    time: float = TRIAL_TIME
    guidance: float = TRIAL_GUIDANCE

    @property
    def refusal(self) -> str | None:
        """The reason for which the teacher is not admitted; ``None`` if it is."""
        if self.own < OWN_DIGIT:
            return f"its own stills show the named digit in {self.own:.3f} of cases, {OWN_DIGIT} is expected"
        if self.right < max(RESTORED_DIGIT, self.before):
            return f"soft frames that it denoised show it in {self.right:.3f} of cases, {RESTORED_DIGIT} is expected"
        if self.shuffled > self.before:
            return "it makes digits readable under other captions too, so it does not go by them"
        return None

    def __str__(self) -> str:
        return (
            f"its own stills show the named digit in {self.own:.3f} of cases, soft frames in {self.before:.3f}; after "
            f"noise to t = {self.time:g} and its denoising in {self.right:.3f} under their own captions, and "
            f"{self.shuffled:.3f} under others' (sharpness {self.sharpness_before:.3f}, {self.sharpness_right:.3f}, "
            f"{self.sharpness_shuffled:.3f} of sharp stills')"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "refusal": self.refusal}


def try_frame_teacher(model: LoadedModel, count: int, split: Split, seed: int = 0) -> FrameTrial:
    """Try a frame teacher of the tiny world on first frames of ``count`` soft videos whose captions name their digit.

    Args:
        split: ``train`` to decide by, ``heldout`` to report.
    """
    truth = _naming_digits(count, split, seed)
    sharp = truth.videos[:, :, :1]
    soft, captions = soften(sharp), truth.captions
    moved = [*captions[1:], captions[0]]
    right = denoised(model, soft, captions, TRIAL_TIME, TRIAL_GUIDANCE)
    shuffled = denoised(model, soft, moved, TRIAL_TIME, TRIAL_GUIDANCE)
    scale = sharpness(sharp)
    return FrameTrial(
        own=shown(sampled_stills(model, captions, model.sampler()), captions)["digit"],
        before=shown(soft, captions)["digit"],
        right=shown(right, captions)["digit"],
        shuffled=shown(shuffled, captions)["digit"],
        sharpness_before=sharpness(soft) / scale,
        sharpness_right=sharpness(right) / scale,
        sharpness_shuffled=sharpness(shuffled) / scale,
        frames=len(captions),
    )


def _naming_digits(count: int, split: Split, seed: int) -> WorldSample:
    drawn = TinyWorld(split).sample(2 * count, seed)
    rows = drawn.named[:, 0].nonzero().flatten()[:count]
    return WorldSample(
        drawn.videos[rows],
        [drawn.captions[row] for row in rows.tolist()],
        *(value[rows] for value in (drawn.digit, drawn.colour, drawn.direction, drawn.named, drawn.look)),
    )
