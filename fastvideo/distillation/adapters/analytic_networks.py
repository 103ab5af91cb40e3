"""Networks of the analytic family: Gaussians and mixtures, their flow maps, correlated frames, and an MLP that learns.

Each is a module ``(x_t [B, C, F, H, W], t [B] or [B, F], shift [B]) -> velocity``, in the dtype of ``x_t``, as
:class:`~fastvideo.distillation.adapters.analytic.AnalyticAdapter` calls it. Formulas are of rectified flow:
``x_t = (1 - t) x0 + t noise``, ``alpha = 1 - t`` and ``v_t = alpha^2 s^2 + t^2``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.noise import expand_time

BISECTIONS = 60
"""Halvings of an interval of some ten standard deviations: past the resolution of float64."""


def shifted(mean: Tensor, shift: Tensor, x_t: Tensor) -> Tensor:
    """``mean + shift`` per sample, to broadcast against ``x_t``."""
    return mean + shift.view(-1, *[1] * (x_t.ndim - 1))


class Gaussian(nn.Module):
    """Mean and standard deviation as parameters, so that an exact network can be a student or critic."""

    def __init__(self, mean: float | Sequence[Any], std: float | Sequence[float]) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())

    @property
    def std(self) -> Tensor:
        """Standard deviation of the data, or of each component."""
        return self.log_std.exp()


class Mixture(Gaussian):
    """Weights beside them; ``means`` are ``[K]`` or ``[K][C]``, ``stds`` and ``weights`` ``[K]``."""

    log_weight: Tensor

    def __init__(self, means: Sequence[Any], stds: Sequence[float], weights: Sequence[float]) -> None:
        super().__init__(means, stds)
        self.register_buffer("log_weight", torch.tensor(weights).log().log_softmax(0))


def standardised(x_t: Tensor, t: Tensor, shift: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``(x_t - alpha mu) / sqrt(v_t)`` of each of ``K`` components: ``[*x_t.shape, K]``; ``shift`` ``[B]``."""
    alpha, sigma = (1 - expand_time(t, x_t)).unsqueeze(-1), expand_time(t, x_t).unsqueeze(-1)
    y = x_t.unsqueeze(-1) - alpha * shifted(mean, shift, x_t.unsqueeze(-1))
    return y / (alpha**2 * std**2 + sigma**2).sqrt()


class MixtureDenoiser(Mixture):
    """Exact velocity of a mixture; ``mean`` and ``log_std`` are parameters, so it can be a student or critic."""

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        """Velocity, in the dtype of ``x_t``; ``t`` float ``[B]`` or ``[B, F]``, ``shift`` ``[B]``."""
        alpha, sigma = (1 - expand_time(t, x_t)).unsqueeze(-1), expand_time(t, x_t).unsqueeze(-1)
        mean = shifted(self.mean, shift, x_t.unsqueeze(-1))
        variance = alpha**2 * self.std**2 + sigma**2
        y = x_t.unsqueeze(-1) - alpha * mean
        log_density = self.log_weight - 0.5 * (y**2 / variance + variance.log())
        per_component = -mean + (sigma - alpha * self.std**2) / variance * y
        return (log_density.softmax(-1) * per_component).sum(-1)


class GaussianConsistency(Gaussian):
    """Velocity form ``(x - f) / t`` of the exact consistency function ``f = mu + s y / sqrt(v_t)``.

    Started from pure noise it is the two-parameter generator ``mu + s noise``.
    """

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        """Velocity, in the dtype of ``x_t``."""
        sigma = expand_time(t, x_t)
        alpha, mean = 1 - sigma, shifted(self.mean, shift, x_t)
        x0 = mean + self.std * (x_t - alpha * mean) / (alpha**2 * self.std**2 + sigma**2).sqrt()
        return (x_t - x0) / sigma.clamp_min(1e-6)  # at time 0, where conditioning frames are, x0 is x_t


class GaussianMeanVelocity(Gaussian):
    """Exact mean velocity ``(x_t - x_r) / (t - r)`` of the flow of a Gaussian, without dividing by ``t - r``.

    ``-mu + q y`` with ``q = ((t + r)(1 + s^2) - 2 s^2) / (v_t (1 + sqrt(v_r / v_t)))``; the velocity at ``r = t``.
    """

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor, r: Tensor | None = None) -> Tensor:
        """Mean velocity from ``t`` down to ``r``, in the dtype of ``x_t``."""
        mean, variance = shifted(self.mean, shift, x_t), self.std**2
        t, r = expand_time(t, x_t), expand_time(t if r is None else r, x_t)
        v_t, v_r = (1 - t) ** 2 * variance + t**2, (1 - r) ** 2 * variance + r**2
        slope = ((t + r) * (1 + variance) - 2 * variance) / (v_t * (1 + (v_r / v_t).sqrt()))
        return slope * (x_t - (1 - t) * mean) - mean


