"""Wan 2.1 and TI2V-5B (arXiv 2503.20314) over diffusers: ``WanTransformer3DModel``, ``AutoencoderKLWan``, UMT5, CLIP.

The network is rectified flow natively; its time embedding counts to 1000, and that factor exists only in
:meth:`WanAdapter.network_time`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import StockSampler
from fastvideo.distillation.adapters.flow_scheduler import flow_match_sampler
from fastvideo.distillation.adapters.loading import load_config
from fastvideo.distillation.adapters.pipeline import PipelineAdapter, PipelineConfig, check_divisible
from fastvideo.distillation.adapters.wan_comfy import comfy_layer
from fastvideo.distillation.adapters.wan_inputs import (
    FITTED,
    IMAGE_EMBEDS,
    IMAGE_LATENTS,
    ClipImages,
    ImageInput,
    NetworkInputs,
    allow_given_frames,
    fitted_text,
)
from fastvideo.distillation.noise import shift_time
from fastvideo.distillation.types import Condition, RawBatch

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
TIME_UNITS = 1000.0
"""The time embedding's unit: what diffusers passes as ``timestep`` at ``t = 1``."""


class WanConfig(PipelineConfig):
    """Options of the Wan family."""

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


class WanAdapter(PipelineAdapter[WanConfig]):
    """The Wan family."""

    Config = WanConfig
    pipelines = PIPELINES
    published_guidance = 5.0
    summary = "Wan 2.1 and TI2V-5B, from text and images: rectified flow, UMT5 text"
    transformer_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    text_encoder_class = "UMT5EncoderModel"
    time_embedding = "condition_embedder.time_embedder"
    blocks = "blocks"

    @cached_property
    def inputs(self) -> NetworkInputs:
        """What the network reads beside noise."""
        return NetworkInputs.read(self.source)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one sample.

        Raises:
            UserError: if the checkpoint does not take the configured size or given frames.
        """
        temporal, spatial = self._vae_config["scale_factor_temporal"], self._vae_config["scale_factor_spatial"]
        self.inputs.check(self.source, spatial, **self.config.model_dump(include=set(FITTED)))
        frames = (self.config.num_frames - 1) // temporal + 1
        return self._vae_config["z_dim"], frames, self.config.height // spatial, self.config.width // spatial

    @classmethod
    def comfy_layer(cls, layer: str) -> str:
        return comfy_layer(layer)

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """Uniform, then shifted once as the pipeline's scheduler config says: the flow grid of Wan's own UniPC.

        Stock ``FlowMatchEulerDiscreteScheduler`` shifts its end point too and spends its last call where nothing is
        left to denoise (1, .858, .602, .009 for 4 steps at shift 3), which makes few steps worse.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = load_config(FlowMatchEulerDiscreteScheduler, self.source, "scheduler")
        shift = float(config.get("flow_shift", config.get("shift", 1.0)))
        return tuple(shift_time(1 - i / steps, shift) for i in range(steps))

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        return flow_match_sampler(times, kind)

    @classmethod
    def network_time(cls, t: Tensor, config: WanConfig) -> Tensor:
        return t * TIME_UNITS

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        timestep, span = self.network_time(t, self.config), None if r is None else t - r
        if t.ndim == 2:
            timestep = self._per_token(timestep, x_t, network)
            span = None if span is None else self._per_token(span, x_t, network)
        tensors = condition.tensors
        x = torch.cat([x_t, tensors[IMAGE_LATENTS]], dim=1) if IMAGE_LATENTS in tensors else x_t
        with self._autocast(x_t), self._reading(network, span):
            (u,) = network(x, timestep, tensors["prompt_embeds"], tensors.get(IMAGE_EMBEDS), return_dict=False)
        return u.float()  # type: ignore[no-any-return]

    @staticmethod
    def _per_token(timestep: Tensor, x_t: Tensor, network: Any) -> Tensor:
        """Per-frame times ``[B, F]`` as the per-token times that the network takes."""
        frames, height, width = network.config.patch_size
        tokens = (x_t.shape[3] // height) * (x_t.shape[4] // width)
        return timestep[:, ::frames].repeat_interleave(tokens, dim=1)

    @cached_property
    def _images(self) -> ImageInput:
        scale, config = int(self._vae_config["scale_factor_temporal"]), self.config
        clip = ClipImages(self.source, self._frozen) if self.inputs.image_width else None
        return ImageInput(self.inputs, self.latent_shape, scale, config.given_frames, self.encode, self.decode, clip)

    @property
    def first_frames(self) -> tuple[int, ...]:
        return self._images.counts

    def encode_frames(self, frames: Tensor) -> Condition:
        return self._images.condition(frames.to(self.device))

    def first_frames_of(self, raw: RawBatch) -> Condition:
        """Given frames are those of the latents. What an image-to-video checkpoint reads comes from ``raw.extras``
        (``first_frame_latent``, ``clip_feature``), or else is encoded from the decoded first latent frame."""
        return self._images.condition_of(raw, self.device)

    @property
    def extra_shapes(self) -> Mapping[str, tuple[int | None, ...]]:
        return {"text_embedding": (None, self.inputs.text_width), **self._images.extra_shapes}

    def encode_extras(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        text = dict(super().encode_extras(videos, captions))
        latent_frames = (videos.shape[2] - 1) // self._images.scale + 1
        return text | self._images.extras(videos.to(self.device), latent_frames)

    def text_of(self, raw: RawBatch) -> Condition:
        embedding = raw.extras.get("text_embedding")
        if embedding is None:
            return self.encode_prompts(raw.captions)
        fitted = fitted_text(embedding, self.config.max_sequence_length, self.inputs.text_width)
        return Condition({"prompt_embeds": fitted.to(self.device)})

    @torch.no_grad()
    def _encode_text(self, prompt: str) -> Tensor:
        """Zero beyond the prompt's tokens, as in ``WanPipeline``."""
        tokens = self._tokens(prompt)
        hidden = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return (hidden.float() * tokens.attention_mask.unsqueeze(-1))[0]  # type: ignore[no-any-return]

    def clean_prompt(self, prompt: str) -> str:
        """As ``WanPipeline`` does, without the seconds that importing it takes."""
        text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
        return re.sub(r"\s+", " ", text).strip()

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        mean, std = self._vae_config["latents_mean"], self._vae_config["latents_std"]
        return torch.tensor(mean, device=self.device).view(shape), torch.tensor(std, device=self.device).view(shape)

    def normalise(self, latents: Tensor) -> Tensor:
        """With the VAE's published statistics."""
        mean, std = (value.to(latents.device) for value in self._latent_statistics())
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics()
        return self.vae.decode(latents * std + mean, return_dict=False)[0]  # type: ignore[no-any-return]

    def save_pipeline(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any]) -> None:
        super().save_pipeline(folder, network, recipe)
        if self.config.given_frames:
            allow_given_frames(folder)
