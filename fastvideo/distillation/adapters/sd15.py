"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752) over diffusers: ``UNet2DConditionModel``, ``AutoencoderKL``, CLIP."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec
from fastvideo.distillation.adapters.diffusers.unet import UNetAdapter, UNetConfig, UNetTexts
from fastvideo.ranges import Pixels


class SD15Config(UNetConfig):
    """Options of the Stable Diffusion family."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    path: str
    """A diffusers Stable Diffusion pipeline: a folder, or a hub id."""
    height: Pixels = 512
    """Picture height in pixels."""
    width: Pixels = 512
    """Picture width in pixels."""


class SD15Conditioner(UNetTexts[SD15Config]):
    """CLIP tokens."""


class SD15Adapter(UNetAdapter[SD15Config]):
    """The Stable Diffusion family."""

    Config = SD15Config
    summary = "Stable Diffusion 1.x and 2.x, stills from text: predicts noise or v, CLIP text"
    _spec = PipelineSpec(
        network="UNet2DConditionModel",
        vae="AutoencoderKL",
        text_encoder="CLIPTextModel",
        time_embedding="time_embedding",
        blocks="down_blocks",
        published_guidance=7.5,
        parts=("unet",),
    )

    @cached_property
    def conditioner(self) -> SD15Conditioner:
        return SD15Conditioner(self._pipeline)
