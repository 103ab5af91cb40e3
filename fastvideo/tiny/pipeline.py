"""The tiny pipeline as a diffusers folder: assembling, saving and loading it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from fastvideo.tiny.recipe import TransformerRecipe

WEIGHTS = Path(__file__).parent / "weights"
PIPELINE_FOLDER = WEIGHTS / "pipeline"
CLASSIFIER_FOLDER = WEIGHTS / "classifier"


def build_transformer(recipe: TransformerRecipe, text_width: int) -> WanTransformer3DModel:
    """The Wan transformer before its training: velocity of latents [B, 16, 3, 4, 4] given text [B, 16, text_width]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # module constructors only know the global generator
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=recipe.heads,
            attention_head_dim=recipe.head_width,
            in_channels=recipe.channels,
            out_channels=recipe.channels,
            text_dim=text_width,
            freq_dim=recipe.frequency_width,
            ffn_dim=recipe.feed_forward,
            num_layers=recipe.layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=recipe.longest_axis,
        )


def save_pipeline(folder: Path, shift: float, **parts: object) -> None:
    """Write a complete diffusers folder from `tokenizer`, `text_encoder`, `vae` and `transformer`."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    WanPipeline(scheduler=scheduler, **parts).save_pretrained(folder, safe_serialization=True)


def load_pipeline(folder: Path = PIPELINE_FOLDER) -> WanPipeline:
    """The pipeline in `folder` (the shipped one by default), float32 on the CPU, through diffusers' own loader."""
    return WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def load_vae(folder: Path = PIPELINE_FOLDER) -> AutoencoderKLWan:
    """The frozen VAE of the pipeline in `folder`, float32 on the CPU."""
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)
