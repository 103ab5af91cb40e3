"""The autoencoder of the tiny SDXL pipeline: diffusers' `AutoencoderKL`, a latent for 4 x 4 pixels, on sharp stills."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import nn

from fastvideo.evaluation.streams.reconstruction import psnr
from fastvideo.tiny.classifier import FRAMES, TinyClassifier
from fastvideo.tiny.world import TinyWorld, WorldSample, stills
from tools.tiny_world.recipe import WeighedTraining
from tools.tiny_world.train_classifier import accuracy
from tools.tiny_world.train_vae import ink_error, optimise, training_batches, use_channels_last
from tools.tiny_world.vae import LOG_VARIANCE_START


@dataclass(frozen=True)
class StillsVaeRecipe(WeighedTraining):
    """Size and training of the autoencoder.

    Attributes:
        channels: of a latent.
        widths: channels at 32, 16 and 8 pixels a side; the first is small, as convolutions at full resolution dominate
            the cost of a step.
        groups: of every group normalisation.
    """

    channels: int = 4
    widths: tuple[int, ...] = (8, 32, 64)
    groups: int = 4
    steps: int = 3000
    batch_size: int = 16
    seed: int = 31


def build_vae(recipe: StillsVaeRecipe) -> AutoencoderKL:
    """The autoencoder before training: stills [B, 3, 32, 32] to latents [B, 4, 8, 8]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # module constructors only know the global generator
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(recipe.widths),
            up_block_types=("UpDecoderBlock2D",) * len(recipe.widths),
            block_out_channels=recipe.widths,
            layers_per_block=1,
            latent_channels=recipe.channels,
            norm_num_groups=recipe.groups,
            sample_size=32,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
    with torch.no_grad():
        vae.quant_conv.bias[recipe.channels :] += LOG_VARIANCE_START
        vae.decoder.conv_out.bias.fill_(-1.0)  # black
    return vae


def train_vae(recipe: StillsVaeRecipe) -> AutoencoderKL:
    """An autoencoder trained on stills of the train split, with its scale measured; frozen, in eval mode."""
    vae, world = build_vae(recipe), stills("train")
    use_channels_last(vae)
    generator = torch.Generator().manual_seed(recipe.seed)

    def losses() -> Iterator[torch.Tensor]:
        for sample in training_batches(recipe, world):
            yield _loss(vae, sample.videos[:, :, 0], recipe, generator)

    optimise(vae, _kernels(vae), recipe, "vae", losses())
    vae.register_to_config(
        scaling_factor=1.0 / _deviation(vae, world.sample(recipe.statistics_videos, recipe.seed + 1))
    )
    return vae.eval().requires_grad_(False)


def _loss(
    vae: AutoencoderKL, images: torch.Tensor, recipe: StillsVaeRecipe, generator: torch.Generator
) -> torch.Tensor:
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - posterior.logvar - 1.0).mean()
    return ink_error(decoded, images, recipe.ink_weight, recipe.squared_weight) + recipe.kl_weight * kl


def _kernels(vae: AutoencoderKL) -> list[nn.Parameter]:
    """Convolution kernels for Muon, without the last layer's, whose rows are pixels and not features."""
    last = vae.decoder.conv_out.weight
    return [p for p in vae.parameters() if p.dim() > 3 and p[0].numel() > 1 and p is not last]


@torch.no_grad()
def _deviation(vae: AutoencoderKL, sample: WorldSample) -> float:
    latents = torch.cat([vae.encode(part[:, :, 0]).latent_dist.mean for part in sample.videos.split(64)])
    return float(latents.double().square().mean().sqrt())


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, judge: TinyClassifier, count: int) -> dict[str, float]:
    """PSNR in dB of held-out stills after the autoencoder, and how many digits and colours are read right."""
    truth = TinyWorld("heldout", view="still").sample(count, 0)
    images = truth.videos[:, :, 0]
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(64)])
    right = accuracy(judge, truth, decoded.unsqueeze(2).expand(-1, -1, FRAMES, -1, -1))
    return {"psnr": psnr(decoded, images), "digit": right["digit"], "colour": right["colour"]}
