"""Texts that datasets store, beside prompts that are encoded; and images through a pipeline's CLIP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.abilities import Shape, StoredTexts
from fastvideo.distillation.adapters.diffusers.conditioner import TOKENIZED, PromptCache, TextConditioner, to_host
from fastvideo.distillation.adapters.diffusers.encoder_settings import encoder_settings
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, Pipeline, load_component
from fastvideo.distillation.types import Condition, RawBatch, UserError

STORED = "text_embedding"
"""Name of the text in a dataset."""


class HeldTexts(PromptCache):
    """Embeddings of prompts, some of them for good; these do not count towards the limit."""

    def __init__(self, encode: Callable[[str], Tensor], limit: int) -> None:
        super().__init__(encode, limit)
        self._held: dict[str, Tensor] = {}

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The distinct prompts that are neither kept nor held."""
        return [prompt for prompt in super().missing(prompts) if prompt not in self._held]

    def hold(self, texts: Mapping[str, Tensor]) -> None:
        """Keep embeddings for good, such as those that a dataset stores."""
        self._held.update(texts)

    def keep(self, prompt: str) -> None:
        """Encode a prompt, unless it is kept already, and keep it for good."""
        if prompt in self._held:
            return
        row = self._kept.pop(prompt, None)
        if row is None:
            self._held[prompt] = to_host(self._encode(prompt))
        else:
            self.bytes -= row.nbytes
            self._held[prompt] = row

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        recent = [prompt for prompt in prompts if prompt not in self._held]
        found = dict(zip(recent, super().__call__(recent), strict=True))
        return [self._held[prompt] if prompt in self._held else found[prompt] for prompt in prompts]


class DiffusersConditioner(TextConditioner[ConfigT], StoredTexts):
    """A text encoder whose texts a dataset may store, and that a run can release."""

    _cache = HeldTexts
    _prompts: HeldTexts

    def ensure_negative_conditioning(self, made: Condition | None = None) -> None:
        """Hold the negative prompt's text for good."""
        if self._negative is None and made is None:
            self.keep_texts([self.negative_prompt])
        super().ensure_negative_conditioning(made)

    @property
    def encoder_bytes(self) -> int:
        if "text_encoder" not in self.__dict__:
            return 0
        return sum(weight.nbytes for weight in self.text_encoder.parameters())

    def release_encoder(self) -> None:
        self.__dict__.pop("text_encoder", None)

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Channels of a text embedding."""

    @property
    def text_settings(self) -> Mapping[str, Any]:
        return {**encoder_settings(self.pipeline), "width": self.text_width}

    def encode_texts(self, prompts: Sequence[str]) -> list[Tensor]:
        self.check_prompts(prompts)
        rows = self._encode_batch(prompts, "max_length" if self.encodes_padding else "longest")
        return [row.cpu().clone() for row in rows]

    def missing_texts(self, prompts: Iterable[str]) -> list[str]:
        return self._prompts.missing(prompts)

    def hold_texts(self, texts: Mapping[str, Tensor]) -> None:
        self._prompts.hold(texts)

    def keep_texts(self, prompts: Iterable[str]) -> None:
        missing = self._prompts.missing(prompts)
        self.check_prompts(missing)
        for prompt in prompts:
            self._prompts.keep(prompt)

    def texts_fit(self, prompts: Sequence[str]) -> bool:
        token = self.text_width * (2 if self.device.type == "cuda" else 4)
        if not prompts or len(prompts) * token > self._prompts.limit:
            return not prompts
        counts = [self.text_rows] if self.encodes_padding else self.token_counts(prompts[:TOKENIZED])
        return len(prompts) * sum(counts) / len(counts) * token <= self._prompts.limit

    @property
    def stored_shapes(self) -> Mapping[str, Shape]:
        return {STORED: (None, self.text_width)}

    def encode_stored(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        self.check_prompts(self._prompts.missing(captions))
        return {STORED: self._rows(captions)}

    def text_of(self, raw: RawBatch) -> Condition:
        if STORED not in raw.extras:
            return self.encode_prompts(raw.captions)
        return Condition({self.key: self._tensors(self._fitted(raw.extras[STORED]))})

    def _fitted(self, embedding: Tensor) -> Tensor:
        """A precomputed text embedding ``[B, L, D]`` as the network takes it, on the device.

        Raises:
            UserError: if its width is another, or it has too many tokens that are not padding.
        """
        length, width = self.text_rows, self.text_width
        if embedding.shape[2] != width:
            raise UserError(f"data: text_embedding has width {embedding.shape[2]}, the model's text has width {width}")
        if embedding.shape[1] > length and embedding[:, length:].any():
            raise UserError(
                f"data: a text_embedding has {embedding.shape[1]} tokens, the model sees {length} "
                f"(model.max_sequence_length)"
            )
        return self._padded(embedding[:, :length].to(self.device, non_blocking=True))


def checked(extras: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor | None:
    """``extras[name]`` if it is there and one sample of it has ``shape``; ``None`` fits any size.

    Raises:
        UserError: with both shapes.
    """
    found = extras.get(name)
    if found is None:
        return None
    sample = tuple(found.shape[1:])
    if len(sample) != len(shape) or any(want not in (None, have) for want, have in zip(shape, sample, strict=True)):
        wanted = tuple("any" if want is None else want for want in shape)
        raise UserError(f"data: {name} has shape {sample}, the model expects {wanted}")
    return found.float()


class ClipImages:
    """The frozen CLIP image encoder of a pipeline, loaded on first use."""

    def __init__(self, pipeline: Pipeline[Any]) -> None:
        self.pipeline = pipeline

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, CLIPVisionModel

        processor = load_component(AutoImageProcessor, self.pipeline.source, "image_processor")
        return processor, self.pipeline.frozen(CLIPVisionModel, "image_encoder", dtype=torch.float32)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Hidden states ``[B, L, D]`` before the last layer, of images ``[B, 3, H, W]`` in ``[-1, 1]``."""
        processor, encoder = self._loaded
        bytes_ = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        pixels = processor(images=list(bytes_.numpy()), return_tensors="pt", input_data_format="channels_first")
        states = encoder(pixels["pixel_values"].to(self.pipeline.device), output_hidden_states=True).hidden_states
        return states[-2].float()  # type: ignore[no-any-return]
