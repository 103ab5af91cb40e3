"""Variance-preserving schedules on a table of 1000 noise levels, seen from rectified flow.

The checkpoint's scheduler holds the table (CogVideoX: ``snr_shift_scale`` 3 for 2B, 1 for 5B). Its first entry is a
little noisy, ``t`` about 0.03 to 0.05. Its last is pure noise, ``alpha = 0`` (zero terminal SNR, arXiv 2305.08891), or
nearly so: SDXL and Stable Diffusion 1.5 end at ``alpha = 0.068``, which is ``t = 0.936``, and their networks know no
noisier sample. Their pipelines start there from pure noise all the same. :class:`NoiseGrid` does so at every time
above: the network sees the sample, at unit variance, as one of its noisiest level.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastvideo.distillation.adapters.diffusers.pipeline import library_class, load_config
from fastvideo.distillation.interpolant import Interpolant
from fastvideo.distillation.noise import expand_time
from fastvideo.distillation.types import UserError

ON_GRID = 2e-3
"""Steps within which a time counts as one of the table: float32 places ``t`` to 3e-4 of the narrowest step."""


class NoiseGrid:
    """The noise levels of a checkpoint's scheduler, and its network's prediction.

    Args:
        config: of the scheduler, from its file.
        scheduler: diffusers' class of the deterministic sampler on this table, such as ``DDIMScheduler``.

    Raises:
        UserError: for a prediction that is neither ``epsilon`` nor ``v_prediction``, or ``epsilon`` on a table that
            ends in pure noise, which says nothing of a sample there.
    """

    def __init__(self, config: Mapping[str, Any], scheduler: str) -> None:
        cls = library_class("diffusers", scheduler)
        known = inspect.signature(cls.__init__).parameters  # the file may be that of another sampler
        written_out = config.get("trained_betas")  # by an export: shifted and rescaled already
        plain = {"snr_shift_scale": 1.0} if written_out else {}
        self.config = {key: value for key, value in {**config, **plain}.items() if key in known}
        self.scheduler = cls.from_config(self.config)
        self.prediction: str = self.scheduler.config.prediction_type
        self.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        if written_out:
            self.alphas_cumprod = (1 - torch.tensor(written_out, dtype=torch.float64)).cumprod(0)
        self.times = Interpolant.variance_preserving(self.alphas_cumprod).flow_time
        """Rectified-flow time of every timestep, float64 ``[1000]``, rising to :attr:`noisiest`."""
        self.noisiest = float(self.times[-1])
        """Time of the last timestep; exactly 1 for a table that ends in pure noise."""
        self._check()

    def _check(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"the scheduler's prediction_type is {self.prediction}: epsilon and v_prediction are known")
        if self.prediction == "epsilon" and self.noisiest == 1.0:
            raise UserError(
                "the scheduler's prediction_type is epsilon on a table that ends in pure noise (zero terminal SNR), "
                "where the noise says nothing of the sample: such a network predicts v"
            )

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The sample ``[B, ...]`` at time ``t`` ``[B]``, on the network's own schedule: of unit variance."""
        return variance_preserving(t).from_flow(x_t)

    def flow_velocity(self, x_t: Tensor, x: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
        """Rectified-flow velocity of the prediction for ``x``, which :meth:`network_input` made of ``x_t``.

        Above :attr:`noisiest` the clean estimate is the one that ``x`` has there, and the velocity points to it.
        """
        known = t if self.noisiest == 1.0 else t.clamp(max=self.noisiest)
        native = variance_preserving(known)
        if self.prediction == "epsilon":
            u = native.flow_velocity_from_noise(x, predicted)
        else:
            u = native.flow_velocity_from_v(x, predicted)
        if self.noisiest == 1.0:
            return u
        x0 = native.to_flow(x) - expand_time(known, x) * u
        return torch.where(
            (t > known).view(-1, *[1] * (x.ndim - 1)), (x_t - x0) / expand_time(t, x).clamp_min(self.noisiest), u
        )

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
            UserError: if its spacing does not start from pure noise, and the table has it.
        """
        self.scheduler.set_timesteps(steps)
        timesteps: list[int] = self.scheduler.timesteps.tolist()
        if steps == 1:  # numpy's linspace of one point is its start, the clean end
            return [len(self.times) - 1]
        if timesteps[0] != len(self.times) - 1 and self.noisiest == 1.0:
            raise UserError(
                f"the scheduler's timestep_spacing {self.config.get('timestep_spacing', 'leading')!r} starts at "
                f"{timesteps[0]}, which is not pure noise; trailing and linspace do start there"
            )
        return timesteps


@lru_cache(maxsize=8)
def noise_grid(source: str, scheduler: str) -> NoiseGrid:
    """The noise levels of a pipeline folder; ``scheduler`` as for :class:`NoiseGrid`."""
    with _disable_current_modes():  # numbers, where planning computes without them
        return NoiseGrid(load_config(library_class("diffusers", scheduler), source, "scheduler"), scheduler)


def variance_preserving(t: Tensor) -> Interpolant:
    """Coefficients with the signal-to-noise ratio of rectified-flow time ``t``; exact at both ends.

    By way of ``abar`` the smaller of the two would be the root of a rounded difference.
    """
    length = torch.hypot(1 - t, t)
    return Interpolant((1 - t) / length, t / length)
