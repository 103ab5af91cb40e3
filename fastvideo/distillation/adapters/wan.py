"""Wan text to video (arXiv 2503.20314) over diffusers: ``WanTransformer3DModel``, ``AutoencoderKLWan``, UMT5.

The network is rectified flow natively; its time embedding counts to 1000, and that factor exists only in
:meth:`WanAdapter.network_time`. Images, two experts, streams and flow maps are in ``wan_family``.
"""

from __future__ import annotations

import html
import re
from functools import cached_property
from typing import ClassVar

import ftfy
from pydantic import model_validator
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.codec import StatisticsCodec
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT, TextConditioner
from fastvideo.distillation.adapters.diffusers.pipeline import (
    PipelineConfig,
    PipelineSpec,
    check_divisible,
    load_config,
)
from fastvideo.distillation.adapters.diffusers.plain import PlainAdapter, PlainFolder
from fastvideo.distillation.config.sections import Level
from fastvideo.distillation.frames import latent_frames
from fastvideo.distillation.noise import shift_time
from fastvideo.distillation.types import Condition
from fastvideo.ranges import Frames, Tokens

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
    """Options of Wan text to video."""

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    level: ClassVar[Level] = "tiny distillation"
    path: str = "tiny"
    """A diffusers Wan pipeline: a folder, a hub id, or `tiny` for the one that ships with this package."""
    num_frames: Frames = 9
    """Video frames; one more than a multiple of the VAE's temporal factor."""
    max_sequence_length: Tokens = 16
    """Tokens that a prompt may have; the network sees this many, zero-padded (512 for the published checkpoints)."""

    @model_validator(mode="after")
    def _divisible(self) -> WanConfig:
        check_divisible(self, side=16, frames=4)
        return self


class WanAdapter(PlainAdapter[WanConfig]):
    """Wan text to video, of one network."""

    Config = WanConfig
    summary = "Wan 2.1 from text: rectified flow, UMT5 text"
    _spec = SPEC

    @cached_property
    def codec(self) -> WanCodec:
        return WanCodec(self._pipeline)

    @cached_property
    def conditioner(self) -> WanConditioner:
        return WanConditioner(self._pipeline)

    @cached_property
    def folder(self) -> WanFolder:
        return WanFolder(self._pipeline)

    @classmethod
    def network_time(cls, t: Tensor, config: WanConfig) -> Tensor:
        return t * TIME_UNITS

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        inputs = self._inputs(network, x_t, t, condition)
        with self._autocast(network, x_t):
            (u,) = network(*inputs, return_dict=False)
        return u.float()  # type: ignore[no-any-return]

    def _inputs(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """Latents, times and text as the network takes them."""
        text = condition.of(self.conditioner.key)[TEXT]
        return self._input(network, x_t), self.network_time(t, self.config), self._input(network, text)


class WanFolder(PlainFolder[WanConfig]):
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


class WanCodec(StatisticsCodec):
    """``AutoencoderKLWan``."""

    @property
    def temporal(self) -> int:
        return int(self.pipeline.vae_config["scale_factor_temporal"])

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one sample."""
        vae, config = self.pipeline.vae_config, self.pipeline.config
        frames, spatial = latent_frames(config.num_frames, self.temporal), vae["scale_factor_spatial"]
        return vae["z_dim"], frames, config.height // spatial, config.width // spatial


class WanConditioner(TextConditioner[WanConfig]):
    """UMT5 text. The network sees zeros beyond a prompt's own tokens, as in ``WanPipeline``."""

    def clean_prompt(self, prompt: str) -> str:
        """As ``WanPipeline`` does, without the seconds that importing it takes."""
        if prompt.isascii() and prompt.isprintable() and "&" not in prompt:  # ftfy and html have nothing to mend
            return " ".join(prompt.split())
        text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
        return re.sub(r"\s+", " ", text).strip()
