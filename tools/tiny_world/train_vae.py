"""Training of a tiny VAE, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch import nn

from fastvideo.inference.progress import tracked
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.world import TinyWorld
from tools.tiny_world import cogvideox_vae
from tools.tiny_world import vae as wan_vae
from tools.tiny_world.muon import Muon
from tools.tiny_world.recipe import VaeRecipe
from tools.tiny_world.train_classifier import accuracy
from tools.tiny_world.vae import encode_moments, psnr

Vae = Any
"""A diffusers video autoencoder."""
StepHook = Callable[[int, Vae], None]


@dataclass(frozen=True)
class VaeKind:
    """What the training of a decoder must know of its VAE's class.

    Attributes:
        model: the diffusers class.
        decode: raw latents to videos, with gradients everywhere.
        kernels: the parameters that Muon trains.
    """

    model: type[Any]
    decode: Callable[[Vae, torch.Tensor], torch.Tensor]
    kernels: Callable[[Vae], list[nn.Parameter]]

    def load(self, folder: Path) -> Vae:
        """The VAE that was saved in `folder`, in float32."""
        return self.model.from_pretrained(folder, torch_dtype=torch.float32)


WAN = VaeKind(AutoencoderKLWan, wan_vae.decode_unclamped, wan_vae.kernels)
COGVIDEOX = VaeKind(AutoencoderKLCogVideoX, cogvideox_vae.decode, cogvideox_vae.kernels)


def train_vae(recipe: VaeRecipe, after_step: StepHook | None = None) -> AutoencoderKLWan:
    """A Wan VAE trained on videos of the train split, its latent statistics measured; frozen, in eval mode.

    Args:
        recipe: size and training.
        after_step: called with the number of steps done and the VAE, for checkpoints and measurements.
    """
    vae = wan_vae.build_vae(recipe)
    use_channels_last(vae)
    optimizers = split_optimizers(list(vae.parameters()), wan_vae.kernels(vae), recipe.muon_rate, recipe.adam_rate)
    share = warmed_cosine(recipe.warm_up, recipe.steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(recipe.seed)
    samples = TinyWorld("train").batches(recipe.steps * recipe.batch_size, recipe.seed, recipe.batch_size)
    for step, sample in enumerate(tracked(samples, "vae", total=recipe.steps)):
        short = step < recipe.short_share * recipe.steps
        videos = sample.videos[:, :, : recipe.short_frames] if short else sample.videos
        vae.zero_grad()
        vae_loss(vae, videos, recipe, generator).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(vae.parameters(), recipe.gradient_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if after_step is not None:
            after_step(step + 1, vae)
    mean, std = measure_statistics(vae, recipe)
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


def split_optimizers(
    parameters: list[nn.Parameter], kernels: list[nn.Parameter], muon_rate: float, adam_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for those `parameters` that are among `kernels`, Adam for the others."""
    taken = {id(p) for p in kernels}
    muon = [p for p in parameters if id(p) in taken]
    others = [p for p in parameters if id(p) not in taken]
    return [Muon(muon, muon_rate), torch.optim.Adam(others, adam_rate, betas=(0.9, 0.99))]


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
def measure_statistics(vae: Vae, recipe: VaeRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [16] per channel of the train split's latents, float64."""
    batches = TinyWorld("train").batches(recipe.statistics_videos, recipe.seed + 1, 64)
    latents = torch.cat([encode_moments(vae, sample.videos)[0] for sample in batches])
    std, mean = torch.std_mean(latents.double(), dim=(0, 2, 3, 4))
    return mean, std


@dataclass(frozen=True)
class VaeQuality:
    """Reconstruction of held-out videos: PSNR in dB and what the classifier reads off it (shares of `samples`)."""

    psnr: float
    digit_accuracy: float
    colour_accuracy: float
    direction_accuracy: float
    samples: int


@torch.no_grad()
def vae_quality(vae: Vae, judge: TinyClassifier, samples: int, seed: int) -> VaeQuality:
    """Encode and decode `samples` held-out videos and measure what came back."""
    truth = TinyWorld("heldout").sample(samples, seed)
    pieces = [vae.decode(encode_moments(vae, part)[0]).sample for part in truth.videos.split(64)]
    reconstruction = torch.cat(pieces)
    right = accuracy(judge, truth, reconstruction)
    return VaeQuality(psnr(reconstruction, truth.videos), right["digit"], right["colour"], right["direction"], samples)
