"""The flow-map loss of AnyFlow (arXiv 2605.13724), which both of its stages train on: data alone, no teacher.

The mean velocity's own derivative, by central difference, gives its target, as in MeanFlow; guidance is fused into the
network, so that it samples without.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.jvp import DerivativeConfig, JVPMode, derivative
from fastvideo.distillation.noise import add_noise, expand_time, shift_time, velocity_target
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.schedule import Guidance
from fastvideo.distillation.tangent import mean_velocity_target
from fastvideo.distillation.types import Batch, free_means


class FlowMapLossConfig(DerivativeConfig):
    """Options of the flow-map loss."""

    jvp: JVPMode = "central_difference"
    """`central_difference`, as published, or `autodiff`."""
    jvp_step: PositiveFloat = 5e-3
    """Step of the central difference, in time."""
    velocity_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the global batch with `r = t`, which regresses the velocity."""
    consistency_share: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share with `r = 0`; the rest has both times free."""
    flow_time_shift: PositiveFloat = 5.0
    """Shift of both times."""
    fused_guidance: Guidance = 3.0
    """Guidance that the network learns to have built in; 1 is none."""
    caption_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of samples that train the negative prediction."""
    balance: bool = True
    """Weigh samples with `r < t` so that each counts like a mean one with `r = t` (over a process's micro-batch)."""


class FlowMapLoss:
    """The loss of one role.

    Args:
        config: its options.
        student: the flow map.
        rng: where times, noise and dropped captions come from.
    """

    def __init__(self, config: FlowMapLossConfig, student: RoleHandle, rng: RandomStreams) -> None:
        self.config, self.student, self.rng = config, student, rng
        self.derivative = derivative(config.jvp, config.jvp_step)

    def __call__(self, batch: Batch) -> Tensor:
        """The scalar loss of a batch at times of its own."""
        t, r = self.times(len(batch))
        keep = self.rng.uniform(len(batch)) >= self.config.caption_dropout
        losses = self.per_sample(batch, self.rng.normal_like(batch.latents), t, r, keep)
        return (balanced(losses, r == t) if self.config.balance else losses).mean()

    def per_sample(self, batch: Batch, noise: Tensor, t: Tensor, r: Tensor, keep: Tensor) -> Tensor:
        """``w(t) mean (u_g - y)^2`` of each sample, ``[B]``.

        ``u_g = (u(c) - (1 - g) u(negative)) / g`` is regressed to ``y = v - (t - r) (du/dt) / g`` with
        ``v = noise - x0``: ``u(c)`` then is the guided velocity. Where ``keep`` is false the caption is dropped, and
        with it the guidance.
        """
        g, condition = self.config.fused_guidance, batch.condition.where(keep, batch.negative)
        share = expand_time(torch.full_like(t, 1 / g).where(keep, 1.0), noise)
        x_t, v = add_noise(batch.latents, noise, t), velocity_target(batch.latents, noise)
        u = partial(self.student.velocity, condition=condition, r=r)
        slope = self.derivative(u, x_t, t, v, torch.ones_like(t), floor=r)
        prediction = u(x_t, t)
        if g != 1.0:
            with torch.no_grad():
                negative = self.student.velocity(x_t, t, batch.negative, r=r)
            prediction = negative + share * (prediction - negative)
        error = (prediction - mean_velocity_target(v, share * slope, t, r)).square()
        return free_means(expand_time(beta_weight(t), error) * error, condition.given).flatten()

    def times(self, count: int) -> tuple[Tensor, Tensor]:
        """``t >= r``: two shifted uniform draws, of which a share has ``r = t`` and another ``r = 0``."""
        one, other = (shift_time(self.rng.uniform(count), self.config.flow_time_shift) for _ in range(2))
        t, r, place = torch.maximum(one, other), torch.minimum(one, other), self.rng.places(count)
        equal = self.config.velocity_share
        r = torch.where(place < equal + self.config.consistency_share, torch.zeros_like(r), r)
        return t, torch.where(place < equal, t, r)


def beta_weight(t: Tensor) -> Tensor:
    """``t sqrt(1 - t)``, with mean 1 over uniform times: AnyFlow's weight of noise levels."""
    return 15 / 4 * t * (1 - t).sqrt()


def balanced(losses: Tensor, equal: Tensor, eps: float = 1e-5) -> Tensor:
    """Losses ``[B]`` whose other samples count like the mean of those with ``equal``; none of these, like the mean."""
    level = (losses[equal] if bool(equal.any()) else losses).detach().mean()
    return torch.where(equal, losses, losses * level / (losses.detach() + eps))
