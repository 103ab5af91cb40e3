"""The VAE of the tiny CogVideoX pipeline: diffusers' `AutoencoderKLCogVideoX`, small.

Videos [B, 3, 9, 32, 32] become latents [B, 16, 3, 4, 4]: three halvings of height and width, the first two of time too.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from torch import nn

from tools.tiny_world.cogvideox_recipe import CogVideoXVaeRecipe
from tools.tiny_world.vae import CHANNELS, LOG_VARIANCE_START

BLOCKS = 1  # residual blocks per resolution of the encoder; the decoder has one more


def build_vae(recipe: CogVideoXVaeRecipe) -> AutoencoderKLCogVideoX:
    """The VAE before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # module constructors only know the global generator
        vae = AutoencoderKLCogVideoX(
            block_out_channels=recipe.widths,
            layers_per_block=BLOCKS,
            latent_channels=CHANNELS,
            norm_num_groups=recipe.groups,
            temporal_compression_ratio=4,
            sample_height=32,
            sample_width=32,
            scaling_factor=1.0,
        )
    with torch.no_grad():
        vae.encoder.conv_out.conv.bias[CHANNELS:] += LOG_VARIANCE_START
        vae.decoder.conv_out.conv.bias.fill_(-1.0)  # black
        for norm in (module for module in vae.modules() if isinstance(module, CogVideoXSpatialNorm3D)):
            # A plain normalisation at first: random scales would multiply up through the decoder.
            norm.conv_y.conv.bias.fill_(1.0)
            norm.conv_b.conv.bias.zero_()
    return vae


def decode(vae: AutoencoderKLCogVideoX, latents: torch.Tensor) -> torch.Tensor:
    """Videos of raw latents [B, 16, T, H, W], with gradients; this VAE does not clamp."""
    video: torch.Tensor = vae.decode(latents).sample  # type: ignore[no-untyped-call]
    return video


def kernels(vae: AutoencoderKLCogVideoX) -> list[nn.Parameter]:
    """Convolution kernels for Muon, without the last layer's, whose rows are pixels and not features."""
    last = vae.decoder.conv_out.conv.weight
    return [p for p in vae.parameters() if p.dim() > 3 and p[0].numel() > 1 and p is not last]
