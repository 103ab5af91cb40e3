"""SFT: flow-matching fine-tuning (Flow Matching arXiv 2210.02747; time densities and shift from arXiv 2403.03206).

The smallest complete method, and the one that makes teachers: read it first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastvideo.distillation.caption_dropout import without_captions
from fastvideo.distillation.chunks import Context
from fastvideo.distillation.config.base import MethodConfig, OptimizerConfig, OptimizerOptions, TimeRange
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.noise import add_noise, expand_time, shift_time, velocity_target
from fastvideo.distillation.types import Batch, Condition, RoleLoss
from fastvideo.ranges import Fraction, LearningRate, NonNegativeFloat, Number, PositiveFloat


class SFTConfig(MethodConfig, OptimizerOptions):
    """Options of SFT."""

    time_density: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """Density of the training times before the shift; `mode` is heavier in the middle and does not vanish at the ends
    (Stable Diffusion 3, eq. 20)."""
    logit_mean: Number = 0.0
    """Mean of `logit(t)` for `logit_normal`; above 0 favours noise, below 0 data. A shift S adds ln S to it."""
    logit_std: PositiveFloat = 1.0
    """Standard deviation of `logit(t)` for `logit_normal`."""
    mode_scale: float = Field(default=1.29, ge=-1.0, le=1.75)
    """Scale of `mode`; 0 is uniform, above 0 favours the middle. Outside -1 to 1.75 it is not a density."""
    time_shift: PositiveFloat = 3.0
    """Shift of the training times: 3 for Wan at 480p, 5 at 720p."""
    time_range: TimeRange = (0.001, 0.999)
    """Range to which times are clamped after the shift."""
    weighting: Literal["none", "gaussian", "beta08", "min_snr"] = "none"
    """Weight of a sample's loss at its time. `gaussian`: a bump in the middle, for uniform times; `beta08`:
    t sqrt(1 - t) (AnyFlow); both have mean 1 over uniform times. `min_snr`: the loss in x0 weighted min(SNR, gamma)."""
    min_snr_gamma: PositiveFloat = 5.0
    """The gamma of `min_snr`."""
    caption_dropout: Fraction = 0.1
    """Share of samples whose caption is replaced by the negative prompt, which guidance needs."""
    learning_rate: LearningRate = 1e-5
    """AdamW learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay."""


class SFTMethod(DistillMethod[SFTConfig]):
    """One role, trained on data."""

    Config = SFTConfig
    trainable_roles = ("student",)
    makes_teachers = True
    sampler = "euler"
    summary = "flow-matching fine-tuning: makes and tunes teachers (arXiv 2210.02747)"

    @classmethod
    def optimizers(cls, config: SFTConfig) -> Mapping[str, OptimizerConfig]:
        return {"student": config.optimizer_of(config.learning_rate)}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        noise, t = self.rng.normal_like(batch.latents), self.times(len(batch))
        yield RoleLoss("student", batch.mean(self.errors(batch, noise, t)))

    def errors(self, batch: Batch, noise: Tensor, t: Tensor, context: Context | None = None) -> Tensor:
        """Weighted squared errors ``[B, C, F, H, W]`` of the velocity at times ``t``, ``[B]`` or per frame."""
        x_t = add_noise(batch.latents, noise, t)
        u = self.bundle["student"].velocity(x_t, t, self.dropped(batch), context=context)
        error = (u - velocity_target(batch.latents, noise)).square()
        return expand_time(self.weight(t), error) * error

    def times(self, count: int) -> Tensor:
        """Training times ``[count]``."""
        config = self.config
        if config.time_density == "logit_normal":
            t = (config.logit_mean + config.logit_std * self.rng.normal((count,))).sigmoid()
        else:
            t = self.rng.uniform(count)
        if config.time_density == "mode":
            t = mode_time(t, config.mode_scale)
        return shift_time(t, config.time_shift).clamp(*config.time_range)

    def weight(self, t: Tensor) -> Tensor:
        """Weight ``[B]`` of each sample's loss."""
        if self.config.weighting == "gaussian":
            return gaussian_weight(t)
        if self.config.weighting == "beta08":
            return t * (1 - t).sqrt() * 15 / 4
        if self.config.weighting == "min_snr":
            return min_snr_weight(t, self.config.min_snr_gamma)
        return torch.ones_like(t)

    def dropped(self, batch: Batch) -> Condition:
        """Condition of the batch with a share of rows replaced by the negative one."""
        keep = self.rng.uniform(len(batch)) >= self.config.caption_dropout
        return without_captions(batch, keep)


def mode_time(u: Tensor, scale: float) -> Tensor:
    """Map uniform ``u`` to the mode density: ``1 - u - s (cos^2(pi u / 2) - 1 + u)`` (arXiv 2403.03206, eq. 20)."""
    return 1 - u - scale * ((math.pi / 2 * u).cos().square() - 1 + u)


def gaussian_weight(t: Tensor) -> Tensor:
    """``exp(-2 (t - 1/2)^2) - exp(-1/2)``, scaled to mean 1 over uniform times; 0 at both ends (also "bsmntw")."""
    least = math.exp(-0.5)
    mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - least
    return ((-2 * (t - 0.5).square()).exp() - least) / mean


def min_snr_weight(t: Tensor, gamma: float) -> Tensor:
    """Min-SNR (arXiv 2303.09556): ``min(SNR, gamma) t^2`` with ``SNR = (1 - t)^2 / t^2``.

    The paper weights the loss in x0 by ``min(SNR, gamma)``; that loss is ``t^2`` times the loss in the velocity.
    """
    return torch.minimum((1 - t).square(), gamma * t.square())
