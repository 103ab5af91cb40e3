"""Students of HunyuanVideo 1.5 in stock diffusers, where a component of the pipeline holds the guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvideo.distillation.adapters.diffusers.flow_config import one_guidance
from fastvideo.distillation.adapters.export.flow import FlowExporter
from fastvideo.distillation.noise import GuidanceValue


class Hunyuan15Exporter(FlowExporter):
    """A guider of the student's guidance, and adapters that the network loads by itself."""

    lora_loader = "transformer.load_lora_adapter"

    def stock_parts(self, guidance: GuidanceValue) -> Mapping[str, Any]:
        from diffusers import ClassifierFreeGuidance

        return {"guider": ClassifierFreeGuidance(guidance_scale=one_guidance(guidance))}
