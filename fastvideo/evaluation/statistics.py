"""Sampling error: bootstrap over prompts, with the same resamples for every figure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 200
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    count: int


def resample_counts(samples: int, seed: int, resamples: int = RESAMPLES) -> Tensor:
    """Draws of each sample in each resample: float64 ``[resamples, samples]``; each row sums to ``samples``."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(samples, np.full(samples, 1.0 / samples), size=resamples)
    return torch.from_numpy(counts.astype(np.float64))


def estimate(
    value: float, resampled: Tensor, count: int, lowest: float = 0.0, highest: float = float("inf")
) -> Estimate:
    """``value`` with the 95 % interval from its resampled copies ``[R]``.

    The quantiles are re-centred on ``value``: a Frechet distance is biased upward by a finite sample, resampling adds
    that bias once more, and plain percentiles would then lie wholly above the figure itself. Resamples in which the
    figure is undefined (NaN: no prompt names the attribute) are skipped.
    """
    kept = resampled[~resampled.isnan()]
    if not len(kept):
        return Estimate(value, value, value, count)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(kept, torch.tensor([tail, 1 - tail], dtype=kept.dtype)).tolist()
    shift = value - float(kept.mean())
    return Estimate(value, min(max(low + shift, lowest), value), max(min(high + shift, highest), value), count)


def weighted_mean(values: Tensor, counts: Tensor) -> tuple[float, Tensor]:
    """Mean of ``values`` ``[N]`` (NaN where not observed) and its resampled copies ``[R]``; NaN if none is observed."""
    observed = ~values.isnan()
    filled = values.nan_to_num(0.0).double()
    weight = counts * observed
    return float(filled.sum() / observed.sum()), (weight @ filled) / weight.sum(1)
