"""FLUX.1 dev and schnell over diffusers: ``FluxTransformer2DModel``, ``AutoencoderKL``, T5 and CLIP.

The network is rectified flow natively, on 2 x 2 patches. It reads T5's tokens, padding encoded like words, and CLIP's
pooled text, whose own prompt ends after 77 tokens as in the stock pipeline. That of dev also reads a guidance, which is
a condition like the text: the same number for student, critic and teacher, and for every later sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter, image_grid
from fastvideo.distillation.adapters.diffusers.flow_config import GuidedImageConfig, StockCall
from fastvideo.distillation.adapters.diffusers.flow_texts import GUIDANCE, FlowTexts
from fastvideo.distillation.adapters.diffusers.image_codec import ImageCodec
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec

POOLED = "pooled_prompt_embeds"
"""Name of the pooled text in a condition."""
AXES = 3
"""Axes of positions: none, row, column."""


class FluxConfig(GuidedImageConfig):
    """Options of the FLUX.1 family."""

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    stock: ClassVar[StockCall] = StockCall(guidance="true_cfg_scale", packed=True)
    authors_guidance: ClassVar[float] = 3.5
    path: str
    """A diffusers FLUX.1 pipeline: a folder, or a hub id such as `black-forest-labs/FLUX.1-dev`."""


class FluxConditioner(FlowTexts[FluxConfig]):
    """T5 tokens, CLIP's pooled text, and the guidance that a network reads."""

    whole_prompts = ("_2",)

    @property
    def pooled(self) -> Mapping[str, int]:
        return {POOLED: self.pipeline.network_config()["pooled_projection_dim"]}

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        length = self.config.max_sequence_length
        texts, pooled, _ = stock.encode_prompt(prompts, device=self.device, max_sequence_length=length)
        return texts, [pooled]


class FluxAdapter(FlowAdapter[FluxConfig]):
    """The FLUX.1 family."""

    Config = FluxConfig
    summary = "FLUX.1 dev and schnell, stills from text: rectified flow, T5 and CLIP, guidance as an input"
    time_projection = ("time_text_embed.time_proj", 1000.0)
    token_output = 1
    _codec, _texts = ImageCodec, FluxConditioner
    _spec = PipelineSpec(
        network="FluxTransformer2DModel",
        vae="AutoencoderKL",
        text_encoder="CLIPTextModel",
        time_embedding="time_text_embed.timestep_embedder",
        blocks="transformer_blocks",
        published_guidance=1.0,
    )

    def network_call(
        self, network: Any, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        texts = {"encoder_hidden_states": own[TEXT], "pooled_projections": self._input(network, own[POOLED])}
        ids = {
            "img_ids": image_grid(shape[3] // 2, shape[4] // 2, AXES, x.device),
            "txt_ids": own[TEXT].new_zeros(own[TEXT].shape[1], AXES),
        }
        guidance = own.get(GUIDANCE)
        return network(x, timestep=time, guidance=guidance, **texts, **ids, return_dict=False)[0]  # type: ignore[no-any-return]
