"""Features inside networks: tokens after their blocks, for discriminators and for the teacher as an instrument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastvideo.distillation.denoiser import Denoiser, Family, exact
from fastvideo.distillation.noise import GuidanceValue, velocity_to_x0
from fastvideo.distillation.types import Condition, UserError

Taps = Sequence[int]
"""Numbers of repeated blocks whose tokens are read."""
Tokens = tuple[Tensor, ...]
"""Token features, float32 ``[B, L, D]`` frame by frame along ``L``, one per tap, in the order of the taps."""


@runtime_checkable
class Featured(Family, Protocol):
    """Family whose networks can be tapped."""

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Width ``D`` of the tokens after each repeated block, known without the network."""
        ...

    def features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, taps: Taps, *, whole: bool = False
    ) -> tuple[Tensor | None, Tokens]:
        """Tokens after the blocks ``taps``, differentiable in ``x_t`` and in the network.

        With ``whole`` the ``velocity`` of the same call comes first; otherwise ``None``, and nothing runs after the
        last tap.

        Raises:
            UserError: for a tap that is no block.
        """
        ...


@runtime_checkable
class ReadsFeatures(Protocol):
    """Options of a method with heads of their family's own widths on the features of one role."""

    @property
    def backbone(self) -> str:
        """That role."""
        ...


def widths_of(family: Family) -> tuple[int, ...]:
    """Widths of a family's tokens, block by block; none for a family without features."""
    return family.feature_widths if isinstance(family, Featured) else ()


def check_taps(taps: Taps, widths: Sequence[int], family: str) -> None:
    """Check that every tap is a block of the network; ``widths`` are those of all blocks."""
    wrong = [tap for tap in taps if not 0 <= tap < len(widths)]
    if wrong or not taps:
        raise UserError(f"taps {list(taps)}: blocks 0 to {len(widths) - 1} of {family} can be tapped, at least one")


def features(role: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, taps: Taps) -> Tokens:
    """Tokens ``[B, L, D]`` after blocks ``taps``; :func:`generated_tokens` masks those of conditioning frames."""
    return _tapped(role, x_t, t, condition, taps)[1]


def x0_guided_and_features(
    role: Denoiser,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    negative: Condition,
    guidance: GuidanceValue,
    taps: Taps,
) -> tuple[Tensor, Tokens]:
    """``Denoiser.x0_guided`` without gradient, and :func:`features` of its conditional call with it."""
    u, tokens = _tapped(role, x_t, t, condition, taps, whole=True)
    assert u is not None
    with torch.no_grad():
        if guidance != 1.0:
            u = role.guided(role.velocity(x_t, t, negative), u, guidance, x_t, t)
        return exact(velocity_to_x0(x_t, u, t), condition), tokens


def _tapped(
    role: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, taps: Taps, *, whole: bool = False
) -> tuple[Tensor | None, Tokens]:
    family = role.adapter
    if not isinstance(family, Featured):
        raise UserError(f"{type(family).__name__} has no features to tap: a family names its blocks and their widths")
    seen, times = role.network_input(x_t, t, condition)
    return family.features(role.network, seen, times, condition, taps, whole=whole)
