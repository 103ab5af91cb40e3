"""rCM: continuous-time consistency with distribution matching as a regulariser (arXiv 2510.08431), in TrigFlow.

Consistency (as in sCM) keeps the diversity of the teacher's flow; DMD2's gradient sharpens. A student step takes both,
and the critic trains in between. Pitfalls and differences of implementations: ``docs/methods/rcm.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.causal_rollout import Continuation, forced_velocity, roll
from fastvideo.distillation.chunks import Past, spans
from fastvideo.distillation.config.base import Guidance, Shares
from fastvideo.distillation.config.causal import ForcedOptions
from fastvideo.distillation.interpolant import Interpolant
from fastvideo.distillation.jvp import DerivativeConfig, derivative
from fastvideo.distillation.methods.causal import Forced
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.methods.distribution_matching.refused import refused
from fastvideo.distillation.noise import add_noise, expand_time, full_time, velocity_target, velocity_to_x0
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder, Velocity
from fastvideo.distillation.tangent import consistency_error, consistency_tangent, sample_warmup_tangent, trig_field
from fastvideo.distillation.types import Batch, Need, RoleLoss
from fastvideo.ranges import NonNegativeFloat, NonNegativeInt, Number, PositiveFloat, Steps


class RCMConfig(ForcedOptions, DMD2Config, DerivativeConfig):
    """Options of rCM, besides those of DMD2."""

    rollout: Literal["simulate"] = "simulate"
    """Input of the student: its own steps from noise, at random times."""
    rollout_steps: Steps = 4
    """Largest number of those steps: the n-th distribution-matching update takes `n mod rollout_steps + 1`."""
    teacher_guidance: Guidance = 5.0
    """Guidance of the teacher in both terms, standard convention."""
    score_time_shift: PositiveFloat = 5.0
    """Shift of the uniform noise levels at which teacher and critic are compared and the critic is trained."""
    score_and_train: Annotated[bool, refused("its critic rests on the student's steps")] = False
    critic_updates_on_student_steps: Annotated[bool, refused("its critic rests on the student's steps")] = False
    """Not possible here."""
    critic_sees_rung: Annotated[bool, refused("its rollouts take drawn times instead of the ladder's")] = False
    rung_shares: Annotated[Shares, refused("its rollouts take drawn times instead of the ladder's", "empty")] = ()
    """Not possible here."""
    consistency_steps: NonNegativeInt = 1000
    """First steps, on consistency alone; 0 for a student that is a consistency model already."""
    consistency_weight: PositiveFloat = 0.035
    """Weight of the consistency loss beside that of DMD2 (both are means: 100 to 1 in sums at Wan's size)."""
    log_sigma_mean: Number = 0.7
    """Times of consistency and rollout: `tan(angle)` is log-normal with this mean of its logarithm; 1.5 for Wan 14B."""
    log_sigma_std: PositiveFloat = 1.6
    """Standard deviation of that logarithm."""
    tangent_warmup_steps: NonNegativeInt = 1000
    """Steps, of all roles, over which the tangent's unstable terms are faded in; 0 has them from the start."""
    tangent_warmup: Literal["both", "sample"] = "both"
    """Terms that are faded in: `both` as in the sCM paper, or the `sample` term alone as in rCM's own code."""
    tangent_constant: NonNegativeFloat = 0.1
    """Constant added to the tangent's root mean square in its normalisation."""


class RCMMethod(Forced, DMD2Method):
    """Student, frozen teacher, critic."""

    bridges = False
    one_expert_rollouts = ()
    Config = RCMConfig
    config: RCMConfig
    summary = "rCM, consistency with distribution matching: diverse and sharp (arXiv 2510.08431)"

    def __init__(self, config: RCMConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.derivative = derivative(config.jvp, config.jvp_step, (0.0, math.pi / 2))
        self.notes = (*self.notes, config.derivative_note)

    @classmethod
    def needs_of(cls, config: RCMConfig) -> frozenset[Need]:  # type: ignore[override]
        return config.derivative_needs | config.chunk_needs

    @classmethod
    def uses_latents(cls, config: DMD2Config) -> bool:
        return True

    def active_roles(self, step: int) -> tuple[str, ...]:
        """The student alone at first; then the student for one step and the critic for the rest of each interval."""
        after = step - self.config.consistency_steps
        return ("student",) if after < 0 or after % self.config.generator_update_interval == 0 else ("critic",)

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """On a student step consistency, then distribution matching: two graphs in turn, one optimizer step."""
        turn = (step - self.config.consistency_steps) // self.config.generator_update_interval
        if self.active_roles(step) == ("critic",):
            with torch.no_grad():
                x0 = self.rollout(batch, turn)
            yield self.critic_loss(x0, batch)
            return
        yield self.consistency_loss(batch, step)
        if turn >= 0:
            yield self.student_loss(self.rollout(batch, turn), batch)

    def consistency_loss(self, batch: Batch, step: int) -> RoleLoss:
        """sCM along the guided teacher's flow, with a constant weight instead of a learned one."""
        warmup = min(1.0, step / self.config.tangent_warmup_steps) if self.config.tangent_warmup_steps else 1.0
        drawn = self.angles(len(batch)), self.rng.normal_like(batch.latents)
        tangent, error = self.consistency_error(batch, *drawn, warmup)
        metrics = {"tangent_rms": batch.mean(tangent.square()).sqrt()}
        return RoleLoss("student", self.config.consistency_weight * error.mean(), metrics)

    def consistency_error(self, batch: Batch, angle: Tensor, noise: Tensor, warmup: float) -> tuple[Tensor, Tensor]:
        """Tangent before normalisation, and the squared error ``[B]``."""
        x = expand_time(angle.cos(), noise) * batch.latents + expand_time(angle.sin(), noise) * noise
        past, texts = self.past(batch), (batch.condition, batch.negative)
        with torch.no_grad():
            flow = trig_field(forced_velocity(self.teacher, past, *texts, self.config.teacher_guidance))(x, angle)
        field = trig_field(forced_velocity(self.student, past, *texts, 1.0))
        form = consistency_tangent if self.config.tangent_warmup == "both" else sample_warmup_tangent
        constant, given = self.config.tangent_constant, batch.left_out(x)
        return consistency_error(field, x, angle, flow, self.derivative, warmup, constant, given, form)

    def rollout(self, batch: Batch, turn: int = 0) -> Tensor:
        """Clean sample of the student after ``turn mod rollout_steps + 1`` calls, the last with gradient.

        With a ``reach`` the student streams it, each chunk in so many calls on its own past.
        """
        x, reach = self.rng.normal(batch.shape), self.config.reach
        solve = partial(self.solved, earlier=turn % self.config.rollout_steps)
        if reach is None:
            return solve(partial(self.student.velocity, condition=batch.condition), x)
        stream = Continuation(self.student, batch.condition, self.config.context_time, self.rng.normal_like)
        noises = torch.split(x, [end - start for start, end in spans(x.shape[2], reach.chunk)], dim=2)
        return torch.cat([chunk for _, chunk in roll(stream, Past(reach, shared={}), noises, solve)], dim=2)

    def solved(self, velocity: Velocity, noise: Tensor, earlier: int) -> Tensor:
        """Clean sample from ``noise`` after ``earlier`` calls without gradient and one with.

        Times fall from pure noise: each is the lower of the previous one and a draw, per sample.
        """
        x, t = noise, full_time(noise, 1.0)
        with torch.no_grad():
            for _ in range(earlier):
                x0 = velocity_to_x0(x, velocity(x, t), t)
                t = torch.minimum(t, Interpolant.trigflow(self.angles(len(x))).flow_time)
                x = add_noise(x0, self.rng.normal_like(x0), t)
        return velocity_to_x0(x, velocity(x, t), t)

    def critic_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """Velocity matching in TrigFlow on the student's samples: ``hypot(t, 1 - t)`` times the flow's own error."""
        t, noise = self.score_times(len(batch)), self.rng.normal_like(x0)
        error = self.critic.velocity(add_noise(x0, noise, t), t, batch.condition) - velocity_target(x0, noise)
        return RoleLoss("critic", batch.mean((expand_time(torch.hypot(t, 1 - t), error) * error).square()))

    def angles(self, count: int) -> Tensor:
        """Times ``[count]``: ``arctan`` of a log-normal."""
        return (self.config.log_sigma_mean + self.config.log_sigma_std * self.rng.normal((count,))).exp().atan()
