"""Attention of diffusers' CogVideoX, whose text and video tokens attend together: over processes, and on a past."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastvideo.distillation.adapters.diffusers.view import ReadsView, View


class JointViewAttention(ReadsView, CogVideoXAttnProcessor2_0):  # type: ignore[misc]
    """Attention of one layer: the stock one, unless the table of positions is a :class:`View`.

    On a view text sees text alone, so that it does not depend on a video, and video sees text and what the view says.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Video tokens ``[B, V, D]`` and text tokens ``[B, L, D]``, in and out."""
        if not isinstance(image_rotary_emb, View):
            return super().__call__(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        length = encoder_hidden_states.shape[1]
        heads = projected(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1))
        text, video = [x[:, :length] for x in heads], [x[:, length:] for x in heads]

        def beside_text(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return _attention(query, torch.cat([text[1], key], dim=1), torch.cat([text[2], value], dim=1))

        seen = image_rotary_emb.attend(self.layer, video[0], video[1], video[2], beside_text)
        out = torch.cat([_attention(*text), seen], dim=1)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))
        return out[:, length:], out[:, :length]


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of ``[B, L, heads, D]``."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


def projected(attn: Any, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, L, heads, D]`` of all tokens, without positions."""
    query, key, value = (project(joint).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v))
    return (query, key, value) if attn.norm_q is None else (attn.norm_q(query), attn.norm_k(key), value)


class JointAttention:
    """``CogVideoXAttnProcessor2_0`` through diffusers' dispatcher, which knows how to exchange heads for tokens."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video tokens ``[B, V, D]`` and text tokens ``[B, L, D]``, this process's part of each, in and out."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        joint, length = torch.cat([encoder_hidden_states, hidden_states], dim=1), encoder_hidden_states.shape[1]
        query, key, value = projected(attn, joint)
        if image_rotary_emb is not None:
            query, key = (_rotated(x, length, image_rotary_emb) for x in (query, key))
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))
        return out[:, length:], out[:, :length]


def _rotated(x: Tensor, text_length: int, table: tuple[Tensor, Tensor]) -> Tensor:
    """``[B, S, heads, width]`` with positions on the video tokens."""
    from diffusers.models.embeddings import apply_rotary_emb

    text, video = x[:, :text_length], x[:, text_length:]
    return torch.cat([text, apply_rotary_emb(video, table, sequence_dim=1).to(x.dtype)], dim=1)
