"""Rectified flow and its exact conversions: the only schedule that methods see.

``x_t = (1 - t) x0 + t noise`` with ``t`` in ``[0, 1]`` (1 is pure noise) and velocity ``u = noise - x0``. Families of
other schedules convert inside their adapters (``interpolant.py``).

Times ``[B]`` or per frame ``[B, F]`` broadcast against latents ``[B, C, F, H, W]``. They are float32 or better, because
bf16 rounds 0.999 to 1.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", float, Tensor)
GuidanceValue = float | tuple[tuple[float, float], ...]
"""Guidance in the standard convention: a number, or pairs ``(t, g)`` that fall in ``t`` to 0, each the guidance from
its time up to the one before."""
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


def x0_to_velocity(x_t: Tensor, x0: Tensor, t: Tensor, eps: float = 1e-6) -> Tensor:
    """``u = (x_t - x0) / t`` with ``t`` clamped at ``eps``; prefer a network's native velocity near ``t = 0``."""
    return (x_t - x0) / expand_time(t, x_t).clamp_min(eps)


def guide(unconditional: Tensor, conditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance in the standard convention: 1 is the conditional prediction, 0 the unconditional.

    A tensor holds a guidance per sample ``[B]`` or frame ``[B, F]``.
    """
    if isinstance(guidance, Tensor):
        guidance = expand_time(guidance, conditional)
    return unconditional + guidance * (conditional - unconditional)


def guidance_at(guidance: GuidanceValue, t: Tensor) -> float | Tensor:
    """Guidance at times ``t`` ``[B]`` or ``[B, F]``: the number itself, or one for each time."""
    if not isinstance(guidance, tuple):
        return guidance
    found = torch.full_like(t, guidance[-1][1])
    for start, value in reversed(guidance[:-1]):
        found = torch.where(t >= start, value, found)
    return found


def shift_time(t: T, shift: float) -> T:
    """``S t / (1 + (S - 1) t)``: adds ``ln S`` to ``logit(t)``; 0 and 1 stay; the inverse is shift ``1 / S``."""
    return shift * t / (1 + (shift - 1) * t)
