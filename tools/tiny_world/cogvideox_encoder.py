"""Distil the encoder of the shipped Wan VAE into that of the tiny CogVideoX VAE.

So its latents are normal in every channel, where CogVideoX has one scaling factor for all, and match Wan's. A fixed
target trains an encoder in minutes; the decoder follows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.tiny.world import TinyWorld
from tools.tiny_world.cogvideox_recipe import CogVideoXVaeRecipe
from tools.tiny_world.cogvideox_vae import build_vae, kernels
from tools.tiny_world.train_vae import optimise, training_batches, use_channels_last
from tools.tiny_world.vae import CHANNELS, encode_moments


def train_encoder(recipe: CogVideoXVaeRecipe) -> tuple[AutoencoderKLCogVideoX, float]:
    """A VAE with a trained encoder and an untrained decoder, in eval mode; and the last squared error of a latent."""
    vae = build_vae(recipe)
    use_channels_last(vae)
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith("encoder."))
    target, error = WanTarget(), torch.zeros(())

    def losses() -> Iterator[Tensor]:
        nonlocal error
        for sample in training_batches(recipe, TinyWorld("train")):
            error, width = target.errors(vae, sample.videos)
            yield error + recipe.width_weight * width

    optimise(vae, kernels(vae), recipe, "encoder", losses())
    return vae.eval().requires_grad_(False), error.item()


class WanTarget:
    """Posteriors of the shipped Wan VAE over normalised latents."""

    def __init__(self) -> None:
        self.codec = WanFamily(WanFamilyConfig()).codec
        deviation = torch.tensor(self.codec.vae.config.latents_std)
        self.log_variance = 2 * deviation.log().view(1, CHANNELS, 1, 1, 1)

    def errors(self, vae: AutoencoderKLCogVideoX, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors of mean and log-variance of `vae` on videos [B, 3, 9, 32, 32]."""
        with torch.no_grad():
            mean, log_variance = encode_moments(self.codec.vae, videos)
            mean, log_variance = self.codec.normalise(mean), log_variance - self.log_variance
        found, found_log_variance = encode_moments(vae, videos)
        return (found - mean).square().mean(), (found_log_variance - log_variance).square().mean()
