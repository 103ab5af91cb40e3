"""LTX-Video (arXiv 2501.00103) over diffusers: ``LTXVideoTransformer3DModel``, ``AutoencoderKLLTXVideo``, T5.

The network is rectified flow natively, on one token per latent pixel; its time counts to 1000, and positions are in
seconds and pixels. The encoder sees a prompt's padding, which the network does not: a text depends on the length to
which it is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.codec import DiffusersCodec
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter
from fastvideo.distillation.adapters.diffusers.flow_config import StockCall
from fastvideo.distillation.adapters.diffusers.flow_texts import MASK, FlowTexts
from fastvideo.distillation.adapters.diffusers.packing import Packing, Patches
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec
from fastvideo.distillation.adapters.diffusers.videos import FlowVideoConfig
from fastvideo.ranges import Frames, Pixels, Tokens
from fastvideo.sampling_ranges import FrameRate

SIDE, STRIDE = 32, 8
"""Pixels on a side of a latent pixel, and frames of a latent frame, of all published checkpoints."""


class LTXConfig(FlowVideoConfig):
    """Options of the LTX-Video family."""

    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline",)
    side, stride = SIDE, STRIDE
    packing: ClassVar[Packing] = Patches(1)
    stock: ClassVar[StockCall] = StockCall(
        packed=True,
        sigmas=False,
        images=False,
        sizes=("height", "width", "num_frames", "max_sequence_length", "frame_rate"),
    )
    path: str
    """A diffusers LTX-Video pipeline: a folder, or a hub id such as `Lightricks/LTX-Video`."""
    height: Pixels = 512
    """Video height in pixels."""
    width: Pixels = 704
    """Video width in pixels."""
    num_frames: Frames = 161
    """Video frames; one more than a multiple of 8."""
    frame_rate: FrameRate = 25.0
    """Frames per second, which the network reads as distances in time."""
    max_sequence_length: Tokens = 128
    """Tokens that a prompt may have, and to which it is padded."""


class LTXCodec(DiffusersCodec):
    """``AutoencoderKLLTXVideo``; a decoder that reads a time gets that of clean latents, as in the stock pipeline."""

    @property
    def temporal(self) -> int:
        return STRIDE

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        config = self.pipeline.config
        frames = (config.num_frames - 1) // STRIDE + 1
        return self.pipeline.vae_config["latent_channels"], frames, config.height // SIDE, config.width // SIDE

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            one.to(latents.device).view(1, -1, 1, 1, 1) for one in (self.vae.latents_mean, self.vae.latents_std)
        )
        return mean, std / self.vae.config.scaling_factor

    def normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        time = latents.new_zeros(len(latents)) if self.vae.config.timestep_conditioning else None
        return self.vae.decode(latents * std + mean, time, return_dict=False)[0]  # type: ignore[no-any-return]


class LTXConditioner(FlowTexts[LTXConfig]):
    """T5 tokens, masked."""

    encodes_padding = False
    width_field = "caption_channels"

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.config.max_sequence_length}
        texts, mask, *_ = stock.encode_prompt(prompts, device=self.device, **options)
        return [row[used] for row, used in zip(texts, mask, strict=True)], ()


class LTXAdapter(FlowAdapter[LTXConfig]):
    """The LTX-Video family."""

    Config = LTXConfig
    summary = "LTX-Video, videos from text: rectified flow on far smaller latents, T5 text"
    supports = FlowAdapter.supports | {"frames"}
    time_units = 1000.0
    _codec, _texts = LTXCodec, LTXConditioner
    _spec = PipelineSpec(
        network="LTXVideoTransformer3DModel",
        vae="AutoencoderKLLTXVideo",
        text_encoder="T5EncoderModel",
        time_embedding="time_embed.emb.timestep_embedder",
        blocks="transformer_blocks",
        published_guidance=3.0,
    )

    def network_call(
        self, network: Any, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        sizes = dict(zip(("num_frames", "height", "width"), shape[2:], strict=True))
        scale = STRIDE / self.config.frame_rate, SIDE, SIDE
        return network(  # type: ignore[no-any-return]
            x, own[TEXT], time, own[MASK].to(torch.long), **sizes, rope_interpolation_scale=scale, return_dict=False
        )[0]
