"""Times on one side of the boundary between two experts: a call then runs one of them, the same on every process."""

from __future__ import annotations

from torch import Tensor

from fastvideo.distillation.noise import shift_time
from fastvideo.distillation.rng import RandomStreams

MARGIN = 1e-4
"""Distance that drawn times keep from the boundary, above the rounding of float32."""


def within(u: Tensor, low: float, high: float, shift: float) -> Tensor:
    """Times ``[B]`` of uniform draws ``u``, distributed as shifted uniform ones that fall into ``[low, high]``."""
    start, end = shift_time(low, 1 / shift), shift_time(high, 1 / shift)
    return shift_time(start + (end - start) * u, shift).clamp(low, high)


def on_one_side(u: Tensor, boundary: float, shift: float, rng: RandomStreams) -> Tensor:
    """Shifted times ``[B]`` of uniform draws ``u`` that are all above the boundary, or all below.

    The side is drawn for all processes, as often as a shifted uniform time falls on it; so over many steps the times
    are distributed as :func:`shift_time` of ``u`` is.
    """
    if rng.shared_uniform() >= shift_time(boundary, 1 / shift):
        return within(u, boundary + MARGIN, 1.0, shift)
    return within(u, 0.0, boundary - MARGIN, shift)
