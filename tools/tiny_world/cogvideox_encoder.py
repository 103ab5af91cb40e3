"""The encoder of the tiny CogVideoX VAE learns to say what the shipped Wan VAE says.

So its latents are normal in every channel, where CogVideoX has one scaling factor for all, and what is known of the
other latents holds for these. Against a fixed target an encoder is trained in minutes, and its decoder afterwards.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from fastvideo.distillation.adapters.wan import WanAdapter, WanConfig
from fastvideo.inference.progress import tracked
from fastvideo.tiny.world import TinyWorld
from tools.tiny_world.cogvideox_recipe import CogVideoXVaeRecipe
from tools.tiny_world.cogvideox_vae import build_vae, kernels
from tools.tiny_world.train_vae import split_optimizers, use_channels_last, warmed_cosine
from tools.tiny_world.vae import CHANNELS, encode_moments


def train_encoder(recipe: CogVideoXVaeRecipe) -> tuple[AutoencoderKLCogVideoX, float]:
    """A VAE whose encoder is trained and whose decoder is not, in eval mode; and the last squared error of a latent."""
    vae = build_vae(recipe)
    use_channels_last(vae)
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith("encoder."))
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizers = split_optimizers(parameters, kernels(vae), recipe.muon_rate, recipe.adam_rate)
    share = warmed_cosine(recipe.warm_up, recipe.steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    samples = TinyWorld("train").batches(recipe.steps * recipe.batch_size, recipe.seed, recipe.batch_size)
    target = WanTarget()
    for sample in tracked(samples, "encoder", total=recipe.steps):
        vae.zero_grad()
        error, width = target.errors(vae, sample.videos)
        (error + recipe.width_weight * width).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, recipe.gradient_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return vae.eval().requires_grad_(False), error.item()


class WanTarget:
    """Posteriors of the shipped Wan VAE over normalised latents."""

    def __init__(self) -> None:
        self.codec = WanAdapter(WanConfig()).codec
        deviation = torch.tensor(self.codec.vae.config.latents_std)
        self.log_variance = 2 * deviation.log().view(1, CHANNELS, 1, 1, 1)

    def errors(self, vae: AutoencoderKLCogVideoX, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors of mean and log-variance of `vae` on videos [B, 3, 9, 32, 32]."""
        with torch.no_grad():
            mean, log_variance = encode_moments(self.codec.vae, videos)
            mean, log_variance = self.codec.normalise(mean), log_variance - self.log_variance
        found, found_log_variance = encode_moments(vae, videos)
        return (found - mean).square().mean(), (found_log_variance - log_variance).square().mean()
