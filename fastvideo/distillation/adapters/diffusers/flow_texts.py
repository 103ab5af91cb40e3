"""Texts of flow families, and the guidance that some of their networks read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow_config import GuidedImageConfig
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, Pipeline
from fastvideo.distillation.adapters.diffusers.pipeline_texts import PipelineTexts
from fastvideo.distillation.types import UserError

MASK = "prompt_mask"
"""Name of the mask ``[B, L]`` of a condition's text: true on tokens, false on padding."""
GUIDANCE = "guidance"
"""Name of the guidance ``[B]`` that a network reads."""


def embedded_guidance(pipeline: Pipeline[Any]) -> float | None:
    """Guidance that the network of a pipeline reads; ``None`` for one that reads none.

    Raises:
        UserError: if a run names one all the same.
    """
    config = pipeline.config
    if not isinstance(config, GuidedImageConfig):
        return None
    reads = pipeline.network_config()["guidance_embeds"]
    if config.guidance_embedded is not None and not reads:
        raise UserError(f"model.guidance_embedded: the network of {config.path} reads no guidance: leave it out")
    return config.embedded if reads else None


class FlowTexts(PipelineTexts[ConfigT]):
    """Texts of one length for every prompt: padding is encoded like words, or masked (``encodes_padding`` false).

    A masked text is cached and stored without its padding. Rows of zeros are padding: no encoder gives one.
    """

    padded_by_tokenizers = False
    width_field: ClassVar[str] = "joint_attention_dim"
    """Field of the network's config with the width of a text."""

    @property
    def text_width(self) -> int:
        return int(self.pipeline.network_config()[self.width_field])

    @property
    def _key_fields(self) -> set[str]:
        return super()._key_fields | {"guidance_embedded"}

    def _tensors(self, texts: Tensor) -> dict[str, Tensor]:
        found = super()._tensors(texts)
        if not self.encodes_padding:
            found[MASK] = found[TEXT].ne(0).any(-1)
        guidance = embedded_guidance(self.pipeline)
        if guidance is not None:
            found[GUIDANCE] = texts.new_full((len(texts),), guidance)
        return found

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        tokens, *_ = stock.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        return tokens, ()


def count_written(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of texts in which a chat's template has written all special tokens: the tokenizer adds none."""
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False).input_ids]


def lengths(mask: Tensor) -> list[int]:
    """Tokens of each text of a mask ``[B, L]``; all of them where tensors have no values, as in a plan."""
    if isinstance(mask, FakeTensor) or mask.is_meta:
        return [mask.shape[1]] * len(mask)
    return mask.sum(1).tolist()
