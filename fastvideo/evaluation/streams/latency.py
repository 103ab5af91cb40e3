"""Prompt switches: frames until the new prompt shows, and the price of a switch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvideo.evaluation.metrics import correctness
from fastvideo.evaluation.statistics import LEVEL, Estimate, estimate, weighted_mean
from fastvideo.evaluation.streams.motion import steps
from fastvideo.evaluation.streams.observer import SeenStreams
from fastvideo.evaluation.streams.series import quantile
from fastvideo.tiny.classifier import FRAMES
from fastvideo.tiny.world import SIZE

FLOOR = 5
"""Frames of a new scene that the judge needs to see: more than half of a window."""
CONTINUOUS = 2.0
"""Pixels of a step that still continue a motion; real digits go 1.4."""


def latencies(right: Tensor, ends: Tensor, switch: int) -> Tensor:
    """Frames from a switch until the new attribute is read, and read in all that follows; infinite for never.

    Args:
        right: bool ``[N, W]``, the new attribute is read in a window.
        ends: last frame of each window ``[W]``, ascending.
        switch: number of the first frame under the new prompt.

    Returns:
        float64 ``[N]``.
    """
    after = ends >= switch
    lasting = right[:, after].flip(1).cumprod(1).flip(1).bool()
    frames = (ends[after] - switch + 1).double()
    return frames.expand(len(right), -1).where(lasting, torch.inf).amin(1)


def switch_figures(
    seen: SeenStreams, switch: int, wanted: Tensor, changed: Tensor, counts: Tensor
) -> dict[str, Estimate]:
    """Figures of switched streams, each window of which was read.

    ``switch_median`` and ``switch_p90``: :func:`latencies` in frames, never counting as infinite; ``switch_never``:
    share of those. ``kept_before`` and ``kept_after``: accuracy of the two attributes that do not change, in the window
    before the switch and in the last one; ``kept_during``: the lowest of the windows that hold a frame of the first
    window after the switch, those that hold the switch among them. ``continuous``: share without a step of more than
    :data:`CONTINUOUS` pixels in that first window.

    Args:
        wanted: attributes ``[N, 3]`` of the new prompts.
        changed: number of the attribute that changes ``[N]``.
        counts: bootstrap counts ``[R, N]``.
    """
    asked = wanted.gather(1, changed[:, None])
    right = seen.read.gather(2, changed[:, None, None].expand(-1, len(seen.starts), 1))[..., 0] == asked
    took = latencies(right, torch.tensor(seen.starts) + FRAMES - 1, switch)
    never, nevers = weighted_mean(took.isinf().double(), counts)
    unchanged = wanted.scatter(1, changed[:, None], -1)
    before = seen.starts.index(switch - FRAMES)
    during = [place for place, start in enumerate(seen.starts) if switch - FRAMES < start < switch + FRAMES]
    moved = steps(seen.positions, SIZE)[:, switch - 1 : switch + FRAMES - 1].norm(dim=-1)
    steady, steadies = weighted_mean((moved <= CONTINUOUS).all(1).double(), counts)
    return {
        "switch_median": _quantile(took, counts, 0.5),
        "switch_p90": _quantile(took, counts, 0.9),
        "switch_never": estimate(never, nevers, len(took), highest=1.0),
        "kept_before": _kept(seen.read[:, before], unchanged, counts),
        "kept_during": min((_kept(seen.read[:, at], unchanged, counts) for at in during), key=lambda kept: kept.value),
        "kept_after": _kept(seen.read[:, -1], unchanged, counts),
        "continuous": estimate(steady, steadies, len(took), highest=1.0),
    }


def _kept(read: Tensor, unchanged: Tensor, counts: Tensor) -> Estimate:
    value, resampled = weighted_mean(correctness(read, unchanged).nanmean(1), counts)
    return estimate(value, resampled, len(read), highest=1.0)


def _quantile(values: Tensor, counts: Tensor, share: float) -> Estimate:
    """A quantile with plain percentiles of its resamples, which may be infinite."""
    value, resampled = quantile(values, counts, share)
    ordered, tail = resampled.sort().values, (1 - LEVEL) / 2
    low, high = (float(ordered[math.floor(end * (len(ordered) - 1))]) for end in (tail, 1 - tail))
    return Estimate(float(value), min(low, float(value)), max(high, float(value)), len(values))
