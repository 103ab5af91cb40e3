"""Wan 2.1 and TI2V-5B (arXiv 2503.20314) over diffusers: ``WanTransformer3DModel``, ``AutoencoderKLWan``, UMT5, CLIP.

The network is rectified flow natively; its time embedding counts to 1000, and that factor exists only in
:meth:`WanAdapter.network_time`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import StockSampler
from fastvideo.distillation.adapters.diffusers.adapter import DiffusersAdapter
from fastvideo.distillation.adapters.diffusers.codec import StatisticsCodec
from fastvideo.distillation.adapters.diffusers.flow_scheduler import flow_match_sampler
from fastvideo.distillation.adapters.diffusers.folder import DiffusersFolder
from fastvideo.distillation.adapters.diffusers.loading import load_config
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, PipelineConfig, PipelineSpec, check_divisible
from fastvideo.distillation.adapters.diffusers.texts import TEXT
from fastvideo.distillation.adapters.wan_comfy import comfy_layer
from fastvideo.distillation.adapters.wan_conditioner import (
    IMAGE_EMBEDS,
    IMAGE_LATENTS,
    NetworkInputs,
    WanConditioner,
)
from fastvideo.distillation.noise import shift_time
from fastvideo.distillation.types import Condition

TIME_UNITS = 1000.0
"""The time embedding's unit: diffusers passes this as ``timestep`` at ``t = 1``."""
SPEC = PipelineSpec(
    network="WanTransformer3DModel",
    vae="AutoencoderKLWan",
    text_encoder="UMT5EncoderModel",
    time_embedding="condition_embedder.time_embedder",
    blocks="blocks",
    published_guidance=5.0,
)


class WanConfig(PipelineConfig):
    """Options of the Wan family."""

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline")
    path: str = "tiny"
    """A diffusers Wan pipeline: a folder, a hub id, or `tiny` for the one that ships with this package."""
    num_frames: PositiveInt = 9
    """Video frames; one more than a multiple of the VAE's temporal factor."""
    given_frames: NonNegativeInt = 0
    """Latent frames at the start of a video that are given and not generated: 1 goes on from an image (Wan 2.2 TI2V-5B,
    or a text-to-video model that is tuned to), more from a clip. An image-to-video checkpoint (Wan 2.1 I2V) takes its
    image otherwise and keeps 0."""
    max_sequence_length: PositiveInt = 16
    """Tokens that a prompt may have; the network sees this many, zero-padded (512 for the published checkpoints)."""

    @model_validator(mode="after")
    def _divisible(self) -> WanConfig:
        check_divisible(self, side=16, frames=4)
        frames = self.num_frames // 4 + 1
        if self.given_frames >= frames:
            raise ValueError(
                f"given_frames must leave one of {frames} latent frames to generate, got {self.given_frames}"
            )
        return self


class WanCodec(StatisticsCodec):
    """``AutoencoderKLWan``."""

    def __init__(self, pipeline: Pipeline[WanConfig], inputs: NetworkInputs) -> None:
        super().__init__(pipeline)
        self.inputs, self.config = inputs, pipeline.config

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one sample.

        Raises:
            UserError: if the checkpoint does not take the configured size or given frames.
        """
        vae = self.pipeline.vae_config
        temporal, spatial = vae["scale_factor_temporal"], vae["scale_factor_spatial"]
        self.inputs.check(self.pipeline, self.config.given_frames)
        frames = (self.config.num_frames - 1) // temporal + 1
        return vae["z_dim"], frames, self.config.height // spatial, self.config.width // spatial


class WanFolder(DiffusersFolder[WanConfig]):
    """A Wan pipeline."""

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """Uniform, then shifted once by the scheduler config's shift: the flow grid of Wan's own UniPC.

        Stock ``FlowMatchEulerDiscreteScheduler`` shifts its end point too and spends its last call where nothing is
        left to denoise (1, .858, .602, .009 for 4 steps at shift 3), which makes few steps worse.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = load_config(FlowMatchEulerDiscreteScheduler, self.pipeline.source, "scheduler")
        shift = float(config.get("flow_shift", config.get("shift", 1.0)))
        return tuple(shift_time(1 - i / steps, shift) for i in range(steps))

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        return flow_match_sampler(times, kind)

    def comfy_layer(self, layer: str) -> str:
        return comfy_layer(layer)

    def save(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any]) -> None:
        """As every pipeline. With ``given_frames`` the index notes times per token, as TI2V-5B's does: stock
        ``WanImageToVideoPipeline`` then keeps the first frame clean."""
        super().save(folder, network, recipe)
        if self.config.given_frames:
            file = folder / "model_index.json"
            index = json.loads(file.read_text()) | {"expand_timesteps": True}
            file.write_text(json.dumps(index, indent=2) + "\n")


class WanAdapter(DiffusersAdapter[WanConfig]):
    """The Wan family."""

    Config = WanConfig
    summary = "Wan 2.1 and TI2V-5B, from text and images: rectified flow, UMT5 text"
    supports = DiffusersAdapter.supports | {"frame_times"}
    _spec = SPEC

    @cached_property
    def _inputs(self) -> NetworkInputs:
        return NetworkInputs.read(self._pipeline)

    @cached_property
    def codec(self) -> WanCodec:
        return WanCodec(self._pipeline, self._inputs)

    @cached_property
    def conditioner(self) -> WanConditioner:
        return WanConditioner(self._pipeline, self._inputs, self.codec, self.config.given_frames)

    @cached_property
    def folder(self) -> WanFolder:
        return WanFolder(self._pipeline)

    @classmethod
    def network_time(cls, t: Tensor, config: WanConfig) -> Tensor:
        return t * TIME_UNITS

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        timestep, span = self.network_time(t, self.config), None if r is None else t - r
        if t.ndim == 2:
            timestep = _per_token(timestep, x_t, network)
            span = None if span is None else _per_token(span, x_t, network)
        own = condition.of(self.conditioner.key)
        x = torch.cat([x_t, own[IMAGE_LATENTS]], dim=1) if IMAGE_LATENTS in own else x_t
        with self._autocast(x_t), self._reading(network, span):
            (u,) = network(x, timestep, own[TEXT], own.get(IMAGE_EMBEDS), return_dict=False)
        return u.float()  # type: ignore[no-any-return]


def _per_token(times: Tensor, x_t: Tensor, network: Any) -> Tensor:
    """Per-frame times ``[B, F]`` as the per-token times that the network takes."""
    frames, height, width = network.config.patch_size
    tokens = (x_t.shape[3] // height) * (x_t.shape[4] // width)
    return times[:, ::frames].repeat_interleave(tokens, dim=1)
