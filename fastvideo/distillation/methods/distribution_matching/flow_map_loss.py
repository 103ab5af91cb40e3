"""Flow-map loss of both AnyFlow stages (arXiv 2605.13724), from data without a teacher.

As in MeanFlow, the derivative of the mean velocity gives its target; guidance is fused into the network, which then
samples without.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.caption_dropout import without_captions
from fastvideo.distillation.config.base import GuidanceNumber
from fastvideo.distillation.jvp import DerivativeConfig, JVPMode, derivative
from fastvideo.distillation.noise import add_noise, expand_time, shift_time, velocity_target
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.tangent import mean_velocity_target
from fastvideo.distillation.types import Batch, mean_over_generated
from fastvideo.ranges import Fraction, PositiveFloat


class FlowMapLossConfig(DerivativeConfig):
    """Options of the flow-map loss."""

    jvp: JVPMode = "central_difference"
    """`central_difference`, as published, or `autodiff`."""
    jvp_step: PositiveFloat = 5e-3
    """Step of the central difference, in time."""
    velocity_share: Fraction = 0.5
    """Share of the global batch with `r = t`, which regresses the velocity."""
    consistency_share: Fraction = 0.25
    """Share with `r = 0`; the rest draws both times."""
    flow_time_shift: PositiveFloat = 5.0
    """Shift of both times."""
    fused_guidance: GuidanceNumber = 3.0
    """Guidance that is built into the network; 1 is none."""
    caption_dropout: Fraction = 0.1
    """Share of samples that train the negative prediction."""
    balance: bool = True
    """Weight samples with `r < t` to the mean loss of those with `r = t` (within a process's micro-batch)."""


class FlowMapLoss:
    """Loss of a flow map; ``rng`` draws times, noise and dropped captions."""

    def __init__(self, config: FlowMapLossConfig, student: RoleHandle, rng: RandomStreams) -> None:
        self.config, self.student, self.rng = config, student, rng
        self.derivative = derivative(config.jvp, config.jvp_step)

    def __call__(self, batch: Batch) -> Tensor:
        """Scalar loss of a batch at drawn times."""
        t, r = self.times(len(batch))
        keep = self.rng.uniform(len(batch)) >= self.config.caption_dropout
        losses = self.per_sample(batch, self.rng.normal_like(batch.latents), t, r, keep)
        return (balanced(losses, r == t) if self.config.balance else losses).mean()

    def per_sample(self, batch: Batch, noise: Tensor, t: Tensor, r: Tensor, keep: Tensor) -> Tensor:
        """``w(t) mean (u_g - y)^2`` per sample, ``[B]``.

        ``u_g = (u(c) - (1 - g) u(negative)) / g`` is regressed on ``y = v - (t - r) (du/dt) / g`` with
        ``v = noise - x0``, so that ``u(c)`` becomes the guided velocity. Where ``keep`` is false, caption and guidance
        are dropped.
        """
        g, condition = self.config.fused_guidance, without_captions(batch, keep)
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
        return mean_over_generated(expand_time(beta_weight(t), error) * error, batch.left_out(error)).flatten()

    def times(self, count: int) -> tuple[Tensor, Tensor]:
        """``t >= r``, float32 ``[count]``: two shifted uniform draws; a share has ``r = t``, another ``r = 0``."""
        one, other = (shift_time(self.rng.uniform(count), self.config.flow_time_shift) for _ in range(2))
        t, r, position = torch.maximum(one, other), torch.minimum(one, other), positions(self.rng, count)
        equal = self.config.velocity_share
        r = torch.where(position < equal + self.config.consistency_share, torch.zeros_like(r), r)
        return t, torch.where(position < equal, t, r)


def beta_weight(t: Tensor) -> Tensor:
    """AnyFlow's weight of noise levels: ``t sqrt(1 - t)``, scaled to mean 1 over uniform times."""
    return 15 / 4 * t * (1 - t).sqrt()


def balanced(losses: Tensor, equal: Tensor, eps: float = 1e-5) -> Tensor:
    """Losses ``[B]``, the others scaled to the mean of those with ``equal`` (or of all, if there are none).

    The device decides, so the host need not wait for it.
    """
    chosen = torch.where(equal.any(), equal, True)
    level = losses.detach().where(chosen, 0.0).sum() / chosen.sum()
    return torch.where(equal, losses, losses * level / (losses.detach() + eps))


def positions(rng: RandomStreams, count: int) -> Tensor:
    """Float32 ``[count]`` in ``[0, 1)``: positions of this rank's samples in an even grid over all ranks.

    Cutting the grid gives shares of the global batch, exact to one sample. Its start is drawn, equal on all ranks, so
    that a batch of one meets every share in turn.
    """
    start = rng.shared_uniform()
    own = torch.arange(rng.rank * count, (rng.rank + 1) * count, dtype=torch.float64)
    return ((start + own / (rng.ranks * count)) % 1.0).float().to(rng.device)
