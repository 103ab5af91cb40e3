"""CogVideoX's tokens over several processes: diffusers has neither a plan nor an attention for it.

Text and video tokens attend to each other together, so both are split, and every process has a part of both. Attention
does not depend on the order of keys, so the parts may be joined process by process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.scaling import DiffusersScaling


class CogVideoXScaling(DiffusersScaling):
    """``Scaling`` of ``CogVideoXTransformer3DModel``."""

    def context_counts(self, path: str | None, latent_shape: Sequence[int]) -> Mapping[str, int]:
        """Text tokens too."""
        config, (frames, height, width) = self.pipeline.network_config(path), latent_shape[1:]
        span, patch = config["patch_size_t"] or 1, config["patch_size"]
        tokens = (frames // span) * (height // patch) * (width // patch)
        return {"attention heads": config["num_attention_heads"], "tokens": tokens, "text tokens": self.text_length}

    def plan(self) -> dict[str, Any]:
        """Split before the first block, gather after the last layer; the rotary table is split like the video."""
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        table, tokens = ContextParallelInput(split_dim=0, expected_dims=2), ContextParallelInput(1, expected_dims=3)
        return {
            "": {"image_rotary_emb": [table, table]},
            "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    def split_tokens(self, network: Any, mesh: Any) -> None:
        network.set_attn_processor(JointAttention())
        super().split_tokens(network, mesh)


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
        query, key, value = (
            project(joint).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
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
