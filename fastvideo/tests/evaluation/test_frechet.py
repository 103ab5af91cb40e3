"""The Frechet distance against closed forms, and its sampling error."""

from __future__ import annotations

import pytest
import torch

from fastvideo.distillation.rng import normal, seeded
from fastvideo.evaluation.frechet import Moments, PixelPCA, frechet, symmetric_root
from fastvideo.evaluation.metrics import frechet_estimate
from fastvideo.evaluation.statistics import resample_counts


def gaussian(count: int, dim: int, seed: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    return mean + scale * normal((count, dim), seeded(seed), dtype=torch.float64)


def test_closed_form_of_diagonal_gaussians() -> None:
    a = Moments(torch.tensor([0.0, 1.0, -2.0]).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()))
    b = Moments(torch.tensor([0.5, 1.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0]).double()))
    # |m1 - m2|^2 + sum (s1 - s2)^2
    assert float(frechet(a, b)) == pytest.approx(0.25 + 4.0 + 1.0 + 0.0 + 4.0)


def test_closed_form_when_covariances_do_not_commute() -> None:
    """In two dimensions ``tr (A B)^1/2 = sqrt(tr AB + 2 sqrt(det AB))``."""
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double()
    b = torch.tensor([[1.0, -0.5], [-0.5, 3.0]]).double()
    cross = a @ b
    want = a.trace() + b.trace() - 2 * (cross.trace() + 2 * cross.det().sqrt()).sqrt()
    zero = torch.zeros(2).double()
    assert float(frechet(Moments(zero, a), Moments(zero, b))) == pytest.approx(float(want), rel=1e-12)


def test_identical_sets_are_at_zero_distance_even_when_singular() -> None:
    features = gaussian(40, 64, 0)  # fewer samples than dimensions
    assert float(frechet(Moments.of(features), Moments.of(features))) == pytest.approx(0.0, abs=1e-5)


def test_symmetry_and_order() -> None:
    a, near, far = (Moments.of(gaussian(500, 8, seed, mean=mean)) for seed, mean in ((0, 0.0), (1, 0.5), (2, 2.0)))
    assert float(frechet(a, near)) == pytest.approx(float(frechet(near, a)), rel=1e-9)
    assert float(frechet(a, near)) < float(frechet(a, far))


def test_moments_are_those_of_torch_far_from_the_origin() -> None:
    features = gaussian(300, 5, 3, mean=1e6)
    moments = Moments.of(features)
    torch.testing.assert_close(moments.covariance, torch.cov(features.T), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(moments.mean, features.mean(0))


def test_weighted_moments_are_those_of_the_resample() -> None:
    features = gaussian(20, 3, 4)
    counts = resample_counts(20, seed=0, resamples=2)
    resampled = features.repeat_interleave(counts[1].long(), dim=0)
    torch.testing.assert_close(Moments.weighted(features, counts)[1].covariance, torch.cov(resampled.T))


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two samples"):
        Moments.of(torch.zeros(1, 3))


def test_root_of_a_singular_matrix() -> None:
    half = gaussian(3, 6, 5)
    matrix = half.T @ half
    root = symmetric_root(matrix)
    torch.testing.assert_close(root @ root, matrix)


def test_interval_holds_the_estimate_and_usually_the_truth() -> None:
    """In 2 dimensions the bias is small: at least 80 % of forty 95 % intervals hold the distance."""
    reference = Moments(torch.zeros(2).double(), torch.eye(2).double())
    truth = 2 * 0.5**2 + 2 * 0.2**2
    covered = 0
    for seed in range(40):
        found = frechet_estimate(reference, gaussian(400, 2, seed, 1.2, 0.5), resample_counts(400, seed, 100))
        assert found.low <= found.value <= found.high
        covered += found.low <= truth <= found.high
    assert covered >= 32


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    videos = gaussian(30, 3 * 2 * 4 * 4, 6).view(30, 3, 2, 4, 4) * torch.linspace(0.1, 2.0, 4)
    pca = PixelPCA.fit(videos, 5)
    flat = videos.flatten(1).float()
    _, _, v = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    torch.testing.assert_close((pca.components.T @ v[:5].T).abs(), torch.eye(5), rtol=0, atol=1e-3)
    torch.testing.assert_close(pca(videos).mean(0), torch.zeros(5), rtol=0, atol=1e-4)
