"""CM: discrete consistency models on the ECT schedule (CM arXiv 2303.01469, iCT 2310.14189, ECT 2406.14548).

The student learns ``f(x_t, t)``, the end of the flow through ``x_t``: its estimate at ``t`` must agree with its own,
without gradient, at a lower ``r``. With a teacher, ``x_r`` is one of its ODE steps (consistency distillation); without,
the same noise on the same data (consistency training). ``f(x, 0) = x`` holds by ``f = x_t - t u``. The schedule uses
EDM's noise levels ``sigma = t / (1 - t)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.config.base import Guidance, MethodConfig, OptimizerConfig, OptimizerKind, OptimizerOptions
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.consistency_model.discrete import (
    StepWeighting,
    lower_level,
    sample_distances,
    step_weights,
)
from fastvideo.distillation.noise import add_noise, expand_time
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, Condition, RoleLoss
from fastvideo.ranges import LearningRate, Number, PositiveFloat, PositiveInt


class CMConfig(MethodConfig, OptimizerOptions):
    """Options of consistency models; noise levels are EDM's sigma = t / (1 - t)."""

    log_sigma_mean: Number = -1.1
    """Mean of ln(sigma) = logit(t) of the training noise levels."""
    log_sigma_std: PositiveFloat = 2.0
    """Standard deviation of ln(sigma)."""
    sigma_range: tuple[PositiveFloat, PositiveFloat] = (0.002, 80.0)
    """Range to which noise levels are clamped; 80 is t = 0.9877."""
    ratio_base: float = Field(default=2.0, gt=1.0)
    """q of ECT: the ratio of lower to upper noise level is about 1 - q^-(k+1) in stage k = 0, 1, ..."""
    samples_per_stage: PositiveInt = 6_400_000
    """Samples of one process per stage."""
    max_ratio: float = Field(default=0.999, gt=0.0, lt=1.0)
    """Upper bound of the ratio."""
    weighting: StepWeighting = "inverse_step"
    """Weight of a sample: 1 / (sigma - sigma_r), its root, 1 / c_out or 1 / c_out^2 of EDM's preconditioning (with
    `sigma_data`), 1 / sigma^2, or 1."""
    sigma_data: PositiveFloat = 1.0
    """Standard deviation of the data in `c_out`; latents are normalised to about 1."""
    metric: Literal["huber", "squared"] = "huber"
    """Distance of two estimates: sqrt(d^2 + c^2) - c with the Euclidean distance d of whole samples, or d^2."""
    huber_constant: PositiveFloat = 1e-8
    """c of `huber`: small is the plain Euclidean distance."""
    solver: Literal["euler", "heun"] = "euler"
    """Step of the teacher: one call, or two and second order."""
    teacher_guidance: Guidance = 5.0
    """Guidance of the teacher, if there is one, in the standard convention."""
    optimizer: OptimizerKind = "radam"
    """Optimizer of the student."""
    learning_rate: LearningRate = 1e-4
    """Learning rate."""


class CMMethod(DistillMethod[CMConfig]):
    """Student, and for distillation a frozen teacher."""

    Config = CMConfig
    trainable_roles = ("student",)
    optional_roles = ("teacher",)
    sampler = "renoise"
    summary = "consistency model on the ECT schedule: distilled with a teacher, trained without (arXiv 2406.14548)"

    def __init__(self, config: CMConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.student, self.teacher = bundle["student"], bundle.get("teacher")
        self.samples_seen = 0

    @classmethod
    def optimizers(cls, config: CMConfig) -> Mapping[str, OptimizerConfig]:
        return {"student": config.optimizer_of(config.learning_rate, config.optimizer)}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        noise, (t, r) = self.rng.normal_like(batch.latents), self.times(len(batch))
        x_t = add_noise(batch.latents, noise, t)
        with torch.no_grad():
            x_r = add_noise(batch.latents, noise, r) if self.teacher is None else self.teacher_step(x_t, t, r, batch)
            target = self.consistency(x_r, r, batch.condition).where(expand_time(r, x_r) > 0, batch.latents)
        estimate = self.consistency(x_t, t, batch.condition)
        ratio = torch.tensor(self.ratio)
        self.samples_seen += len(batch)
        constant = self.config.huber_constant if self.config.metric == "huber" else None
        distances = sample_distances(estimate, target, batch.left_out(estimate), constant)
        weights = step_weights(t, r, self.config.weighting, self.config.sigma_data)
        yield RoleLoss("student", self.reduce(weights * distances, t).float(), {"ratio": ratio})

    @property
    def ratio(self) -> float:
        """``1 - q^-(k+1)`` after ``k`` whole stages (ECT section 3)."""
        stage = self.samples_seen // self.config.samples_per_stage
        return min(1 - self.config.ratio_base ** -(stage + 1), self.config.max_ratio)

    def times(self, count: int) -> tuple[Tensor, Tensor]:
        """Rectified-flow times ``t`` and ``r < t``, float32 ``[count]``."""
        sigma = self.noise_levels(count)
        lower = lower_level(sigma, self.ratio)
        return (sigma / (1 + sigma)).float(), (lower / (1 + lower)).float()

    def noise_levels(self, count: int) -> Tensor:
        """Log-normal, clamped, float64 ``[count]``."""
        log_sigma = self.config.log_sigma_mean + self.config.log_sigma_std * self.rng.normal((count,)).double()
        return log_sigma.exp().clamp(*self.config.sigma_range)

    def teacher_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """``x_r``: one step of the guided teacher's flow from ``x_t``."""
        assert self.teacher is not None
        guided, interval = (batch.condition, batch.negative, self.config.teacher_guidance), expand_time(t - r, x_t)
        u = self.teacher.guided_velocity(x_t, t, *guided)
        if self.config.solver == "euler":
            return x_t - interval * u
        return x_t - interval * (u + self.teacher.guided_velocity(x_t - interval * u, r, *guided)) / 2

    def consistency(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``f(x_t, t)``."""
        return self.student.x0(x_t, t, condition)

    def reduce(self, losses: Tensor, t: Tensor) -> Tensor:
        """Mean of losses ``[B]``."""
        return losses.mean()

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.samples_seen = int(state["samples_seen"])
