"""Causal CD: consistency distillation of an autoregressive teacher, chunk by chunk (Causal Forcing++ arXiv 2605.15141).

Every chunk has a time of its own on a grid and, by teacher forcing, clean chunks before it. One step of the teacher's
flow leads to the next time of the grid; there the student's average says where the flow ends, and the student must say
the same from where the step began. No trajectories are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.causal_rollout import forced
from fastvideo.distillation.chunks import Masked, by_chunk
from fastvideo.distillation.config.base import Guidance, OptimizerConfig, OptimizerOptions
from fastvideo.distillation.config.causal import CausalOptions
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.noise import add_noise, expand_time
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, RoleLoss
from fastvideo.ranges import Beta, LearningRate, PositiveFloat, Steps


class CausalCDConfig(CausalOptions, OptimizerOptions):
    """Options of causal consistency distillation; the target is the student's average (`ema`)."""

    autoregressive_roles = ("teacher",)

    grid_steps: Steps = 48
    """Times of the grid, uniform before the shift; 0 follows the last."""
    grid_shift: PositiveFloat = 5.0
    """Shift of the grid."""
    teacher_guidance: Guidance = 3.0
    """Guidance of the teacher in the standard convention; the student learns it in."""
    allow_bidirectional_teacher: bool = False
    """Take a teacher whose folder does not say that it generates chunk by chunk. One that has only seen whole videos
    gives targets that are wrong, without a sign."""
    learning_rate: LearningRate = 2e-6
    """AdamW learning rate."""
    betas: tuple[Beta, Beta] = (0.0, 0.999)
    """Momenta."""

    @property
    def trusts_teachers(self) -> bool:
        return self.allow_bidirectional_teacher


class CausalCDMethod(DistillMethod[CausalCDConfig]):
    """Student, with its average as the target, and a frozen autoregressive teacher."""

    Config = CausalCDConfig
    trainable_roles = ("student",)
    frozen_roles = ("teacher",)
    averaged_roles = ("student",)
    sampler = "renoise"
    summary = "causal consistency distillation of an autoregressive teacher (arXiv 2605.15141)"

    def __init__(self, config: CausalCDConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.student, self.teacher = bundle["student"], bundle["teacher"]
        times = uniform_ladder(config.grid_steps, shift=config.grid_shift).with_end
        self.grid = torch.tensor(times, dtype=torch.float32, device=rng.device)

    @classmethod
    def optimizers(cls, config: CausalCDConfig) -> Mapping[str, OptimizerConfig]:
        return {"student": config.optimizer_of(config.learning_rate)}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        x0, noise = batch.latents, self.rng.normal_like(batch.latents)
        level = by_chunk(partial(self.rng.index, high=self.config.grid_steps), x0, self.config.reach.chunk)
        t, r = self.grid[level], self.grid[level + 1]
        x_t, past = add_noise(x0, noise, t), forced(self.config.reach, x0, self.config.context_time, self.rng)
        with torch.no_grad():
            x_r = self.teacher_step(x_t, t, r, batch, past)
            with self.student.averaged():
                target = self.student.x0(x_r, r, batch.condition, context=past)
        estimate = self.student.x0(x_t, t, batch.condition, context=past)
        yield RoleLoss("student", 0.5 * batch.mean((estimate - target).square()))

    def teacher_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch, past: Masked) -> Tensor:
        """``x_r``: one Euler step of the guided teacher's flow from ``x_t``; ``t`` and ``r`` are ``[B, F]``."""
        guided = batch.condition, batch.negative, self.config.teacher_guidance
        return x_t - expand_time(t - r, x_t) * self.teacher.guided_velocity(x_t, t, *guided, contexts=(past, past))
