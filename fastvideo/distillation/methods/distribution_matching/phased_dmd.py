"""Phased DMD: distribution matching of a student of two experts, each on its range of noise (arXiv 2510.27684).

The expert of high noise ends at a time ``s``, the boundary, and is matched to the teacher on its noisy samples ``x_s``;
that of low noise goes on to clean samples. Each phase has its steps of the ladder, score times and scoring experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.config.base import Shares, Time
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.methods.distribution_matching.phase import Phase, boundary_of_phases, within
from fastvideo.distillation.methods.distribution_matching.refused import refused
from fastvideo.distillation.noise import add_noise, full_time
from fastvideo.distillation.rng import MARGIN, RandomStreams
from fastvideo.distillation.rollout import Ladder, few_step, renoise
from fastvideo.distillation.types import Batch, RoleLoss, UserError
from fastvideo.ranges import NonNegativeInt

CLEAR = 0.02
"""Distance of score times from ``s`` in the phase of high noise: the target's variance has no bound there."""


class PhasedDMDConfig(DMD2Config):
    """Options of Phased DMD."""

    experts: Literal["both", "high", "low"] = "both"
    """Phases that are trained: `high` ends at the boundary, `low` goes on from there to clean videos, `both` take
    turns, one for each `generator_update_interval` steps. The expert of a phase that is not trained stays as it is, to
    the bit."""
    boundary: Time | None = None
    """Time between the phases, for a student of one network; that of its experts for a student of two. The default for
    one network is in the middle of the ladder, or that of the teacher's experts if it divides the ladder alike."""
    teacher_start_steps: NonNegativeInt = 0
    """Guided steps of the teacher from noise to the start of the phase `low`; 0 starts from the student's own phase
    `high`, which fits its sampling, and wants that phase to be trained."""
    score_and_train: Annotated[bool, refused("its phases score noisy samples in a call of their own")] = False
    critic_sees_rung: Annotated[bool, refused("each phase has its own score times")] = False
    rung_shares: Annotated[Shares, refused("each phase draws among its own steps", "empty")] = ()


