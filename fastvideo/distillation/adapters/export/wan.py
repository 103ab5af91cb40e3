"""Wan students in stock diffusers, and under the names of the authors' own code, which ComfyUI and LightX2V read."""

from __future__ import annotations

import re

from fastvideo.distillation.adapters.export.base import StreamingClasses
from fastvideo.distillation.adapters.export.flow_match import FlowMatchExporter
from fastvideo.distillation.adapters.export.lora import LAYOUTS
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
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}


class WanExporter(FlowMatchExporter):
    """``FlowMatchEulerDiscreteScheduler``, the authors' names, and FastVideo's classes for streaming."""

    lora_layouts = tuple(LAYOUTS)
    streaming = StreamingClasses("WanCausalDMDPipeline", "CausalWanTransformer3DModel", "SelfForcingFlowMatchScheduler")

    def original_name(self, name: str) -> str:
        found = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
        assert found is not None
        names = IN_A_BLOCK if found[1] else OUTSIDE
        if found[2] not in names:
            raise UserError(f"{name}: the authors' code of Wan has no such layer")
        return f"{found[1] or ''}{names[found[2]]}{found[3] or ''}"
