"""TCM: truncated consistency models (arXiv 2410.14895), the second stage after a consistency model.

Below a transition noise level the frozen first stage answers, so the student spends its capacity above it. Samples at
exactly that level have the first stage as their target: they tie the student to it, and without them a constant student
would have no loss at all.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.methods.consistency_model.cm import CMConfig, CMMethod
from fastvideo.distillation.noise import expand_time
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Condition, UserError
from fastvideo.ranges import LearningRate, NonNegativeFloat, Number, PositiveFloat

TABLE = 4097
"""Points of the quadrature behind the noise levels."""


class TCMConfig(CMConfig):
    """Options of truncated consistency models; `ratio_base` and `samples_per_stage` have no effect here."""

    transition_sigma: PositiveFloat = 1.0
    """Noise level below which the first stage answers; 1 is t = 0.5."""
    log_sigma_mean: Number = 0.0
    """Location of ln(sigma), a Student t cut to levels above the transition."""
    log_sigma_std: PositiveFloat = 0.2
    """Scale of ln(sigma)."""
    degrees_of_freedom: PositiveFloat = 0.01
    """Degrees of freedom of that Student t; a smaller number makes its tail heavier."""
    boundary_share: float = Field(default=0.25, gt=0.0, lt=1.0)
    """Share of a batch at exactly the transition."""
    boundary_weight: NonNegativeFloat = 0.1
    """Weight of those samples' mean beside that of the others."""
    learning_rate: LearningRate = 5e-5
    """Learning rate."""


class TCMMethod(CMMethod):
    """Student, the frozen first stage, and for distillation a frozen teacher."""

    Config = TCMConfig
    config: TCMConfig
    frozen_roles = ("cm_teacher",)
    summary = "truncated consistency model, the second stage after cm (arXiv 2410.14895)"

    def __init__(self, config: TCMConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.first_stage = bundle["cm_teacher"]
        self.transition = config.transition_sigma / (1 + config.transition_sigma)
        below = [time for time in ladder.times if time < self.transition]
        if below:
            raise UserError(
                f"ladder: times {below} are below the transition {self.transition:g} (method.transition_sigma "
                f"{config.transition_sigma:g}), where this student is not trained: leave them out"
            )
        if config.sigma_range[1] <= config.transition_sigma:
            raise UserError(
                f"method.sigma_range: ends at {config.sigma_range[1]:g}, which is not above the transition "
                f"{config.transition_sigma:g}"
            )

    @property
    def ratio(self) -> float:
        """Constant: the schedule's upper bound."""
        return self.config.max_ratio

    def noise_levels(self, count: int) -> Tensor:
        """Float64 ``[count]``: a random share at exactly the transition, the others above it."""
        sigma = truncated_student(self.rng.uniform(count), self.config)
        boundary = self.rng.uniform(count).argsort()[: self.boundary_count(count)]
        return sigma.index_fill(0, boundary, self.config.transition_sigma)

    def boundary_count(self, count: int) -> int:
        """Number of ``count`` samples at the transition: at least one, and never all."""
        return min(max(1, round(self.config.boundary_share * count)), max(1, count - 1))

    def consistency(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The student's estimate at and above the transition, the first stage's below.

        Both run at all times, because ranks that run different forwards deadlock.
        """
        above = expand_time(t, x_t) >= torch.tensor(self.transition, dtype=t.dtype, device=t.device)
        with torch.no_grad():
            below = self.first_stage.x0(x_t, t, condition)
        return self.student.x0(x_t, t, condition).where(above, below)

    def reduce(self, losses: Tensor, t: Tensor) -> Tensor:
        """Mean over samples above the transition, plus ``boundary_weight`` times the mean over those at it."""
        at = t == torch.tensor(self.transition, dtype=t.dtype, device=t.device)
        means = [(losses * which).sum() / which.sum().clamp_min(1) for which in (~at, at)]
        return means[0] + self.config.boundary_weight * means[1]


def truncated_student(uniform: Tensor, config: TCMConfig) -> Tensor:
    """Map uniform numbers to noise levels: ``ln sigma`` is Student t, cut to the transition and the largest level.

    With ``ln sigma = mean + std sqrt(nu) sinh(y)`` the density in ``y`` is ``cosh(y)^-nu``, smooth for any tail;
    linear interpolation inverts its cumulative sum.
    """
    scale = config.log_sigma_std * math.sqrt(config.degrees_of_freedom)
    bounds = config.transition_sigma, config.sigma_range[1]
    low, high = (math.asinh((math.log(sigma) - config.log_sigma_mean) / scale) for sigma in bounds)
    y = torch.linspace(low, high, TABLE, dtype=torch.float64, device=uniform.device)
    density = y.cosh().pow(-config.degrees_of_freedom)
    cumulative = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, y)])
    wanted = uniform.double() * cumulative[-1]
    right = torch.searchsorted(cumulative, wanted, right=True).clamp(1, TABLE - 1)
    share = (wanted - cumulative[right - 1]) / (cumulative[right] - cumulative[right - 1])
    drawn = y[right - 1] + share * (y[right] - y[right - 1])
    sigma = torch.exp(config.log_sigma_mean + scale * drawn.sinh())
    return sigma.clamp(config.transition_sigma * (1 + 1e-6), config.sigma_range[1])
