"""Variance-preserving schedules on a table of 1000 noise levels, seen from rectified flow.

The checkpoint's scheduler holds the table (CogVideoX: ``snr_shift_scale`` 3 for 2B, 1 for 5B). Its last entry is pure
noise, ``alpha = 0`` (zero terminal SNR, arXiv 2305.08891); its first is a little noisy, ``t`` about 0.03 to 0.05.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.pipeline import load_config
from fastvideo.distillation.noise import Interpolant
from fastvideo.distillation.types import UserError

ON_GRID = 2e-3
"""Steps within which a time counts as one of the table: float32 places ``t`` to 3e-4 of the narrowest step."""


class NoiseGrid:
    """The noise levels of a CogVideoX scheduler.

    Args:
        config: of the scheduler, from its file.

    Raises:
        UserError: for a scheduler that is not v-prediction on a table that ends in pure noise.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers import CogVideoXDDIMScheduler

        written_out = config.get("trained_betas")  # by an export: shifted and rescaled already
        if config.get("prediction_type") != "v_prediction" or not (written_out or config.get("rescale_betas_zero_snr")):
            raise UserError(
                "the scheduler of a CogVideoX model has prediction_type v_prediction and rescale_betas_zero_snr true, "
                f"this one {config.get('prediction_type')} and {config.get('rescale_betas_zero_snr')}"
            )
        self.config = {**config, "snr_shift_scale": 1.0} if written_out else dict(config)
        self.scheduler = CogVideoXDDIMScheduler.from_config(self.config)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        if written_out:
            self.alphas_cumprod = (1 - torch.tensor(written_out, dtype=torch.float64)).cumprod(0)
        self.times = Interpolant.variance_preserving(self.alphas_cumprod).flow_time
        """Rectified-flow time of every timestep, float64 ``[1000]``, rising to exactly 1."""

    def timestep(self, t: Tensor) -> Tensor:
        """The timestep, float32 in ``[0, 999]``, whose noise level rectified-flow time ``t`` (any shape) has.

        Whole on the table's own times. Between them it is a fraction, linear in ``t``: the sinusoidal embedding is
        smooth, and a rounded one would misstate the noise by half a step and have no derivative. Below the first
        level, which no training video was cleaner than, it stays 0.
        """
        grid = self.times.to(t.device, torch.float32)
        t = t.float().clamp(grid[0], grid[-1])
        above = torch.searchsorted(grid, t.contiguous()).clamp_min(1)
        below = above - 1
        exact = below + (t - grid[below]) / (grid[above] - grid[below])
        whole = exact.round()
        # Added as a constant, so that the derivative in t is that of the line on the table's times too.
        return exact + ((whole - exact) * ((whole - exact).abs() < ON_GRID)).detach()

    def times_of(self, timesteps: Sequence[int]) -> tuple[float, ...]:
        """The rectified-flow times of whole timesteps."""
        return tuple(float(self.times[step]) for step in timesteps)

    def teacher_timesteps(self, steps: int) -> list[int]:
        """Timesteps at which the pipeline's own scheduler calls the network for that many steps.

        Raises:
            UserError: if its spacing does not start from pure noise.
        """
        self.scheduler.set_timesteps(steps)
        timesteps: list[int] = self.scheduler.timesteps.tolist()
        if steps == 1:  # numpy's linspace of one point is its start, the clean end
            return [len(self.times) - 1]
        if timesteps[0] != len(self.times) - 1:
            raise UserError(
                f"the scheduler's timestep_spacing {self.config.get('timestep_spacing', 'leading')!r} starts at "
                f"{timesteps[0]}, which is not pure noise; trailing and linspace do start there"
            )
        return timesteps


@lru_cache(maxsize=8)
def noise_grid(source: str) -> NoiseGrid:
    """The noise levels of a pipeline folder."""
    from diffusers import CogVideoXDDIMScheduler

    return NoiseGrid(load_config(CogVideoXDDIMScheduler, source, "scheduler"))


def variance_preserving(t: Tensor) -> Interpolant:
    """Coefficients with the signal-to-noise ratio of rectified-flow time ``t``; exact at both ends.

    By way of ``abar`` the smaller of the two would be the root of a rounded difference.
    """
    length = torch.hypot(1 - t, t)
    return Interpolant((1 - t) / length, t / length)
