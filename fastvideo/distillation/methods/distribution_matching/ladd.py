"""LADD: adversarial distillation in latent space, on features of the frozen teacher alone (arXiv 2403.12015).

There is no score difference and no critic: the student must look real at every noise level to heads on the teacher's
features. Real samples are latents of the data or, as in the paper, guided samples of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.config.base import RESUMABLE, Guidance, OptimizerConfig, Shares, TimeRange
from fastvideo.distillation.denoiser import Family
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching.gan import Adversary, AdversaryConfig, generator_loss
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder, Rungs, few_step
from fastvideo.distillation.samplers import euler
from fastvideo.distillation.types import Batch, Need, RoleLoss
from fastvideo.ranges import Beta, LearningRate, NonNegativeFloat, NonNegativeInt, Number, PositiveFloat, Steps


class LADDConfig(AdversaryConfig):
    """Options of LADD."""

    real_samples: Literal["data", "teacher"] = "data"
    """Real samples: latents of the `data`, or samples of the guided `teacher` for the batch's prompts."""
    teacher_steps: Steps = 16
    """Euler steps of the teacher, for `real_samples: teacher`."""
    teacher_shift: PositiveFloat = 3.0
    """Shift of those steps' uniform times."""
    teacher_guidance: Guidance = 4.5
    """Their guidance, in the standard convention."""
    rollout: Literal["simulate", "data"] = "simulate"
    """Input of the student: its own steps from noise (`simulate`), or noised real samples (`data`, the paper)."""
    generator_update_interval: int = Field(default=2, ge=2)
    """Steps per update of the student; the discriminator is updated on all others."""
    renoise_mean: Number = 1.0
    """Mean of the logit-normal noise level of the discriminator: high noise shows structure, low noise detail."""
    renoise_scale: PositiveFloat = 1.0
    """Scale of that distribution."""
    renoise_range: TimeRange = (0.001, 0.999)
    """Range to which noise levels are clamped."""
    student_learning_rate: LearningRate = 2e-6
    """AdamW learning rate of the student."""
    discriminator_learning_rate: LearningRate = 4e-6
    """AdamW learning rate of the discriminator."""
    betas: tuple[Beta, Beta] = (0.0, 0.99)
    """AdamW momenta of both."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay of both."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up, for both."""
    decay_steps: Annotated[NonNegativeInt, RESUMABLE] = 0
    """Updates of the student, after the warm-up, over which its rate falls to zero as a cosine; 0 keeps it constant.
    The discriminator's never falls, so it sees ever finer differences. A resumed run may extend it."""
    rung_shares: Shares = ()
    """Share of training at each step of the ladder, the noisiest first; empty means equal shares."""
    early_rung_shares: Shares = ()
    """Shares during the first `early_rung_steps` steps of the run: low noise is the easier start."""
    early_rung_steps: NonNegativeInt = 0
    """Steps of the run (of any role) until `rung_shares` take over."""

    @model_validator(mode="after")
    def _stages(self) -> LADDConfig:
        if bool(self.early_rung_shares) != bool(self.early_rung_steps):
            raise ValueError("early_rung_shares and early_rung_steps go together: set both, or neither")
        return self


class LADDMethod(DistillMethod[LADDConfig]):
    """Student, frozen teacher as the backbone, discriminator."""

    Config = LADDConfig
    trainable_roles = ("student", "discriminator")
    frozen_roles = ("teacher",)
    sampler = "renoise"
    summary = "LADD, adversarial distillation on the teacher's features (arXiv 2403.12015)"

    def __init__(self, config: LADDConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.student, self.teacher = bundle["student"], bundle["teacher"]
        self.adversary = Adversary(config, self.teacher, bundle["discriminator"], rng)
        self.rungs = Rungs(config.rung_shares, ladder)
        self.early_rungs = Rungs(config.early_rung_shares, ladder, "early_rung_shares")

    @classmethod
    def optimizers(cls, config: LADDConfig) -> Mapping[str, OptimizerConfig]:
        shared = {"betas": config.betas, "weight_decay": config.weight_decay, "warmup_steps": config.warmup_steps}
        student = {"learning_rate": config.student_learning_rate, "decay_steps": config.decay_steps}
        own = {"student": student, "discriminator": {"learning_rate": config.discriminator_learning_rate}}
        return {role: OptimizerConfig.model_validate(options | shared) for role, options in own.items()}

    @classmethod
    def heads(cls, config: LADDConfig, families: Mapping[str, Family]) -> Mapping[str, nn.Module]:
        return {"discriminator": Adversary.build(config, families["teacher"])}

    @classmethod
    def uses_latents(cls, config: LADDConfig) -> bool:
        return config.real_samples == "data"

    @classmethod
    def needs_of(cls, config: LADDConfig) -> frozenset[Need]:
        return frozenset({"features"})

    @classmethod
    def backbone_of(cls, config: LADDConfig) -> str:
        return "teacher"

    @classmethod
    def gradient_roles_of(cls, config: LADDConfig) -> tuple[str, ...]:
        return ("teacher",)

    def active_roles(self, step: int) -> tuple[str, ...]:
        return ("student",) if step % self.config.generator_update_interval == 0 else ("discriminator",)

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """The student's loss or the discriminator's, by turns."""
        if "student" in self.active_roles(step):
            yield self.student_loss(self.rollout(batch, step), batch)
        else:
            real = self.real(batch)
            with torch.no_grad():
                x0 = self.rollout(batch, step, real)
            yield self.adversary.loss(x0, real, self.times(len(batch)), batch.condition)

    def real(self, batch: Batch) -> Tensor:
        """Clean real samples ``[B, C, F, H, W]``."""
        if self.config.real_samples == "data":
            return batch.latents
        guided = partial(self.teacher.guided_velocity, condition=batch.condition, negative=batch.negative)
        times = uniform_ladder(self.config.teacher_steps, shift=self.config.teacher_shift).times
        return euler(partial(guided, guidance=self.config.teacher_guidance), self.rng.normal(batch.shape), times)

    def rollout(self, batch: Batch, step: int, real: Tensor | None = None) -> Tensor:
        """Clean sample of the student; one call, at a ladder step drawn by its shares, carries gradient."""
        if self.config.rollout == "simulate":
            stop, noise = self.rungs_at(step).stop(self.rng), self.rng.normal(batch.shape)
            velocity = partial(self.student.velocity, condition=batch.condition)
            return few_step(velocity, noise, self.ladder.times[: stop + 1], self.rng.normal_like)
        real = self.real(batch) if real is None else real
        t = self.rungs_at(step).times(len(real), self.rng)
        return self.student.x0(add_noise(real, self.rng.normal_like(real), t), t, batch.condition)

    def rungs_at(self, step: int) -> Rungs:
        """Shares in force at ``step`` of the run."""
        return self.early_rungs if step < self.config.early_rung_steps else self.rungs

    def student_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """Adversarial loss at one drawn noise level per sample."""
        t = self.times(len(x0))
        x_t = add_noise(x0, self.rng.normal_like(x0), t)
        with self.adversary.frozen():
            logits = self.adversary.judge(x_t, t, batch.condition)
        return RoleLoss("student", generator_loss(logits, self.config.gan_loss), frozen=self.adversary.roles)

    def times(self, count: int) -> Tensor:
        """Logit-normal noise levels ``[count]``, clamped."""
        logit = self.config.renoise_mean + self.config.renoise_scale * self.rng.normal((count,))
        return logit.sigmoid().clamp(*self.config.renoise_range)
