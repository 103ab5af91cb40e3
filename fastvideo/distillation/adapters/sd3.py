"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206) over diffusers: ``SD3Transformer2DModel``, ``AutoencoderKL``, CLIP, T5.

The network is rectified flow natively; its time counts to 1000. It reads the tokens of two CLIP encoders side by side
and then those of T5, padding encoded like words, and adds both pooled texts to its time. The CLIP encoders see the
first 77 tokens of a prompt, as in the stock pipeline; T5 sees all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter, FlowFolder, parameters_of
from fastvideo.distillation.adapters.diffusers.flow_config import FlowImageConfig
from fastvideo.distillation.adapters.diffusers.flow_texts import FlowTexts
from fastvideo.distillation.adapters.diffusers.image_codec import ImageCodec
from fastvideo.distillation.adapters.diffusers.packing import Packing, Pictures
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec
from fastvideo.distillation.types import UserError
from fastvideo.ranges import Tokens

POOLED = "pooled_prompt_embeds"
"""Name of the pooled text in a condition."""
UNUSED = ("attn.add_q_proj", "attn.norm_added_q")
"""Layers of the last block that make its text tokens, which nothing reads."""


class SD3Config(FlowImageConfig):
    """Options of the Stable Diffusion 3 family."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    packing: ClassVar[Packing] = Pictures(2)
    path: str
    """A diffusers Stable Diffusion 3 pipeline: a folder, or a hub id."""
    max_sequence_length: Tokens = 256
    """Tokens that a prompt may have for T5."""


class SD3Conditioner(FlowTexts[SD3Config]):
    """Tokens of both CLIP encoders, of T5, and the pooled text."""

    whole_prompts = ("_3",)

    @property
    def pooled(self) -> Mapping[str, int]:
        return {POOLED: self.pipeline.network_config()["pooled_projection_dim"]}

    @property
    def token_rows(self) -> int:
        return int(self.tokenizers["tokenizer"].model_max_length) + self.config.max_sequence_length

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        if "_3" not in self._suffixes:
            raise UserError(f"{self.pipeline.source} has no T5 encoder (text_encoder_3), which this family reads")
        return super().token_counts(prompts)

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.config.max_sequence_length}
        texts, _, pooled, _ = stock.encode_prompt(prompts, prompts, prompts, device=self.device, **options)
        return texts, [pooled]


class SD3Folder(FlowFolder[SD3Config]):
    """A Stable Diffusion 3 pipeline, which leaves the noise levels to its scheduler."""

    def grid(self, steps: int) -> dict[str, Any]:
        return {"num_inference_steps": steps}

    def dead_parameters(self, network: Any) -> frozenset[str]:
        last = len(network.transformer_blocks) - 1
        return parameters_of(network, (f"transformer_blocks.{last}.{layer}" for layer in UNUSED))


class SD3Adapter(FlowAdapter[SD3Config]):
    """The Stable Diffusion 3 family."""

    Config = SD3Config
    summary = "Stable Diffusion 3 and 3.5, stills from text: rectified flow, two CLIP texts and T5"
    time_units = 1000.0
    token_output = 1
    _codec, _texts, _folder = ImageCodec, SD3Conditioner, SD3Folder
    _spec = PipelineSpec(
        network="SD3Transformer2DModel",
        vae="AutoencoderKL",
        text_encoder="CLIPTextModelWithProjection",
        time_embedding="time_text_embed.timestep_embedder",
        blocks="transformer_blocks",
        published_guidance=7.0,
    )

    def network_call(
        self, network: Any, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        pooled = self._input(network, own[POOLED])
        return network(x, own[TEXT], pooled, time, return_dict=False)[0]  # type: ignore[no-any-return]
