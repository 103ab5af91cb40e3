"""Frechet distances in a teacher's features: reduced to few components each, so that some hundred videos suffice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvideo.evaluation.frechet import Moments, frechet

COMPONENTS = 32
"""Most components of a space; a covariance needs several videos for each, see :func:`components_for`."""
VIDEOS_PER_COMPONENT = 4
Distances = tuple[float, Tensor]
"""A distance and its resampled copies ``[R]``."""


def components_for(videos: int) -> int:
    """Components of a space that so many videos in each half determine."""
    return max(1, min(COMPONENTS, videos // 2 // VIDEOS_PER_COMPONENT))


@dataclass(frozen=True)
class FeatureSpaces:
    """A linear map of each of ``S`` spaces onto principal components of the teacher's videos, each of unit variance.

    Attributes:
        mean: ``[S, 1, D]``.
        scale: ``[S, 1, D]``, standard deviations.
        components: ``[S, D, K]``.
    """

    mean: Tensor
    scale: Tensor
    components: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> FeatureSpaces:
        """Spaces of features ``[N, S, D]``, each with :func:`components_for` ``N`` components."""
        by_space = features.double().transpose(0, 1)
        mean, scale = by_space.mean(1, keepdim=True), by_space.std(1, keepdim=True).clamp_min(1e-6)
        standard = (by_space - mean) / scale
        _, lengths, directions = torch.linalg.svd(standard, full_matrices=False)
        kept = components_for(len(features))
        spread = (lengths[:, :kept] / len(features) ** 0.5).clamp_min(1e-6)
        return cls(mean, scale, directions[:, :kept].mT / spread[:, None])

    def __call__(self, features: Tensor) -> Tensor:
        """Coordinates ``[S, N, K]`` of features ``[N, S, D]``."""
        coordinates: Tensor = ((features.double().transpose(0, 1) - self.mean) / self.scale) @ self.components
        return coordinates

    def distance(self, reference: Tensor, other: Tensor, counts: Tensor, other_counts: Tensor) -> Distances:
        """Frechet distance of two sets of features, the mean over the spaces.

        Args:
            reference: ``[M, S, D]``.
            other: ``[N, S, D]``.
            counts: bootstrap counts ``[R, M]`` (or ``[1, M]``).
            other_counts: ``[R, N]``.
        """
        values, resampled = [], []
        for first, second in zip(self(reference), self(other), strict=True):
            values.append(frechet(Moments.of(first), Moments.of(second)))
            drawn = Moments.weighted(first, counts), Moments.weighted(second, other_counts)
            resampled.append(frechet(*drawn))
        return float(torch.stack(values).mean()), torch.stack(resampled).mean(0)


def split(count: int) -> tuple[Tensor, Tensor]:
    """Numbers of two halves of ``count`` samples, drawn without regard to their order."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(count))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


def halves_distance(spaces: FeatureSpaces, teacher: Tensor, model: Tensor, counts: Tensor) -> Distances:
    """Distance of a model's videos of one half of the prompts from the teacher's of the other; mean of both ways.

    So no prompt and no noise is on both sides, and the teacher's own distance, from half to half, is the floor: a
    student that cannot be told from its teacher scores it.

    Args:
        spaces: of the teacher's features.
        teacher: features ``[N, S, D]``.
        model: features ``[N, S, D]`` of the same prompts.
        counts: bootstrap counts ``[R, N]``.
    """
    first, second = split(len(teacher))
    there = spaces.distance(teacher[first], model[second], counts[:, first], counts[:, second])
    back = spaces.distance(teacher[second], model[first], counts[:, second], counts[:, first])
    return (there[0] + back[0]) / 2, (there[1] + back[1]) / 2
