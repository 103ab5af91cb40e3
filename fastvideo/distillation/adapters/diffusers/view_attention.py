"""Attention of diffusers' Wan that reads a view of the past (``view.py``) and keys of a prompt (``text_keys.py``)."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.text_keys import Pair, ReadsText, TextInput
from fastvideo.distillation.adapters.diffusers.view import ReadsView, View


class ViewAttention(ReadsView, WanAttnProcessor):  # type: ignore[misc]
    """Self-attention of one layer of Wan: the stock one, unless the table of positions is a :class:`View`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        if not isinstance(rotary_emb, View):
            return super().__call__(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        mixed = rotary_emb.attend(self.layer, query, key, value, self._attention)
        output: Tensor = attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3).type_as(query)))
        return output

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed: Tensor = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        return mixed


class TextAttention(ReadsText, WanAttnProcessor):  # type: ignore[misc]
    """Cross-attention of one layer of Wan: the stock one, unless the text is a :class:`TextInput`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        if not isinstance(encoder_hidden_states, TextInput):
            return super().__call__(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        heads = (attn.heads, -1)

        def make(text: Tensor) -> Pair:
            return attn.norm_k(attn.to_k(text)).unflatten(2, heads), attn.to_v(text).unflatten(2, heads)

        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        key, value = encoder_hidden_states.of(self.layer, make)
        mixed: Tensor = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        output: Tensor = attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3).type_as(query)))
        return output
