"""The published Wan networks, built from their configs without memory.

Configs: ``scripts/convert_wan_to_diffusers.py`` of diffusers, which wrote the checkpoints ``Wan-AI/Wan2.1-T2V-*``,
``Wan2.1-I2V-14B-480P`` and ``Wan2.2-TI2V-5B`` (``-Diffusers``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig

SHARED = {
    "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "patch_size": (1, 2, 2), "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}  # fmt: skip
T2V = {"in_channels": 16, "out_channels": 16, "added_kv_proj_dim": None, "image_dim": None}
T2V_SMALL = {**T2V, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
T2V_LARGE = {**T2V, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
I2V = {**T2V_LARGE, "in_channels": 36, "added_kv_proj_dim": 5120, "image_dim": 1280}
TI2V = {**T2V, "in_channels": 48, "out_channels": 48, "num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336}
VAE_22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}  # fmt: skip


def parameters(module: nn.Module) -> int:
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("config", "count"),
    [(T2V_SMALL, 1_418_996_800), (T2V_LARGE, 14_288_491_584), (I2V, 16_394_878_784), (TI2V, 4_999_787_712)],
    ids=["T2V-1.3B", "T2V-14B", "I2V-14B-480P", "TI2V-5B"],
)
def test_the_published_network_has_its_number_of_parameters(config: dict[str, Any], count: int) -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        network = WanTransformer3DModel(**SHARED, **config)
    assert parameters(network) == count


def test_the_vae_of_wan_22_has_its_number_of_parameters() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        assert parameters(AutoencoderKLWan(**VAE_22)) == 704_688_668


def checkpoint(folder: Path, index: dict[str, Any], network: dict[str, Any], vae: dict[str, Any]) -> Path:
    """A pipeline folder with the config files of a published checkpoint, and no weights."""
    files = {"model_index.json": index, "transformer/config.json": {**SHARED, **network}, "vae/config.json": vae}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_the_image_to_video_checkpoint_is_understood(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"_class_name": "WanImageToVideoPipeline"}, I2V, {})
    sizes = {"height": 480, "width": 832, "num_frames": 81, "max_sequence_length": 512}
    adapter = WanFamily(WanFamilyConfig(path=str(folder), **sizes))
    assert adapter.codec.latent_shape == (16, 21, 60, 104)
    assert adapter.conditioner.first_frames == (1,)
    assert adapter.conditioner.stored_shapes == {
        "text_embedding": (None, 4096),
        "first_frame_latent": (16, 21, 60, 104),
        "clip_feature": (None, 1280),
    }


def test_the_text_and_image_to_video_checkpoint_is_understood(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"_class_name": "WanPipeline", "expand_timesteps": True}, TI2V, VAE_22)
    sizes = {"height": 704, "width": 1280, "num_frames": 121, "max_sequence_length": 512}
    adapter = WanFamily(WanFamilyConfig(path=str(folder), **sizes))
    assert adapter.codec.latent_shape == (48, 31, 44, 80)
    assert adapter.conditioner.first_frames == (0, 1)
    assert adapter.conditioner.stored_shapes == {"text_embedding": (None, 4096)}
