"""Students of FLUX.2 in stock diffusers, whose pipelines give one name to two guidances."""

from __future__ import annotations

from typing import Any

from fastvideo.distillation.adapters.diffusers.flow_config import GuidedImageConfig, one_guidance
from fastvideo.distillation.adapters.diffusers.pipeline import read_index
from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.adapters.export.flow import FlowExporter
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.types import UserError


class Flux2Exporter(FlowExporter):
    """``guidance_scale`` is that between two predictions for klein, and the one that the network reads for dev."""

    config: GuidedImageConfig

    def guidance_arguments(self, guidance: GuidanceValue) -> dict[str, Any]:
        between = one_guidance(guidance)
        folder = resolve_pipeline(self.config.path, self.config.pipelines)
        if read_index(folder)["_class_name"] == "Flux2KleinPipeline":
            return {"guidance_scale": between}
        if between != 1.0:
            raise UserError(
                f"guidance {between:g}: diffusers' Flux2Pipeline takes no guidance between two predictions, 1"
            )
        return {"guidance_scale": self.config.embedded}
