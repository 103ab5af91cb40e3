"""Prompts through a stock pipeline's own ``encode_prompt``, for families with several text encoders or pooled texts.

The pipeline is built from its text components alone. A prompt is one matrix, as it is cached and stored: its tokens,
then each pooled vector as a row under them, or above them where a text has its prompt's tokens alone. The condition
holds them apart, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastvideo.distillation.abilities import Shape
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT, count_tokens, load_text_encoder
from fastvideo.distillation.adapters.diffusers.encoder_settings import encoder_settings
from fastvideo.distillation.adapters.diffusers.pipeline import (
    ConfigT,
    Pipeline,
    library_class,
    load_component,
)
from fastvideo.distillation.adapters.diffusers.stored_texts import STORED, DiffusersConditioner
from fastvideo.distillation.types import UserError

SUFFIXES = ("", "_2", "_3")
"""Ends of the names of a pipeline's text encoders and tokenizers."""


class PipelineTexts(DiffusersConditioner[ConfigT]):
    """Texts ``prompt_embeds`` ``[B, L, D]``, with padding encoded like words, and ``pooled`` vectors ``[B, W]``.

    An empty prompt is the checkpoint's own unconditional one: zeros where its index says
    ``force_zeros_for_empty_prompt``, as the stock pipeline takes without a negative prompt.
    """

    encodes_padding = True
    padded_by_tokenizers: ClassVar[bool] = True
    """Every tokenizer pads to a length of its own, which is ``max_sequence_length``."""
    whole_prompts: ClassVar[tuple[str, ...]] = SUFFIXES
    """Ends of the names of the tokenizers that must not cut a prompt."""

    @property
    def pooled(self) -> Mapping[str, int]:
        """Width of each pooled vector, by its name, in the order of ``encode_prompt``; at most ``text_width``."""
        return {}

    @property
    def text_rows(self) -> int:
        return self.token_rows + len(self.pooled)

    @property
    def token_rows(self) -> int:
        """Tokens of a text, of all encoders."""
        return self.config.max_sequence_length

    @cached_property
    def _suffixes(self) -> list[str]:
        """Ends of the names of those text encoders that the folder has."""
        return [suffix for suffix in SUFFIXES if (self.pipeline.index.get(f"text_encoder{suffix}") or [None])[0]]

    @cached_property
    def text_encoder(self) -> nn.ModuleDict:
        """The text encoders, by the names that the pipeline gives them."""
        names = [f"text_encoder{suffix}" for suffix in self._suffixes]
        return nn.ModuleDict(
            {name: load_text_encoder(self.pipeline, self.pipeline.index[name][1], name) for name in names}
        )

    @cached_property
    def tokenizers(self) -> Mapping[str, Any]:
        """The tokenizers, by the names that the pipeline gives them.

        Raises:
            UserError: if one cuts texts elsewhere than the config says.
        """
        auto, length = library_class("transformers", "AutoTokenizer"), self.config.max_sequence_length
        names = [f"tokenizer{suffix}" for suffix in self._suffixes]
        found = {name: load_component(auto, self.pipeline.source, name) for name in names}
        for name, tokenizer in found.items() if self.padded_by_tokenizers else ():
            if tokenizer.model_max_length != length:
                raise UserError(
                    f"model.max_sequence_length is {length}, the {name} of {self.pipeline.source!r} pads every prompt "
                    f"to {tokenizer.model_max_length} tokens"
                )
        return found

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        whole = [self.tokenizers[f"tokenizer{suffix}"] for suffix in self._suffixes if suffix in self.whole_prompts]
        texts = [self.clean_prompt(prompt) for prompt in prompts]
        return [max(each) for each in zip(*(count_tokens(one, texts) for one in whole), strict=True)]

    @cached_property
    def _stock(self) -> Any:
        """The stock pipeline without encoders, network and autoencoder."""
        cls = pipeline_library_class(self.pipeline.index["_class_name"])
        options = {name: value for name, value in self.pipeline.index.items() if name[0] != "_"}
        missing = {name: None for name, value in options.items() if _is_component(value)}
        return cls(**{**options, **missing, **self.stock_needs, **self.tokenizers})

    @property
    def stock_needs(self) -> Mapping[str, Any]:
        """Components without weights that the stock pipeline cannot be made without, by their names."""
        return {}

    @torch.no_grad()
    def _encode_batch(self, prompts: Sequence[str], padding: Literal["max_length", "longest"]) -> list[Tensor]:
        stock = self._stock
        stock.register_modules(**dict(self.text_encoder.items()))
        tokens, pooled = self._encoded(stock, list(prompts))
        stock.register_modules(**dict.fromkeys(self.text_encoder.keys()))  # so that they can be released
        widened = [nn.functional.pad(one, (0, self.text_width - one.shape[1])) for one in pooled]
        rows = [self._joined(row, [one[i : i + 1] for one in widened]) for i, row in enumerate(tokens)]
        zeros = bool(self.pipeline.index.get("force_zeros_for_empty_prompt"))
        return [row * 0 if zeros and not prompt else row for prompt, row in zip(prompts, rows, strict=True)]

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Tokens ``[L, D]`` of each prompt, and pooled vectors ``[B, W]``, by the pipeline's ``encode_prompt``."""
        tokens, *pooled = stock.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[::2]  # the others are of the negative prompt
        return tokens, pooled

    def _joined(self, tokens: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        return torch.cat([tokens, *pooled] if self.encodes_padding else [*pooled, tokens])

    def _tensors(self, texts: Tensor) -> dict[str, Tensor]:
        length = self.token_rows
        if not self.encodes_padding:
            texts = texts.roll(-len(self.pooled), dims=1)
        pooled = enumerate(self.pooled.items(), start=length)
        return {TEXT: texts[:, :length], **{name: texts[:, row, :width] for row, (name, width) in pooled}}

    @property
    def text_settings(self) -> Mapping[str, Any]:
        found = dict(super().text_settings)
        for suffix in self._suffixes[1:]:
            more = encoder_settings(self.pipeline, suffix)
            found |= {f"{key}{suffix}": value for key, value in more.items() if key != "max_sequence_length"}
        return found

    @property
    def stored_shapes(self) -> Mapping[str, Shape]:
        return {STORED: (None, self.text_width)}

    def _fitted(self, embedding: Tensor) -> Tensor:
        """Texts with all rows where every row counts, or zeros alone (an empty caption is stored without them)."""
        rows, wanted = embedding.shape[1], self.text_rows
        if self.encodes_padding and rows != wanted and embedding[:, : min(rows, wanted)].any():
            raise UserError(
                f"data: text_embedding has {rows} rows, the model expects {wanted} (tokens, then pooled vectors)"
            )
        return super()._fitted(embedding)


def pipeline_library_class(name: str) -> Any:
    """A stock pipeline's class, imported without transformers' remarks on image processors that nobody asked for."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return library_class("diffusers", name)
    finally:
        logging.set_verbosity(level)


def _is_component(value: object) -> bool:
    """True for the library and the class of a component in a pipeline's index, and not for an option."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str | None) for name in value)


def text_encoders(pipeline: Pipeline[Any]) -> nn.ModuleDict:
    """All text encoders of a pipeline on the meta device, for planning."""
    folder, index = Path(pipeline.source), pipeline.index
    found = nn.ModuleDict()
    with torch.device("meta"):
        for name in (f"text_encoder{suffix}" for suffix in SUFFIXES):
            if (index.get(name) or [None])[0]:
                cls = library_class("transformers", index[name][1])
                found[name] = cls(cls.config_class.from_pretrained(folder / name))
    return found
