"""Students of flow families in stock diffusers, most of whose pipelines take the noise levels of their steps.

A scheduler without shifts, and the ladder as ``sigmas`` of the call, give every ladder exactly. Pipelines that ask
their scheduler for even levels, and take no others, get a shift that bends these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.flow_config import FlowConfig, one_guidance
from fastvideo.distillation.adapters.export.base import StockSampler, deviation
from fastvideo.distillation.adapters.export.flow_match import CANDIDATES, TRAIN_TIMESTEPS, FlowMatchExporter
from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.types import UserError

LARGEST = 30.0
"""Largest shift that is tried, and one over the smallest."""


class FlowExporter(FlowMatchExporter):
    """A family whose config says how its stock pipeline is called."""

    config: FlowConfig

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.stock = self.config.stock
        self.lora_layouts, self.call_options = self.stock.lora_layouts, self.stock.sizes
        self.makes_images = self.stock.images

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        """A scheduler without shifts, to be called with the ladder.

        Raises:
            UserError: for a sampler that it does not have, or a ladder that does not start from pure noise, as these
                pipelines do.
        """
        if kind not in ("renoise", "euler"):
            raise UserError(f"sampler {kind!r} has no stock counterpart: diffusers offers renoise and euler for flows")
        if not self.stock.sigmas:
            return bent_sampler(times, kind)
        if times[0] != 1.0:
            raise UserError(f"the ladder starts at {times[0]:g}: this family's pipelines start from pure noise, 1")
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=TRAIN_TIMESTEPS, shift=1.0, stochastic_sampling=kind == "renoise"
        )
        scheduler.set_timesteps(sigmas=list(times))
        return StockSampler(scheduler, tuple(scheduler.sigmas[:-1].tolist()), tuple(times))

    def stock_latents(self, latents: Tensor) -> Tensor:
        return self.config.packing.pack(latents) if self.stock.packed else latents.squeeze(2)

    def guidance_arguments(self, guidance: GuidanceValue) -> dict[str, Any]:
        found, guidance = dict(self.config.call_arguments), one_guidance(guidance)
        if self.stock.guidance is not None:
            found[self.stock.guidance] = guidance - self.stock.offset
        if guidance != 1.0 and self.stock.negative:
            found["negative_prompt"] = self.config.prompt_for_negative
        return found


def bent_sampler(times: Sequence[float], kind: str) -> StockSampler:
    """The scheduler whose shift, and last time, bend the levels 1, 1 - 1/K, ..., 1/K into those nearest to a ladder.

    A uniform ladder under any shift up to :data:`LARGEST` is met to 1e-4.
    """
    shifts = np.geomspace(1 / LARGEST, LARGEST, CANDIDATES)
    for _ in range(2):  # and again between the neighbours of the best
        found = [_bent(times, kind, float(shift)) for shift in shifts]
        best = min(range(len(found)), key=lambda i: deviation(found[i].times, times))
        shifts = np.geomspace(shifts[max(best - 1, 0)], shifts[min(best + 1, CANDIDATES - 1)], CANDIDATES)
    return found[best]


def _bent(times: Sequence[float], kind: str, shift: float) -> StockSampler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    steps = len(times)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        shift=shift,
        shift_terminal=times[-1] if steps > 1 else None,  # one time is the first and the last
        stochastic_sampling=kind == "renoise",
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    return StockSampler(scheduler, tuple(scheduler.sigmas[:-1].tolist()))
