"""The text side of the tiny pipeline: a word-level tokenizer and a small random T5-family encoder, never trained.

A random encoder is enough for a closed vocabulary: embeddings of different words are nearly orthogonal, and the
transformer's cross-attention learns their meaning.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from fastvideo.tiny.captions import WORDS
from tools.tiny_world.recipe import TextRecipe

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer(recipe: TextRecipe) -> PreTrainedTokenizerFast:
    """One token per word of the tiny world and an end token; the empty prompt is the end token alone."""
    vocabulary = {word: index for index, word in enumerate((PAD, END, UNKNOWN, *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, vocabulary[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=recipe.max_length,
        padding_side="right",
    )


def build_umt5(recipe: TextRecipe) -> UMT5EncoderModel:
    """Wan's text encoder; see :func:`_build`."""
    return _build(UMT5EncoderModel, UMT5Config, recipe)


def build_t5(recipe: TextRecipe) -> T5EncoderModel:
    """CogVideoX's text encoder; see :func:`_build`."""
    return _build(T5EncoderModel, T5Config, recipe)


def _build(cls: type[Any], config_cls: type[Any], recipe: TextRecipe) -> Any:
    """A frozen encoder: int64 token ids [B, L] to float32 [B, L, width] of about unit scale (its last layer norm)."""
    config = config_cls(
        vocab_size=len(WORDS) + 3,
        d_model=recipe.width,
        d_kv=recipe.width // recipe.heads,
        d_ff=2 * recipe.width,
        num_layers=recipe.layers,
        num_heads=recipe.heads,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # transformers initialises from the global generator only
        encoder = cls(config)
    return encoder.eval().requires_grad_(False)
