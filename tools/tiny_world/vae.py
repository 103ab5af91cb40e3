"""The VAE of the tiny pipeline: diffusers' `AutoencoderKLWan` in the layout of Wan2.2, small.

Videos [B, 3, 9, 32, 32] become latents [B, 16, 3, 4, 4]: pixels are folded 2x2 into channels, then two stages halve
height and width, both of them also time. Parameter-free shortcuts around each stage make it trainable in minutes.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import nn

from tools.tiny_world.recipe import VaeRecipe

CHANNELS = 16
PATCH = 2  # pixels folded into channels, per axis
LOG_VARIANCE_START = -5.0  # a posterior that starts wide drowns the first reconstructions in noise


def build_vae(recipe: VaeRecipe) -> AutoencoderKLWan:
    """The VAE before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # module constructors only know the global generator
        vae = AutoencoderKLWan(
            base_dim=recipe.encoder_width,
            decoder_base_dim=recipe.decoder_width,
            z_dim=CHANNELS,
            dim_mult=list(recipe.multipliers),
            num_res_blocks=recipe.blocks,
            temperal_downsample=[True] * (len(recipe.multipliers) - 1),
            is_residual=True,
            in_channels=3 * PATCH**2,
            out_channels=3 * PATCH**2,
            patch_size=PATCH,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
        )
    with torch.no_grad():
        vae.quant_conv.bias[CHANNELS:] += LOG_VARIANCE_START
        vae.decoder.conv_out.bias.fill_(-1.0)  # black
    return vae


def encode_moments(vae: AutoencoderKLWan, videos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the posterior, each [B, 16, 3, 4, 4], with gradients."""
    posterior = vae.encode(videos).latent_dist
    return posterior.mean, posterior.logvar


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` of raw latents [B, 16, T, H, W] without its final clamp to [-1, 1].

    The clamp has no gradient outside the range. Almost every pixel of this world is black, the lower end of the range:
    a network trained through the clamp overshoots there once and stops learning.
    """
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for index, frame in enumerate(hidden.split(1, dim=2)):
        vae._conv_idx = [0]
        chunks.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    video: torch.Tensor = unpatchify(torch.cat(chunks, dim=2), patch_size=vae.config.patch_size)
    return video


def kernels(vae: AutoencoderKLWan) -> list[nn.Parameter]:
    """Convolution kernels for Muon, without the last layer's, whose rows are pixels and not features."""
    last = vae.decoder.conv_out.weight
    return [p for p in vae.parameters() if p.dim() > 3 and p[0].numel() > 1 and p is not last]
