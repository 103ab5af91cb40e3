"""CogVideoX students in stock diffusers."""

from __future__ import annotations

from torch import Tensor

from fastvideo.distillation.adapters.export.discrete_vp import DiscreteVPExporter


class CogVideoXExporter(DiscreteVPExporter):
    """``LCMScheduler`` or ``CogVideoXDDIMScheduler`` over the checkpoint's own noise levels."""

    scheduler = "CogVideoXDDIMScheduler"

    def stock_latents(self, latents: Tensor) -> Tensor:
        """``[B, F, C, H, W]``."""
        return latents.transpose(1, 2)
