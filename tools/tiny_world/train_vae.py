"""Training of a tiny VAE, and its quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch import nn

from fastvideo.evaluation.streams.reconstruction import psnr
from fastvideo.inference.progress import tracked
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.world import TinyWorld, WorldSample
from tools.tiny_world import cogvideox_vae
from tools.tiny_world import vae as wan_vae
from tools.tiny_world.muon import Muon
from tools.tiny_world.recipe import VaeRecipe, VaeTraining
from tools.tiny_world.train_classifier import accuracy
from tools.tiny_world.vae import encode_moments

Vae = Any
"""A diffusers video autoencoder."""


@dataclass(frozen=True)
class VaeKind:
    """A class of VAE, for the training of its decoder.

    Attributes:
        model: the diffusers class.
        decode: raw latents to videos, with gradients everywhere.
        kernels: the parameters that Muon trains.
    """

    model: type[Any]
    decode: Callable[[Vae, torch.Tensor], torch.Tensor]
    kernels: Callable[[Vae], list[nn.Parameter]]

    def load(self, folder: Path) -> Vae:
        """The VAE saved in `folder`, in float32."""
        return self.model.from_pretrained(folder, torch_dtype=torch.float32)


WAN = VaeKind(AutoencoderKLWan, wan_vae.decode_unclamped, wan_vae.kernels)
COGVIDEOX = VaeKind(AutoencoderKLCogVideoX, cogvideox_vae.decode, cogvideox_vae.kernels)


def train_vae(recipe: VaeRecipe) -> AutoencoderKLWan:
    """A Wan VAE trained on videos of the train split, with measured latent statistics; frozen, in eval mode."""
    return fit_vae(wan_vae.build_vae(recipe), recipe, TinyWorld("train"))


def fit_vae(vae: AutoencoderKLWan, recipe: VaeRecipe, world: TinyWorld) -> AutoencoderKLWan:
    """Train a Wan VAE in place on videos of ``world`` and measure its latent statistics; frozen, in eval mode."""
    use_channels_last(vae)
    generator = torch.Generator().manual_seed(recipe.seed)

    def losses() -> Iterator[torch.Tensor]:
        for step, sample in enumerate(training_batches(recipe, world)):
            frames = recipe.short_frames if step < recipe.short_share * recipe.steps else world.frames
            yield vae_loss(vae, sample.videos[:, :, :frames], recipe, generator)

    optimise(vae, wan_vae.kernels(vae), recipe, "vae", losses())
    mean, std = measure_statistics(vae, world, recipe.statistics_videos, recipe.seed + 1)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae.eval().requires_grad_(False)


def vae_loss(
    vae: AutoencoderKLWan, videos: torch.Tensor, recipe: VaeRecipe, generator: torch.Generator
) -> torch.Tensor:
    """Weighted reconstruction error of videos [B, 3, T, H, W] from a sample of their posterior, and the KL term."""
    mean, log_variance = encode_moments(vae, videos)
    noise = torch.randn(mean.shape, generator=generator)
    decoded = wan_vae.decode_unclamped(vae, mean + (0.5 * log_variance).exp() * noise)
    kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1.0).mean()
    return ink_error(decoded, videos, recipe.ink_weight, recipe.squared_weight) + recipe.kl_weight * kl


def ink_error(decoded: torch.Tensor, videos: torch.Tensor, ink_weight: float, squared_weight: float) -> torch.Tensor:
    """Absolute plus weighted squared error, where a pixel of full ink counts `1 + ink_weight` and black counts 1."""
    error = decoded - videos
    ink = (videos.amax(dim=1, keepdim=True) + 1.0) / 2.0
    return ((1.0 + ink_weight * ink) * (error.abs() + squared_weight * error.square())).mean()


def training_batches(recipe: VaeTraining, world: TinyWorld) -> Iterator[WorldSample]:
    """A batch of videos of ``world`` for each step."""
    return world.batches(recipe.steps * recipe.batch_size, recipe.seed, recipe.batch_size)


def optimise(
    vae: Vae, kernels: list[nn.Parameter], recipe: VaeTraining, label: str, losses: Iterator[torch.Tensor]
) -> None:
    """Train the parameters of `vae` that require gradients, in place: `kernels` by Muon, the others by Adam.

    Args:
        label: of the progress bar.
        losses: one scalar per step, each computed when it is asked for.
    """
    parameters, taken = [p for p in vae.parameters() if p.requires_grad], {id(p) for p in kernels}
    optimizers = [
        Muon([p for p in parameters if id(p) in taken], recipe.muon_rate),
        torch.optim.Adam([p for p in parameters if id(p) not in taken], recipe.adam_rate, betas=(0.9, 0.99)),
    ]
    share = warmed_cosine(recipe.warm_up, recipe.steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    for loss in tracked(losses, label, total=recipe.steps):
        vae.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, recipe.gradient_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()


def warmed_cosine(warm_up: int, steps: int) -> Callable[[int], float]:
    """Share of the highest learning rate at a step: linear warm-up times a cosine to zero."""
    return lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def use_channels_last(vae: Vae) -> None:
    """Store kernels with their channels last: a sixth faster on a CPU, the same numbers."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


@torch.no_grad()
def measure_statistics(vae: Vae, world: TinyWorld, videos: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [16] per channel of the latents of ``world.sample(videos, seed)``, float64."""
    batches = world.batches(videos, seed, 64)
    latents = torch.cat([encode_moments(vae, sample.videos)[0] for sample in batches])
    std, mean = torch.std_mean(latents.double(), dim=(0, 2, 3, 4))
    return mean, std


@dataclass(frozen=True)
class VaeQuality:
    """Reconstruction of held-out videos: PSNR in dB, and the classifier's accuracies over `samples`."""

    psnr: float
    digit_accuracy: float
    colour_accuracy: float
    direction_accuracy: float
    samples: int


@torch.no_grad()
def vae_quality(vae: Vae, judge: TinyClassifier, samples: int, seed: int) -> VaeQuality:
    """Quality of `samples` held-out videos after encoding and decoding."""
    truth = TinyWorld("heldout").sample(samples, seed)
    pieces = [vae.decode(encode_moments(vae, part)[0]).sample for part in truth.videos.split(64)]
    reconstruction = torch.cat(pieces)
    right = accuracy(judge, truth, reconstruction)
    return VaeQuality(psnr(reconstruction, truth.videos), right["digit"], right["colour"], right["direction"], samples)
