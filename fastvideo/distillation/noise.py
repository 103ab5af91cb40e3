"""Rectified flow and its exact conversions: the only schedule that methods see.

``x_t = (1 - t) x0 + t noise`` with ``t`` in ``[0, 1]`` (1 is pure noise) and velocity ``u = noise - x0``. Any other
Gaussian interpolant ``x = alpha x0 + sigma noise`` (VP, EDM, TrigFlow) equals it after a rescaling that keeps
``alpha / sigma`` (SNR matching); adapters convert.

Times ``[B]`` or per frame ``[B, F]`` broadcast against latents ``[B, C, F, H, W]``. They are float32 or better, because
bf16 rounds 0.999 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", float, Tensor)
TIME_DTYPES = (torch.float32, torch.float64)


def full_time(x: Tensor, t: float) -> Tensor:
    """Float32 ``[B]`` filled with ``t``."""
    return torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Reshape ``t`` to broadcast against ``like`` ``[B, C, F, H, W]`` (or ``[B, ...]``); TypeError below float32."""
    if t.dtype not in TIME_DTYPES:
        raise TypeError(f"time must be float32 or float64, got {t.dtype}: lower precision moves the noise level")
    if t.ndim == 1:
        return t.view(-1, *[1] * (like.ndim - 1))
    return t.view(t.shape[0], 1, t.shape[1], *[1] * (like.ndim - 3))


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t = (1 - t) x0 + t noise``."""
    t = expand_time(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """``u = noise - x0``."""
    return noise - x0


def velocity_to_x0(x_t: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """``x0 = x_t - t u``."""
    return x_t - expand_time(t, x_t) * u


def velocity_to_noise(x_t: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """``noise = x_t + (1 - t) u``."""
    return x_t + (1 - expand_time(t, x_t)) * u


def velocity_to_score(x_t: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """``score = -noise / t``; diverges at ``t = 0``."""
    return -velocity_to_noise(x_t, u, t) / expand_time(t, x_t)


def x0_to_velocity(x_t: Tensor, x0: Tensor, t: Tensor, eps: float = 1e-6) -> Tensor:
    """``u = (x_t - x0) / t`` with ``t`` clamped at ``eps``; prefer a network's native velocity near ``t = 0``."""
    return (x_t - x0) / expand_time(t, x_t).clamp_min(eps)


def guide(unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance in the standard convention: 1 is the conditional prediction, 0 the unconditional."""
    return unconditional + guidance * (conditional - unconditional)


def shift_time(t: T, shift: float) -> T:
    """``S t / (1 + (S - 1) t)``: adds ``ln S`` to ``logit(t)``; 0 and 1 stay; the inverse is shift ``1 / S``."""
    return shift * t / (1 + (shift - 1) * t)


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