class PhasedDMDMethod(DMD2Method):
    """Student of two phases, frozen teacher, critic."""

    Config = PhasedDMDConfig
    config: PhasedDMDConfig
    bridges = False
    one_expert_rollouts = ("simulate", "data")
    summary = "Phased DMD, distribution matching of each of two experts on its range of noise (arXiv 2510.27684)"

    def __init__(self, config: PhasedDMDConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        scoring = self.teacher.boundary or self.critic.boundary
        self.boundary = boundary_of_phases(self.student.boundary, scoring, config.boundary, ladder.times)
        self.above = sum(time >= self.boundary for time in ladder.times)
        self.high = config.experts != "low"
        self.phase = Phase(self.boundary)
        self._check()
        self.notes = (f"phases: {self.above} steps from 1 to {self.boundary:g}, {len(ladder) - self.above} below",)

    @classmethod
    def idle_expert_of(cls, config: DMD2Config) -> str | None:
        assert isinstance(config, PhasedDMDConfig)
        return {"high": "transformer_2", "low": "transformer", "both": None}[config.experts]

    def _check(self) -> None:
        """Each trained phase has steps and score times, and one expert of teacher and critic."""
        for role in (self.teacher, self.critic):
            if role.boundary not in (None, self.boundary):
                way = f"set method.boundary: {role.boundary:g}"
                way = way if self.student.boundary is None else "take a ladder without steps between these two times"
                own = f"roles.{role.name}: its experts change at {role.boundary:g}"
                raise UserError(f"{own}, the student's phases at {self.boundary:g}; both have to be one: {way}")
        steps = {"high": self.above, "low": len(self.ladder) - self.above}
        for side in ("high", "low"):
            if self.config.experts in (side, "both") and not steps[side]:
                shown = ", ".join(f"{time:g}" for time in self.ladder.times)
                raise UserError(f"ladder ({shown}): no step is {side} of the boundary {self.boundary:g} between phases")
            low, high = self._range(side == "high")
            if self.config.experts in (side, "both") and low >= high:
                given = list(self.config.score_time_range)
                raise UserError(f"method.score_time_range {given} holds no time for the phase {side}")

    def _range(self, high: bool) -> tuple[float, float]:
        """Lowest and highest score time of a phase."""
        least, most = self.config.score_time_range
        return (max(least, self.boundary + CLEAR), most) if high else (least, min(most, self.boundary - MARGIN))

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """As DMD2's, of the phase whose turn it is."""
        if self.config.experts == "both":
            self.high = step // self.config.generator_update_interval % 2 == 0
        yield from super().losses(batch, step)

    def rollout(self, batch: Batch) -> Tensor:
        """Sample of the phase: ``x_s`` of the high one, a clean one of the low one; one call has gradient."""
        count = self.above if self.high else len(self.ladder) - self.above
        stop = self.rng.shared_index(count) + (0 if self.high else self.above)
        x0 = self._clean(batch, stop)
        return add_noise(x0, self.rng.normal_like(x0), full_time(x0, self.boundary)) if self.high else x0

    def _clean(self, batch: Batch, stop: int) -> Tensor:
        """The student's clean estimate at step ``stop`` of the ladder."""
        times, noise = self.ladder.times[: stop + 1], self.rng.normal(batch.shape)
        velocity = partial(self.student.velocity, condition=batch.condition)
        if self.config.rollout == "data":
            return self._last(batch, add_noise(batch.latents, noise, full_time(noise, times[-1])), times[-1])
        if self.high or not self.config.teacher_start_steps:
            return few_step(velocity, noise, times, self.rng.normal_like)
        state = self._from_teacher(batch, noise, times[self.above])
        return self._last(batch, renoise(velocity, state, times[self.above :], self.rng.normal_like), times[-1])

    def _last(self, batch: Batch, x: Tensor, time: float) -> Tensor:
        return self.student.x0(x, full_time(x, time), batch.condition)

    @torch.no_grad()
    def _from_teacher(self, batch: Batch, noise: Tensor, end: float) -> Tensor:
        """State at ``end`` of the teacher's guided flow, in equal steps."""
        count, x = self.config.teacher_start_steps, noise
        guided = partial(self.teacher.guided_velocity, guidance=self.config.teacher_guidance)
        for t, after in itertools.pairwise(1 - (1 - end) * i / count for i in range(count + 1)):
            x = x - (t - after) * guided(x, full_time(x, t), batch.condition, batch.negative)
        return x

    def student_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """DMD loss of the phase; the high one compares estimates of ``x_s``, which here is ``x0``."""
        if not self.high:
            return super().student_loss(x0, batch)
        guidance = self.config.teacher_guidance
        with torch.no_grad():
            x_t, t, _ = self.renoise_sample(x0)
            fake = self.critic.velocity(x_t, t, batch.condition)
            real = self.teacher.guided_velocity(x_t, t, batch.condition, batch.negative, guidance)
            fake, real = (self.phase.estimate(x_t, u, t) for u in (fake, real))
            gradient = self.gradient(x0, real, fake, batch)
        loss = 0.5 * batch.mean((x0 - (x0 - gradient).detach()).square())
        return RoleLoss("student", loss, {"dmd_gradient_rms": batch.mean(gradient.square()).sqrt()})

    def renoise_sample(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As DMD2's; in the phase of high noise ``x0`` is ``x_s``."""
        if not self.high:
            return super().renoise_sample(x0)
        t, noise = self.score_times(len(x0)), self.rng.normal_like(x0)
        return self.phase.add_noise(x0, noise, t), t, self.phase.velocity_target(x0, noise, t)

    def score_times(self, count: int) -> Tensor:
        """Shifted uniform times ``[count]`` in the range of the phase."""
        return within(self.rng.uniform(count), *self._range(self.high), self.config.score_time_shift)
