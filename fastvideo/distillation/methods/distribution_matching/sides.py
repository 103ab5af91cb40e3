"""Times on one side of the boundary between two experts: a call then runs one of them, the same on every process."""

from __future__ import annotations

from torch import Tensor

from fastvideo.distillation.noise import shift_time
from fastvideo.distillation.rng import RandomStreams

MARGIN = 1e-4
"""Distance that drawn times keep from the boundary, above the rounding of float32."""


def on_one_side(u: Tensor, boundary: float, shift: float, rng: RandomStreams) -> Tensor:
    """Shifted times ``[B]`` of uniform draws ``u`` that are all above the boundary, or all below.

    The side is drawn for all processes, as often as a shifted uniform time falls on it; so over many steps the times
    are distributed as :func:`shift_time` of ``u`` is.
    """
    share = shift_time(boundary, 1 / shift)
    if rng.shared_uniform() >= share:
        return shift_time(share + (1 - share) * u, shift).clamp_min(boundary + MARGIN)
    return shift_time(share * u, shift).clamp_max(boundary - MARGIN)
