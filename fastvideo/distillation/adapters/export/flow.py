"""Students of flow families in stock diffusers, by pipelines that take the noise levels of their steps.

A scheduler without shifts, and the ladder as ``sigmas`` of the call, give every ladder exactly; a shift could not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastvideo.distillation.adapters.diffusers.flow_config import FlowImageConfig
from fastvideo.distillation.adapters.export.base import StockSampler
from fastvideo.distillation.adapters.export.flow_match import TRAIN_TIMESTEPS, FlowMatchExporter
from fastvideo.distillation.config.base import AdapterConfig
from fastvideo.distillation.types import UserError


class FlowExporter(FlowMatchExporter):
    """A family whose config says how its stock pipeline is called."""

    config: FlowImageConfig

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
        if not self.stock.sigmas:
            return super().stock_sampler(times, kind)
        if kind not in ("renoise", "euler"):
            raise UserError(f"sampler {kind!r} has no stock counterpart: diffusers offers renoise and euler for flows")
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

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        found = dict(self.config.call_arguments)
        if self.stock.guidance is not None:
            found[self.stock.guidance] = guidance - self.stock.offset
        if guidance != 1.0 and self.stock.negative:
            found["negative_prompt"] = self.config.prompt_for_negative
        return found
