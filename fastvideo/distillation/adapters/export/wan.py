"""Wan students in stock diffusers, and in ComfyUI, whose names of layers are those of the authors' own code."""

from __future__ import annotations

import re

from fastvideo.distillation.adapters.export.flow_match import FlowMatchExporter
from fastvideo.distillation.types import UserError

IN_A_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}


class WanExporter(FlowMatchExporter):
    """``FlowMatchEulerDiscreteScheduler``, and ComfyUI's names."""

    def comfy_layer(self, layer: str) -> str:
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
        if found and found[2] in IN_A_BLOCK:
            return f"diffusion_model.blocks.{found[1]}.{IN_A_BLOCK[found[2]]}"
        if layer in OUTSIDE:
            return f"diffusion_model.{OUTSIDE[layer]}"
        raise UserError(f"ComfyUI has no name for the layer {layer} of Wan")
