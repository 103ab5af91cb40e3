"""DMD2: distribution matching distillation (DMD arXiv 2311.18828; DMD2 arXiv 2405.14867).

The student minimises the reverse KL to the guided teacher at all noise levels. Its gradient is the difference of the
frozen teacher and a critic that keeps training on the student's samples (``docs/methods/dmd2.md``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.config.base import OptimizerConfig
from fastvideo.distillation.denoiser import Family
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching.dmd2_config import DMD2Config as DMD2Config
from fastvideo.distillation.noise import add_noise, shift_time, velocity_target, velocity_to_x0
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder, Rungs, SamplerKind, few_step
from fastvideo.distillation.types import Batch, RoleLoss, Scored, UserError, level


@runtime_checkable
class _DMD2Adapter(Family, Protocol):
    """Family for DMD2: a velocity and the negative prompt's condition."""

    def ensure_negative_conditioning(self) -> None: ...


class DMD2Method(DistillMethod[DMD2Config]):
    """Student, frozen teacher, critic."""

    Config = DMD2Config
    trainable_roles: ClassVar[tuple[str, ...]] = ("student", "critic")
    frozen_roles: ClassVar[tuple[str, ...]] = ("teacher",)
    term_roles: ClassVar[tuple[str, ...]] = ()
    """Roles of further terms in a subclass."""
    following_roles: ClassVar[tuple[str, ...]] = ("critic",)
    """Roles that learn from the student's samples: on every step, or on those that do not train the student."""
    sampler: ClassVar[SamplerKind] = "renoise"
    bridges = True
    one_expert_rollouts: ClassVar[tuple[str, ...]] = ("simulate",)
    summary = "DMD2, distribution matching with a learned critic (arXiv 2405.14867)"

    def __init__(self, config: DMD2Config, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        bundle.require_roles(["student", "teacher", "critic", *self.term_roles])
        super().__init__(config, bundle, ladder, rng)
        self.student, self.teacher, self.critic = bundle["student"], bundle["teacher"], bundle["critic"]
        if not isinstance(self.teacher.adapter, _DMD2Adapter):
            raise UserError(f"DMD2 needs velocity() and ensure_negative_conditioning() of {self.teacher.adapter}")
        self.teacher.adapter.ensure_negative_conditioning()
        self.to_teacher = bundle.bridge("student", "teacher")
        self.rungs = Rungs(config.rung_shares, ladder, told=config.critic_sees_rung)

    @classmethod
    def optimizers(cls, config: DMD2Config) -> Mapping[str, OptimizerConfig]:
        shared = {"betas": config.betas, "weight_decay": config.weight_decay, "warmup_steps": config.warmup_steps}
        rates = {"student": config.student_learning_rate, "critic": config.critic_learning_rate}
        return {role: OptimizerConfig.model_validate({"learning_rate": rate, **shared}) for role, rate in rates.items()}

    @classmethod
    def uses_latents(cls, config: DMD2Config) -> bool:
        return config.rollout == "data"

    def active_roles(self, step: int) -> tuple[str, ...]:
        if step % self.config.generator_update_interval:
            return self.following_roles
        return ("student", *self.following_roles) if self.config.critic_updates_on_student_steps else ("student",)

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """The student's loss on its steps; the critic's on the same sample, detached, on its own."""
        student_step = "student" in self.active_roles(step)
        with torch.set_grad_enabled(student_step):
            x0, batch = self.sample(batch)
        if joint := student_step and self.config.score_and_train:
            yield from self.joint_losses(x0, batch)
        elif student_step:
            yield self.student_loss(x0, batch)
        if "critic" in self.active_roles(step) and not joint:
            yield from self.critic_losses(x0.detach(), batch)

    def sample(self, batch: Batch) -> tuple[Tensor, Batch]:
        """Clean sample of the student in the teacher's space, and the batch that scores it."""
        return self.to_teacher(self.rollout(batch)), batch

    def critic_losses(self, x0: Tensor, batch: Batch) -> Iterator[RoleLoss]:
        """Losses on the student's sample ``x0``, detached; a subclass adds its own."""
        yield self.critic_loss(x0, batch)

    def rollout(self, batch: Batch) -> Tensor:
        """Clean sample of the student in its own space; one call, at a ladder time drawn by its share, has gradient."""
        noise = self.rng.normal(batch.shape)
        if self.config.rollout == "simulate":
            velocity, stop = partial(self.student.velocity, condition=batch.condition), self.rungs.stop(self.rng)
            return few_step(velocity, noise, self.ladder.times[: stop + 1], self.rng.normal_like)
        t = self.rungs.times(len(batch), self.rng)
        return self.student.x0(add_noise(batch.latents, noise, t), t, batch.condition)

    def student_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """DMD loss at drawn noise levels."""
        with torch.no_grad():
            x_t, t, _ = self.renoise_sample(x0)
            fake = self.critic.x0(x_t, t, batch.condition, r=self.rungs.second_time(t))
        return self.dmd_loss(x0, batch, x_t, t, fake)

    def dmd_loss(self, x0: Tensor, batch: Batch, x_t: Tensor, t: Tensor, fake: Tensor) -> RoleLoss:
        """Loss with ``d loss / d x0 = gradient / numel`` (DMD eq. 7)."""
        with torch.no_grad():
            real = self.teacher.x0_guided(x_t, t, batch.condition, batch.negative, self.config.teacher_guidance)
            gradient = self.gradient(x0, real, fake, batch)
        loss = 0.5 * batch.mean((x0 - (x0 - gradient).detach()).square())
        squares = gradient.square()
        squared = {"dmd_gradient_rms": batch.mean(squares), **self.chunk_metrics("dmd_gradient_rms", squares, batch)}
        return RoleLoss("student", loss, {name: mean.sqrt() for name, mean in squared.items()})

    def gradient(self, x0: Tensor, real: Tensor, fake: Tensor, batch: Batch) -> Tensor:
        """DMD gradient ``[B, C, F, H, W]`` of the clean estimates ``real`` and ``fake``; variants override it."""
        return dmd_gradient(x0, real=real, fake=fake, given=batch.left_out(x0))

    def critic_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """Conditional flow matching on the student's samples."""
        x_t, t, target = self.renoise_sample(x0)
        u = self.critic.velocity(x_t, t, batch.condition, r=self.rungs.second_time(t))
        squares = (u - target).square()
        return RoleLoss("critic", batch.mean(squares), self.chunk_metrics("loss", squares.detach(), batch))

    def chunk_metrics(self, name: str, squares: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Means of ``squares`` ``[B, C, F, H, W]`` in each chunk, as metrics; none for a method without chunks."""
        return {}

    def joint_losses(self, x0: Tensor, batch: Batch) -> Iterator[RoleLoss]:
        """Both losses from one call of the critic, whose graph outlives the student's backward."""
        x_t, t, target = self.renoise_sample(x0.detach())
        u = self.critic.velocity(x_t, t, batch.condition, r=self.rungs.second_time(t))
        yield self.dmd_loss(x0, batch, x_t, t, velocity_to_x0(x_t, u.detach(), t))
        yield RoleLoss("critic", batch.mean((u - target).square()))

    def renoise_sample(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x_t`` at drawn times ``t`` ``[B]``, those times, and the velocity target."""
        t, noise = self.score_times(len(x0)), self.rng.normal_like(x0)
        return add_noise(x0, noise, t), t, velocity_target(x0, noise)

    def score_times(self, count: int) -> Tensor:
        """Uniform times ``[count]``, shifted, then clamped; all frames of a sample share one, all samples an expert."""
        shift, edge = self.config.score_time_shift, self.teacher.boundary or self.critic.boundary
        u = self.rng.uniform(count) if edge is None else self.rng.on_one_side(count, shift_time(edge, 1 / shift))
        return shift_time(u, shift).clamp(*self.config.score_time_range)


def dmd_gradient(x0: Tensor, *, real: Tensor, fake: Tensor, given: Scored | None = None) -> Tensor:
    """``(fake - real) / (mean |x0 - real| + 1e-6)``, the mean over each sample's generated frames (DMD eq. 8), or over
    each of its parts."""
    precise = torch.promote_types(x0.dtype, torch.float32)
    x0, real, fake = x0.to(precise), real.to(precise), fake.to(precise)
    return (fake - real) / (level((x0 - real).abs(), given) + 1e-6)
