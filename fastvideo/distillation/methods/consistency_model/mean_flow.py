"""MeanFlow: a flow map that learns mean velocities over time intervals (arXiv 2505.13447), from data or a teacher.

``u(x_t, t, r)`` satisfies ``u = v - (t - r) du/dt``, with ``v`` the velocity of the flow and ``du/dt`` along it; the
right side, without gradient, is the target. Pitfalls, failure signs and disagreements: ``docs/methods/mean_flow.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import NormalDist
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.caption_dropout import without_captions
from fastvideo.distillation.config.base import Guidance, OptimizerConfig, OptimizerOptions, TimeRange
from fastvideo.distillation.jvp import DerivativeConfig, derivative
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.noise import add_noise, velocity_target
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.tangent import mean_velocity_target, unit_rms
from fastvideo.distillation.types import Batch, Condition, Need, RoleLoss, mean_over_generated
from fastvideo.ranges import Beta, Fraction, LearningRate, NonNegativeFloat, NonNegativeInt, Number, PositiveFloat


class MeanFlowConfig(DerivativeConfig, OptimizerOptions):
    """Options of MeanFlow."""

    jvp_step: PositiveFloat = 5e-3
    """Step of the central difference, in time; `autodiff` has none."""
    teacher_guidance: Guidance = 3.0
    """Guidance of the teacher's velocity, standard convention; without a teacher see `mixture`."""
    logit_mean: Number = -0.4
    """Mean of the logit of both times (-0.8 in FastGen's recipe for Wan); the later one is `t`."""
    logit_std: PositiveFloat = 1.0
    """Standard deviation of their logits (1.6 in that recipe)."""
    equal_times: Fraction = 0.75
    """Share of samples with `r = t`, which regress the velocity itself (0 in that recipe)."""
    mixture: tuple[NonNegativeFloat, Number] = (1.0, 0.0)
    """Guidance without a teacher, `(w, k)`: the velocity is `w (noise - x0) + k u(c) + (1 - w - k) u(negative)`, which
    is guidance `w / (1 - k)`; `(1, 0)` is none."""
    mixture_range: TimeRange = (0.0, 1.0)
    """Times of the mixture; the plain velocity is used elsewhere."""
    caption_dropout: Fraction = 0.1
    """Share of samples that train the negative prediction, with the plain velocity; without a teacher only."""
    loss: Literal["adaptive", "unit_error"] = "adaptive"
    """`adaptive` weights a sample by `(error + c)^-p`; `unit_error` divides the error by its rms plus c."""
    loss_power: NonNegativeFloat = 1.0
    """The p of `adaptive`; 0 is the plain squared error."""
    loss_constant: PositiveFloat = 1e-3
    """The c of both (`unit_error`: 10 in FastGen, with sums)."""
    tangent_warmup_steps: NonNegativeInt = 0
    """Steps over which the derivative is faded in; 2000 in FastGen's recipe for Wan."""
    learning_rate: LearningRate = 1e-5
    """AdamW learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """AdamW momenta."""

    @model_validator(mode="after")
    def _weights(self) -> MeanFlowConfig:
        if self.mixture[1] >= 1.0:
            raise ValueError(f"mixture: guidance is w / (1 - k), so k must be below 1, got {self.mixture[1]}")
        return self


NEAR, ENOUGH = 0.95, 0.01
"""Share of the ladder's first time that counts as near it, and the share of samples whose jump should begin above."""


def rare_start_notes(config: MeanFlowConfig, ladder: Ladder) -> list[str]:
    """Warn of training that hardly meets the first jump of sampling, which everything after rests on."""
    edge = NEAR * ladder.times[0]
    below = NormalDist(config.logit_mean, config.logit_std).cdf(math.log(edge / (1 - edge)))
    share = (1 - config.equal_times) * (1 - below**2)
    if share >= ENOUGH:
        return []
    return [
        f"{100 * share:.2g} % of the samples train a jump that begins above t = {edge:g}, where sampling begins: few "
        f"steps will be poor. Raise method.logit_std"
    ]


