"""SDXL and Stable Diffusion students in stock diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from fastvideo.distillation.adapters.diffusers.pipeline import full_config
from fastvideo.distillation.adapters.diffusers.single_file import UNET
from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.adapters.export.discrete_vp import DiscreteVPExporter
from fastvideo.distillation.types import UserError

ENDS = {
    "conv_in": "input_blocks.0.0", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
"""Modules of a UNet outside of its levels, in diffusers and in Stability's code."""
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
"""Layers of a residual block."""


class StableDiffusionExporter(DiscreteVPExporter):
    """``LCMScheduler`` or ``DDIMScheduler`` over the checkpoint's own noise levels; one picture per sample."""

    scheduler = "DDIMScheduler"
    network_part = "unet"
    lora_layouts = ("diffusers", "peft", "kohya")
    call_options = ("height", "width")
    makes_images = True

    def stock_latents(self, latents: Tensor) -> Tensor:
        """``[B, C, H, W]``."""
        return latents.squeeze(2)


class SDXLExporter(StableDiffusionExporter):
    """Kohya's scripts name the layers as Stability's code does, and those of earlier models as diffusers."""

    @cached_property
    def _blocks(self) -> Mapping[str, str]:
        source = resolve_pipeline(self.config.path, self.config.pipelines)
        return original_blocks(full_config(UNET, source, self.network_part))

    def original_name(self, name: str) -> str:
        block = next((own for own in self._blocks if name == own or name.startswith(f"{own}.")), None)
        if block is None:
            raise UserError(f"{name}: Stability's code has no such layer")
        rest = name.removeprefix(block)
        layer = rest.split(".")[1] if ".resnets." in block and rest else ""
        return self._blocks[block] + rest.replace(f".{layer}", f".{RESNET.get(layer, layer)}", 1)


def original_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules of a UNet, in diffusers and in Stability's code, which counts the blocks of all levels through.

    Raises:
        UserError: for levels of different depths.
    """
    if not isinstance(config["layers_per_block"], int):
        raise UserError(
            f"layers_per_block {config['layers_per_block']}: Stability's names are known for one number of layers at "
            f"all levels; only diffusers' names fit this network"
        )
    found, count = dict(ENDS), config["layers_per_block"] + 1  # with what makes maps smaller, or larger
    for level in range(len(config["down_block_types"])):
        for layer in range(count - 1):
            place, number = f"down_blocks.{level}", 1 + level * count + layer
            found[f"{place}.resnets.{layer}"] = f"input_blocks.{number}.0"
            found[f"{place}.attentions.{layer}"] = f"input_blocks.{number}.1"
        found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * count}.0.op"
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(count):
            place, number = f"up_blocks.{level}", level * count + layer
            found[f"{place}.resnets.{layer}"] = f"output_blocks.{number}.0"
            found[f"{place}.attentions.{layer}"] = f"output_blocks.{number}.1"
        last = 2 if "Attn" in kind else 1
        found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{(level + 1) * count - 1}.{last}.conv"
    return found
