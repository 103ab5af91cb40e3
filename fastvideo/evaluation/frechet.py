"""Frechet distance between Gaussians fitted to two sets of features, and principal components of pixels as features.

``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)`` (Heusel et al., arXiv 1706.08500), in float64. The root is
taken of a symmetric matrix through its eigenvalues, so it is exact for singular covariances too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean ``[..., D]`` and unbiased covariance ``[..., D, D]``, float64; leading dimensions are resamples."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of ``[N, D]`` features."""
        return cls.weighted(features, torch.ones(1, len(features), dtype=torch.float64))[0]

    @classmethod
    def weighted(cls, features: Tensor, counts: Tensor) -> Moments:
        """Moments of resamples: row ``n`` of ``[N, D]`` taken ``counts[r, n]`` times, for each ``r``.

        Raises:
            ValueError: for fewer than two samples, which have no covariance.
        """
        if len(features) < 2:
            raise ValueError(f"a covariance needs two samples, got {len(features)}")
        total = counts.sum(1)
        origin = features.double().mean(0)  # moments about a near point: no cancellation of large means
        centred = features.double() - origin
        offset = counts @ centred / total[:, None]
        second = torch.stack([(centred * count[:, None]).T @ centred for count in counts])
        outer = total[:, None, None] * offset[:, :, None] * offset[:, None, :]
        return cls(origin + offset, (second - outer) / (total - 1)[:, None, None])

    def __getitem__(self, index: int) -> Moments:
        return Moments(self.mean[index], self.covariance[index])


def symmetric_root(matrix: Tensor) -> Tensor:
    """The positive square root of symmetric positive semi-definite matrices ``[..., D, D]``."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
    return root


def frechet(reference: Moments, other: Moments) -> Tensor:
    """Squared Frechet distance, float64, shape of ``other``'s leading dimensions; in squared units of the features."""
    root = symmetric_root(reference.covariance)
    cross = root @ other.covariance @ root
    # Rounding leaves cross asymmetric in the last bits, and eigvalsh reads one triangle only.
    fidelity = torch.linalg.eigvalsh((cross + cross.mT) / 2).clamp_min(0).sqrt().sum(-1)
    spread = _trace(reference.covariance) + _trace(other.covariance) - 2 * fidelity
    distance: Tensor = ((reference.mean - other.mean) ** 2).sum(-1) + spread
    return distance.clamp_min(0)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


@dataclass(frozen=True)
class PixelPCA:
    """Projection of whole videos onto the principal components of real ones: no network, no labels.

    Attributes:
        mean: ``[P]``, the mean video, flat.
        components: ``[P, K]``, orthonormal.
    """

    mean: Tensor
    components: Tensor

    @classmethod
    def fit(cls, videos: Tensor, count: int) -> PixelPCA:
        """The first ``count < N`` components of videos ``[N, 3, T, H, W]``; exact, through the N x N Gram matrix."""
        flat = videos.flatten(1).float()
        mean = flat.mean(0)
        centred = flat - mean
        values, vectors = torch.linalg.eigh((centred @ centred.T).double())
        top = (vectors[:, -count:] / values[-count:].sqrt()).flip(1).float()
        return cls(mean, centred.T @ top)

    def __call__(self, videos: Tensor) -> Tensor:
        """Coordinates ``[N, K]`` of videos."""
        return (videos.flatten(1).float() - self.mean) @ self.components