class MeanFlowMethod(DistillMethod[MeanFlowConfig]):
    """Student with two times, and a teacher for distillation."""

    Config = MeanFlowConfig
    trainable_roles = ("student",)
    optional_roles = ("teacher",)
    sampler = "flow_map"
    summary = "MeanFlow, a flow map of mean velocities: any number of steps (arXiv 2505.13447)"

    def __init__(self, config: MeanFlowConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.student = bundle["student"]
        self.derivative = derivative(config.jvp, config.jvp_step)
        self.notes = (config.derivative_note, *rare_start_notes(config, ladder))

    @classmethod
    def optimizers(cls, config: MeanFlowConfig) -> Mapping[str, OptimizerConfig]:
        return {"student": config.optimizer_of(config.learning_rate)}

    @classmethod
    def needs_of(cls, config: MeanFlowConfig) -> frozenset[Need]:
        return config.derivative_needs | {"flow_map"}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        t, r = self.times(len(batch))
        noise = self.rng.normal_like(batch.latents)
        warmup = min(1.0, step / self.config.tangent_warmup_steps) if self.config.tangent_warmup_steps else 1.0
        yield self.student_loss(batch, noise, t, r, warmup)

    def student_loss(self, batch: Batch, noise: Tensor, t: Tensor, r: Tensor, warmup: float = 1.0) -> RoleLoss:
        """Regression of the mean velocity on the target that its own derivative gives (MeanFlow eq. 9 to 11, 22)."""
        x_t = add_noise(batch.latents, noise, t)
        velocity, condition = self.flow(batch, x_t, noise, t)
        u = partial(self.student.velocity, condition=condition, r=r)
        slope = warmup * self.derivative(u, x_t, t, velocity, torch.ones_like(t), floor=r)
        mean = u(x_t, t)
        error = mean_velocity_target(velocity, slope, t, r) - mean.detach()
        squares = mean_over_generated(error.square(), batch.left_out(error))
        if self.config.loss == "unit_error":
            error = unit_rms(error, self.config.loss_constant, batch.left_out(error))
        loss = mean_over_generated((mean - mean.detach() - error).square(), batch.left_out(error))
        if self.config.loss == "adaptive":
            loss = loss / (squares + self.config.loss_constant) ** self.config.loss_power
        return RoleLoss("student", loss.mean(), {"error_rms": squares.mean().sqrt()})

    @torch.no_grad()
    def flow(self, batch: Batch, x_t: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Condition]:
        """Velocity of the flow, for target and derivative alike, and the student's condition."""
        if "teacher" in self.bundle:
            guided = self.bundle["teacher"].guided_velocity
            return guided(x_t, t, batch.condition, batch.negative, self.config.teacher_guidance), batch.condition
        plain, keep = velocity_target(batch.latents, noise), self.rng.uniform(len(batch)) >= self.config.caption_dropout
        condition = without_captions(batch, keep)
        w, k = self.config.mixture
        if (w, k) == (1.0, 0.0):
            return plain, condition
        conditional, unconditional = (self.student.velocity(x_t, t, c) for c in (batch.condition, batch.negative))
        low, high = self.config.mixture_range
        mixed = w * plain + k * conditional + (1 - w - k) * unconditional
        return mixed.where((keep & (t >= low) & (t <= high)).view(-1, 1, 1, 1, 1), plain), condition

    def times(self, count: int) -> tuple[Tensor, Tensor]:
        """``t >= r`` of two logit-normal draws; a share of the samples has ``r = t``."""
        drawn = (self.config.logit_mean + self.config.logit_std * self.rng.normal((count, 2))).sigmoid()
        t, r = drawn.amax(dim=1), drawn.amin(dim=1)
        return t, r.where(self.rng.uniform(count) >= self.config.equal_times, t)
