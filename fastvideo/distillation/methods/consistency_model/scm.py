"""sCM: continuous-time consistency distillation and training (arXiv 2410.11081), in TrigFlow.

Training makes the student's ``f(x, a) = cos(a) x - sin(a) F(x, a)`` constant along the teacher's flow: its normalised
derivative along that flow moves ``F``. Without a teacher the flow is that of each sample's data and noise. Pitfalls,
failure signs and differences of implementations: ``docs/methods/scm.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.causal_rollout import forced_velocity
from fastvideo.distillation.chunks import Masked
from fastvideo.distillation.config.base import Guidance, OptimizerConfig, OptimizerOptions
from fastvideo.distillation.config.causal import ForcedOptions
from fastvideo.distillation.denoiser import Family
from fastvideo.distillation.jvp import DerivativeConfig, derivative
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.causal import Forced
from fastvideo.distillation.noise import expand_time
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.tangent import consistency_error, trig_field
from fastvideo.distillation.types import Batch, Need, RoleLoss
from fastvideo.ranges import Beta, LearningRate, NonNegativeFloat, Number, PositiveFloat, PositiveInt

LOSS_WEIGHT = "loss_weight"
FREQUENCIES = 4


class SCMConfig(ForcedOptions, DerivativeConfig, OptimizerOptions):
    """Options of sCM."""

    teacher_guidance: Guidance = 5.0
    """Guidance of the teacher's flow, standard convention; without a teacher there is none."""
    log_sigma_mean: Number = -1.0
    """Training times: `tan(angle)` is log-normal with this mean of its logarithm; 0.7 for Wan 1.3B (rCM)."""
    log_sigma_std: PositiveFloat = 1.4
    """Standard deviation of that logarithm; 1.6 for Wan 1.3B."""
    tangent_warmup_steps: PositiveInt = 10_000
    """Steps over which the tangent's unstable terms are faded in, from pure regression of the flow."""
    tangent_constant: NonNegativeFloat = 0.1
    """Constant added to the tangent's root mean square in its normalisation."""
    learning_rate: LearningRate = 7e-5
    """AdamW learning rate of the student."""
    loss_weight_learning_rate: LearningRate = 1e-3
    """AdamW learning rate of the loss weight."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """AdamW momenta of both; the other options of the optimizer are the student's."""


class LossWeight(nn.Module):
    """``w(angle)``, the logarithm of a loss weight that balances noise levels; it starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * FREQUENCIES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, angle: Tensor) -> Tensor:
        """``[B]`` for angles ``[B]``."""
        phase = angle[:, None] * 2 ** torch.arange(FREQUENCIES, device=angle.device)
        return self.linear(torch.cat([phase.sin(), phase.cos()], dim=1))[:, 0]  # type: ignore[no-any-return]


class SCMMethod(Forced, DistillMethod[SCMConfig]):
    """Student, its loss weight, and a teacher for distillation."""

    Config = SCMConfig
    config: SCMConfig
    trainable_roles = ("student", LOSS_WEIGHT)
    optional_roles = ("teacher",)
    sampler = "renoise"
    summary = "sCM, continuous-time consistency: no discretisation error (arXiv 2410.11081)"

    def __init__(self, config: SCMConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.student, self.weight = bundle["student"], bundle[LOSS_WEIGHT].network
        self.derivative = derivative(config.jvp, config.jvp_step, (0.0, math.pi / 2))
        self.notes = (config.derivative_note,)

    @classmethod
    def optimizers(cls, config: SCMConfig) -> Mapping[str, OptimizerConfig]:
        weight = OptimizerConfig(learning_rate=config.loss_weight_learning_rate, betas=config.betas)
        return {"student": config.optimizer_of(config.learning_rate), LOSS_WEIGHT: weight}

    @classmethod
    def needs_of(cls, config: SCMConfig) -> frozenset[Need]:
        return config.derivative_needs | config.chunk_needs

    @classmethod
    def heads(cls, config: SCMConfig, families: Mapping[str, Family]) -> Mapping[str, nn.Module]:
        return {LOSS_WEIGHT: LossWeight()}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """The student's loss, then its weight's on the same errors (sCM eq. 8, split into its two gradients)."""
        angle, noise = self.angles(len(batch)), self.rng.normal_like(batch.latents)
        tangent, error = self.tangent_and_error(batch, angle, noise, min(1.0, step / self.config.tangent_warmup_steps))
        weight, prior = self.weight(angle), 1 / angle.tan()
        rms = batch.mean(tangent.square()).sqrt()
        yield RoleLoss("student", (weight.detach().exp() * prior * error).mean(), {"tangent_rms": rms})
        yield RoleLoss(LOSS_WEIGHT, (weight.exp() * prior * error.detach() - weight).mean())

    def tangent_and_error(self, batch: Batch, angle: Tensor, noise: Tensor, warmup: float) -> tuple[Tensor, Tensor]:
        """Tangent before normalisation, and the error ``[B]`` whose gradient moves ``F`` along it."""
        cos, sin = expand_time(angle.cos(), noise), expand_time(angle.sin(), noise)
        x = cos * batch.latents + sin * noise
        past = self.past(batch)
        flow = self.flow(batch, x, angle, past) if "teacher" in self.bundle else cos * noise - sin * batch.latents
        field = trig_field(forced_velocity(self.student, past, batch.condition, batch.negative, 1.0))
        constant, given = self.config.tangent_constant, batch.left_out(x)
        return consistency_error(field, x, angle, flow, self.derivative, warmup, constant, given)

    @torch.no_grad()
    def flow(self, batch: Batch, x: Tensor, angle: Tensor, past: Masked | None) -> Tensor:
        """``dx / d angle`` of the guided teacher."""
        guided = batch.condition, batch.negative, self.config.teacher_guidance
        return trig_field(forced_velocity(self.bundle["teacher"], past, *guided))(x, angle)

    def angles(self, count: int) -> Tensor:
        """Training times ``[count]``: ``arctan`` of a log-normal."""
        return (self.config.log_sigma_mean + self.config.log_sigma_std * self.rng.normal((count,))).exp().atan()
