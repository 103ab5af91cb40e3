"""The tiny CogVideoX pipeline as a diffusers folder: its transformer before training, its scheduler, its index."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from fastvideo.tiny.world import FRAMES
from tools.tiny_world.cogvideox_recipe import CogVideoXRecipe, CogVideoXTransformerRecipe
from tools.tiny_world.pipeline import save_half, write_index
from tools.tiny_world.recipe import TextRecipe
from tools.tiny_world.vae import CHANNELS

LATENT_SIZE = 4  # latents a side
# Parts of the folder and the classes that stock `CogVideoXPipeline.from_pretrained` loads them with.
PARTS = {
    "scheduler": ("diffusers", "CogVideoXDDIMScheduler"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", "CogVideoXTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLCogVideoX"),
}


def build_transformer(recipe: CogVideoXTransformerRecipe, text: TextRecipe) -> CogVideoXTransformer3DModel:
    """The transformer before its training: `v` of latents [B, 3, 16, 4, 4] given text [B, 16, width]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # module constructors only know the global generator
        return CogVideoXTransformer3DModel(
            num_attention_heads=recipe.heads,
            attention_head_dim=recipe.head_width,
            num_layers=recipe.layers,
            time_embed_dim=recipe.time_width,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_embed_dim=text.width,
            max_text_seq_length=text.max_length,
            sample_height=LATENT_SIZE,
            sample_width=LATENT_SIZE,
            sample_frames=FRAMES,
            use_rotary_positional_embeddings=True,
            activation_fn="linear-silu",
            attention_bias=True,
        )


def build_scheduler(recipe: CogVideoXTransformerRecipe) -> CogVideoXDDIMScheduler:
    """The scheduler of the published checkpoints."""
    return CogVideoXDDIMScheduler(
        snr_shift_scale=recipe.snr_shift,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def write_network(folder: Path, recipe: CogVideoXRecipe) -> None:
    """Save an untrained transformer, the scheduler and the pipeline's index."""
    save_half(build_transformer(recipe.transformer, recipe.text), folder / "transformer")
    build_scheduler(recipe.transformer).save_pretrained(folder / "scheduler")
    write_index(folder, "CogVideoXPipeline", PARTS)
