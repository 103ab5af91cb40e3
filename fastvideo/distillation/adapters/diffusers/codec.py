"""Autoencoders of diffusers."""

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
        return self.ready(self.pipeline.frozen(autoencoder, "vae", torch_dtype=torch.float32))

    def ready(self, vae: Any) -> Any:
        """An autoencoder as it computes here, such as in tiles."""
        return vae

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.pipeline.config.height, self.pipeline.config.width

    @cached_property
    def latent_key(self) -> str:
        """SHA-256 of the VAE's config and weights."""
        return component_hash(self.pipeline.vae_config, self.vae)

    def _encode(self, videos: Tensor) -> Tensor:
        return self.normalise(self.vae.encode(videos).latent_dist.mode())

    def _decoded(self, raw: Tensor) -> Tensor:
        """Videos of latents that are no longer normalised."""
        return self.vae.decode(raw, return_dict=False)[0]  # type: ignore[no-any-return]


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
