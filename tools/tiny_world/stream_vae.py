"""Training of a Wan VAE on streams: videos longer than its causal convolutions look back.

A convolution of a stream reads what earlier frames left in its cache. A step trains a few frames in the middle of a
video and takes the caches of the step before as given (truncated backpropagation through time), so that full caches
cost no more than empty ones. Several batches take turns, each at its own place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor

from fastvideo.tiny.world import torus
from tools.tiny_world.recipe import WeighedTraining
from tools.tiny_world.sharpen import freeze_encoder
from tools.tiny_world.train_vae import ink_error, measure_statistics, optimise, use_channels_last
from tools.tiny_world.vae import kernels

GROUP = 4  # video frames of a latent frame; the first one has a single frame


@dataclass(frozen=True)
class StreamVaeRecipe(WeighedTraining):
    """Training on streams.

    Attributes:
        groups: latent frames of a step.
        turns: batches of videos that take turns.
        shortest, longest: length of a video in latent frames.
    """

    steps: int = 3000
    batch_size: int = 8
    muon_rate: float = 3e-3
    adam_rate: float = 1.5e-3
    groups: int = 4
    turns: int = 6
    shortest: int = 5
    longest: int = 33
    seed: int = 31


@dataclass(frozen=True)
class SharpStreamRecipe(StreamVaeRecipe):
    """The same for the decoder alone, with fixed latents."""

    steps: int = 2000
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    squared_weight: float = 8.0
    seed: int = 32


def fit_on_streams(vae: AutoencoderKLWan, recipe: StreamVaeRecipe) -> AutoencoderKLWan:
    """Train encoder and decoder in place and measure the latent statistics; frozen, in eval mode."""
    use_channels_last(vae)
    optimise(vae, kernels(vae), recipe, "vae", stream_losses(vae, recipe, torch.Generator().manual_seed(recipe.seed)))
    mean, std = measure_statistics(vae, torus("train"), recipe.statistics_videos, recipe.seed + 1)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae.eval().requires_grad_(False)


def sharpen_on_streams(vae: AutoencoderKLWan, recipe: SharpStreamRecipe) -> AutoencoderKLWan:
    """Train the decoder in place, from the means of the posteriors; frozen, in eval mode."""
    freeze_encoder(vae)
    optimise(vae, kernels(vae), recipe, "decoder", stream_losses(vae, recipe, None))
    return vae.eval().requires_grad_(False)


def stream_losses(vae: AutoencoderKLWan, recipe: StreamVaeRecipe, noise: torch.Generator | None) -> Iterator[Tensor]:
    """Losses of all steps; with ``noise`` on samples of the posteriors, otherwise on their means."""
    turn, fresh = random.Random(recipe.seed), videos_of(recipe)
    streams = [Stream(vae, next(fresh)) for _ in range(recipe.turns)]
    for _ in range(recipe.steps):
        chosen = turn.randrange(recipe.turns)
        yield streams[chosen].loss(recipe, noise)
        if streams[chosen].ended:
            streams[chosen] = Stream(vae, next(fresh))


def videos_of(recipe: StreamVaeRecipe) -> Iterator[Tensor]:
    """Batches of videos ``[B, 3, T, 32, 32]`` of random length."""
    length, seed = random.Random(recipe.seed + 1), recipe.seed * 1000
    while True:
        seed += 1
        frames = 1 + GROUP * (length.randint(recipe.shortest, recipe.longest) - 1)
        yield torus("train", frames).sample(recipe.batch_size, seed).videos


class Stream:
    """A batch of videos that training goes through, with what the convolutions remember of it."""

    def __init__(self, vae: AutoencoderKLWan, videos: Tensor) -> None:
        vae.clear_cache()  # it counts the convolutions
        self.vae, self.videos, self.at = vae, videos, 0
        self.encoded: list[Any] = [None] * vae._enc_conv_num
        self.decoded: list[Any] = [None] * vae._conv_num

    @property
    def ended(self) -> bool:
        return self.at == self.videos.shape[2]

    def loss(self, recipe: StreamVaeRecipe, noise: torch.Generator | None) -> Tensor:
        """Loss of the next frames, whose caches then belong to the past."""
        begin, parts = self.at, [self._latent_frame(noise) for _ in range(recipe.groups) if not self.ended]
        decoded = torch.cat([video for video, _ in parts], dim=2)
        self.encoded, self.decoded = _detached(self.encoded), _detached(self.decoded)
        error = ink_error(decoded, self.videos[:, :, begin : self.at], recipe.ink_weight, recipe.squared_weight)
        return error + recipe.kl_weight * torch.stack([kl for _, kl in parts]).mean()

    def _latent_frame(self, noise: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The next frames after encoding and decoding, and the KL term of their posterior."""
        first, vae, patch = self.at == 0, self.vae, self.vae.config.patch_size
        frames = self.videos[:, :, self.at : self.at + (1 if first else GROUP)]
        self.at += frames.shape[2]
        hidden = vae.encoder(patchify(frames, patch_size=patch), feat_cache=self.encoded, feat_idx=[0])
        mean, log_variance = vae.quant_conv(hidden).chunk(2, dim=1)
        kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1.0).mean()
        if noise is not None:
            mean = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=noise)
        hidden = vae.post_quant_conv(mean)
        video = vae.decoder(hidden, feat_cache=self.decoded, feat_idx=[0], first_chunk=first)
        return unpatchify(video, patch_size=patch), kl


def _detached(cache: list[Any]) -> list[Any]:
    """A cache without graph; diffusers marks some of its entries by a text."""
    return [entry.detach() if isinstance(entry, Tensor) else entry for entry in cache]