class _Path:
    """A 1-D Gaussian mixture on the way from data to noise; tensors end in the dimension of components."""

    def __init__(self, x: Tensor, t: Tensor, mean: Tensor, std: Tensor, weight: Tensor) -> None:
        sigma = expand_time(t, x).unsqueeze(-1)
        self.mean, self.weight = (1 - sigma) * mean, weight
        self.std = ((1 - sigma) ** 2 * std**2 + sigma**2).sqrt()

    def below(self, x: Tensor) -> Tensor:
        """Probability of a smaller value."""
        z = (x.unsqueeze(-1) - self.mean) / self.std
        return torch.sum(self.weight * torch.special.ndtr(z), -1)

    def above(self, x: Tensor) -> Tensor:
        """Probability of a larger value: what keeps its digits in the upper tail."""
        z = (self.mean - x.unsqueeze(-1)) / self.std
        return torch.sum(self.weight * torch.special.ndtr(z), -1)

    def density(self, x: Tensor) -> Tensor:
        """Probability density."""
        z = (x.unsqueeze(-1) - self.mean) / self.std
        return (self.weight * torch.exp(-0.5 * z**2) / (self.std * math.sqrt(2 * math.pi))).sum(-1)


def mixture_flow_map(
    x: Tensor, t: Tensor, r: Tensor, mean: Tensor, std: Tensor, weight: Tensor, shift: Tensor | None = None
) -> Tensor:
    """End of the flow of a 1-D mixture from ``x`` at times ``t`` down to ``r``: ``CDF_r^{-1}(CDF_t(x))``, in float64.

    The flow keeps the order of points, so it maps quantiles. ``mean``, ``std`` and ``weight`` are ``[K]``.
    The first derivative with respect to everything is exact (one Newton step stands on the graph).
    """
    x, t, r, std, weight = x.double(), t.double(), r.double(), std.double(), weight.double()
    means = mean.double() if shift is None else mean.double() + shift.double().view(-1, *[1] * x.ndim)
    start, end = _Path(x, t, means, std, weight), _Path(x, r, means, std, weight)
    below, above = start.below(x), start.above(x)
    with torch.no_grad():
        low, high = (end.mean - 12 * end.std).amin(-1).expand_as(x), (end.mean + 12 * end.std).amax(-1).expand_as(x)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            right = torch.where(below < 0.5, end.below(middle) < below, end.above(middle) > above)
            low, high = middle.where(right, low), high.where(right, middle)
        found = (low + high) / 2
    missing = torch.where(below < 0.5, below - end.below(found), end.above(found) - above)
    return found + missing / end.density(found).clamp_min(1e-300)


class MixtureConsistency(Mixture):
    """Velocity form ``(x - f) / t`` of the exact consistency function of a 1-D mixture: its quantile map."""

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        """Velocity, in the dtype of ``x_t``."""
        end = mixture_flow_map(x_t, t, torch.zeros_like(t), self.mean, self.std, self.log_weight.exp(), shift)
        return ((x_t - end) / expand_time(t, x_t).clamp_min(1e-6)).to(x_t.dtype)


class VectorMixtureDenoiser(Mixture):
    """Exact velocity of a mixture over the channels: every site ``(f, h, w)`` is one draw of ``C`` values.

    ``means`` are ``[K][C]``, ``stds`` ``[K]``.
    """

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        """Velocity, in the dtype of ``x_t``; one posterior over components for all channels of a site."""
        sigma = expand_time(t, x_t).unsqueeze(-1)
        alpha, std = 1 - sigma, self.log_std.exp()
        mean = shifted(self.mean.T[:, None, None, None, :], shift, x_t.unsqueeze(-1))
        variance = alpha**2 * std**2 + sigma**2
        y = x_t.unsqueeze(-1) - alpha * mean
        log_density = self.log_weight - 0.5 * (y**2 / variance + variance.log()).sum(1, keepdim=True)
        per_component = -mean + (sigma - alpha * std**2) / variance * y
        return (log_density.softmax(-1) * per_component).sum(-1)


@dataclass(frozen=True)
class Seen:
    """Frames that a chunk sees beside its own.

    Attributes:
        latents: ``[B, C, n, H, W]``, noisy where a time is above 0.
        times: of each frame, ``[B, n]``.
        positions: numbers of those frames in the video.
        start: number of the chunk's first frame.
    """

    latents: Tensor
    times: Tensor
    positions: tuple[int, ...]
    start: int


