"""Autoencoders of diffusers: videos, or images frame by frame."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.adapters.base import Codec
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, component_hash, library_class


class DiffusersCodec(Codec):
    """A frozen float32 autoencoder, loaded on first use; latents are the posterior's mean, normalised."""

    def __init__(self, pipeline: Pipeline[Any]) -> None:
        self.pipeline, self.device = pipeline, pipeline.device

    @cached_property
    def vae(self) -> Any:
        """The autoencoder."""
        autoencoder = library_class("diffusers", self.pipeline.spec.vae)
        return self.pipeline.frozen(autoencoder, "vae", torch_dtype=torch.float32)

    @cached_property
    def latent_key(self) -> str:
        """SHA-256 of the VAE's config and weights."""
        return component_hash(self.pipeline.vae_config, self.vae)

    def _encode(self, videos: Tensor) -> Tensor:
        return self.normalise(self.vae.encode(videos).latent_dist.mode())

    def _decoded(self, raw: Tensor) -> Tensor:
        """Videos of latents that are no longer normalised."""
        return self.vae.decode(raw, return_dict=False)[0]  # type: ignore[no-any-return]


class ImageCodec(DiffusersCodec):
    """An autoencoder of images (``AutoencoderKL``): one scale and one shift, every frame on its own."""

    @property
    def spatial(self) -> int:
        """Pixels per latent pixel."""
        return int(2 ** (len(self.pipeline.vae_config["block_out_channels"]) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        config = self.pipeline.config
        size = config.height // self.spatial, config.width // self.spatial
        return self.pipeline.vae_config["latent_channels"], config.num_frames, *size

    def normalise(self, latents: Tensor) -> Tensor:
        scale, shift = self._scale_and_shift
        return (latents - shift) * scale

    @property
    def _scale_and_shift(self) -> tuple[float, float]:
        config = self.pipeline.vae_config
        return float(config["scaling_factor"]), float(config["shift_factor"] or 0.0)

    def _encode(self, videos: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(videos.transpose(1, 2).flatten(0, 1)).latent_dist.mode()
        return self.normalise(latents.view(len(videos), -1, *latents.shape[1:]).transpose(1, 2))

    def _decode(self, latents: Tensor) -> Tensor:
        scale, shift = self._scale_and_shift
        frames = self._decoded((latents / scale + shift).transpose(1, 2).flatten(0, 1))
        return frames.view(len(latents), -1, *frames.shape[1:]).transpose(1, 2)


class StatisticsCodec(DiffusersCodec):
    """Normalises each channel with the mean and deviation that the VAE's config holds."""

    def statistics(self, device: torch.device) -> tuple[Tensor, ...]:
        """Mean and deviation of the raw latents, ``[1, C, 1, 1, 1]``."""
        names, config = ("latents_mean", "latents_std"), self.pipeline.vae_config
        return tuple(torch.tensor(config[name], device=device).view(1, -1, 1, 1, 1) for name in names)

    def normalise(self, latents: Tensor) -> Tensor:
        mean, std = self.statistics(latents.device)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The VAE's raw latents."""
        mean, std = self.statistics(latents.device)
        return latents * std + mean

    def _decode(self, latents: Tensor) -> Tensor:
        return self._decoded(self.denormalise(latents))
