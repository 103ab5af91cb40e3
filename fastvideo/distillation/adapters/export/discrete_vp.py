"""Students on a variance-preserving table of noise levels, in stock diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid, noise_grid
from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.adapters.export.base import Exporter, StockSampler
from fastvideo.distillation.types import UserError


class DiscreteVPExporter(Exporter):
    """``LCMScheduler`` or the family's deterministic scheduler, over the checkpoint's own noise levels."""

    scheduler: ClassVar[str]
    """Deterministic scheduler of the family, such as ``DDIMScheduler``."""

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        """The scheduler of a sampler, with as many steps as ``times``.

        Both take the timesteps 999, 999 - 1000/K, ...; a ladder at the times of these is reproduced exactly.

        Raises:
            UserError: for another sampler than ``renoise`` and ``euler``, or an Euler ladder whose number of steps does
                not divide 1000.
        """
        if kind not in ("renoise", "euler"):
            raise UserError(f"sampler {kind!r} has no stock counterpart: diffusers has renoise and euler")
        source, steps = resolve_pipeline(self.config.path, self.config.pipelines), len(times)
        grid = noise_grid(source, self.scheduler)
        scheduler = euler_scheduler(grid, steps) if kind == "euler" else renoising_scheduler(grid)
        scheduler.set_timesteps(steps)
        return StockSampler(scheduler, grid.times_of(scheduler.timesteps.tolist()))


def renoising_scheduler(grid: NoiseGrid) -> Any:
    """Stock ``LCMScheduler`` on this table: from one timestep to the next through fresh noise."""
    from diffusers import LCMScheduler

    previous = torch.cat([torch.ones(1, dtype=torch.float64), grid.alphas_cumprod[:-1]])
    return LCMScheduler(
        num_train_timesteps=len(grid.times),
        trained_betas=(1 - grid.alphas_cumprod / previous).tolist(),
        original_inference_steps=len(grid.times),  # every number of steps starts at 999
        prediction_type=grid.prediction,
    )


def euler_scheduler(grid: NoiseGrid, steps: int) -> Any:
    """The grid's scheduler, which is Euler's method in rectified flow, spaced from its noisiest level to clean.

    Raises:
        UserError: for a number of steps that it cannot take evenly.
    """
    cls = type(grid.scheduler)
    if len(grid.times) % steps:
        raise UserError(
            f"stock {cls.__name__} takes {steps} steps unevenly (it goes down by whole timesteps): "
            f"the number of steps must divide {len(grid.times)}"
        )
    return cls.from_config(grid.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
