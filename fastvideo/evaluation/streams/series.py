"""Figures along a stream, with bootstrap intervals over streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvideo.evaluation.frechet import Moments, frechet
from fastvideo.evaluation.metrics import rounded
from fastvideo.evaluation.statistics import Estimate, estimate

INFINITE = float("inf")
PER_FRAMES = 100
"""Frames over which a slope is given."""


@dataclass(frozen=True)
class Series:
    """A figure at several frames of a stream.

    Attributes:
        at: number of the (first) frame behind each value, from 0.
        values: ``[W]``.
        resampled: their bootstrap copies ``[R, W]``, the same resamples at every frame.
        count: streams behind it.
        lowest, highest: ends of what the figure can be.
    """

    at: tuple[int, ...]
    values: Tensor
    resampled: Tensor
    count: int
    lowest: float = -INFINITE
    highest: float = INFINITE

    def __len__(self) -> int:
        return len(self.at)

    def __iter__(self) -> Iterator[Estimate]:
        """Each value with its interval."""
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> Estimate:
        return estimate(float(self.values[place]), self.resampled[:, place], self.count, self.lowest, self.highest)

    @property
    def drop(self) -> Estimate:
        """The first value minus the last."""
        return self._combined(torch.eye(len(self), dtype=torch.float64)[0] - _last(len(self)))

    @property
    def slope(self) -> Estimate:
        """Slope of the least-squares line per :data:`PER_FRAMES` frames, over the values that are defined."""
        return self._combined(slope_weights(self.at))

    def minus(self, other: Series) -> Series:
        """Difference at the same frames, in the same resamples."""
        values, resampled = self.values - other.values, self.resampled - other.resampled
        return Series(self.at, values, resampled, min(self.count, other.count))

    def to_dict(self) -> dict[str, Any]:
        """Lists by name, for JSON."""
        found = list(self)
        parts = {name: [rounded(getattr(one, name)) for one in found] for name in ("value", "low", "high")}
        return {"at": list(self.at), **parts, "count": self.count}

    def _combined(self, weights: Tensor) -> Estimate:
        value = float(self.values.double() @ weights)
        return estimate(value, self.resampled.double() @ weights, self.count, -INFINITE)


def _last(count: int) -> Tensor:
    return torch.eye(count, dtype=torch.float64)[-1]


def slope_weights(at: Sequence[int]) -> Tensor:
    """Weights ``[W]`` that turn values at these frames into the slope of their least-squares line; 0 for one frame."""
    x = torch.tensor(at, dtype=torch.float64)
    x = x - x.mean()
    return PER_FRAMES * x / x.square().sum().clamp_min(1e-9)


def mean_series(at: Sequence[int], values: Tensor, counts: Tensor, highest: float = INFINITE) -> Series:
    """Means over streams of ``[N, W]``, NaN where a stream has none."""
    return ratio_series(at, values, torch.ones_like(values), counts, highest)


def ratio_series(at: Sequence[int], above: Tensor, below: Tensor, counts: Tensor, highest: float = INFINITE) -> Series:
    """Ratios of means over streams, of two ``[N, W]`` that are NaN where a stream has none."""
    missing = above.isnan() | below.isnan()
    top, bottom = (values.double().masked_fill(missing, 0.0) for values in (above, below))
    count = int((~missing).any(1).sum())
    return Series(tuple(at), top.sum(0) / bottom.sum(0), (counts @ top) / (counts @ bottom), count, 0.0, highest)


def quantile_series(at: Sequence[int], values: Tensor, counts: Tensor, share: float = 0.5) -> Series:
    """A quantile over streams of ``[N, W]`` at each frame; NaN entries are left out, infinite ones are not."""
    columns = [quantile(column, counts, share) for column in values.T]
    count = int((~values.isnan()).any(1).sum())
    return Series(tuple(at), torch.stack([c[0] for c in columns]), torch.stack([c[1] for c in columns], 1), count, 0.0)


def quantile(values: Tensor, counts: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A quantile of ``[N]`` and of its resamples ``[R]``: the smallest value with at least that share up to it.

    NaN entries are left out; the quantile of nothing is NaN.
    """
    kept = ~values.isnan()
    ordered, order = values[kept].double().sort()
    every = torch.cat([torch.ones_like(counts[:1]), counts])[:, kept][:, order].cumsum(1)
    if not len(ordered):
        found = torch.full((len(every),), torch.nan, dtype=torch.float64)
        return found[0], found[1:]
    place = (every < share * every[:, -1:]).sum(1).clamp_max(len(ordered) - 1)
    found = ordered[place].where(every[:, -1] > 0, torch.nan)
    return found[0], found[1:]


def frechet_series(at: Sequence[int], features: Tensor, reference: Moments, counts: Tensor) -> Series:
    """Squared Frechet distances from the reference of features ``[N, W, D]`` at each frame."""
    columns = features.unbind(1)
    values = [frechet(reference, Moments.of(column)) for column in columns]
    resampled = [frechet(reference, Moments.weighted(column, counts)) for column in columns]
    return Series(tuple(at), torch.stack(values), torch.stack(resampled, dim=1), len(features), 0.0)
