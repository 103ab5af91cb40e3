"""Figures of a set of generated videos, as values with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.noise import GuidanceValue
from fastvideo.evaluation.frechet import Moments, frechet
from fastvideo.evaluation.statistics import Estimate, estimate, weighted_mean
from fastvideo.tiny.captions import parse_caption

ATTRIBUTES = ("digit", "colour", "direction")


@dataclass(frozen=True, kw_only=True)
class SampledRow:
    """One model under one sampler: how its videos were made.

    Seconds: wall time per video, the median over batches of ``batch_size``. ``kind``: ``teacher``, ``student``, or
    ``untrained`` for a teacher's weights under a student's sampler.
    """

    samples: int
    network_calls: int
    steps: int
    guidance: GuidanceValue
    sampler: str
    denoise_seconds_per_video: float
    end_to_end_seconds_per_video: float
    batch_size: int
    kind: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """All figures and facts by name."""
        return dict(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Numbers by name, and ``intervals`` and ``counts`` of the estimates, for JSON."""
        values: dict[str, Any] = {}
        intervals: dict[str, list[float | None]] = {}
        counts: dict[str, int] = {}
        for name, value in self.values.items():
            if isinstance(value, Estimate):
                intervals[name] = [rounded(end) for end in (value.low, value.high)]
                counts[name] = value.count
                values[name] = rounded(value.value)
            else:
                values[name] = rounded(value) if isinstance(value, float) else value
        return {**values, "intervals": intervals, "counts": counts}


@dataclass(frozen=True, kw_only=True)
class Row(SampledRow):
    """The figures of a model of the tiny world.

    Distances are squared, in squared units of their space. Floors are the distances of as many real held-out videos
    after the VAE: the score of a perfect model of the latents. ``diversity``: spread of one prompt's videos relative to
    that of fitting real videos (1 as varied as the world, 0 always the same video).
    """

    digit_accuracy: Estimate
    colour_accuracy: Estimate
    direction_accuracy: Estimate
    frechet: Estimate
    frechet_pixel: Estimate
    frechet_floor: float
    frechet_pixel_floor: float
    diversity: Estimate


@dataclass(frozen=True, kw_only=True)
class JudgedRow(SampledRow):
    """The figures that the chosen metrics gave a model, by name."""

    figures: Mapping[str, Estimate | float]

    @property
    def values(self) -> dict[str, Any]:
        own = dict(vars(self))
        return {**own.pop("figures"), **own}


def rounded(value: float) -> float | None:
    """Six significant digits; JSON has neither NaN (a figure without observations) nor infinity: both are null."""
    return None if not math.isfinite(value) else float(f"{value:.6g}")


def named_attributes(captions: Sequence[str]) -> Tensor:
    """Indices ``[N, 3]`` of (digit, colour, direction) that each caption names, -1 where it leaves one open."""
    parsed = [parse_caption(caption) for caption in captions]
    return torch.tensor([[-1 if v is None else v for v in (a.digit, a.colour, a.direction)] for a in parsed])


def correctness(read: Tensor, named: Tensor) -> Tensor:
    """Float64 ``[N, 3]``: 1 for a named attribute that the video shows, 0 for a missed one, NaN for an open one."""
    return torch.where(named < 0, torch.nan, (read == named).double())


def accuracies(read: Tensor, named: Tensor, counts: Tensor) -> dict[str, Estimate]:
    """Accuracy of each attribute over the prompts that name it.

    Args:
        read: int ``[N, 3]``, labels of the classifier.
        named: int ``[N, 3]`` of :func:`named_attributes`.
        counts: bootstrap counts ``[R, N]``.
    """
    result = {}
    for name, column in zip(ATTRIBUTES, correctness(read, named).T, strict=True):
        value, resampled = weighted_mean(column, counts)
        result[f"{name}_accuracy"] = estimate(value, resampled, int((~column.isnan()).sum()), highest=1.0)
    return result


def frechet_estimate(reference: Moments, features: Tensor, counts: Tensor) -> Estimate:
    """Distance of ``[N, D]`` features from the reference, with their sampling error (the reference is fixed)."""
    value = float(frechet(reference, Moments.of(features)))
    return estimate(value, frechet(reference, Moments.weighted(features, counts)), len(features))


def spread(features: Tensor) -> Tensor:
    """Mean Euclidean distance between two different videos of one prompt: ``[P]`` of ``[P, S, D]``."""
    count = features.shape[1]
    pairs = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return pairs.sum((1, 2)) / (count * (count - 1))


def diversity(generated: Tensor, real: Tensor, counts: Tensor) -> Estimate:
    """Mean :func:`spread` of generated features ``[P, S, D]`` over that of real ones ``[P]``, same prompts."""
    ours = spread(generated)
    value, resampled = float(ours.mean() / real.mean()), (counts @ ours) / (counts @ real)
    return estimate(value, resampled, len(ours))
