"""Wan pipelines that take an image, at toy size with random weights: Wan 2.1 I2V and Wan 2.2 TI2V-5B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastvideo.tests.cache import built
from fastvideo.tests.distillation.tiny import wan_config, wan_folder

NETWORK = {
    "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 16, "freq_dim": 16,
    "patch_size": (1, 2, 2), "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip
CLIP_WIDTH, CLIP_TOKENS = 16, 5


def _built(root: Path, name: str, build: Callable[[Any], Any]) -> Path:
    """The pipeline that ``build`` makes of the toy text-to-video pipeline, built once under ``root``."""
    from diffusers import WanPipeline

    def write(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            build(WanPipeline.from_pretrained(wan_folder(root))).save_pretrained(folder)

    return built(root / name, name, write)


def i2v_folder(root: Path, *, clip: bool = True) -> Path:
    """Image-to-video: 4 noisy, 4 mask and 4 image channels; with CLIP features as Wan 2.1 has, or without."""

    def build(text: Any) -> Any:
        from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

        widths = {"image_dim": CLIP_WIDTH, "added_kv_proj_dim": 24} if clip else {}
        network = WanTransformer3DModel(in_channels=12, out_channels=4, **NETWORK, **widths)
        shared = {key: text.components[key] for key in ("tokenizer", "text_encoder", "vae", "scheduler")}
        return WanImageToVideoPipeline(transformer=network, **shared, **(_clip() if clip else {}))

    return _built(root, "wan_i2v" if clip else "wan_i2v_without_clip", build)


def i2v_experts_folder(root: Path) -> Path:
    """Image-to-video with two experts and without CLIP features, as Wan 2.2 I2V A14B is."""

    def build(text: Any) -> Any:
        from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

        high, low = (WanTransformer3DModel(in_channels=12, out_channels=4, **NETWORK) for _ in range(2))
        shared = {key: text.components[key] for key in ("tokenizer", "text_encoder", "vae", "scheduler")}
        return WanImageToVideoPipeline(transformer=high, transformer_2=low, boundary_ratio=0.9, **shared)

    return _built(root, "wan_i2v_experts", build)


def _clip() -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16,
        patch_size=8,
    )  # fmt: skip
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": CLIPImageProcessor(**size)}


def ti2v_folder(root: Path) -> Path:
    """Text-and-image-to-video: times per token, and the residual VAE with patches, 16 pixels to a latent pixel."""

    def build(text: Any) -> Any:
        from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

        vae = AutoencoderKLWan(
            base_dim=4, decoder_base_dim=8, z_dim=4, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
            scale_factor_spatial=16, num_res_blocks=1, latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[0.5, 2, 1, 0.8],
        )  # fmt: skip
        network = WanTransformer3DModel(in_channels=4, out_channels=4, **NETWORK)
        shared = {key: text.components[key] for key in ("tokenizer", "text_encoder", "scheduler")}
        return WanPipeline(transformer=network, vae=vae, expand_timesteps=True, **shared)

    return _built(root, "wan_ti2v", build)


def i2v_config(root: Path, **options: Any) -> Any:
    """16 x 32 pixels, 9 frames, and the text length without which diffusers would not find the image's features."""
    return wan_config(i2v_folder(root), **{"num_frames": 9, "max_sequence_length": 512, **options})


def ti2v_config(root: Path, **options: Any) -> Any:
    """32 x 64 pixels, 9 frames."""
    return wan_config(ti2v_folder(root), **{"height": 32, "width": 64, "num_frames": 9, **options})
