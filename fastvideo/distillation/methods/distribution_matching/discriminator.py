"""Discriminator of real and student latents: a small head on every tapped block of a diffusion network.

Independent heads read token features of several blocks and the time (LADD arXiv 2403.12015, section 3). They are built
from the widths that a family declares, so no family knows of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastvideo.distillation.types import Given, UserError

FREQUENCIES = 4
"""Octaves of the time embedding."""


class Head(nn.Module):
    """One logit: RMS norm, a two-layer perceptron per token with the time added, the mean over tokens."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(width, hidden)
        self.time = nn.Linear(2 * FREQUENCIES, hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.logit = nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor, time: Tensor, free: Tensor | None) -> Tensor:
        """Logits ``[B]`` of tokens ``[B, L, D]``; ``free``, bool ``[B, L]``, selects those that are pooled."""
        hidden = self.tokens(functional.rms_norm(tokens.float(), tokens.shape[-1:])) + self.time(time)[:, None]
        hidden = functional.silu(self.mix(functional.silu(hidden)))
        pooled = hidden.mean(1) if free is None else (hidden * free[..., None]).sum(1) / free.sum(1, keepdim=True)
        return self.logit(pooled)[:, 0]  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """Logits ``[B, taps]``, float32, positive for real; ``widths`` are those of the tokens of each tap."""

    def __init__(self, widths: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width, hidden) for width in widths)

    def forward(self, features: Sequence[Tensor], t: Tensor, given: Given | None = None) -> Tensor:
        """Logits of tokens ``[B, L, D]`` of each tap at times ``t`` ``[B]``, pooled over generated frames."""
        time = embed(t.float())
        return torch.stack(
            [
                head(tokens, time, None if given is None else generated_tokens(tokens.shape[1], given))
                for head, tokens in zip(self.heads, features, strict=True)
            ],
            dim=1,
        )


def generated_tokens(count: int, given: Given) -> Tensor:
    """Bool ``[B, count]``, true for tokens of generated frames; tokens run frame by frame."""
    return ~given.mask.repeat_interleave(count // given.mask.shape[1], dim=1)


def embed(t: Tensor) -> Tensor:
    """Cosines and sines of times ``[B]`` in [0, 1]: ``[B, 2 FREQUENCIES]``."""
    angles = math.pi * t[:, None] * 2.0 ** torch.arange(FREQUENCIES, device=t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def taps_at(depths: Sequence[float], blocks: int) -> tuple[int, ...]:
    """Block indices at relative ``depths`` (1 is the last block), without duplicates.

    Raises:
        UserError: if the network has no blocks to tap.
    """
    if not blocks:
        raise UserError(
            "roles: a discriminator needs features of the network, and this model family declares none "
            "(feature_widths); take a method without one, such as dmd2"
        )
    return tuple(sorted({max(0, math.ceil(depth * blocks) - 1) for depth in depths}))
