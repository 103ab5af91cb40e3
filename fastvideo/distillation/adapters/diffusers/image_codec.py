"""Autoencoders of families of images."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastvideo.distillation.adapters.diffusers.codec import DiffusersCodec, StatisticsCodec
from fastvideo.distillation.adapters.diffusers.packing import Patches


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

    def denormalise(self, latents: Tensor) -> Tensor:
        """The VAE's raw latents."""
        scale, shift = self._scale_and_shift
        return latents / scale + shift

    @property
    def _scale_and_shift(self) -> tuple[float, float]:
        config = self.pipeline.vae_config
        return float(config["scaling_factor"]), float(config["shift_factor"] or 0.0)

    def _encode(self, videos: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(videos.transpose(1, 2).flatten(0, 1)).latent_dist.mode()
        return self.normalise(latents.view(len(videos), -1, *latents.shape[1:]).transpose(1, 2))

    def _decode(self, latents: Tensor) -> Tensor:
        frames = self._decoded(self.denormalise(latents).transpose(1, 2).flatten(0, 1))
        return frames.view(len(latents), -1, *frames.shape[1:]).transpose(1, 2)


class PatchifiedCodec(ImageCodec):
    """An autoencoder whose latents are normalised after four pixels are one: by the running statistics of its
    batch norm, which is never trained."""

    PATCH: ClassVar[Patches] = Patches(2)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        channels, frames, height, width = super().latent_shape
        return channels * self.PATCH.side**2, frames, height // self.PATCH.side, width // self.PATCH.side

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation ``[1, C, 1, 1, 1]`` of the patchified latents."""
        norm, shape = self.vae.bn, (1, -1, 1, 1, 1)
        mean, var = (value.to(latents.device).view(shape) for value in (norm.running_mean, norm.running_var))
        return mean, (var + self.vae.config.batch_norm_eps).sqrt()

    def normalise(self, latents: Tensor) -> Tensor:
        """Of the VAE's raw latents ``[B, C, F, h, w]``."""
        batch, channels, frames, height, width = latents.shape
        size = channels * self.PATCH.side**2, frames, height // self.PATCH.side, width // self.PATCH.side
        patchified = Patches(1).unpack(self.PATCH.pack(latents), (batch, *size))
        mean, std = self._statistics(latents)
        return (patchified - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        batch, channels, frames, height, width = latents.shape
        mean, std = self._statistics(latents)
        size = channels // self.PATCH.side**2, frames, height * self.PATCH.side, width * self.PATCH.side
        return self.PATCH.unpack(Patches(1).pack(latents * std + mean), (batch, *size))


class VideoStillsCodec(StatisticsCodec):
    """An autoencoder of videos that is given stills, each a video of one frame."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        vae, config = self.pipeline.vae_config, self.pipeline.config
        spatial = 2 ** len(vae["temperal_downsample"])
        return vae["z_dim"], config.num_frames, config.height // spatial, config.width // spatial
