"""Rollouts: from noise to clean latents, by the steps that training and sampling share.

They take a velocity function ``(x_t [B, C, F, H, W], t [B]) -> u`` with role and condition bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastvideo.distillation.noise import add_noise, full_time, velocity_to_x0

NoiseLike = Callable[[Tensor], Tensor]
SamplerKind = Literal["renoise", "euler", "flow_map"]


class Velocity(Protocol):
    """``u(x_t, t)``, or a flow map's mean velocity from ``t`` down to ``r``."""

    def __call__(self, x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor: ...


def start(noise: Tensor, t: float) -> Tensor:
    """The state at time ``t`` that stands for pure ``noise``: as large as a sample of unit variance would be there.

    It is the noise itself at ``t = 1``. Ladders of families that end short of pure noise start below.
    """
    return noise if t == 1.0 else math.hypot(1 - t, t) * noise


def renoise(velocity: Velocity, x: Tensor, times: Sequence[float], noise_like: NoiseLike) -> Tensor:
    """State at ``times[-1]`` of the stochastic ("SDE", consistency) sampler, without gradient.

    At each time but the last, ``x0 = x - t u`` and then ``x = (1 - t') x0 + t' noise`` with fresh noise.
    """
    with torch.no_grad():
        for t, after in itertools.pairwise(times):
            x0 = velocity_to_x0(x, velocity(x, full_time(x, t)), full_time(x, t))
            x = add_noise(x0, noise_like(x0), full_time(x0, after))
    return x


def few_step(velocity: Velocity, noise: Tensor, times: Sequence[float], noise_like: NoiseLike) -> Tensor:
    """Clean latents after ``len(times)`` calls from pure ``noise`` at ``times[0]`` (:func:`start`).

    Gradient flows through the last call only (DMD2's backward simulation, arXiv 2405.14867 section 4.5); under
    ``no_grad`` this is the student's sampler.
    """
    x = renoise(velocity, start(noise, times[0]), times, noise_like)
    t = full_time(x, times[-1])
    return velocity_to_x0(x, velocity(x, t), t)


def euler(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate ``dx/dt = u`` from ``times[0]`` to 0 by Euler steps, without gradient: the teacher's sampler."""
    x = start(noise, times[0])
    with torch.no_grad():
        for t, after in zip(times, (*times[1:], 0.0), strict=True):
            x = x - (t - after) * velocity(x, full_time(x, t))
    return x


def flow_map(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Jump from ``times[0]`` to 0, ``x <- x - (t - r) u(x, t, r)`` per time (MeanFlow arXiv 2505.13447, eq. 12)."""
    x = start(noise, times[0])
    for t, r in zip(times, (*times[1:], 0.0), strict=True):
        x = x - (t - r) * velocity(x, full_time(x, t), r=full_time(x, r))
    return x


@torch.no_grad()
def generate(
    kind: SamplerKind, velocity: Velocity, noise: Tensor, times: Sequence[float], noise_like: NoiseLike
) -> Tensor:
    """Clean latents by the named sampler; only ``renoise`` draws from ``noise_like``."""
    if kind == "euler":
        return euler(velocity, noise, times)
    if kind == "flow_map":
        return flow_map(velocity, noise, times)
    return few_step(velocity, noise, times, noise_like)
