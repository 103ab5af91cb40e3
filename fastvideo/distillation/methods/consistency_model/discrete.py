"""Noise levels, distances and weights of discrete consistency models.

Noise levels are EDM's ``sigma = t / (1 - t)``; everything here is float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastvideo.distillation.parts import Parts
from fastvideo.distillation.types import Scored

LEAST_STEP = 1e-6
"""Smallest difference of two noise levels."""
StepWeighting = Literal[
    "inverse_step", "inverse_root_step", "inverse_c_out", "inverse_c_out_squared", "inverse_square", "none"
]


def lower_level(sigma: Tensor, ratio: float) -> Tensor:
    """``sigma (1 - (1 - ratio) n)``, ``n = 1 + 8 sigmoid(-sigma)``, at least 0, the data (ECT arXiv 2406.14548)."""
    lower = sigma * (1 - (1 - ratio) * (1 + 8 * torch.sigmoid(-sigma)))
    return torch.minimum(lower, sigma - LEAST_STEP).clamp_min(0)


def step_weights(t: Tensor, r: Tensor, weighting: StepWeighting, sigma_data: float) -> Tensor:
    """Weight ``[B]`` of samples at rectified-flow times ``t`` and ``r``."""
    sigma, lower = (time.double() / (1 - time.double()) for time in (t, r))
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    weights = {
        "inverse_step": 1 / (sigma - lower),
        "inverse_root_step": (sigma - lower) ** -0.5,
        "inverse_c_out": 1 / c_out,
        "inverse_c_out_squared": c_out**-2,
        "inverse_square": sigma**-2,
        "none": torch.ones_like(sigma),
    }
    return weights[weighting]


def sample_distances(estimate: Tensor, target: Tensor, given: Scored | None, huber: float | None) -> Tensor:
    """Distance ``[B]`` of two batches: ``sqrt(d^2 + huber^2) - huber`` (iCT, arXiv 2310.14189), or ``d^2``.

    ``d`` is the Euclidean distance over a sample's generated frames.
    """
    squared = (estimate.double() - target.double()).square()
    if isinstance(given, Parts):
        free = given.balanced(squared)
    else:
        free = squared if given is None else squared.masked_fill(given.frames, 0.0)
    squared = free.flatten(1).sum(dim=1)
    return squared if huber is None else (squared + huber**2).sqrt() - huber
