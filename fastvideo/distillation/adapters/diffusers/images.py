"""Images through a pipeline's CLIP encoder."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.loading import load_component
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline


class ClipImages:
    """The frozen CLIP image encoder of a pipeline, loaded on first use."""

    def __init__(self, pipeline: Pipeline[Any]) -> None:
        self.pipeline = pipeline

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, CLIPVisionModel

        processor = load_component(AutoImageProcessor, self.pipeline.source, "image_processor")
        return processor, self.pipeline.frozen(CLIPVisionModel, "image_encoder", dtype=torch.float32)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Hidden states ``[B, L, D]`` before the last layer, of images ``[B, 3, H, W]`` in ``[-1, 1]``."""
        processor, encoder = self._loaded
        bytes_ = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        pixels = processor(images=list(bytes_.numpy()), return_tensors="pt", input_data_format="channels_first")
        states = encoder(pixels["pixel_values"].to(self.pipeline.device), output_hidden_states=True).hidden_states
        return states[-2].float()  # type: ignore[no-any-return]
