"""Students of Kandinsky 5 in stock diffusers, whose pipeline leaves the noise levels to its scheduler."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from fastvideo.distillation.adapters.diffusers.pipeline import full_config
from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.adapters.export.base import StockSampler
from fastvideo.distillation.adapters.export.flow import FlowExporter
from fastvideo.distillation.adapters.export.flow_match import flow_match_sampler


class Kandinsky5Exporter(FlowExporter):
    """A scheduler that comes closest to the ladder, with its own shift and last time."""

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        return flow_match_sampler(times, kind)

    def stock_latents(self, latents: Tensor) -> Tensor:
        """With the frames that a network may be given, none of which are."""
        folder = resolve_pipeline(self.config.path, self.config.pipelines)
        network, packed = (
            full_config("Kandinsky5Transformer3DModel", folder, "transformer"),
            super().stock_latents(latents),
        )
        return pad(packed, (0, latents.shape[1] + 1)) if network["visual_cond"] else packed
