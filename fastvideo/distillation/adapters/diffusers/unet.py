"""Families whose network is a ``UNet2DConditionModel`` on a variance-preserving table: Stable Diffusion and SDXL.

A still is a video of one frame. The network predicts noise or ``v`` (the checkpoint's scheduler says which) for a
sample of unit variance; :class:`~fastvideo.distillation.adapters.diffusers.discrete_vp.NoiseGrid` converts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import refused_context
from fastvideo.distillation.adapters.diffusers.adapter import DiffusersAdapter, DiffusersScaling
from fastvideo.distillation.adapters.diffusers.codec import ImageCodec
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid, noise_grid
from fastvideo.distillation.adapters.diffusers.folder import DiffusersFolder
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, PipelineConfig, resolve_pipeline
from fastvideo.distillation.adapters.diffusers.pipeline_texts import text_encoders
from fastvideo.distillation.chunks import Context
from fastvideo.distillation.types import Condition, UserError
from fastvideo.ranges import Frames, Tokens

SCHEDULER = "DDIMScheduler"
"""Class that reads the checkpoint's noise levels, and takes the same timesteps as its own scheduler."""


class ImageConfig(PipelineConfig):
    """Options of a family of images."""

    own_sizes: ClassVar[frozenset[str]] = frozenset({"height", "width", "num_frames", "max_sequence_length"})
    num_frames: Frames = 1
    """Frames: 1, a still."""
    max_sequence_length: Tokens = 77
    """Tokens that a prompt may have, start and end included: the length to which its tokenizers pad."""

    @model_validator(mode="after")
    def _a_still(self) -> ImageConfig:
        if self.num_frames != 1:
            raise ValueError(f"num_frames must be 1: the family makes images, got {self.num_frames}")
        for name, size in (("height", self.height), ("width", self.width)):
            if size % 8:
                raise ValueError(f"{name} must be a multiple of 8 (VAE factor), got {size}")
        return self


class UNetFolder(DiffusersFolder[ConfigT]):
    """A pipeline with a UNet."""

    @property
    def grid(self) -> NoiseGrid:
        """The noise levels that the network was trained on."""
        return noise_grid(self.pipeline.source, SCHEDULER)

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """The times of the timesteps that the checkpoint's spacing gives for so many steps."""
        return self.grid.times_of(self.grid.teacher_timesteps(steps))

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The UNet.

        Raises:
            UserError: for one that reads an image beside the noise (inpainting, editing).
        """
        taken, latents = self.pipeline.network_config(path)["in_channels"], self.pipeline.vae_config["latent_channels"]
        if taken != latents:
            raise UserError(
                f"the unet of {path or self.pipeline.source!r} takes {taken} channels, its latents have {latents}: "
                f"text-to-image checkpoints are read, none for inpainting or editing"
            )
        return super().load_network(path, dtype)

    @property
    def _head_width(self) -> int:
        """Of the first level with attention; diffusers calls the number of heads ``attention_head_dim`` here."""
        config = self.pipeline.network_config()
        heads, widths = config["attention_head_dim"], config["block_out_channels"]
        return int(widths[-1] // (heads[-1] if isinstance(heads, Sequence) else heads))

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        return {**super().frozen_parts(), "text encoder": text_encoders(self.pipeline)}


class UNetScaling(DiffusersScaling):
    """A UNet's tokens are not split: convolutions and attention take turns at several sizes."""

    def context_counts(self, path: str | None, latent_shape: Sequence[int]) -> Mapping[str, int]:
        return {"attention heads": 1, "tokens": latent_shape[2] * latent_shape[3]}


class UNetAdapter(DiffusersAdapter[ConfigT]):
    """A family with a UNet."""

    @cached_property
    def codec(self) -> ImageCodec:
        return ImageCodec(self._pipeline)

    @cached_property
    def folder(self) -> UNetFolder[ConfigT]:
        return UNetFolder(self._pipeline)

    @cached_property
    def scaling(self) -> UNetScaling:
        return UNetScaling(self._pipeline)

    @cached_property
    def feature_widths(self) -> tuple[int, ...]:
        """Channels after each block on the way down; its tokens are the pixels of its map."""
        return tuple(self._pipeline.network_config()["block_out_channels"])

    @classmethod
    def network_time(cls, t: Tensor, config: ConfigT) -> Tensor:
        return noise_grid(resolve_pipeline(config.path, config.pipelines), SCHEDULER).timestep(t)

    def _added(self, own: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor] | None:
        """Conditions that the network adds to its time embedding, for latents ``x`` ``[B, C, 1, h, w]``."""
        return None

    def velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        if context is not None:
            raise refused_context(type(self).__name__)
        if t.ndim != 1:
            raise UserError(f"{type(self).__name__} takes one time per sample: it makes stills")
        grid, own = self.folder.grid, condition.of(self.conditioner.key)
        x = self._input(network, grid.network_input(x_t, t))
        with self._autocast(network, x_t), self._reading(network, None if r is None else t - r):
            (predicted,) = network(
                x.squeeze(2),
                grid.timestep(t),
                encoder_hidden_states=self._input(network, own[TEXT]),
                added_cond_kwargs=self._added(own, x),
                return_dict=False,
            )
        return grid.flow_velocity(x_t, x, t, predicted.float().unsqueeze(2))
