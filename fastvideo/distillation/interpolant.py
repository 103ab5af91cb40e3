"""Other Gaussian schedules and parameterisations, and their exact conversions to rectified flow.

An interpolant ``x = alpha x0 + sigma noise`` (VP, EDM, TrigFlow) equals rectified flow after a rescaling that keeps
``alpha / sigma`` (SNR matching). Shapes are those of :mod:`~fastvideo.distillation.noise`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.distillation.noise import expand_time


def velocity_to_noise(x_t: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """``noise = x_t + (1 - t) u``."""
    return x_t + (1 - expand_time(t, x_t)) * u


def velocity_to_score(x_t: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """``score = -noise / t``; diverges at ``t = 0``."""
    return -velocity_to_noise(x_t, u, t) / expand_time(t, x_t)


@dataclass(frozen=True)
class Interpolant:
    """Coefficients ``[B]`` (or ``[B, F]``) of ``x = alpha x0 + sigma noise``."""

    alpha: Tensor
    sigma: Tensor

    @staticmethod
    def rectified_flow(t: Tensor) -> Interpolant:
        """``alpha = 1 - t``, ``sigma = t``."""
        return Interpolant(1 - t, t)

    @staticmethod
    def variance_preserving(alphas_cumprod: Tensor) -> Interpolant:
        """``alpha = sqrt(abar)``, ``sigma = sqrt(1 - abar)`` of ``abar`` at the steps."""
        return Interpolant(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())

    @staticmethod
    def edm(sigma: Tensor) -> Interpolant:
        """``alpha = 1``: the variance-exploding form of EDM."""
        return Interpolant(torch.ones_like(sigma), sigma)

    @staticmethod
    def trigflow(angle: Tensor) -> Interpolant:
        """``alpha = cos``, ``sigma = sin`` of an angle in ``[0, pi / 2]`` (data std 1)."""
        return Interpolant(angle.cos(), angle.sin())

    @property
    def flow_time(self) -> Tensor:
        """Rectified-flow time with the same signal-to-noise ratio: ``sigma / (alpha + sigma)``."""
        return self.sigma / (self.alpha + self.sigma)

    def to_flow(self, x: Tensor) -> Tensor:
        """Sample on the rectified-flow schedule: ``x / (alpha + sigma)``."""
        return x / expand_time(self.alpha + self.sigma, x)

    def from_flow(self, x_t: Tensor) -> Tensor:
        """Inverse of :meth:`to_flow`."""
        return x_t * expand_time(self.alpha + self.sigma, x_t)

    def x0_from_noise(self, x: Tensor, noise: Tensor) -> Tensor:
        """``(x - sigma noise) / alpha``; loses precision where ``alpha`` is small."""
        return (x - expand_time(self.sigma, x) * noise) / expand_time(self.alpha, x)

    def noise_from_x0(self, x: Tensor, x0: Tensor) -> Tensor:
        """``(x - alpha x0) / sigma``."""
        return (x - expand_time(self.alpha, x) * x0) / expand_time(self.sigma, x)

    def x0_from_v(self, x: Tensor, v: Tensor) -> Tensor:
        """``x0`` of Salimans' ``v = alpha noise - sigma x0`` (arXiv 2202.00512)."""
        alpha, sigma = expand_time(self.alpha, x), expand_time(self.sigma, x)
        return (alpha * x - sigma * v) / (alpha**2 + sigma**2)

    def noise_from_v(self, x: Tensor, v: Tensor) -> Tensor:
        """``noise`` of Salimans' ``v``."""
        alpha, sigma = expand_time(self.alpha, x), expand_time(self.sigma, x)
        return (sigma * x + alpha * v) / (alpha**2 + sigma**2)

    def flow_velocity_from_noise(self, x: Tensor, noise: Tensor) -> Tensor:
        """Rectified-flow velocity ``noise - x0`` of a noise prediction; ``alpha`` must not be 0."""
        alpha, sigma = expand_time(self.alpha, x), expand_time(self.sigma, x)
        return ((alpha + sigma) * noise - x) / alpha

    def flow_velocity_from_v(self, x: Tensor, v: Tensor) -> Tensor:
        """Rectified-flow velocity ``noise - x0`` of a v-prediction, without division by a small number."""
        return self.noise_from_v(x, v) - self.x0_from_v(x, v)


def flow_time_to_variance_preserving(t: Tensor) -> Tensor:
    """``abar`` whose VP interpolant has the signal-to-noise ratio of rectified-flow time ``t``."""
    return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)


def flow_time_to_trigflow(t: Tensor) -> Tensor:
    """TrigFlow angle with ``tan(angle) = t / (1 - t)`` (data std 1)."""
    return torch.atan2(t, 1 - t)
