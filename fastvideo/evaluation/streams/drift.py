"""Drift: what becomes of content, motion, exposure and identity in the course of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.evaluation.frechet import Moments
from fastvideo.evaluation.metrics import ATTRIBUTES, correctness
from fastvideo.evaluation.statistics import Estimate, estimate
from fastvideo.evaluation.streams.motion import steps
from fastvideo.evaluation.streams.observer import SeenStreams
from fastvideo.evaluation.streams.series import (
    Series,
    frechet_series,
    mean_series,
    quantile_series,
    ratio_series,
    slope_weights,
)
from fastvideo.tiny.classifier import FRAMES
from fastvideo.tiny.world import SIZE

FROZEN, RUNAWAY = 0.2, 2.2
"""Pixels per frame below and above which a digit stands still or runs away; real ones do .6 to 1.4."""


@dataclass(frozen=True)
class Comparison:
    """Things that streams are compared with.

    Attributes:
        named: attributes ``[N, 3]`` that the prompts name, -1 for open ones.
        counts: bootstrap counts ``[R, N]``.
        reference: moments of the judge's features of real windows.
        real: real streams of the same prompts, through the same codec; without them there is no ``identity``.
    """

    named: Tensor
    counts: Tensor
    reference: Moments
    real: SeenStreams | None


def drift_series(seen: SeenStreams, against: Comparison) -> dict[str, Series]:
    """Figures along the streams.

    Per window: ``digit``, ``colour`` and ``direction`` (accuracies where named), ``frechet``; ``speed`` over that of
    the window at 0, of streams that move there, and ``turn``, degrees between the two directions, of those that move in
    both (medians); shares ``frozen`` and ``runaway``; ``identity``, distance of the features from those at 0 over that
    of real streams. Per frame: ``ink`` and ``saturation``.
    """
    counts, at = against.counts, seen.starts
    right = torch.stack([correctness(read, against.named) for read in seen.read.unbind(1)], dim=1)
    found = {name: mean_series(at, right[:, :, i], counts, highest=1.0) for i, name in enumerate(ATTRIBUTES)}
    found["frechet"] = frechet_series(at, seen.features, against.reference, counts)
    found |= _motion(seen, counts)
    if against.real is not None:
        found["identity"] = identity_series(seen, against.real, counts)
    frames = range(seen.frames)
    found["ink"] = mean_series(frames, seen.ink, counts, highest=1.0)
    found["saturation"] = mean_series(frames, seen.saturation, counts, highest=1.0)
    return found


def drift_figures(seen: SeenStreams, series: Mapping[str, Series], counts: Tensor) -> dict[str, Estimate]:
    """The curves of :func:`drift_series` as single figures.

    ``NAME_last`` is the value of the last window; ``NAME_drop`` of an accuracy the first window's minus it. Slopes per
    100 frames: of accuracies (``NAME_slope``), and of ``ink`` and ``saturation`` as shares of the first window's.
    """
    found: dict[str, Estimate] = {}
    for name in ATTRIBUTES:
        found |= {f"{name}_drop": series[name].drop, f"{name}_slope": series[name].slope}
    found |= {f"{name}_last": line[-1] for name, line in series.items() if line.at == seen.starts}
    found["frechet_slope"] = series["frechet"].slope
    found["ink_slope"] = relative_slope(seen.ink, counts)
    found["saturation_slope"] = relative_slope(seen.saturation, counts)
    return found


def relative_slope(values: Tensor, counts: Tensor) -> Estimate:
    """Slope per 100 frames of ``[N, T]``, over the mean of the first window."""
    slopes = values.double() @ slope_weights(range(values.shape[1]))
    level = values[:, :FRAMES].double().mean(1)
    return estimate(float(slopes.sum() / level.sum()), (counts @ slopes) / (counts @ level), len(values), -float("inf"))


def speeds(seen: SeenStreams) -> Tensor:
    """Mean displacement per frame ``[N, W, 2]`` of each window, in pixels; NaN where ink is missing."""
    moved = steps(seen.positions, SIZE)
    return torch.stack([moved[:, start : start + FRAMES - 1].mean(1) for start in seen.starts], dim=1)


def _motion(seen: SeenStreams, counts: Tensor) -> dict[str, Series]:
    velocity = speeds(seen)
    speed, first = velocity.norm(dim=-1).nan_to_num(0.0), velocity[:, :1]  # nothing to see stands still
    started = speed[:, :1] >= FROZEN
    moving = started & (speed >= FROZEN)
    ratio = (speed / speed[:, :1]).where(started, torch.nan)
    cosine = (velocity * first).sum(-1) / (speed * speed[:, :1])
    turn = torch.rad2deg(cosine.clamp(-1, 1).acos()).where(moving, torch.nan)
    at = seen.starts
    return {
        "speed": quantile_series(at, ratio, counts),
        "turn": quantile_series(at, turn, counts),
        "frozen": mean_series(at, (speed < FROZEN).double(), counts, highest=1.0),
        "runaway": mean_series(at, (speed > RUNAWAY).double(), counts, highest=1.0),
    }


def identity_series(seen: SeenStreams, real: SeenStreams, counts: Tensor) -> Series:
    """Mean distance of each window's features from the first window's, over that of real streams; NaN at the first."""
    ours, theirs = ((one.features - one.features[:, :1]).norm(dim=-1) for one in (seen, real.at(seen.starts)))
    ours, theirs = ours.clone(), theirs.clone()
    ours[:, 0] = torch.nan
    return ratio_series(seen.starts, ours, theirs, counts)
