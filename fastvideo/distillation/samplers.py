"""Samplers beside the student's rollout (``rollout.few_step``): the teacher's Euler steps, the jumps of a flow map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvideo.distillation.noise import full_time
from fastvideo.distillation.rollout import NoiseLike, SamplerKind, Velocity, few_step, start


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
