"""Z-Image (arXiv 2511.22699) over diffusers: ``ZImageTransformer2DModel``, ``AutoencoderKL``, Qwen3.

The network counts time from noise, 0, to data, 1, and answers the velocity from noise to data. It takes each sample
with the text of its own length, and fills both up to multiples of 32 tokens with learned ones, which are seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter, FlowFolder
from fastvideo.distillation.adapters.diffusers.flow_config import FlowImageConfig, StockCall
from fastvideo.distillation.adapters.diffusers.flow_texts import MASK, FlowTexts, lengths
from fastvideo.distillation.adapters.diffusers.image_codec import ImageCodec
from fastvideo.distillation.adapters.diffusers.packing import Packing, Pictures
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec

MULTIPLE = 32
"""Tokens of a sample, and of a text, are filled up to a multiple of this."""


class ZImageConfig(FlowImageConfig):
    """Options of the Z-Image family."""

    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    stock: ClassVar[StockCall] = StockCall(offset=1.0)
    packing: ClassVar[Packing] = Pictures(2)
    reversed_time: ClassVar[bool] = True
    path: str
    """A diffusers Z-Image pipeline: a folder, or a hub id such as `Tongyi-MAI/Z-Image`."""


class ZImageConditioner(FlowTexts[ZImageConfig]):
    """Qwen3 tokens of the chat template, masked."""

    encodes_padding = False
    width_field = "cap_feat_dim"

    def clean_prompt(self, prompt: str) -> str:
        chat = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "enable_thinking": True}
        return str(self.tokenizers["tokenizer"].apply_chat_template(chat, tokenize=False, **options))

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        length = self.config.max_sequence_length
        found = stock.encode_prompt(prompts, self.device, do_classifier_free_guidance=False, max_sequence_length=length)
        return found[0], ()


class ZImageFolder(FlowFolder[ZImageConfig]):
    """A Z-Image pipeline."""

    def dead_parameters(self, network: nn.Module) -> frozenset[str]:
        return frozenset({"x_pad_token"} if self.tokens % MULTIPLE == 0 else ())


class ZImageAdapter(FlowAdapter[ZImageConfig]):
    """The Z-Image family."""

    Config = ZImageConfig
    summary = "Z-Image, stills from text: rectified flow in reversed time, Qwen3 text"
    _codec, _texts, _folder = ImageCodec, ZImageConditioner, ZImageFolder
    _spec = PipelineSpec(
        network="ZImageTransformer2DModel",
        vae="AutoencoderKL",
        text_encoder="Qwen3Model",
        time_embedding="t_embedder",
        blocks="layers",
        published_guidance=6.0,  # the authors' 5 is added to the conditional prediction
    )

    @cached_property
    def feature_widths(self) -> tuple[int, ...]:
        config = self._pipeline.network_config()
        return (int(config["dim"]),) * int(config["n_layers"])

    def network_call(
        self, network: nn.Module, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        texts = [text[:count] for text, count in zip(own[TEXT], lengths(own[MASK]), strict=True)]
        (answers,) = network(list(x.unsqueeze(2)), time, texts, return_dict=False)
        return torch.stack(answers).squeeze(2)

    def _tokens(self, x_t: Tensor, output: Any) -> Tensor:
        tokens: Tensor = output
        return tokens[:, : self.packing.tokens(x_t.shape[1:])]  # before filling and text
