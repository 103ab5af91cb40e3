"""Assemble and save the tiny pipeline as a diffusers folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin, WanTransformer3DModel

from tools.tiny_world.recipe import TinyRecipe, TransformerRecipe


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


# Parts of the folder and the classes that stock `WanPipeline.from_pretrained` loads them with.
PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
OPTIONS = {"boundary_ratio": None, "expand_timesteps": False, "transformer_2": (None, None)}


def write_network(folder: Path, recipe: TinyRecipe) -> None:
    """Save an untrained transformer, the scheduler and the pipeline's index."""
    save_half(build_transformer(recipe.transformer, recipe.text.width), folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=recipe.transformer.shift).save_pretrained(folder / "scheduler")
    write_index(folder, "WanPipeline", {**OPTIONS, **PARTS})


def write_index(folder: Path, pipeline: str, parts: Mapping[str, Any]) -> None:
    """Write the `model_index.json` of a diffusers pipeline."""
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_half(model: ModelMixin, folder: Path) -> None:
    """Save `model` in half precision, for a smaller package; diffusers loads it back as float32."""
    half = copy.deepcopy(model).half()
    half.register_to_config(_name_or_path="")  # drop the local folder
    half.save_pretrained(folder)
