"""Prompts through a pipeline's tokenizer and text encoder, which is read whole or refused."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, Pipeline, library_class, load_component
from fastvideo.distillation.types import Condition, UserError

TEXT = "prompt_embeds"
"""Name of the text in a condition."""
FOLDER = "text_encoder"
TOKENIZED = 8192
"""Prompts that are tokenized at once."""


class PromptCache:
    """Embeddings of prompts, each encoded once and alone: a result does not depend on the rest of its batch.

    Args:
        encode: the embedding ``[L, D]`` of one prompt, without padding, in the encoder's dtype.
        limit: bytes to keep, least recently used first out.
    """

    def __init__(self, encode: Callable[[str], Tensor], limit: int) -> None:
        self._encode, self.limit = encode, limit
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The distinct prompts that are not kept."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """The embedding of each prompt, on the host."""
        for prompt in self.missing(prompts):
            row = to_host(self._encode(prompt))
            self._kept[prompt] = row
            self.bytes += row.nbytes
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        rows = [self._kept[prompt] for prompt in prompts]
        while self.bytes > self.limit:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes
        return rows


def to_host(row: Tensor) -> Tensor:
    """A copy on the host, without the memory of padding that a view would keep alive.

    From CUDA it does not wait: whatever the same stream reads from the pinned copy comes after it.
    """
    on_cuda = row.device.type == "cuda"
    return torch.empty(row.shape, dtype=row.dtype, pin_memory=on_cuda).copy_(row, non_blocking=on_cuda)


class TextConditioner(Conditioner, Generic[ConfigT]):
    """One frozen text encoder, loaded on first use; the condition is ``prompt_embeds`` ``[B, L, D]`` in float32."""

    encodes_padding: ClassVar[bool] = False
    """True if padding is encoded like words, so that an embedding always has ``max_sequence_length`` tokens."""
    _cache: ClassVar[type[PromptCache]] = PromptCache

    def __init__(self, pipeline: Pipeline[ConfigT]) -> None:
        self.pipeline, self.config, self.device = pipeline, pipeline.config, pipeline.device
        self.text_length, self.negative_prompt = self.config.max_sequence_length, self.config.prompt_for_negative
        self._prompts = self._cache(self._encode_text, self.config.prompt_cache_mib * 2**20)

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

    def clean_prompt(self, prompt: str) -> str:
        """The prompt as the family's pipeline gives it to the tokenizer: cleaned, or put into a template."""
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


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, with those that the tokenizer adds."""
    if not tokenizer.is_fast:
        return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False).input_ids]
    backend = tokenizer.backend_tokenizer  # without the lists of Python integers of the call above
    backend.no_truncation()
    backend.no_padding()
    return [len(found) for found in backend.encode_batch(texts)]


def load_text_encoder(pipeline: Pipeline[Any], name: str | None = None, part: str = FOLDER) -> nn.Module:
    """A frozen text encoder on the pipeline's device: bfloat16 on CUDA, float32 elsewhere.

    It is the family's, or the class ``name`` in the subfolder ``part``.

    On CUDA the weights go from the mapped file to the device, so that the processes of a machine share one reading.

    Raises:
        UserError: if it cannot be read, or lacks weights that it needs.
    """
    on_cuda = pipeline.device.type == "cuda"
    options: dict[str, Any] = {"device_map": {"": pipeline.device}} if on_cuda else {}
    options["dtype"] = torch.bfloat16 if on_cuda else torch.float32
    cls = library_class("transformers", name or pipeline.spec.text_encoder)
    encoder, info = load_component(cls, pipeline.source, part, output_loading_info=True, **options)
    check_whole(encoder, info["missing_keys"], pipeline.source, part)
    module: nn.Module = encoder.to(pipeline.device).eval().requires_grad_(False)
    return module


def check_whole(encoder: Any, missing: Iterable[str], source: str, part: str = FOLDER) -> None:
    """Refuse an encoder with weights that no file gave it: its embeddings would say nothing of the prompt.

    Published Wan checkpoints store ``shared.weight`` alone and say ``tie_word_embeddings: false``; some versions of
    transformers then leave the encoder's own table of words unset.

    Raises:
        UserError: naming the weights and the versions that are known for it.
    """
    lacking = sorted({*missing, *_untied(encoder, Path(source) / part)})
    if lacking:
        import transformers

        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise UserError(
            f"the text encoder of {source!r} was loaded without {shown}, so every prompt would mean the same. "
            f"transformers {transformers.__version__} read it; 5.0, 5.1 and 5.2 are known to leave the word embeddings "
            f"of such a checkpoint unset: install transformers>=5.3 or <5, or else get the folder text_encoder again"
        )


def _untied(encoder: Any, folder: Path) -> list[str]:
    """Tables of words, by name, that are neither the encoder's shared one nor in its files."""
    shared = encoder.get_input_embeddings().weight
    tables = [
        (f"{name}.weight", module.weight)
        for name, module in encoder.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) and module.weight.shape == shared.shape
    ]
    apart = [name for name, table in tables if table is not shared and not torch.equal(table, shared)]
    return [name for name in apart if name not in _stored_names(folder)]


def _stored_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            names |= set(stored.keys())
    return names
