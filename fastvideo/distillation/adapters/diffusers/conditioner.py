"""Prompts through a pipeline's tokenizer and text encoder, and images through its CLIP."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import Conditioner, Shape
from fastvideo.distillation.adapters.diffusers.encoder import encoder_settings, load_text_encoder
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, Pipeline, library_class, load_component
from fastvideo.distillation.types import Condition, RawBatch, UserError

TEXT = "prompt_embeds"
"""Name of the text in a condition."""
STORED = "text_embedding"
"""Name of the text in a dataset."""
TOKENIZED = 8192
"""Prompts that are tokenized at once."""


class PromptCache:
    """Embeddings of prompts, each encoded once and alone: a result does not depend on the rest of its batch.

    Args:
        encode: the embedding ``[L, D]`` of one prompt, without padding, in the encoder's dtype.
        limit: bytes to keep, least recently used first out; what is held does not count.
    """

    def __init__(self, encode: Callable[[str], Tensor], limit: int) -> None:
        self._encode, self.limit = encode, limit
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._held: dict[str, Tensor] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The distinct prompts that are not kept."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept and prompt not in self._held]

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
        """The embedding of each prompt, on the host."""
        for prompt in self.missing(prompts):
            row = to_host(self._encode(prompt))
            self._kept[prompt] = row
            self.bytes += row.nbytes
        recent = [prompt for prompt in prompts if prompt not in self._held]
        for prompt in recent:
            self._kept.move_to_end(prompt)
        rows = [self._held[prompt] if prompt in self._held else self._kept[prompt] for prompt in prompts]
        while self.bytes > self.limit:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes
        return rows


def to_host(row: Tensor) -> Tensor:
    """A copy on the host, without the memory of padding that a view would keep alive.

    From CUDA it does not wait: whatever the same stream reads from the pinned copy comes after it.
    """
    on_cuda = row.device.type == "cuda"
    return torch.empty(row.shape, dtype=row.dtype, pin_memory=on_cuda).copy_(row, non_blocking=on_cuda)


class DiffusersConditioner(Conditioner, Generic[ConfigT]):
    """One frozen text encoder, loaded on first use; the condition is ``prompt_embeds`` ``[B, L, D]`` in float32."""

    encodes_padding: ClassVar[bool] = False
    """True if padding is encoded like words, so that an embedding always has ``max_sequence_length`` tokens."""

    def __init__(self, pipeline: Pipeline[ConfigT]) -> None:
        self.pipeline, self.config, self.device = pipeline, pipeline.config, pipeline.device
        self.text_length, self.negative_prompt = self.config.max_sequence_length, self.config.prompt_for_negative
        self._prompts = PromptCache(self._encode_text, self.config.prompt_cache_mib * 2**20)

    @cached_property
    def key(self) -> str:
        """Text encoder class, and a hash of its folder and of the options that change its tensors."""
        settings = json.dumps([self.pipeline.source, self.config.model_dump(include=self._key_fields)])
        return f"{self.pipeline.spec.text_encoder}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"

    @property
    def _key_fields(self) -> set[str]:
        return {"max_sequence_length", "prompt_for_negative"}

    @cached_property
    def tokenizer(self) -> Any:
        """The pipeline's tokenizer."""
        return load_component(library_class("transformers", "AutoTokenizer"), self.pipeline.source, "tokenizer")

    @cached_property
    def text_encoder(self) -> Any:
        """The text encoder: bfloat16 on CUDA, float32 elsewhere."""
        return load_text_encoder(self.pipeline)

    @property
    def encoder_bytes(self) -> int:
        if "text_encoder" not in self.__dict__:
            return 0
        return sum(weight.nbytes for weight in self.text_encoder.parameters())

    def release_encoder(self) -> None:
        self.__dict__.pop("text_encoder", None)

    def clean_prompt(self, prompt: str) -> str:
        """The prompt as the family's pipeline cleans it before tokenizing."""
        return prompt

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return count_tokens(self.tokenizer, [self.clean_prompt(prompt) for prompt in prompts])

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for start in range(0, len(prompts), TOKENIZED):
            part = prompts[start : start + TOKENIZED]
            for prompt, count in zip(part, self.token_counts(part), strict=True):
                if count > self.config.max_sequence_length:
                    raise UserError(
                        f"prompt has {count} tokens, the text encoder takes {self.config.max_sequence_length} "
                        f"(model.max_sequence_length): {prompt[:80]!r}"
                    )

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """``prompt_embeds`` ``[B, max_sequence_length, D]``; padding is zero unless the family encodes it."""
        self.check_prompts(self._prompts.missing(prompts))
        return Condition({self.key: self._tensors(self._rows(prompts))})

    def _rows(self, prompts: Sequence[str]) -> Tensor:
        """Texts of prompts ``[B, text_rows, D]``, on the device in float32."""
        rows = [row.to(self.device, non_blocking=True) for row in self._prompts(prompts)]
        return torch.stack([self._padded(row) for row in rows])

    def _tensors(self, texts: Tensor) -> dict[str, Tensor]:
        """The tensors of a condition, by name, of texts ``[B, text_rows, D]`` as they are cached and stored."""
        return {TEXT: texts}

    def _padded(self, embedding: Tensor) -> Tensor:
        """``[..., L, D]`` in float32, followed by zeros up to ``text_rows``."""
        missing = self.text_rows - embedding.shape[-2]
        return nn.functional.pad(embedding.float(), (0, 0, 0, missing))

    def _encode_text(self, prompt: str) -> Tensor:
        """Embedding ``[L, D]`` of one prompt, without padding that the network sees as zeros."""
        return self._encode_batch([prompt], "max_length")[0]

    @torch.no_grad()
    def _encode_batch(self, prompts: Sequence[str], padding: Literal["max_length", "longest"]) -> list[Tensor]:
        """Embedding ``[L, D]`` of each prompt, without padding that the network sees as zeros, on the device."""
        texts = [self.clean_prompt(prompt) for prompt in prompts]
        found = self.tokenizer(texts, padding=padding, max_length=self.config.max_sequence_length)
        ids, mask = (torch.tensor(found[name]).to(self.device) for name in ("input_ids", "attention_mask"))
        hidden = self.text_encoder(ids, None if self.encodes_padding else mask).last_hidden_state
        if self.encodes_padding:
            return list(hidden)
        return [row[: sum(used)] for row, used in zip(hidden, found["attention_mask"], strict=True)]

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
        counts = [self.config.max_sequence_length] if self.encodes_padding else self.token_counts(prompts[:TOKENIZED])
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


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, with those that the tokenizer adds."""
    if not tokenizer.is_fast:
        return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False).input_ids]
    backend = tokenizer.backend_tokenizer  # without the lists of Python integers of the call above
    backend.no_truncation()
    backend.no_padding()
    return [len(found) for found in backend.encode_batch(texts)]


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
