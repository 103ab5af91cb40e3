"""Flow families of videos: their sizes, autoencoders whose config names their factors, and calls of one sample each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.codec import DiffusersCodec
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter
from fastvideo.distillation.adapters.diffusers.flow_config import FlowConfig
from fastvideo.distillation.adapters.diffusers.packing import Patches
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, check_divisible
from fastvideo.distillation.features import Taps, Tokens
from fastvideo.distillation.types import Condition


class FlowVideoConfig(FlowConfig):
    """Options of a flow family of videos."""

    own_sizes: ClassVar[frozenset[str]] = frozenset({"max_sequence_length"})
    side: ClassVar[int] = 16
    """Pixels of which height and width are multiples: the VAE's factor, times the side of a patch."""
    stride: ClassVar[int] = 4
    """Frames of a latent frame, but for the first, which is one frame."""

    @model_validator(mode="after")
    def _divisible(self) -> FlowVideoConfig:
        check_divisible(self, self.side, self.stride)
        return self


class ScaledVideoCodec(DiffusersCodec):
    """An autoencoder of videos whose latents are normalised by one number."""

    @property
    def temporal(self) -> int:
        return int(self.pipeline.vae_config["temporal_compression_ratio"])

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        vae, config = self.pipeline.vae_config, self.pipeline.config
        side, frames = vae["spatial_compression_ratio"], (config.num_frames - 1) // self.temporal + 1
        return vae["latent_channels"], frames, config.height // side, config.width // side

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * float(self.pipeline.vae_config["scaling_factor"])

    def _decode(self, latents: Tensor) -> Tensor:
        return self._decoded(latents / float(self.pipeline.vae_config["scaling_factor"]))


@dataclass(frozen=True)
class Volumes(Patches):
    """Videos ``[B, C, F, h, w]``, or with ``channels_last`` ``[B, F, h, w, C]``, of which the network makes patches."""

    channels_last: bool = False

    def pack(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 4, 1) if self.channels_last else x

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return packed.permute(0, 4, 1, 2, 3) if self.channels_last else packed


class OneByOneAdapter(FlowAdapter[ConfigT]):
    """A flow family whose network is called for each sample of a batch alone: it has no mask for a text's padding.

    The number of calls is that of samples, whatever their texts, so processes that share a network stay together.
    """

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        call, rows = super().velocity, _rows(x_t)
        to = [None if r is None else r[row] for row in rows]
        at = [(x_t[row], t[row], condition.rows(row)) for row in rows]
        return torch.cat([call(network, *one, r=end) for one, end in zip(at, to, strict=True)])

    def features(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        taps: Taps,
        *,
        whole: bool = False,
    ) -> tuple[Tensor | None, Tokens]:
        call = super().features
        found = [call(network, x_t[row], t[row], condition.rows(row), taps, whole=whole) for row in _rows(x_t)]
        u = [one for one, _ in found if one is not None]
        tokens = zip(*(each for _, each in found), strict=True)
        return torch.cat(u) if u else None, tuple(torch.cat(each) for each in tokens)


def _rows(x_t: Tensor) -> list[slice]:
    """Each sample of a batch as a batch of one."""
    return [slice(row, row + 1) for row in range(len(x_t))]
