"""SDXL and Stable Diffusion students in stock diffusers."""

from __future__ import annotations

from torch import Tensor

from fastvideo.distillation.adapters.export.discrete_vp import DiscreteVPExporter


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
