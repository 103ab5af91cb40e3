"""SDXL (arXiv 2307.01952) over diffusers: ``UNet2DConditionModel``, ``AutoencoderKL``, two CLIP text encoders.

The network reads the tokens of both encoders side by side, and adds to its time embedding the second one's pooled text
and six numbers: the size of the picture that a sample was cut from, the cut's corner, and the size to make. Like the
stock pipeline, whole pictures of the size of the latents are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec
from fastvideo.distillation.adapters.diffusers.unet import UNetAdapter, UNetConfig, UNetTexts
from fastvideo.distillation.config.sections import Level
from fastvideo.ranges import Pixels

POOLED = "pooled_prompt_embeds"
"""Name of the pooled text in a condition."""
NUMBERS = 6
"""Sizes and corner that the network reads."""


class SDXLConfig(UNetConfig):
    """Options of the SDXL family."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    level: ClassVar[Level] = "tiny distillation"
    path: str
    """A diffusers SDXL pipeline: a folder, or a hub id such as `stabilityai/stable-diffusion-xl-base-1.0`."""
    height: Pixels = 1024
    """Picture height in pixels."""
    width: Pixels = 1024
    """Picture width in pixels."""


class SDXLConditioner(UNetTexts[SDXLConfig]):
    """CLIP-L and CLIP-G tokens, and the pooled text of CLIP-G."""

    @cached_property
    def pooled(self) -> Mapping[str, int]:
        config = self.pipeline.network_config()
        return {POOLED: config["projection_class_embeddings_input_dim"] - NUMBERS * config["addition_time_embed_dim"]}


class SDXLAdapter(UNetAdapter[SDXLConfig]):
    """The SDXL family."""

    Config = SDXLConfig
    summary = "SDXL, stills from text: predicts noise, two CLIP texts and sizes"
    _spec = PipelineSpec(
        network="UNet2DConditionModel",
        vae="AutoencoderKL",
        text_encoder="CLIPTextModel",
        time_embedding="time_embedding",
        blocks="down_blocks",
        published_guidance=5.0,
        parts=("unet",),
    )

    @cached_property
    def conditioner(self) -> SDXLConditioner:
        return SDXLConditioner(self._pipeline)

    def _added(self, own: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        size = [self.codec.spatial * side for side in x.shape[3:]]
        numbers = x.new_tensor([*size, 0, 0, *size]).expand(len(x), NUMBERS)
        return {"text_embeds": own[POOLED].to(x.dtype), "time_ids": numbers}