class Frames(Gaussian):
    """Gaussian frames with correlation ``a^|i - j|``: AR(1), ``N(mean, std^2 R)`` at every pixel.

    A chunk that sees frames is their conditional Gaussian, exact at any of their times.
    """

    correlation: Tensor

    def __init__(self, mean: float, std: float, correlation: float) -> None:
        super().__init__(mean, std)
        self.register_buffer("correlation", torch.tensor(correlation))

    def correlations(self, positions: Sequence[int]) -> Tensor:
        """Correlations ``[F, F]`` of frames with these numbers."""
        at = torch.tensor(positions, device=self.correlation.device)
        return torch.pow(self.correlation, (at[:, None] - at[None, :]).abs())

    def prior(self, x_t: Tensor, shift: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor]:
        """Mean, to broadcast against ``x_t``, and covariance ``[F, F]`` or ``[B, F, F]`` of its clean frames."""
        mean, own = shifted(self.mean, shift, x_t), x_t.shape[2]
        if seen is None:
            return mean, self.std**2 * self.correlations(range(own))
        positions = (*seen.positions, *range(seen.start, seen.start + own))
        covariance, count = self.std**2 * self.correlations(positions), len(seen.positions)
        alpha = 1 - seen.times
        cross = covariance[count:, :count] * alpha[:, None, :]
        noisy = alpha[:, :, None] * covariance[:count, :count] * alpha[:, None, :]
        gain = cross @ torch.linalg.inv(noisy + torch.diag_embed(seen.times**2))
        y = seen.latents - alpha[:, None, :, None, None] * mean
        answer = torch.einsum("bij,bcjhw->bcihw", gain, y)
        return mean + answer, covariance[count:, count:] - gain @ cross.transpose(1, 2)


class FrameDenoiser(Frames):
    """Exact velocity of correlated frames.

    Times may differ per frame: with ``A = diag(1 - t)``, ``S = diag(t)`` and ``M = A Sigma A + S^2`` it is
    ``(S - Sigma A) M^{-1} (x - A mean) - mean``.
    """

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor, seen: Seen | None = None) -> Tensor:
        """Velocity, in the dtype of ``x_t``."""
        sigma = (t if t.ndim == 2 else t[:, None]).expand(-1, x_t.shape[2])
        alpha, (mean, covariance) = 1 - sigma, self.prior(x_t, shift, seen)
        y = (x_t - alpha[:, None, :, None, None] * mean).movedim(2, -1)
        joint = alpha[:, :, None] * covariance * alpha[:, None, :] + torch.diag_embed(sigma**2)
        gain = (torch.diag_embed(sigma) - covariance * alpha[:, None, :]) @ torch.linalg.inv(joint)
        return torch.einsum("bij,bchwj->bchwi", gain, y).movedim(-1, 2) - mean


class FrameConsistency(Frames):
    """Velocity form of the exact consistency function of correlated frames; from noise ``mean + Sigma^(1/2) noise``."""

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor, seen: Seen | None = None) -> Tensor:
        """Velocity, in the dtype of ``x_t``; all frames share their time."""
        sigma, (mean, covariance) = expand_time(t, x_t), self.prior(x_t, shift, seen)
        values, vectors = torch.linalg.eigh(covariance.double())
        spectrum = values.to(x_t.dtype).view(-1, 1, 1, 1, x_t.shape[2])
        basis: Tensor = vectors.to(x_t.dtype).view(-1, 1, 1, *vectors.shape[-2:])
        level = sigma.movedim(2, -1)[..., :1]
        scale = (spectrum / ((1 - level) ** 2 * spectrum + level**2)).sqrt()
        y = (x_t - (1 - sigma) * mean).movedim(2, -1) @ basis
        end: Tensor = mean + ((scale * y) @ basis.mT).movedim(-1, 2)
        return (x_t - end) / sigma.clamp_min(1e-6)


class SiteMLP(nn.Module):
    """A small learned velocity: an MLP over the channels of every site ``(f, h, w)``, with time and shift beside them.

    Made to learn 1-D and 2-D mixtures; its first weights are random. As a flow map it sees ``t - r`` too, through
    weights that start at zero: it first answers as before.
    """

    def __init__(self, channels: int, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        sizes = [channels + 8, *[width] * depth]
        layers = [nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in itertools.pairwise(sizes)]
        self.body = nn.Sequential(*layers, nn.Linear(width, channels))
        self.span = nn.Linear(2, width, bias=False)
        nn.init.zeros_(self.span.weight)

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor, r: Tensor | None = None) -> Tensor:
        """Velocity, in the dtype of ``x_t``, or mean velocity down to ``r``."""
        time = expand_time(t, x_t).movedim(1, -1).expand(*x_t.movedim(1, -1).shape[:-1], 1)
        waves = [f(math.pi * k * time / 2) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]
        own_shift = shift.to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1)).expand_as(time)
        hidden: Tensor = self.body[0](torch.cat([x_t.movedim(1, -1), time, own_shift, *waves], dim=-1))
        if r is not None:
            span = time - expand_time(r, x_t).movedim(1, -1).expand_as(time)
            hidden = hidden + self.span(torch.cat([span, span.square()], dim=-1))
        for layer in list(self.body)[1:]:
            hidden = layer(hidden)
        return hidden.movedim(-1, 1)
