"""Krea 2 over diffusers: ``Krea2Transformer2DModel``, Wan's autoencoder, Qwen3-VL.

The network is rectified flow natively, on 2 x 2 patches. It reads several layers of the encoder for every token of the
text, which it stacks by itself; they lie side by side in caches and datasets. The stock pipeline puts padding between
the prompt and the end of its template. All tokens of a text have one position, so here it is behind both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT, count_tokens
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter, FlowFolder, image_grid
from fastvideo.distillation.adapters.diffusers.flow_config import FlowImageConfig, StockCall
from fastvideo.distillation.adapters.diffusers.flow_texts import MASK, FlowTexts
from fastvideo.distillation.adapters.diffusers.image_codec import VideoStillsCodec
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec

AXES = 3
"""Axes of positions: none, row, column."""
DISTILLED_MU = 1.15


class Krea2Config(FlowImageConfig):
    """Options of the Krea 2 family."""

    pipelines: ClassVar[tuple[str, ...]] = ("Krea2Pipeline",)
    stock: ClassVar[StockCall] = StockCall(offset=1.0, packed=True)
    path: str
    """A diffusers Krea 2 pipeline: a folder, or a hub id."""


class Krea2Conditioner(FlowTexts[Krea2Config]):
    """Selected layers of Qwen3-VL behind the template's head, masked."""

    encodes_padding = False

    @property
    def text_width(self) -> int:
        config = self.pipeline.network_config()
        return int(config["num_text_layers"] * config["text_hidden_dim"])

    def clean_prompt(self, prompt: str) -> str:
        return str(self._stock.prompt_template_encode_prefix) + prompt

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        (after,) = count_tokens(self.tokenizers["tokenizer"], [self._stock.prompt_template_encode_suffix])
        dropped: int = self._stock.prompt_template_encode_start_idx
        return [count - dropped + after for count in super().token_counts(prompts)]

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        texts, mask = stock.encode_prompt(prompts, self.device, max_sequence_length=self.config.max_sequence_length)
        return [row[used].flatten(1) for row, used in zip(texts, mask, strict=True)], ()


class Krea2Folder(FlowFolder[Krea2Config]):
    """A Krea 2 pipeline, of which a distilled one is called at one shift."""

    def mu(self, scheduler: Mapping[str, Any], steps: int) -> float:
        return DISTILLED_MU if self.distilled else super().mu(scheduler, steps)


class Krea2Adapter(FlowAdapter[Krea2Config]):
    """The Krea 2 family."""

    Config = Krea2Config
    summary = "Krea 2, stills from text: rectified flow, several layers of Qwen3-VL"
    _codec, _texts, _folder = VideoStillsCodec, Krea2Conditioner, Krea2Folder
    _spec = PipelineSpec(
        network="Krea2Transformer2DModel",
        vae="AutoencoderKLQwenImage",
        text_encoder="Qwen3VLModel",
        time_embedding="time_embed",
        blocks="transformer_blocks",
        published_guidance=5.5,  # the authors' 4.5 is added to the conditional prediction
    )

    def network_call(
        self, network: Any, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        texts = own[TEXT].unflatten(2, (network.config.num_text_layers, -1))  # type: ignore[no-untyped-call]
        grid = image_grid(shape[3] // 2, shape[4] // 2, AXES, x.device)
        places = torch.cat([grid.new_zeros(texts.shape[1], AXES), grid])
        return network(x, texts, time, places, own[MASK], return_dict=False)[0]  # type: ignore[no-any-return]

    def _tokens(self, x_t: Tensor, output: Any) -> Tensor:
        tokens: Tensor = output
        return tokens[:, -self.packing.tokens(x_t.shape[1:]) :]
