"""The published Wan 2.1 text-to-video networks, built from their configs without memory."""

from __future__ import annotations

import pytest
import torch

SHARED = {
    "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
    "patch_size": (1, 2, 2), "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
    "added_kv_proj_dim": None, "image_dim": None, "rope_max_seq_len": 1024,
}  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "heads", "ffn", "count"),
    [(30, 12, 8960, 1_418_996_800), (40, 40, 13824, 14_288_491_584)],
    ids=["1.3B", "14B"],
)
def test_the_published_network_has_its_number_of_parameters(layers: int, heads: int, ffn: int, count: int) -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        network = WanTransformer3DModel(num_layers=layers, num_attention_heads=heads, ffn_dim=ffn, **SHARED)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in network.parameters()) == count
