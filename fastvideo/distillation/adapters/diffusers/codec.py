"""Autoencoders of diffusers."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import Codec
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, library_class

DECODES = ("decoder.", "post_quant_conv.")
"""Parts of an autoencoder, by the beginnings of their parameters' names, that latents do not depend on."""
OPTIONS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor", "batch_norm_eps", "norm_num_groups")
"""Options of an autoencoder that latents depend on, beside those that its encoder's parameters show."""


def latent_space(config: Mapping[str, Any], vae: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and tensors of an autoencoder that define its latents; equal for Wan's and Qwen-Image's, which differ in
    the decoder and in their classes."""
    options = {name: config[name] for name in OPTIONS if config.get(name) is not None}
    return options, {name: value for name, value in vae.state_dict().items() if not name.startswith(DECODES)}


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
        """SHA-256 of the encoder's weights and of the normalisation: of the latent space, whatever decodes it."""
        return component_hash(*latent_space(self.pipeline.vae_config, self.vae))

    @cached_property
    def known_keys(self) -> tuple[str, ...]:
        """Earlier versions hashed the whole autoencoder with its config."""
        return self.latent_key, component_hash(self.pipeline.vae_config, self.vae.state_dict())

    @abstractmethod
    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise the VAE's raw latents, on any device: published datasets hold these."""

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


def component_hash(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a component's config (but for entries about its file) and weights."""
    kept = {key: value for key, value in config.items() if key[0] != "_"}  # no path, no version
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
