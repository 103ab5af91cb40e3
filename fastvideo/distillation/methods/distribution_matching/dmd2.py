"""DMD2: distribution matching distillation (DMD arXiv 2311.18828; DMD2 arXiv 2405.14867).

The student minimises the reverse KL to the guided teacher at all noise levels. The gradient is the difference of two
denoisers: the frozen teacher and a critic that is trained on the student's own samples all the while. Where public
implementations disagree, this one takes: a normaliser per sample, a score time per sample, a critic step on every
iteration, and the student's sample of a student step re-used for the critic (``docs/methods/dmd2.md``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.methods.base import DistillMethod, MethodConfig, OptimizerConfig, TimeRange
from fastvideo.distillation.noise import add_noise, shift_time, velocity_target
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import SamplerKind, few_step
from fastvideo.distillation.schedule import Guidance, Ladder
from fastvideo.distillation.types import Batch, Condition, Given, RoleLoss, UserError, free_means


@runtime_checkable
class _DMD2Adapter(Protocol):
    """All that DMD2 asks of a model family."""

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    def ensure_negative_conditioning(self) -> None: ...


class DMD2Config(MethodConfig):
    """Options of DMD2."""

    rollout: Literal["simulate", "data"] = "simulate"
    """How the student's input is made: `simulate` runs the student itself from noise (prompts alone are enough);
    `data` noises real latents to a rung of the ladder."""
    generator_update_interval: PositiveInt = 5
    """The student is updated on every this-many-th step, the critic on every step."""
    teacher_guidance: Guidance = 4.5
    """Classifier-free guidance of the teacher in the standard convention: 1 is the conditional prediction. Another
    convention is converted by name: `{extra: 3.5}` is 4.5."""
    score_time_shift: PositiveFloat = 1.0
    """Shift of the uniform noise levels at which teacher and critic are compared and the critic is trained."""
    score_time_range: TimeRange = (0.02, 0.98)
    """Those noise levels are clamped to this range, after the shift."""
    student_learning_rate: PositiveFloat = 2e-6
    """AdamW learning rate of the student."""
    critic_learning_rate: PositiveFloat = 8e-6
    """AdamW learning rate of the critic; it must follow the student, so it is usually the higher one."""
    betas: tuple[float, float] = (0.0, 0.999)
    """AdamW momenta of both."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay of both."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up, for both."""


class DMD2Method(DistillMethod[DMD2Config]):
    """Student, frozen teacher, critic."""

    Config = DMD2Config
    trainable_roles: ClassVar[tuple[str, ...]] = ("student", "critic")
    frozen_roles = ("teacher",)
    term_roles: ClassVar[tuple[str, ...]] = ()
    """Roles of further terms, in a method that adds some."""
    sampler: ClassVar[SamplerKind] = "renoise"
    summary = "DMD2, distribution matching with a learned critic (arXiv 2405.14867)"

    def __init__(self, config: DMD2Config, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        bundle.require_roles(["student", "teacher", "critic", *self.term_roles])
        super().__init__(config, bundle, ladder, rng)
        self.student, self.teacher, self.critic = bundle["student"], bundle["teacher"], bundle["critic"]
        if not isinstance(self.teacher.adapter, _DMD2Adapter):
            raise UserError(f"DMD2 needs velocity() and ensure_negative_conditioning() of {self.teacher.adapter}")
        self.teacher.adapter.ensure_negative_conditioning()

    @classmethod
    def optimizers(cls, config: DMD2Config) -> Mapping[str, OptimizerConfig]:
        shared = {"betas": config.betas, "weight_decay": config.weight_decay, "warmup_steps": config.warmup_steps}
        rates = {"student": config.student_learning_rate, "critic": config.critic_learning_rate}
        return {role: OptimizerConfig.model_validate({"learning_rate": rate, **shared}) for role, rate in rates.items()}

    @classmethod
    def uses_latents(cls, config: DMD2Config) -> bool:
        return config.rollout == "data"

    def active_roles(self, step: int) -> tuple[str, ...]:
        return ("student", "critic") if step % self.config.generator_update_interval == 0 else ("critic",)

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """Student first (on its steps), then the critic on the same sample, detached."""
        if "student" in self.active_roles(step):
            x0 = self.rollout(batch)
            yield self.student_loss(x0, batch)
            x0 = x0.detach()
        else:
            with torch.no_grad():
                x0 = self.rollout(batch)
        yield from self.follow(x0, batch)

    def follow(self, x0: Tensor, batch: Batch) -> Iterator[RoleLoss]:
        """What learns from the student's sample ``x0``, detached, on every step."""
        yield self.critic_loss(x0, batch)

    def rollout(self, batch: Batch) -> Tensor:
        """The student's clean sample; one call carries gradient, at a rung drawn uniformly."""
        noise = self.rng.normal(batch.shape)
        if self.config.rollout == "simulate":
            stop = self.rng.shared_index(len(self.ladder))
            velocity = partial(self.student.velocity, condition=batch.condition)
            return few_step(velocity, noise, self.ladder.times[: stop + 1], self.rng.normal_like)
        if batch.x0 is None:
            raise UserError("DMD2 with rollout 'data' needs latents; use rollout 'simulate' with prompts alone")
        times = torch.tensor(self.ladder.times, dtype=torch.float32, device=noise.device)
        t = times[self.rng.index(len(batch), len(self.ladder))]
        return self.student.x0(add_noise(batch.x0, noise, t), t, batch.condition)

    def student_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """Put the DMD gradient on ``x0``: ``d loss / d x0 = gradient / numel`` (DMD eq. 7)."""
        with torch.no_grad():
            t = self.score_times(len(batch))
            x_t = add_noise(x0, self.rng.normal_like(x0), t)
            fake = self.critic.x0(x_t, t, batch.condition)
            real = self.teacher.x0_guided(x_t, t, batch.condition, batch.negative, self.config.teacher_guidance)
            gradient = dmd_gradient(x0, real=real, fake=fake, given=batch.condition.given)
        loss = 0.5 * batch.mean((x0 - (x0 - gradient).detach()).square())
        return RoleLoss("student", loss, {"dmd_gradient_rms": batch.mean(gradient.square()).sqrt()})

    def critic_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """Flow matching on the student's samples, conditional only."""
        t, noise = self.score_times(len(batch)), self.rng.normal_like(x0)
        u = self.critic.velocity(add_noise(x0, noise, t), t, batch.condition)
        return RoleLoss("critic", batch.mean((u - velocity_target(x0, noise)).square()))

    def score_times(self, count: int) -> Tensor:
        """Uniform, then shifted, then clamped; one time per sample, all frames share it."""
        return shift_time(self.rng.uniform(count), self.config.score_time_shift).clamp(*self.config.score_time_range)


def dmd_gradient(x0: Tensor, *, real: Tensor, fake: Tensor, given: Given | None = None, eps: float = 1e-6) -> Tensor:
    """``(fake - real) / (mean |x0 - real| + eps)`` with the mean over what is generated of each sample (DMD eq. 8)."""
    x0, real, fake = x0.float(), real.float(), fake.float()
    return (fake - real) / (free_means((x0 - real).abs(), given) + eps)
